"""What the kernel families share: which tensors they take, and how large their tiles are.

Nothing is tuned at run time. The first call with new sizes compiles (about a second per kernel,
kept in Triton's cache folder, so once per machine); later calls only launch. `python -m
bench.kernels --tune` times CANDIDATES on the GPU at hand and prints what is better, for MEASURED.
"""

from typing import Literal, NamedTuple, TypeAlias, overload

import torch
import triton
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_OFFSET = 2**31 - 1  # offsets inside one batch item are 32-bit; from item to item, 64-bit


class Tile(NamedTuple):
    """A tile of attention: BLOCK_M queries by BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Norm(NamedTuple):
    """A tile of a norm or of GEGLU: its size, and how many channels it takes."""

    elements: int
    block_c: int
    num_warps: int


class Call(NamedTuple):
    """One launch with nothing left open: `run` launches it, bench/compile.py compiles it ahead."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: tuple
    constants: dict
    num_warps: int
    num_stages: int = 1


class Cost(NamedTuple):
    """The least work of a call, which reads each input once and writes each output once."""

    flops: int
    bytes: int
    exponentials: int


AttentionKernel: TypeAlias = Literal["attention", "one tile", "sliced"]
NormKernel: TypeAlias = Literal["group norm", "layer norm", "geglu"]

# (kernel, BLOCK_D1 or a size) -> setting. Those of attention are chosen from compiled code: nothing
# spills on any target with either Triton (bench.compile). A tile of 128 queries reads k and v half
# as often as one of 64, and two such programs fit on a multiprocessor of sm_90 (one at d 80). Those
# of the norms were the fastest on an H200.
DEFAULT: dict[tuple[str, int], Tile | Norm] = {
    ("attention", 16): Tile(128, 64, 8, 3),
    ("attention", 32): Tile(128, 64, 8, 3),
    ("attention", 64): Tile(128, 64, 8, 3),
    ("attention", 128): Tile(64, 32, 4, 3),  # 64 keys spill on sm_80 and sm_89
    ("one tile", 16): Tile(64, 128, 4, 1),
    ("one tile", 32): Tile(64, 128, 4, 1),
    ("one tile", 64): Tile(64, 128, 4, 1),
    ("sliced", 2): Tile(64, 64, 4, 2),  # bytes per element
    ("sliced", 4): Tile(64, 32, 8, 1),  # half of both spills on sm_80 with Triton 3.6
    ("group norm", 0): Norm(32768, 1, 16),  # a whole group: at most so many elements and warps
    ("group norm", 1): Norm(4096, 32, 4),  # tiles of larger groups
    ("layer norm", 0): Norm(2048, 1, 2),
    ("geglu", 0): Norm(2048, 256, 4),
}
# (device name as torch gives it, kernel, size) -> the setting that was fastest there.
MEASURED: dict[tuple[str, str, int], Tile | Norm] = {
    ("NVIDIA H200", "attention", 64): Tile(64, 64, 4, 3),
    ("NVIDIA H200", "attention", 128): Tile(64, 32, 4, 4),
    ("NVIDIA H200", "sliced", 2): Tile(64, 64, 4, 3),  # a third less; spills on sm_80
}

# Other settings worth timing on a GPU (`python -m bench.kernels --tune`). Each is listed whole: on
# Hopper a tile of 64 rows wants four warps, and one of 128 eight.
CANDIDATES: dict[tuple[str, int], list[Tile] | list[Norm]] = {
    ("attention", 32): [Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(64, 64, 4, 2),
                        Tile(64, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2),
                        Tile(128, 64, 8, 4), Tile(256, 64, 16, 3)],
    ("attention", 64): [Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2),
                        Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 4)],
    ("attention", 128): [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 4),
                         Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)],
    ("one tile", 32): [Tile(128, 128, 8, 1), Tile(128, 128, 4, 1), Tile(64, 128, 8, 1)],
    ("one tile", 64): [Tile(128, 128, 8, 1), Tile(64, 128, 8, 1)],
    ("sliced", 2): [Tile(64, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
                    Tile(64, 128, 8, 2), Tile(128, 128, 8, 2)],
    ("group norm", 0): [Norm(n, 1, w) for n, w in (
        (32768, 8), (16384, 16), (16384, 8), (8192, 16))],
    ("group norm", 1): [Norm(*setting) for setting in (
        (4096, 64, 8), (4096, 128, 4), (4096, 64, 4), (8192, 64, 8), (8192, 128, 8), (2048, 64, 4),
        (2048, 64, 2), (2048, 32, 2), (2048, 128, 2), (8192, 64, 4))],
    ("layer norm", 0): [Norm(1024, 1, 4), Norm(1024, 1, 2), Norm(2048, 1, 4), Norm(2048, 1, 8)],
    ("geglu", 0): [Norm(1024, 256, 4), Norm(1024, 256, 2), Norm(4096, 256, 4), Norm(4096, 256, 8),
                   Norm(2048, 512, 4)],
}


@overload
def setting(device: torch.device, kernel: AttentionKernel, size: int) -> Tile: ...
@overload
def setting(device: torch.device, kernel: NormKernel, size: int) -> Norm: ...
def setting(device: torch.device, kernel: str, size: int) -> Tile | Norm:
    """The fastest setting measured on such a device, or the default."""
    if device.type == "cuda" and MEASURED:
        row = (torch.cuda.get_device_name(device), kernel, size)
        return MEASURED.get(row, DEFAULT[kernel, size])
    return DEFAULT[kernel, size]


def interpreted(kernel) -> bool:
    """Whether Triton's interpreter stands in for the compiler (TRITON_INTERPRET=1)."""
    return not isinstance(kernel, triton.JITFunction)


def refusal(kernel, **tensors: Tensor) -> str | None:
    """Why no kernel takes these tensors, as a sentence; None if one may.

    They must share one device and have a dtype of DTYPES. "meta" tensors pass as those of a GPU.
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
    """Launch in order, on the device of the tensors; "meta" tensors launch nothing."""
    for call in calls:
        if call.args[0].device.type != "meta":
            with torch.cuda.device_of(call.args[0]):
                call.kernel[call.grid](
                    *call.args, **call.constants, num_warps=call.num_warps,
                    num_stages=call.num_stages,
                    enable_fp_fusion=True,  # off by default in some releases of Triton
                )
