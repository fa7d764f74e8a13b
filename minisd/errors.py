"""The errors that minisd defines; all of them are a `MinisdError`. And a call's warnings.

Python's own errors stay what they are: TypeError for an argument of a wrong type, ValueError for
one of a wrong value, FileNotFoundError, MemoryError, and ArithmeticError where values are not
finite.
"""

import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # NumPy's part of the package has no torch
    from torch import Tensor

# Whose frames may lie between a caller's line and the line that warns.
BETWEEN = ("minisd", "torch", "contextlib")


class MinisdError(Exception):
    """What every error that minisd defines is, so that one ``except`` catches them all."""


class WeightError(MinisdError, ValueError):
    """Weights that are damaged, of another model, or not what they claim to be."""


class ImageError(MinisdError, ValueError):
    """An image that cannot be read or used; the message is one sentence that names it."""


class HubError(MinisdError, RuntimeError):
    """A download that did not happen, and why, in one sentence."""


def warn(sentence: str) -> None:
    """A warning at the caller's own line, whatever calls and decorators are between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, stacklevel=level)


def finite(x: "Tensor", stage: str, remedy: str = ": try dtype float32 (--dtype)") -> "Tensor":
    """x; ArithmeticError, which names the stage that computed it, if a value is not finite."""
    if not x.isfinite().all():
        raise ArithmeticError(f"{stage} gave values that are not finite{remedy}")
    return x
