"""Where the loop starts when the UNet is told only the prompt: from noise, or from a noisy image.

Each task and kind of model has a function that makes a `Start`; conditioning/__init__.py lists
them. A UNet that is told more, as inpainting models are, reads it in ``extra``.

B images, H W height and width in pixels, h w of the latent
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
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


class Given(NamedTuple):
    """What a start is made of."""

    plan: Plan
    image: Tensor | None                          # (1, 3, H, W) in [-1, 1]
    mask: Tensor | None                           # (1, 1, H, W): 1, repaint; 0, keep
    noise: Noise
    encode: Callable[[Tensor, Tensor], Tensor]    # (image, noise) -> latents (B, 4, h, w)

    def x_T(self) -> Tensor:
        """Pure noise (B, 4, h, w): drawn, or the caller's own."""
        latents = self.plan.latents
        return self.noise.draw() if latents is None else latents.to(self.noise.like)


class Keep(Protocol):
    """What is kept of a given image while the rest is denoised."""

    def latent(self, x: Tensor, abar: float) -> Tensor:
        """x (B, 4, h, w) with the kept part in place, at that noise level."""

    def pixels(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) with the kept part in place."""


class Start(NamedTuple):
    """What the loop starts with."""

    x: Tensor                      # (B, 4, h, w)
    extra: Tensor | None = None    # (B, C, h, w), channels that the UNet reads after those of x
    keep: Keep | None = None


# The order of the draws is that of diffusers, so that a seed means the same image.


def text_to_image(given: Given) -> Start:
    """Pure noise."""
    return Start(given.x_T())


def image_to_image(given: Given, image: Tensor) -> Start:
    """SDEdit (Meng et al. 2021, https://arxiv.org/abs/2108.01073): add noise to the image's latent,
    up to the first timestep that is visited, and denoise from there."""
    x0 = given.encode(image, given.noise.draw())                             # (B, 4, h, w)
    return Start(noised(given, x0, given.x_T()))


def noised(given: Given, x0: Tensor, eps: Tensor) -> Tensor:
    """x at the first level that is visited (B, 4, h, w)."""
    return schedule.add_noise(x0, eps, given.plan.ladder[0].abar)
