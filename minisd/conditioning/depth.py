"""Depth: a UNet trained for it is shown how near each cell of the latent is.

B maps, H W height and width of a map, h w of the latent
"""

import torch.nn.functional as F
from torch import Tensor

from minisd.conditioning.start import Given, Start, image_to_image, text_to_image


def start(given: Given) -> Start:
    """From noise, or from an image, with the depth of each cell beside."""
    plan, (_, _, h, w) = given.plan, given.plan.shape
    assert plan.depth_map is not None
    begun = text_to_image(given) if plan.image is None else image_to_image(given)
    cells = normalised(plan.depth_map, (h, w)).to(begun.x)           # (1 or B, 1, h, w)
    return begun._replace(extra=cells.expand(len(begun.x), -1, -1, -1))


def normalised(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Relative inverse depth (B, H, W), in any range -> (B, 1, h, w) in [-1, 1], size being (h, w).

    First resized, then normalised, each map by itself: a cell is -1 where it is farthest, 1 where
    nearest. ValueError for a map that is the same everywhere, also if only in these cells.
    """
    # In float64 on the CPU, so that a map does not depend on the device, and no range overflows.
    exact = depth.detach().cpu().double()[:, None]                           # (B, 1, H, W)
    cells = F.interpolate(exact, size, mode="bicubic", align_corners=False)  # (B, 1, h, w)
    low, high = cells.amin((1, 2, 3), keepdim=True), cells.amax((1, 2, 3), keepdim=True)
    # What resizing makes of equal values differs in the last bits.
    if (high - low <= 1e-9 * exact.abs().amax((1, 2, 3), keepdim=True)).any():
        raise ValueError(
            f"the depth map is the same everywhere in the latent's {size[1]}x{size[0]} cells: "
            "it must have near and far parts")
    # Training added 0.001 to high - low; sampling does not, in the scripts and in diffusers.
    return (2 * (cells - low) / (high - low) - 1).to(depth)                  # (B, 1, h, w)
