"""The UNet: predicts the noise in a latent, from the timestep and the encoded prompt.

It was trained to minimise  E || eps - eps_theta(x_t, t, c) ||^2  over latents x_0, their prompts c,
timesteps t and Gaussian noise eps, where x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al.
2020, https://arxiv.org/abs/2006.11239, eq. 14; with prompts Rombach et al., eq. 3). Some models
predict v instead of eps, see samplers/schedule.py.

                 noisy latent 4                                   prediction 4
                      |                                                |
    64x64   320  [res attn] x2 --------- skip connections ------> [res attn] x3    960  640  640
                      | half                                           | double
    32x32   640  [res attn] x2 --------- skip connections ------> [res attn] x3   1920 1280  960
                      | half                                           | double
    16x16  1280  [res attn] x2 --------- skip connections ------> [res attn] x3   2560 2560 1920
                      | half                                           | double
     8x8   1280  [res] x2 -------------- skip connections ------> [res] x3        2560 2560 2560
                      '------------->  [res attn res]  --------------'

Each `res` reads the timestep; each `attn` has self-attention and cross-attention to the prompt.
Every output on the way down is kept, and is concatenated to an input on the way up: on the right is
how many channels each res block there reads. The numbers are those of SD1 at 512x512.

Source: Rombach et al. 2022, https://arxiv.org/abs/2112.10752; CompVis openaimodel.py. Parameters
have the names of diffusers.

B batch, C channels, h w height and width of the latent at a level, L tokens, D width of the context
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import UNetConfig
from minisd.models.ops import Ops
from minisd.models.transformer import SpatialTransformer

# Of the GroupNorms in res blocks and at the UNet's end. That of a spatial transformer has 1e-6.
NORM_EPS = 1e-5
MAX_PERIOD = 10000.0


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """The sinusoidal timestep embedding: (B,) -> (B, width), cosines first, then sines.

    [cos(t w_i), sin(t w_i)] with w_i = 10000^(-i / half), i = 0 .. half - 1: the positions of
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5. Always in float32, because
    half precision gives neighbouring timesteps the same numbers.
    """
    half = width // 2
    # Divided by half, not by half - 1 as in the code of DDPM.
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(exponents / half)[None]          # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                   # (B, width)


def guidance_embedding(scale: float, width: int) -> Tensor:
    """The guidance scale as a latent consistency model is told it: (1, width), sines first.

    Luo et al. 2023, https://arxiv.org/abs/2310.04378, section 4.2. The paper's w is scale - 1;
    here the exponents are divided by half - 1, unlike those of the timestep.
    """
    half = width // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device="cpu")
    angles = 1000.0 * (scale - 1.0) * torch.exp(exponents / (half - 1))      # (half,)
    return torch.cat([angles.sin(), angles.cos()])[None]                     # (1, width)


class TimestepMLP(nn.Module):
    """The timestep embedding through two linear layers; every res block reads the result.

    In a latent consistency model the guidance scale's embedding is added before the first.
    """

    def __init__(self, width: int, time_width: int, cond_width: int | None = None):
        super().__init__()
        self.cond_proj = nn.Linear(cond_width, width, bias=False) if cond_width else None
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, embedding: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and cond is not None:
            embedding = embedding + self.cond_proj(cond.to(embedding))       # (B, 320)
        return self.linear_2(F.silu(self.linear_1(embedding)))


def class_embedding(config: UNetConfig) -> nn.Module | None:
    """From a class to what is added to the timestep's vector: a table, or layers as the timestep's.
    """
    width, n = 4 * config.block_out_channels[0], config.projection_class_embeddings_input_dim
    if config.num_class_embeds is not None:
        return nn.Embedding(config.num_class_embeds, width)
    return None if n is None else TimestepMLP(n, width)


class ResBlock(nn.Module):
    """Two convolutions added to the input; the time embedding is added between the two."""

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.norm1 = nn.GroupNorm(groups, c_in, NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, NORM_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.ops.norm_silu(self.norm1, x))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]           # (B, C, h, w)
        h = self.conv2(self.ops.norm_silu(self.norm2, h))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """Halves height and width, rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)                                                  # (B, C, h/2, w/2)


class Upsample(nn.Module):
    """Grows to the size of the next skip connection: twice its own, or one less if that is odd."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))        # (B, C, 2h, 2w)


class Block(nn.Module):
    """Res blocks of the given (input, output) channels, with ``attentions`` between or after them.

    A parameter's name says where it stands: down_blocks.0.attentions.1 follows
    down_blocks.0.resnets.1.
    """

    def __init__(self, widths: list[tuple[int, int]], attentions: int, heads: int,
                 only_cross: bool, config: UNetConfig, ops: Ops):
        super().__init__()
        time_width, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResBlock(c_in, c_out, time_width, groups, ops) for c_in, c_out in widths
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(widths[0][1], heads, only_cross, config, ops)
            for _ in range(attentions)
        )

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if self.attentions else x


class DownBlock(Block):
    """Every output is also a skip connection, and that of the downsampling too."""

    def __init__(self, widths: list[tuple[int, int]], attends: bool, heads: int, only_cross: bool,
                 downsample: bool, config: UNetConfig, ops: Ops):
        super().__init__(widths, attends * len(widths), heads, only_cross, config, ops)
        self.downsamplers = nn.ModuleList([Downsample(widths[0][1])] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Res block, attention, res block, at the smallest size."""

    def __init__(self, channels: int, heads: int, config: UNetConfig, ops: Ops):
        super().__init__([(channels, channels)] * 2, 1, heads, False, config, ops)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpBlock(Block):
    """Every res block also reads the last skip connection that is left, after its own input."""

    def __init__(self, widths: list[tuple[int, int]], attends: bool, heads: int, only_cross: bool,
                 upsample: bool, config: UNetConfig, ops: Ops):
        super().__init__(widths, attends * len(widths), heads, only_cross, config, ops)
        self.upsamplers = nn.ModuleList([Upsample(widths[0][1])] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), time, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x


class UNet(nn.Module):
    """The denoiser: (x, t, context) -> the noise in x, or v."""

    def __init__(self, config: UNetConfig, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        widths, depth = config.block_out_channels, config.layers_per_block
        attends, heads, last = config.has_attention, config.num_heads, len(widths) - 1
        only_cross = config.only_cross_attention or (False,) * len(widths)

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(
            widths[0], 4 * widths[0], config.time_cond_proj_dim)
        self.class_embedding = class_embedding(config)

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]  # of conv_in and of every output on the way down, in order
        for i, c in enumerate(widths):
            inputs = [widths[max(i - 1, 0)]] + [c] * (depth - 1)
            self.down_blocks.append(DownBlock(
                [(c_in, c) for c_in in inputs], attends[i], heads[i], only_cross[i], i < last,
                config, ops))
            skip_widths += [c] * (depth + (i < last))

        self.mid_block = MidBlock(widths[-1], heads[-1], config, ops)

        self.up_blocks = nn.ModuleList()
        for i in range(last, -1, -1):
            # One res block more than on the way down, because the downsampling has a skip too.
            inputs = [widths[min(i + 1, last)]] + [widths[i]] * depth
            joined = [c_in + skip_widths.pop() for c_in in inputs]
            self.up_blocks.append(UpBlock(
                [(c_in, widths[i]) for c_in in joined], attends[i], heads[i], only_cross[i], i > 0,
                config, ops))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latent: Tensor, t: Tensor | float, context: Tensor,
                class_vector: Tensor | None = None,
                timestep_cond: Tensor | None = None) -> Tensor:
        """Latent (B, 4, h, w), timesteps t, context (B, L, D) -> prediction (B, 4, h, w).

        t is (B,) or one for all; ``class_vector``, where the model is told one, is (B, n), or (B,)
        whole numbers that name a class; ``timestep_cond`` (1 or B, n), for latent consistency
        models, is a `guidance_embedding`. All may have any float dtype and device: the UNet works
        in its own, and answers in that of the latent.
        """
        own = self.conv_in.weight
        t = torch.as_tensor(t, device=own.device).expand(len(latent))        # (B,)
        time = self.time(t, class_vector, timestep_cond)                     # (B, 1280)
        context = context.to(own)
        x = self.conv_in(latent.to(own))                                     # (B, 320, h, w)
        skips = [x]
        for block in self.down_blocks:
            x, kept = block(x, time, context)
            skips += kept
        x = self.mid_block(x, time, context)                                 # (B, 1280, h/8, w/8)
        for block in self.up_blocks:
            x = block(x, skips, time, context)
        x = self.conv_out(self.ops.norm_silu(self.conv_norm_out, x))         # (B, 4, h, w)
        return x.to(latent)

    def time(self, t: Tensor, class_vector: Tensor | None = None,
             timestep_cond: Tensor | None = None) -> Tensor:
        """What every res block is told: timesteps (B,), and classes, as vectors (B, 1280)."""
        own = self.conv_in.weight
        embedding = timestep_embedding(t, self.config.block_out_channels[0])  # (B, 320)
        time = self.time_embedding(embedding.to(own), timestep_cond)         # (B, 1280)
        if self.class_embedding is None:
            return time
        if class_vector is None:
            raise ValueError("this UNet needs a class_vector")
        whole = not class_vector.is_floating_point()
        told = class_vector.to(own.device if whole else own)
        return time + self.class_embedding(told)                             # (B, 1280)
