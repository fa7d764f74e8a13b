"""Tiles: a network that maps cells to cells sees a large map in parts, so it needs less memory.

The parts overlap, and where they do one fades linearly into the next. The result differs a little
from that of the whole: norms and attention see a tile alone. For the UNet this is "Mixture of
Diffusers" (Jimenez 2023, https://arxiv.org/abs/2302.02412): tiles of one latent, and so of one
noise, whose predictions are joined at every step.

B batch, C channels of the result, h w height and width of a map, H W of the result
"""

from collections.abc import Callable

import torch
from torch import Tensor


def in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, side: int, channels: int,
             scale: int = 1) -> Tensor:
    """network(x) from tiles of x (B, ..., h, w), whose side is given in cells of x.

    Returns (B, channels, scale * h, scale * w).
    """
    side, (h, w) = max(side, 1), x.shape[2:]
    joined = x.new_zeros(len(x), channels, scale * h, scale * w)             # (B, C, H, W)
    total = x.new_zeros(scale * h, scale * w)                                # (H, W)
    for top in starts(h, side):
        for left in starts(w, side):
            part = network(x[:, :, top : top + side, left : left + side])
            fade = tent(part.shape[2], x)[:, None] * tent(part.shape[3], x)
            here = (slice(scale * top, scale * (top + side)),
                    slice(scale * left, scale * (left + side)))
            joined[:, :, *here] += fade * part
            total[here] += fade
    return joined / total                                                    # (B, C, H, W)


def starts(length: int, side: int) -> list[int]:
    """Where tiles of a side begin that cover a length evenly and share a quarter or more."""
    steps = max(0, -(-4 * (length - side) // (3 * side)))
    return sorted({i * (length - side) // max(steps, 1) for i in range(steps + 1)})


def tent(length: int, like: Tensor) -> Tensor:
    """1 in the middle, falling to nearly 0 over a quarter at both ends: (length,)."""
    rise = (torch.arange(length, device=like.device) + 1) / (length / 4)
    return torch.minimum(rise, rise.flip(0)).clamp(max=1).to(like)


def tiled_unet(unet: Callable[..., Tensor], side: int, channels: int) -> Callable[..., Tensor]:
    """A function called like the UNet, (x, t, context, ...), that shows it tiles of x."""
    def call(x: Tensor, *args: Tensor, **options: Tensor) -> Tensor:
        return in_tiles(lambda tile: unet(tile, *args, **options), x, side, channels)

    return call
