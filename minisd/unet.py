"""The UNet: what the noise in a latent is, given how noisy it is and what the picture shows.

                 noisy latent 4                                       prediction 4
                      |                                                    |
    64x64   320  [res attn] x2 ---------------- skips ------------> [res attn] x3
                      | half                                               | double
    32x32   640  [res attn] x2 ---------------- skips ------------> [res attn] x3
                      | half                                               | double
    16x16  1280  [res attn] x2 ---------------- skips ------------> [res attn] x3
                      | half                                               | double
     8x8   1280  [res] x2 --------------------- skips ------------> [res] x3
                      '------------->  [res attn res]  -------------------'

Each `res` is told the timestep, each `attn` looks at the words; every output on the way down is
kept and joined on the way up. The numbers are those of SD1 at 512x512.

Source: Rombach et al. 2022, CompVis openaimodel.py; parameters carry the names of diffusers.

B batch, C channels, h w height and width of the latent at a level, L tokens, D width of the context
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import UNetConfig
from minisd.ops import Ops

# Two different constants, and both are right: the res blocks and the end of the UNet normalise
# with 1e-5, the GroupNorm in front of a transformer with 1e-6.
RES_NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6
LAYER_NORM_EPS = 1e-5
MAX_PERIOD = 10000.0


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Timesteps (B,) -> waves (B, width): cosines first, then sines, at width/2 frequencies.

    Always float32: neighbouring timesteps would meet in half precision.
    """
    half = width // 2
    # Divided by half, not by half - 1 as in the original transformer.
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(exponents / half)[None]          # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                   # (B, width)


class TimestepMLP(nn.Module):
    """Makes of the waves a vector that every res block reads."""

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, waves: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResBlock(nn.Module):
    """Two convolutions with the time between them, added to the input."""

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.norm1 = nn.GroupNorm(groups, c_in, RES_NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, RES_NORM_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.ops.norm_silu(self.norm1, x))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]           # (B, C, h, w)
        h = self.conv2(self.ops.norm_silu(self.norm2, h))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Queries from x, keys and values from the context; in self-attention that is x too."""

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
    """The first half of a projection, gated by the GELU of the second (Shazeer 2020)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # the exact GELU; the tanh one is visibly off in tests


class FeedForward(nn.Module):
    """Widen four times, gate, narrow."""

    def __init__(self, channels: int):
        super().__init__()
        widen, narrow = GEGLU(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.net = nn.Sequential(widen, nn.Identity(), narrow)  # dropout was the middle one

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels look at pixels, then at words, then each thinks for itself."""

    def __init__(self, channels: int, context_width: int, heads: int, ops: Ops):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, LAYER_NORM_EPS)
        self.attn1 = Attention(channels, channels, heads, ops)
        self.norm2 = nn.LayerNorm(channels, LAYER_NORM_EPS)
        self.attn2 = Attention(channels, context_width, heads, ops)
        self.norm3 = nn.LayerNorm(channels, LAYER_NORM_EPS)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block on the latent's positions: the only place where pixels look at words."""

    def __init__(self, channels: int, heads: int, config: UNetConfig, ops: Ops):
        super().__init__()
        self.ops, self.linear = ops, config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, TRANSFORMER_NORM_EPS)
        # SD1 projects with 1x1 convolutions, SD2 with the same matrices as linear layers.
        projection = nn.Linear if self.linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = projection(channels, channels)
        block = TransformerBlock(channels, config.cross_attention_dim, heads, ops)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.ops.norm(self.norm, x)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))                   # (B, h*w, C)
        else:
            # Contiguous, or each of the three LayerNorms would make its own copy.
            h = self.proj_in(h).flatten(2).transpose(1, 2).contiguous()      # (B, h*w, C)
        h = self.transformer_blocks[0](h, context)
        if self.linear:
            h = self.proj_out(h).transpose(1, 2).reshape(x.shape)            # (B, C, h, w)
        else:
            h = self.proj_out(h.transpose(1, 2).reshape(x.shape))            # (B, C, h, w)
        return x + h


class Downsample(nn.Module):
    """Halves height and width, rounding up."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)                                                  # (B, C, h/2, w/2)


class Upsample(nn.Module):
    """Grows to the size of the next skip: twice its own, or one less where that is odd."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))        # (B, C, 2h, 2w)


class Level(nn.Module):
    """The res blocks of one level on one way, each followed by attention where the level has it."""

    def __init__(self, widths: list[tuple[int, int]], heads: int | None,
                 config: UNetConfig, ops: Ops):
        super().__init__()
        time_width, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResBlock(c_in, c_out, time_width, groups, ops) for c_in, c_out in widths
        )
        if heads is not None:
            self.attentions = nn.ModuleList(
                Transformer(c_out, heads, config, ops) for _, c_out in widths
            )

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class DownLevel(Level):
    """On the way down every output is also a skip, that of the downsampling included."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            skips.append(x)
        for downsample in getattr(self, "downsamplers", ()):
            x = downsample(x)
            skips.append(x)
        return x, skips


class Middle(Level):
    """Res block, attention, res block, at the smallest size."""

    def __init__(self, channels: int, heads: int, config: UNetConfig, ops: Ops):
        super().__init__([(channels, channels)] * 2, None, config, ops)
        self.attentions = nn.ModuleList([Transformer(channels, heads, config, ops)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpLevel(Level):
    """On the way up every res block also reads the latest skip that is left."""

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), time, context)
        for upsample in getattr(self, "upsamplers", ()):
            x = upsample(x, skips[-1].shape[-2:])
        return x


class UNet(nn.Module):
    """The denoiser: (x, t, context) -> the noise in x, or its velocity v."""

    def __init__(self, config: UNetConfig, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        widths, depth = config.block_out_channels, config.layers_per_block
        heads = [n if on else None for n, on in zip(config.num_heads, config.has_attention)]
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]
        for i, c in enumerate(widths):
            ins = [widths[max(i - 1, 0)]] + [c] * (depth - 1)
            level: Level = DownLevel([(c_in, c) for c_in in ins], heads[i], config, ops)
            if i < last:
                level.downsamplers = nn.ModuleList([Downsample(c)])
            self.down_blocks.append(level)
            skip_widths += [c] * (depth + (i < last))

        self.mid_block = Middle(widths[-1], config.num_heads[-1], config, ops)

        self.up_blocks = nn.ModuleList()
        for i in range(last, -1, -1):
            ins = [widths[min(i + 1, last)]] + [widths[i]] * depth
            ins = [c_in + skip_widths.pop() for c_in in ins]
            level = UpLevel([(c_in, widths[i]) for c_in in ins], heads[i], config, ops)
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(widths[i])])
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], RES_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Latent x (B, 4, h, w), timesteps t (B,), context (B, L, D) -> prediction (B, 4, h, w)."""
        waves = timestep_embedding(t, self.config.block_out_channels[0])     # (B, 320)
        time = self.time_embedding(waves.to(x.dtype))                        # (B, 1280)
        x = self.conv_in(x)                                                  # (B, 320, h, w)
        skips = [x]
        for level in self.down_blocks:
            x, kept = level(x, time, context)
            skips += kept
        x = self.mid_block(x, time, context)                                 # (B, 1280, h/8, w/8)
        for level in self.up_blocks:
            x = level(x, skips, time, context)
        return self.conv_out(self.ops.norm_silu(self.conv_norm_out, x))      # (B, 4, h, w)
