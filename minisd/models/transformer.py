"""The transformer inside the UNet: the only place where the image meets the prompt.

Each position of the latent is a token of C channels. Self-attention relates the positions to each
other, cross-attention relates them to the words of the prompt.

Source: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3; CompVis attention.py.
Attention itself is in ops.py. Parameters have the names of diffusers.

B batch, C channels, h w height and width of the latent at a level, L tokens, D width of the context
"""

from functools import partial

from torch import Tensor, nn

from minisd.config import UNetConfig
from minisd.models.ops import Ops

# Not the 1e-5 of the UNet's res blocks: both are right.
NORM_EPS = 1e-6
LAYER_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Self-attention where ``context`` is x itself, cross-attention where it is the prompt.

    Queries come from x, keys and values from the context.
    """

    def __init__(self, channels: int, context_width: int, heads: int, ops: Ops):
        super().__init__()
        self.ops, self.heads = ops, heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out[0](self.ops.attention(q, k, v, self.heads))


class GEGLU(nn.Module):
    """(x V + c) * GELU(x W + b), with V and W in one matrix, V first.

    Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 5.
    """

    def __init__(self, c_in: int, c_out: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, channels: int, ops: Ops):
        super().__init__()
        widen, narrow = GEGLU(channels, 4 * channels, ops), nn.Linear(4 * channels, channels)
        # The identity stands for the dropout of training: official weights are net.0 and net.2.
        self.net = nn.Sequential(widen, nn.Identity(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on a norm, each added to its input.

    With ``only_cross`` the first attention too reads the prompt, as in the x4 upscaler.
    """

    def __init__(self, channels: int, context_width: int, heads: int, only_cross: bool, ops: Ops):
        super().__init__()
        self.ops, self.only_cross = ops, only_cross
        self.norm1 = nn.LayerNorm(channels, LAYER_NORM_EPS)
        self.attn1 = Attention(channels, context_width if only_cross else channels, heads, ops)
        self.norm2 = nn.LayerNorm(channels, LAYER_NORM_EPS)
        self.attn2 = Attention(channels, context_width, heads, ops)
        self.norm3 = nn.LayerNorm(channels, LAYER_NORM_EPS)
        self.ff = FeedForward(channels, ops)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        norm = self.ops.norm_tokens
        h = norm(self.norm1, x)
        x = x + self.attn1(h, context if self.only_cross else h)
        x = x + self.attn2(norm(self.norm2, x), context)
        return x + self.ff(norm(self.norm3, x))


class SpatialTransformer(nn.Module):
    """GroupNorm, a projection, a transformer block over all positions, and a projection back."""

    def __init__(self, channels: int, heads: int, only_cross: bool, config: UNetConfig, ops: Ops):
        super().__init__()
        self.ops, self.linear = ops, config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, NORM_EPS)
        # SD1 has convolutions of 1x1 here, and SD2 linear layers: the same matrices.
        projection = nn.Linear if self.linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = projection(channels, channels)
        block = TransformerBlock(channels, config.cross_attention_dim, heads, only_cross, ops)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.ops.norm(self.norm, x)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))                   # (B, h*w, C)
        else:
            # Made contiguous once; without it each of the three LayerNorms would copy it.
            h = self.proj_in(h).flatten(2).transpose(1, 2).contiguous()      # (B, h*w, C)
        h = self.transformer_blocks[0](h, context)
        if self.linear:
            h = self.proj_out(h).transpose(1, 2).reshape(x.shape)            # (B, C, h, w)
        else:
            h = self.proj_out(h.transpose(1, 2).reshape(x.shape))            # (B, C, h, w)
        return x + h
