"""Where the loop starts when the UNet is told only the prompt: from noise, or from a noisy image.

Each task and kind of model has a function that makes a `Start`; conditioning/__init__.py lists
them. A UNet that is told more, as inpainting models are, reads it in ``extra``.

B images, H W height and width in pixels, h w of the latent
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from minisd import images
from minisd.models.clip_vision import ImageNormalizer
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

    def draw(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, 4, h, w), or (B, *shape)."""
        drawn = [torch.randn(shape or self.like.shape[1:], generator=g, device=g.device,
                             dtype=torch.float32) for g in self.generators]
        return torch.stack([noise.to(self.like) for noise in drawn])         # (B, ...)


@dataclass(frozen=True)
class Given:
    """What a start is made of."""

    plan: Plan
    noise: Noise
    encode: Callable[[Tensor, Tensor], Tensor]  # (image, noise) -> latents (B, 4, h, w)
    estimate: Callable[[Image], Tensor]         # image -> its depth (1, H', W')
    embed: Callable[[Image], Tensor]            # image -> what CLIP makes of it (1, D)
    image_normalizer: ImageNormalizer | None = None

    @cached_property
    def image(self) -> Tensor:
        """The image at the size of the call, (1, 3, H, W) in [-1, 1]."""
        assert self.plan.image is not None
        return images.to_tensor(
            self.plan.image, self.plan.width, self.plan.height).to(self.noise.like)

    @cached_property
    def mask(self) -> Tensor:
        """The mask at that size, (1, 1, H, W): 1, repaint; 0, keep."""
        assert self.plan.mask_image is not None
        return images.mask_to_tensor(
            self.plan.mask_image, self.plan.width, self.plan.height).to(self.noise.like)

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
    class_vector: Tensor | None = None  # (M, ...), M = 2B with guidance


# The order of the draws is that of diffusers, so that a seed means the same image.


def text_to_image(given: Given) -> Start:
    """Pure noise."""
    return Start(given.x_T())


def image_to_image(given: Given) -> Start:
    """SDEdit (Meng et al. 2021, https://arxiv.org/abs/2108.01073): add noise to the image's latent,
    up to the first timestep that is visited, and denoise from there."""
    x0 = given.encode(given.image, given.noise.draw())                       # (B, 4, h, w)
    return Start(noised(given, x0, given.x_T()))


def noised(given: Given, x0: Tensor, eps: Tensor) -> Tensor:
    """x at the first level that is visited (B, 4, h, w)."""
    return schedule.add_noise(x0, eps, given.plan.ladder[0].abar)
