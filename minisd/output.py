"""What a call gives: its images, and each of its steps to those who watch.

B images, H W height and width in pixels, h w of the latent
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image, new as new_image
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """What a call made: the images, and for each its seed and the settings that made it.

    A seed is None where it does not make the image again: with ``latents``, or with a ``generator``
    that is not freshly seeded or not the CPU's.

    ``images`` is a list of PIL images or, by ``output_type``, a (B, 3, H, W) tensor ("pt") or a
    (B, H, W, 3) array ("np") in [0, 1], or a (B, 4, h, w) tensor of scaled latents ("latent").

    ``nsfw`` has for each image whether the safety checker flags it; None for a model without one,
    and for latents. A flagged image is as it was made.
    """

    images: list[Image] | Tensor | np.ndarray
    seeds: list[int | None]
    settings: list[dict]
    nsfw: list[bool] | None = None

    def blackened(self) -> list[Image] | Tensor | np.ndarray:
        """``images``, of which the flagged ones are black; ValueError if none has been checked."""
        if self.nsfw is None:
            raise ValueError("no safety checker has seen the images: load the model with one "
                             "(safety_checker=, --safety-checker)")
        if isinstance(self.images, list):
            return [new_image(image.mode, image.size) if flagged else image
                    for image, flagged in zip(self.images, self.nsfw, strict=True)]
        images = copy.deepcopy(self.images)
        for i, flagged in enumerate(self.nsfw):
            if flagged:
                images[i] = 0  # black in [0, 1]; in [-1, 1] it would be grey
        return images


@dataclass(frozen=True)
class Step:
    """A call after its i-th step, as `StableDiffusion.stream` gives it."""

    i: int
    t: float         # what the UNet was told
    latents: Tensor  # (B, 4, h, w): x now
    x0: Tensor       # (B, 4, h, w): what the UNet takes x_0 to be, from the x before
    output: Callable[[], Output]  # what the call gives: now, of x_0 so far; after the last step
