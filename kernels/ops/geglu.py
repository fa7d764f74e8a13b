"""GEGLU in one pass over memory: value * GELU(gate), of the two halves of a projection.

Takes    h (..., 2C) in fp16, bf16 or fp32, contiguous; returns (..., C).
Refuses  everything else, and gradients, with a ValueError that says why: `refusal`.
Tested   on an NVIDIA H200 at the sizes of SD1 and SD2 (proven.json), and against float64 in
         Triton's interpreter (tests/kernels/interpreted_fused.py).

The GELU is the exact one, with the error function: the tanh approximation is another function.

C channels of a half
"""

import triton
import triton.language as tl
from minisd_kernels.ops import launch
from torch import Tensor


@triton.jit
def _kernel(h_ptr, out_ptr, n_rows, channels, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]   # (BLOCK_M, 1)
    offs_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]   # (1, BLOCK_C)
    mask = (offs_m < n_rows) & (offs_c < channels)
    ptrs = h_ptr + offs_m.to(tl.int64) * (2 * channels) + offs_c
    value = tl.load(ptrs, mask=mask, other=0.0)                              # (BLOCK_M, BLOCK_C)
    gate = tl.load(ptrs + channels, mask=mask, other=0.0).to(tl.float32)
    # Hendrycks & Gimpel 2016 (https://arxiv.org/abs/1606.08415):
    # GELU(x) = x Phi(x) = x / 2 * (1 + erf(x / sqrt(2)))
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    # Shazeer 2020 (https://arxiv.org/abs/2002.05202): GEGLU = value * GELU(gate). A separate GELU
    # would round its result, so this one is rounded before the product.
    y = value.to(tl.float32) * gelu.to(value.dtype).to(tl.float32)
    ptrs = out_ptr + offs_m.to(tl.int64) * channels + offs_c
    tl.store(ptrs, y.to(value.dtype), mask=mask)


def refusal(h: Tensor) -> str | None:
    """Why the kernel does not take this tensor, as a sentence; None if it does."""
    if h.dim() < 1 or h.numel() == 0 or h.shape[-1] % 2:
        return f"h is (..., 2C) with something in it, not {(*h.shape,)}"
    if not h.is_contiguous():
        return "h is not contiguous"
    return launch.refusal(_kernel, h=h)


def geglu(h: Tensor) -> Tensor:
    """h (..., 2C), contiguous -> (..., C), the first half times the GELU of the second.

    Raises ValueError with the sentence of `refusal`.
    """
    if why := refusal(h):
        raise ValueError(f"geglu: {why}")
    out = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
    launch.run([plan(h, out)])
    return out


def plan(h: Tensor, out: Tensor) -> launch.Call:
    """The launch for these tensors."""
    channels = out.shape[-1]
    n_rows = out.numel() // channels
    tile = launch.setting(h.device, "geglu", 0)
    block_c = min(triton.next_power_of_2(channels), tile.block_c)
    block_m = tile.elements // block_c
    grid = (triton.cdiv(n_rows, block_m), triton.cdiv(channels, block_c))
    constants = dict(BLOCK_C=block_c, BLOCK_M=block_m)
    return launch.Call(_kernel, grid, (h, out, n_rows, channels), constants, tile.num_warps)


def cost(elements: int, itemsize: int) -> launch.Cost:
    """The least work of one call: both halves read, ``elements`` written, one erf for each."""
    return launch.Cost(6 * elements, 3 * elements * itemsize, elements)
