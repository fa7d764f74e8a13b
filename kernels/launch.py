"""What the kernel families share: which tensors may be taken at all, and how large a tile is.

Nothing is tuned at run time. The first call with new sizes compiles (about a second a kernel, kept
in Triton's cache folder, so once a machine) and later ones launch. `python -m bench.kernels --tune`
times a list of settings on the device at hand and prints rows for MEASURED.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_OFFSET = 2**31 - 1  # offsets inside one batch item are 32-bit; from item to item, 64-bit


class Tile(NamedTuple):
    """An attention tile: rows of queries, keys at a time, warps, loads in flight (stages)."""

    queries: int
    keys: int
    warps: int
    stages: int


class Norm(NamedTuple):
    """A tile of a norm or of GEGLU: its elements, how many side by side in memory, warps."""

    elements: int
    width: int
    warps: int


class Call(NamedTuple):
    """One launch, all decided: what `run` does, and what can be compiled ahead of time."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: tuple
    constants: dict
    warps: int
    stages: int = 1


class Cost(NamedTuple):
    """The least work a call can do: each input read once, each output written once."""

    flops: int
    bytes: int
    exponentials: int


# (kernel, widest piece of d or size) -> setting. Attention's are chosen from compiled code
# (bench.compile), those of the norms were the fastest on an H200:
# no spill on any target with either Triton. 128 queries read k and v half as often as 64 do, and
# two such programs fit on a multiprocessor of sm_90 (but one at d 80).
DEFAULT: dict[tuple[str, int], Tile | Norm] = {
    ("attention", 16): Tile(128, 64, 8, 3),
    ("attention", 32): Tile(128, 64, 8, 3),
    ("attention", 64): Tile(128, 64, 8, 3),
    ("attention", 128): Tile(64, 32, 4, 3),  # 64 keys spill on sm_80 and sm_89
    ("one tile", 16): Tile(64, 128, 4, 1),
    ("one tile", 32): Tile(64, 128, 4, 1),
    ("one tile", 64): Tile(64, 128, 4, 1),
    ("sliced", 2): Tile(64, 64, 4, 2),  # by bytes an element
    ("sliced", 4): Tile(64, 32, 8, 1),  # half of both spills on sm_80 with Triton 3.6
    ("group norm", 0): Norm(32768, 1, 16),  # a group whole: at most so many elements, and warps
    ("group norm", 1): Norm(4096, 32, 4),  # parts of larger ones
    ("layer norm", 0): Norm(2048, 1, 2),
    ("geglu", 0): Norm(2048, 256, 4),
}
# (device name as torch gives it, kernel, size) -> the setting that was fastest there.
MEASURED: dict[tuple[str, str, int], Tile | Norm] = {
    ("NVIDIA H200", "attention", 64): Tile(64, 64, 4, 3),
    ("NVIDIA H200", "attention", 128): Tile(64, 32, 4, 4),
    ("NVIDIA H200", "sliced", 2): Tile(64, 64, 4, 3),  # a third less; spills on sm_80
}


def setting(device: torch.device, kernel: str, size: int) -> NamedTuple:
    """The measured winner on such a device, else the default."""
    if device.type == "cuda" and MEASURED:
        row = (torch.cuda.get_device_name(device), kernel, size)
        return MEASURED.get(row, DEFAULT[kernel, size])
    return DEFAULT[kernel, size]


def interpreted(kernel) -> bool:
    """Whether Triton's interpreter stands in for the compiler (TRITON_INTERPRET=1)."""
    return not isinstance(kernel, triton.JITFunction)


def refusal(kernel, **tensors: Tensor) -> str | None:
    """Why no kernel takes these tensors, as a sentence; None if it may.

    They share one device and have a dtype of DTYPES. "meta" tensors pass as a GPU's would.
    """
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, not float16, bfloat16 or float32"
        if x.device != device:
            return f"{name} is on {x.device}, not on {device}"
        if x.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient, and the kernels have no backward"
    if device.type in ("cuda", "meta") or device.type == "cpu" and interpreted(kernel):
        return None
    return f"the tensors are on {device}, and the Triton kernels run on a GPU"


def run(calls: list[Call]) -> None:
    """Launch in order, on the device of the tensors; on "meta" there is nothing to launch."""
    for call in calls:
        if call.args[0].device.type != "meta":
            with torch.cuda.device_of(call.args[0]):
                call.kernel[call.grid](
                    *call.args, **call.constants, num_warps=call.warps, num_stages=call.stages,
                    enable_fp_fusion=True,  # some releases of Triton have it off by default
                )
