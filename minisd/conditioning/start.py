"""Where the loop starts: pure noise, a noisy image, or an image of which a part is kept.

B images, H W height and width in pixels, h w of the latent
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd.request import Plan
from minisd.samplers import schedule


@dataclass(frozen=True)
class Noise:
    """Draws noise for B images, each from its own generator.

    So an image depends neither on the others of its batch nor on the device. The noise is drawn in
    float32 and then cast, so that the image does not depend on the dtype either.
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
        mask = F.interpolate(self.mask, size=x.shape[-2:])                   # (1, 1, h, w)
        return (1 - mask) * schedule.add_noise(self.x0, self.noise, abar) + mask * x

    def pixels(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) <- m image + (1 - m) the given image, so not a kept pixel changes."""
        return (1 - self.mask) * self.image + self.mask * image


class Start(NamedTuple):
    """What the loop starts with."""

    x: Tensor                             # (B, 4, h, w)
    extra: Tensor | None = None           # (B, 5, h, w), what an inpainting UNet sees beside x
    blending: MaskBlending | None = None


def start(
    r: Plan, image: Tensor | None, mask: Tensor | None, noise: Noise,
    encode: Callable[[Tensor, Tensor], Tensor], alphas_cumprod: list[float],
) -> Start:
    """The start for a request: image (1, 3, H, W) in [-1, 1], mask (1, 1, H, W) of 0 and 1.

    ``encode(image, noise)`` draws latents (B, 4, h, w) from the VAE's posterior.
    """
    # The order of the draws is that of diffusers, so that a seed means the same image.
    if image is None:  # text to image: pure noise, x_T
        return Start(noise.draw() if r.latents is None else r.latents.to(noise.like))
    knows_masks = r.config.unet.in_channels != r.config.vae.latent_channels
    pure_noise = mask is not None and r.strength == 1.0
    x0 = None
    if not pure_noise or not knows_masks:
        x0 = encode(image, noise.draw())                                     # (B, 4, h, w)
    x = eps = noise.draw() if r.latents is None else r.latents.to(noise.like)
    if x0 is not None and not pure_noise:
        # Image to image is SDEdit (Meng et al. 2021, https://arxiv.org/abs/2108.01073): add noise
        # to the image's latent, up to the first timestep of the walk, and denoise from there.
        x = schedule.add_noise(x0, eps, alphas_cumprod[r.timesteps[0]])          # (B, 4, h, w)
    if mask is None:
        return Start(x)
    if x0 is not None and not knows_masks:
        noise.draw()  # diffusers draws here for a latent that it then leaves unused
        return Start(x, blending=MaskBlending(image, mask, x0, eps))
    # An inpainting UNet sees the mask and the latent of the masked image at every step.
    masked_image = encode(image * (1 - mask), noise.draw())                  # (B, 4, h, w)
    small = F.interpolate(mask, size=x.shape[-2:]).expand(len(x), -1, -1, -1)
    extra = torch.cat([small, masked_image], dim=1)                          # (B, 5, h, w)
    return Start(x, extra)
