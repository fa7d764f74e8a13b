"""Stable Diffusion 1 and 2, rewritten to be read.

    import minisd
    sd = minisd.load()
    sd("a red heart on a blue background").images[0].save("heart.png")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisd.checkpoint import WeightError
    from minisd.image import ImageError
    from minisd.sd import Output, StableDiffusion, load

__version__ = "0.1.0"
__all__ = ["ImageError", "Output", "StableDiffusion", "WeightError", "load"]

_HOMES = {"ImageError": "image", "WeightError": "checkpoint"}


def __getattr__(name: str):
    # Importing torch takes seconds: `import minisd`, and so `minisd --help`, does without it.
    if name not in __all__:
        raise AttributeError(f"module 'minisd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"minisd.{_HOMES.get(name, 'sd')}"), name)
