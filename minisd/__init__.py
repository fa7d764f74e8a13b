"""Stable Diffusion 1 and 2, rewritten to be read.

    import minisd
    sd = minisd.load()
    sd("a red heart on a blue background").images[0].save("heart.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisd.config import Config
    from minisd.errors import HubError, ImageError, MinisdError, WeightError
    from minisd.hub import download
    from minisd.loading import load
    from minisd.ops import Ops
    from minisd.sd import Output, StableDiffusion

__version__ = "0.2.0"
__all__ = ["Config", "HubError", "ImageError", "MinisdError", "Ops", "Output", "StableDiffusion",
           "WeightError", "download", "load"]

_HOMES = {
    "config": ("Config",), "errors": ("HubError", "ImageError", "MinisdError", "WeightError"),
    "hub": ("download",), "loading": ("load",), "ops": ("Ops",),
    "sd": ("Output", "StableDiffusion"),
}


def __getattr__(name: str) -> object:
    # Importing torch takes seconds: `import minisd`, and so `minisd --help`, does without it.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"minisd.{home}"), name)
    raise AttributeError(f"module 'minisd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
