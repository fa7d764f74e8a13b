"""Single values from outside: right, or one sentence that says what would be.

A wrong type is a TypeError and a wrong value a ValueError, save that a number of the wrong kind
(2.5 or "3" steps, True) is a ValueError too: the caller's mistake is the same.
"""

import math
import reprlib
import sys
from contextlib import suppress
from numbers import Integral, Real

import torch

# Attention grows with the fourth power of the side; nothing beyond this can finish.
MAX_SIDE = 8192
LARGEST = sys.float_info.max
DTYPES = {
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64,
}


def shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())  # arrays have lines, and 10**400 has no end


def as_number(value: object) -> int | float | None:
    """``value`` as a number of Python's; None for what is no number, as True is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def integer(name: str, value: object, low: int, high: int) -> int:
    """``value`` as an int from ``low`` to ``high``."""
    number = as_number(value)
    if not isinstance(number, int) or not low <= number <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, not {shown(value)}")
    return number


def real(name: str, value: object, low: float = -LARGEST, high: float = LARGEST) -> float:
    """``value`` as a finite float from ``low`` to ``high``."""
    number = as_number(value)
    if number is None or not low <= number <= high:  # nan and the infinities are not between them
        bounds = f" from {low:g} to {high:g}" if high < LARGEST else ""
        raise ValueError(f"{name} must be a finite number{bounds}, not {shown(value)}")
    return float(number)


def tile(value: object) -> int | None:
    """The side of a tile in cells of the latent, or None: no tiles."""
    return None if value is None else integer("tile", value, 1, MAX_SIDE)


def side(name: str, value: object, multiple: int, default: int) -> int:
    """A height or width in pixels: a multiple of ``multiple``, at most MAX_SIDE."""
    if value is None:
        return default
    number = as_number(value)
    if (not isinstance(number, int) or number % multiple
            or not multiple <= number <= MAX_SIDE):
        near = "" if number is None else f" (nearest valid: {_nearest(number, multiple)})"
        raise ValueError(
            f"{name} must be a multiple of {multiple} from {multiple} to {MAX_SIDE} pixels, "
            f"not {shown(value)}{near}"
        )
    return number


def _nearest(value: float, multiple: int) -> str:
    value = multiple if value != value else min(max(value, multiple), MAX_SIDE)  # nan: no number
    near = {math.floor(value / multiple), math.ceil(value / multiple)}
    return " or ".join(str(n * multiple) for n in sorted(near))


def device(name: object) -> torch.device:
    """"auto" is cuda, then mps, then cpu; anything else must be there."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps:0"] * torch.backends.mps.is_available() + ["cpu"]
    if isinstance(name, str) and name == "auto":
        return torch.device(there[0])
    with suppress(RuntimeError):
        if isinstance(name, (str, int, torch.device)):
            chosen = torch.device(name)
            whole = "cpu" if str(chosen) == "cpu:0" else str(chosen)
            whole += ":0" if chosen.index is None and chosen.type != "cpu" else ""
            if whole in there:
                return chosen
    raise ValueError(f"device must be auto or one of {', '.join(there)}, not {shown(name)}")


def dtype(name: object, on: torch.device) -> torch.dtype:
    """"auto" is float16 on a GPU; float32 on a CPU, where half precision is far slower."""
    if isinstance(name, str) and name == "auto":
        return torch.float32 if on.type == "cpu" else torch.float16
    chosen = DTYPES.get(name) if isinstance(name, str) else name
    if not isinstance(chosen, torch.dtype) or chosen not in DTYPES.values():
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {shown(name)}")
    return chosen
