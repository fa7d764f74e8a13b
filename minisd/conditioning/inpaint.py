"""Inpainting: a part of the given image is repainted, and the rest is kept.

A model trained for it is shown the mask and the masked image. Any other model inpaints by mask
blending.

B images, H W height and width in pixels, h w of the latent
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd.conditioning.start import Given, Start, noised
from minisd.samplers import schedule


def in_cells(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (1, 1, H, W) at the size of the latent x: the value of one pixel of each cell."""
    return F.interpolate(mask, size=x.shape[-2:])                            # (1, 1, h, w)


@dataclass(frozen=True)
class MaskBlending:
    """Inpainting with a model that knows no masks: the given image, wherever the mask is 0.

    After each step the part to keep is replaced by that of the given image, noised to the same
    level, so that the rest is denoised to fit it: "Blended Latent Diffusion", Avrahami et al. 2022,
    https://arxiv.org/abs/2206.02779. As in diffusers, the noise is the same at every step.
    """

    image: Tensor  # (1, 3, H, W) in [-1, 1]
    mask: Tensor   # (1, 1, H, W): 1, repaint; 0, keep
    x0: Tensor     # (B, 4, h, w), the image's latents
    noise: Tensor  # (B, 4, h, w)

    def latent(self, x: Tensor, abar: float) -> Tensor:
        """x (B, 4, h, w) <- m x + (1 - m) (sqrt(abar) x_0 + sqrt(1 - abar) eps)."""
        mask = in_cells(self.mask, x)                                        # (1, 1, h, w)
        return (1 - mask) * schedule.add_noise(self.x0, self.noise, abar) + mask * x

    def pixels(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) <- m image + (1 - m) the given image, so not a kept pixel changes."""
        return (1 - self.mask) * self.image + self.mask * image


def by_blending(given: Given) -> Start:
    """With a model that knows no masks."""
    image, mask = given.image, given.mask
    x0 = given.encode(image, given.noise.draw())                             # (B, 4, h, w)
    eps = given.x_T()                                                        # (B, 4, h, w)
    x = eps if given.plan.strength == 1.0 else noised(given, x0, eps)
    given.noise.draw()  # diffusers draws here for a latent that it then leaves unused
    return Start(x, keep=MaskBlending(image, mask, x0, eps))


def by_channels(given: Given) -> Start:
    """With a model trained for it: the UNet also reads the mask and the masked image's latent."""
    image, mask = given.image, given.mask
    if given.plan.strength == 1.0:
        x = given.x_T()                                                      # (B, 4, h, w)
    else:
        x0 = given.encode(image, given.noise.draw())                         # (B, 4, h, w)
        x = noised(given, x0, given.x_T())                                   # (B, 4, h, w)
    masked_image = given.encode(image * (1 - mask), given.noise.draw())      # (B, 4, h, w)
    small = in_cells(mask, x).expand(len(x), -1, -1, -1)                     # (B, 1, h, w)
    extra = torch.cat([small, masked_image], dim=1)                          # (B, 5, h, w)
    return Start(x, extra)
