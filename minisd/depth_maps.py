"""Depth maps: as they are given, as the UNet reads them, and images as the depth estimator does.

A depth map is relative inverse depth: larger is nearer. Its size and its range are free, because
``normalised`` brings it to the latent's cells and to [-1, 1].

B maps, H W height and width of a map or an image, h w what is made of it
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.images import Source, open_grey

SIDE = 384     # of the images that the estimator was trained on
MULTIPLE = 32  # of the sides that it reads


def prepared(image: Image.Image) -> Tensor:
    """A PIL image in RGB -> (1, 3, h, w) float32 in [-1, 1], for models.dpt.DepthEstimator.

    The aspect stays, nearly: both sides are scaled by the factor nearer to 1 of the two that make
    one of them 384, then rounded to multiples of 32. So do MiDaS and Stable Diffusion's scripts,
    by OpenCV's bicubic filter; Pillow's, which is used here, skips no pixel where it shrinks.
    diffusers makes a square of 384 of every image.
    """
    size = prepared_size(image.width, image.height)
    pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255        # (1, 3, h, w)
    return (x - 0.5) / 0.5


def prepared_size(width: int, height: int) -> tuple[int, int]:
    """The (width, height) that the estimator reads of an image of these sides."""
    scale = min((SIDE / height, SIDE / width), key=lambda scale: abs(1 - scale))
    # At least one multiple: an image of 8192x64 would have no height left.
    w, h = (max(1, round(scale * side / MULTIPLE)) * MULTIPLE for side in (width, height))
    return w, h


def open_depth_map(source: Source | np.ndarray | Tensor) -> Tensor:
    """Depth maps as they are given -> (B, H, W) on the CPU, float64 if they are, else float32.

    A path or a PIL image of one map, grey of 8 or 16 bits, integers or floats (L, I;16, I, F), or a
    numpy array or a tensor (H, W), (B, H, W) or (B, 1, H, W). Raises TypeError for anything else;
    ValueError for other shapes and for values that are not finite; for a file what
    ``images.open_image`` raises, and ImageError for one with colours.
    """
    if isinstance(source, (str, os.PathLike, Image.Image)):
        source = open_grey(source, "the depth map")
    if isinstance(source, np.ndarray) and source.dtype.kind in "buif":
        wide = source.dtype.kind == "f" and source.dtype.itemsize >= 8
        depth = torch.from_numpy(source.astype(np.float64 if wide else np.float32))
    elif isinstance(source, Tensor) and not source.is_complex():
        wide = source.dtype == torch.float64
        depth = source.detach().cpu().to(torch.float64 if wide else torch.float32)
    else:
        kind = f" of {source.dtype}" if isinstance(source, (np.ndarray, Tensor)) else ""
        raise TypeError("a depth map is a path, a PIL image, or an array or a tensor of real "
                        f"numbers, not {type(source).__name__}{kind}")
    return _checked(depth)


def normalised(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Relative inverse depth (B, H, W), in any range -> (B, 1, h, w) in [-1, 1], size being (h, w).

    First resized, then normalised, each map by itself: a cell is -1 where it is farthest, 1 where
    nearest. The result is on the CPU, in float64. ValueError for a map that is the same everywhere,
    also if only in these cells.
    """
    # In float64 on the CPU, so that a map does not depend on the device, and no range overflows.
    exact = depth.detach().cpu().double()[:, None]                           # (B, 1, H, W)
    cells = F.interpolate(exact, size, mode="bicubic", align_corners=False)  # (B, 1, h, w)
    low, high = cells.amin((1, 2, 3), keepdim=True), cells.amax((1, 2, 3), keepdim=True)
    # What resizing makes of equal values differs in the last bits.
    if (high - low <= 1e-9 * exact.abs().amax((1, 2, 3), keepdim=True)).any():
        raise ValueError(
            f"the depth is the same everywhere in the latent's {size[1]}x{size[0]} cells: "
            "it must have near and far parts")
    # Training added 0.001 to high - low; sampling does not, in the scripts and in diffusers.
    return 2 * (cells - low) / (high - low) - 1                              # (B, 1, h, w)


def _checked(depth: Tensor) -> Tensor:
    shape = tuple(depth.shape)
    if depth.dim() == 4 and shape[1] == 1:
        depth = depth[:, 0]                                                  # (B, H, W)
    if depth.dim() == 2:
        depth = depth[None]                                                  # (1, H, W)
    if depth.dim() != 3 or 0 in shape:
        raise ValueError(
            f"a depth map has the shape (H, W), (B, H, W) or (B, 1, H, W), not {shape}")
    if not depth.float().isfinite().all():  # beyond float32 its range could not be computed
        raise ValueError("the depth map has values that are not finite in float32")
    return depth
