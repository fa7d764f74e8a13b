"""What a call of each kind of model is about: which arguments it takes, and the size of its images.

A kind is a row of `TAKES` here, of `KINDS` in config.py and of `STARTS` in conditioning.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from PIL.Image import Image

from minisd import checks
from minisd.config import Config

# How much of the way is walked again unless said: without a mask, and with one.
DEFAULT_STRENGTH = (0.8, 1.0)
# Without a size an image keeps its own, up to the area of this many times the side that the model
# was trained on; a larger one is scaled down, because a model draws nothing sensible far from that.
LARGEST_UNASKED = 2.5


class Sides(NamedTuple):
    """A size in pixels."""

    height: int
    width: int


def as_the_image(
    height: object, width: object, config: Config, image: Image | Sides | None
) -> tuple[int, int]:
    """Height and width; what is not given keeps the proportions of the image."""
    f, usual = config.vae.downscale, config.sample_size
    if image is None or (height is not None and width is not None):
        return checks.side("height", height, f, usual), checks.side("width", width, f, usual)
    if height is not None:
        scale = checks.side("height", height, f, usual) / image.height
    elif width is not None:
        scale = checks.side("width", width, f, usual) / image.width
    else:
        scale = min(1.0, LARGEST_UNASKED * usual / math.sqrt(image.height * image.width))

    def scaled(name: str, pixels: int) -> int:
        return checks.side(name, max(round(scale * pixels / f), 1) * f, f, usual)

    return scaled("height", image.height), scaled("width", image.width)


def as_asked(
    height: object, width: object, config: Config, image: Image | Sides | None
) -> tuple[int, int]:
    """Height and width, where the image says what to draw, and not how large."""
    return as_the_image(height, width, config, None)


def upscaled(
    height: object, width: object, config: Config, image: Image | Sides | None
) -> tuple[int, int]:
    """Height and width of what an image becomes whose pixels are the latent's cells."""
    assert image is not None
    f = config.vae.downscale
    if height is not None or width is not None:
        raise ValueError(f"height and width must not be given: an upscaling model makes images {f} "
                         "times as wide and high as the given one")
    if f * max(image.height, image.width) > checks.MAX_SIDE:
        raise ValueError(f"image of {image.width}x{image.height} pixels: an upscaling model makes "
                         f"images {f} times as wide and high as the given one, and "
                         f"{checks.MAX_SIDE} pixels a side at most")
    return f * image.height, f * image.width


class Takes(NamedTuple):
    """What a kind of model can be given beside a prompt."""

    arguments: tuple[str, ...]
    all_of: tuple[str, ...] = ()  # without which it cannot be called
    one_of: tuple[str, ...] = ()
    prompt: bool = True           # whether it cannot be called without a prompt
    # (height, width, config, image) -> height and width in pixels
    size: Callable[[object, object, Config, Image | Sides | None], tuple[int, int]] = as_the_image


DRAWN = ("image", "mask_image", "strength")
TAKES = {
    "text to image": Takes(DRAWN),
    "inpainting": Takes(DRAWN, all_of=("image", "mask_image")),
    "depth": Takes(("image", "strength", "depth_map"), one_of=("depth_map", "image")),
    "upscaling": Takes(("image", "noise_level"), all_of=("image",), prompt=False, size=upscaled),
    "image variation": Takes(("image", "image_embeds", "noise_level"),
                             one_of=("image", "image_embeds"), prompt=False, size=as_asked),
}
# What the command line calls them.
OPTIONS = {"image": "--image", "mask_image": "--mask", "strength": "--strength",
           "depth_map": "--depth-map", "noise_level": "--noise-level", "image_embeds": ""}


def takes(config: Config) -> Takes:
    """What a model takes."""
    return TAKES.get(config.kind, TAKES["text to image"])


def check(config: Config, given: set[str]) -> None:
    """ValueError for arguments that the model does not take, or for a lack of one that it needs."""
    row, kind = takes(config), config.kind
    a = f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind} model"
    if strange := [name for name in OPTIONS if name in given and name not in row.arguments]:
        raise ValueError(f"this is {a}, which takes no {_named(strange, 'or')}")
    if "mask_image" in given and "image" not in given:
        raise ValueError("mask_image needs the image that it is the mask of")
    if not given.issuperset(row.all_of):
        raise ValueError(f"this is {a}: give it {_named(row.all_of, 'and')}")
    if kind == "depth" and config.depth is None and "depth_map" not in given:
        raise ValueError(f"this is {a} without its depth estimator: give it "
                         f"{_named(['depth_map'], '')}, with or without an image")
    if row.one_of and not given.intersection(row.one_of):
        raise ValueError(f"this is {a}: give it {_named(row.one_of, 'or')}")
    if given.issuperset(("image", "image_embeds")):
        raise ValueError("give either image or image_embeds, not both")


def _named(names: tuple[str, ...] | list[str], word: str) -> str:
    options = ", ".join(filter(None, (OPTIONS[name] for name in names)))
    return f" {word} ".join(names) + f" ({options})" * bool(options)


def strength(
    value: object, steps: int, has_image: bool, has_mask: bool
) -> tuple[float | None, int]:
    """The strength in (0, 1], or None without an image to start from; and the steps to be done."""
    if not has_image:
        if value is not None:
            raise ValueError("strength needs the image that it is about")
        return None, steps
    share = checks.real("strength", DEFAULT_STRENGTH[has_mask] if value is None else value, 0, 1)
    left = int(share * steps)  # truncated, as the official scripts do: 0.75 of 50 is 37
    if left == 0:
        raise ValueError(f"strength {share:g} of {steps} steps leaves none to do: "
                         "strength times steps must be at least 1")
    return share, left


def noise_level(value: object, config: Config) -> int | None:
    """How much noise is added to what the model is shown; None where it is shown nothing noisy."""
    if "noise_level" not in takes(config).arguments:
        return None
    level = config.noise_level if value is None else value
    if config.vision is not None and config.normalizer_dim is None and checks.as_number(level):
        raise ValueError("noise_level must be 0 with this single file, which lacks the mean and "
                         "standard deviation of CLIP's embeddings: load it with config= (--config)"
                         ", a diffusers folder of the model with its image_normalizer")
    return checks.integer("noise_level", level, 0, config.max_noise_level)
