"""Stable Diffusion 1 and 2, rewritten to be read.

    import minisd
    sd = minisd.load()
    sd("a red heart on a blue background").images[0].save("heart.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisd.checkpoints.hub import download
    from minisd.config import Config
    from minisd.errors import HubError, ImageError, MinisdError, WeightError
    from minisd.loading import load
    from minisd.models.ops import Ops
    from minisd.output import Output
    from minisd.pipeline import StableDiffusion
    from minisd.safety import SafetyChecker

__version__ = "0.2.0"
_HOMES = {
    "Config": "config", "HubError": "errors", "ImageError": "errors", "MinisdError": "errors",
    "Ops": "models.ops", "Output": "output", "SafetyChecker": "safety",
    "StableDiffusion": "pipeline", "WeightError": "errors", "download": "checkpoints.hub",
    "load": "loading",
}
__all__ = ["Config", "HubError", "ImageError", "MinisdError", "Ops", "Output", "SafetyChecker",
           "StableDiffusion", "WeightError", "download", "load"]


def __getattr__(name: str) -> object:
    # Importing torch takes seconds: `import minisd`, and so `minisd --help`, does without it.
    if name not in _HOMES:
        raise AttributeError(f"module 'minisd' has no attribute {name!r}")
    return getattr(import_module(f"minisd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
