"""What goes into the loop besides x: fresh noise, and what inpainting keeps of a picture.

B pictures, H W height and width in pixels, h w of the latent
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd import ddim


@dataclass(frozen=True)
class Noise:
    """Draws noise for B pictures, each from its own generator.

    So a picture depends neither on the others of its batch nor on the device; and it is drawn in
    float32 and cast, so that it does not depend on the dtype either.
    """

    generators: list[torch.Generator]
    like: Tensor  # (1, 4, h, w): the size, device and dtype wanted

    def draw(self) -> Tensor:
        """Standard normal numbers (B, 4, h, w)."""
        shape = self.like.shape[1:]
        drawn = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32)
                 for g in self.generators]
        return torch.stack([noise.to(self.like) for noise in drawn])         # (B, 4, h, w)


@dataclass(frozen=True)
class Known:
    """What inpainting keeps: the given picture, wherever the mask is 0."""

    image: Tensor  # (1, 3, H, W) in [-1, 1]
    mask: Tensor   # (1, 1, H, W)
    x0: Tensor     # (B, 4, h, w), latents of the picture
    noise: Tensor  # (B, 4, h, w)

    def put_back(self, x: Tensor, a: float) -> Tensor:
        """x (B, 4, h, w) with its known part replaced by the picture at signal share ``a``."""
        mask = F.interpolate(self.mask, size=x.shape[-2:])                   # (1, 1, h, w)
        return (1 - mask) * ddim.add_noise(self.x0, self.noise, a) + mask * x

    def paste(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) with its known part replaced by the given picture."""
        return (1 - self.mask) * self.image + self.mask * image
