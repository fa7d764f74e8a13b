"""Depth maps that a caller gives, and images as the depth estimator reads them.

A depth map is relative inverse depth: larger is nearer. Its size and its range are free, because
conditioning/depth.py brings it to the latent's cells and to [-1, 1].

B maps, H W height and width of a map or an image, h w what the estimator reads
"""

import os

import numpy as np
import torch
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
    scale = min((SIDE / image.height, SIDE / image.width), key=lambda scale: abs(1 - scale))
    # At least one multiple: an image of 8192x64 would have no height left.
    size = [max(1, round(scale * side / MULTIPLE)) * MULTIPLE for side in image.size]
    pixels = np.array(image.resize((size[0], size[1]), Image.Resampling.BICUBIC))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255        # (1, 3, h, w)
    return (x - 0.5) / 0.5


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
