"""LayerNorm and the sum in front of it, in one pass over memory.

    s = x [+ shift] [+ residual]        what a transformer adds before each of its norms
    y = (s - mean) / sqrt(var + eps) * weight + bias, over each row

Takes    x (..., C) in fp16, bf16 or fp32, contiguous, C up to 8192; a shift (C,), such as the bias
         of the product before, which doubles the time of that product in cuBLAS; a residual in the
         shape of x.
Refuses  everything else, and gradients, with a ValueError that says why: `refusal`.
Tested   on an NVIDIA H200 at the sizes of SD1 and SD2 (proven.json), and against float64 in
         Triton's interpreter (tests/kernels/interpreted_fused.py).

One program computes BLOCK_M rows and holds each in registers: it reads x once, and the variance is
the mean of centred squares.

C channels (one row)
"""

import triton
import triton.language as tl
from minisd_kernels.ops import launch
from torch import Tensor

WIDEST = 8192


@triton.jit
def _kernel(
    x_ptr, shift_ptr, residual_ptr, weight_ptr, bias_ptr, s_ptr, out_ptr, n_rows, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]   # (BLOCK_M, 1)
    offs_c = tl.arange(0, BLOCK_C)[None, :]                                  # (1, BLOCK_C)
    mask = (offs_m < n_rows) & (offs_c < C)
    offs = offs_m.to(tl.int64) * C + offs_c
    s = tl.load(x_ptr + offs, mask=mask, other=0.0)                          # (BLOCK_M, BLOCK_C)
    dtype = s.dtype
    s = s.to(tl.float32)
    if HAS_SHIFT:
        s += tl.load(shift_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT or HAS_RESIDUAL:
        tl.store(s_ptr + offs, s.to(dtype), mask=mask)
        s = s.to(dtype).to(tl.float32)  # rounded as a separate addition would round it
    # Ba, Kiros & Hinton 2016 (https://arxiv.org/abs/1607.06450):
    # y = (s - mean) / sqrt(var + eps) * weight + bias
    mean = tl.sum(s, 1)[:, None] / C                                         # (BLOCK_M, 1)
    s = tl.where(offs_c < C, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1)[:, None] / C + eps)             # (BLOCK_M, 1)
    weight = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (s * rstd * weight + bias).to(dtype), mask=mask)


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    shift: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these tensors, as a sentence; None if it does."""
    channels = x.shape[-1] if x.dim() else 0
    if x.numel() == 0 or channels > WIDEST:
        return f"x is (..., C) with 1 to {WIDEST} channels, not {(*x.shape,)}"
    tensors = {"x": x, "weight": weight, "bias": bias}
    if residual is not None:
        tensors["residual"] = residual
        if residual.shape != x.shape or residual.dtype != x.dtype:
            return f"residual is {(*residual.shape,)} {residual.dtype}, x {(*x.shape,)} {x.dtype}"
    if shift is not None:
        tensors["shift"] = shift
        if shift.shape != (channels,):
            return f"shift is {(*shift.shape,)}, not ({channels},)"
    for name, t in tensors.items():
        if not t.is_contiguous():
            return f"{name} is not contiguous"
    if weight.shape != (channels,) or bias.shape != (channels,):
        return f"weight {(*weight.shape,)} and bias {(*bias.shape,)} are not both ({channels},)"
    return launch.refusal(_kernel, **tensors)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s): the LayerNorm of s over the last axis, and s = x + shift + residual, rounded to the
    dtype of x (s is x itself without either).

    x and residual (..., C), contiguous; shift, weight and bias (C,). Raises ValueError with the
    sentence of `refusal`.
    """
    if why := refusal(x, weight, bias, residual, shift):
        raise ValueError(f"layer_norm: {why}")
    out = x.new_empty(x.shape)
    s = x if residual is None and shift is None else x.new_empty(x.shape)
    launch.run([plan(x, residual, weight, bias, s, out, eps, shift)])
    return out, s


def plan(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, s: Tensor, out: Tensor,
    eps: float, shift: Tensor | None = None,
) -> launch.Call:
    """The launch for these tensors: as many rows per program as fill a tile."""
    channels = x.shape[-1]
    n_rows = x.numel() // channels
    tile = launch.setting(x.device, "layer norm", 0)
    block_c = triton.next_power_of_2(channels)
    block_m = max(1, tile.elements // block_c)
    constants = dict(C=channels, BLOCK_C=block_c, BLOCK_M=block_m, HAS_SHIFT=shift is not None,
                     HAS_RESIDUAL=residual is not None)
    args = (x, weight if shift is None else shift, x if residual is None else residual,
            weight, bias, s, out, n_rows, eps)
    return launch.Call(_kernel, (triton.cdiv(n_rows, block_m),), args, constants, tile.num_warps)


def cost(elements: int, itemsize: int, residual: bool = False, shift: bool = False) -> launch.Cost:
    """The least work of one call: it reads x, writes y, reads the residual and writes s."""
    moved = 2 + residual + (residual or shift)
    return launch.Cost((8 + residual + shift) * elements, moved * elements * itemsize, 0)
