"""The variational autoencoder: the only place where pixels become latents and latents pixels.

The encoder halves the image at every level but the last (8 times smaller in all, officially) while
its channels grow. The diffusion happens in this small space; the decoder goes the same way back.

    image 3 -> 128 -> 256 -> 512 -> 512 -> mean, logvar 4+4     (encoder, halving thrice)
    image 3 <- 128 <- 256 <- 512 <- 512 <- latent 4             (decoder, doubling thrice)

It was trained before the UNet and apart from it: to reproduce images (L1, a perceptual loss, and a
discriminator against blur), with a small KL penalty towards a standard normal posterior.

Sources: Kingma & Welling 2013, https://arxiv.org/abs/1312.6114 (VAE); the KL-f8 autoencoder of
Rombach et al. 2022, https://arxiv.org/abs/2112.10752. Parameters have the names of diffusers.

B batch, C channels, H W height and width of an image, h w of a latent (h = H/f)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import VAEConfig
from minisd.models.ops import Ops
from minisd.models.tiles import in_tiles

# Not torch's 1e-5, which the UNet's res blocks have (CompVis ldm/modules/diffusionmodules).
NORM_EPS = 1e-6
# Bounds of the log variance, so that exp() stays finite (CompVis ldm/modules/distributions).
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


def vae_dtype(config: VAEConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the VAE of a model in that dtype: float32 at least, where it would overflow."""
    return torch.promote_types(dtype, torch.float32) if config.force_float32 else dtype


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 conv on x if the channels change."""

    def __init__(self, c_in: int, c_out: int, groups: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.norm1 = nn.GroupNorm(groups, c_in, NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, NORM_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.ops.norm_silu(self.norm1, x))
        h = self.conv2(self.ops.norm_silu(self.norm2, h))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all positions, so that distant parts can agree."""

    def __init__(self, channels: int, groups: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.ops.norm(self.group_norm, x).flatten(2).transpose(1, 2)     # (B, h*w, C)
        h = self.ops.attention(self.to_q(h), self.to_k(h), self.to_v(h), heads=1)
        h = self.to_out[0](h).transpose(1, 2).reshape(x.shape)               # (B, C, h, w)
        return x + h


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Only one row below and one column to the right, because the weights were trained with
        # this. Symmetric padding gives the same shapes, and an image shifted by half a cell.
        return self.conv(F.pad(x, (0, 1, 0, 1)))                             # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class Block(nn.Module):
    """Some res blocks, one after the other."""

    def __init__(self, c_in: int, c_out: int, depth: int, groups: int, ops: Ops):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(c_in if i == 0 else c_out, c_out, groups, ops) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class DownBlock(Block):
    """Res blocks and a downsampling; none at the smallest size."""

    def __init__(self, c_in: int, c_out: int, depth: int, downsample: bool, groups: int, ops: Ops):
        super().__init__(c_in, c_out, depth, groups, ops)
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpBlock(Block):
    """Res blocks and an upsampling; none at the largest size."""

    def __init__(self, c_in: int, c_out: int, depth: int, upsample: bool, groups: int, ops: Ops):
        super().__init__(c_in, c_out, depth, groups, ops)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidBlock(nn.Module):
    """Res block, attention, res block, at the smallest size."""

    def __init__(self, channels: int, groups: int, ops: Ops):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups, ops) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups, ops)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> moments before quant_conv (B, 8, h, w)."""

    def __init__(self, config: VAEConfig, ops: Ops):
        super().__init__()
        widths, groups, depth = (
            config.block_out_channels, config.norm_num_groups, config.layers_per_block)
        self.ops = ops
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], c, depth, i < len(widths) - 1, groups, ops)
            for i, c in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, ops)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)                                              # (B, 128, H, W)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)                                                # (B, 512, h, w)
        return self.conv_out(self.ops.norm_silu(self.conv_norm_out, h))      # (B, 8, h, w)


class Decoder(nn.Module):
    """Latent after post_quant_conv (B, 4, h, w) -> image (B, 3, H, W)."""

    def __init__(self, config: VAEConfig, ops: Ops):
        super().__init__()
        widths, groups, depth = (
            config.block_out_channels[::-1], config.norm_num_groups, config.layers_per_block + 1)
        self.ops = ops
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, ops)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], c, depth, i < len(widths) - 1, groups, ops)
            for i, c in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(latent))                             # (B, 512, h, w)
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(self.ops.norm_silu(self.conv_norm_out, h))      # (B, 3, H, W)


class VAE(nn.Module):
    """The whole autoencoder. Images lie in [-1, 1]; latents are scaled to about unit variance.

    Its methods take any float dtype and any device, work in the VAE's own, and answer in the given.

    ``tile``, None unless set, is the side, in cells of the latent, of the tiles in which larger
    latents are decoded: this takes the memory of one tile, and gives nearly the same image. An
    upscaler's UNet is shown them in the same tiles.
    """

    tile: int | None

    def __init__(self, config: VAEConfig, ops: Ops):
        super().__init__()
        self.config, self.tile = config, None
        self.encoder = Encoder(config, ops)
        self.decoder = Decoder(config, ops)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior q(z | image), image (B, 3, H, W) in [-1, 1].

        Both are (B, 4, h, w).
        """
        mean, logvar = self._moments(image.to(self.quant_conv.weight))       # (B, 4, h, w)
        return mean.to(image), logvar.to(image)

    def _moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)  # (B, 4, h, w)
        return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """A scaled latent (B, 4, h, w) of an image (B, 3, H, W) in [-1, 1].

        ``noise`` (B, 4, h, w) samples the posterior; without it the latent is the mean.
        """
        own = self.quant_conv.weight
        mean, logvar = self._moments(image.to(own))                          # (B, 4, h, w)
        # The reparameterisation trick (Kingma & Welling, section 2.4): z = mu + exp(logvar / 2) eps
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(own)
        return (self.config.scaling_factor * z).to(image)  # 0.18215 gives about unit variance

    def decode(
        self, latent: Tensor, decoder: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """An image (B, 3, H, W), about [-1, 1] and not clamped, from a scaled latent.

        ``decoder`` computes the same function in place of ``self.decoder``.
        """
        decoder = decoder or self.decoder
        own = latent.to(self.post_quant_conv.weight)
        z = self.post_quant_conv(own / self.config.scaling_factor)           # (B, 4, h, w)
        if self.tile is None or max(z.shape[2:]) <= self.tile:
            return decoder(z).to(latent)
        image = in_tiles(decoder, z, self.tile, 3, self.config.downscale)
        return image.to(latent)
