"""LayerNorm with the sum in front of it, in one pass over memory.

    s = x [+ shift] [+ residual]        what a transformer adds before each of its norms
    y = (s - mean) / sqrt(variance + eps) * weight + bias, over each row

Takes: x (..., C) in fp16, bf16 or fp32, contiguous, C up to 8192; a shift (C,), such as the bias of
the product before, which cuBLAS takes twice as long with; a residual of x's shape. Refuses the rest
with a ValueError that says why: `refusal`.

One program makes ROWS rows, each whole in registers: x is read once, and the variance is the mean
of centred squares.

Source: Ba, Kiros & Hinton 2016, Layer Normalization.

C channels (one row)
"""

import triton
import triton.language as tl
from minisd_kernels import launch
from torch import Tensor

WIDEST = 8192


@triton.jit
def _kernel(
    x, shift, residual, weight, bias, total, out, n_rows, eps, C: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]           # (ROWS, 1)
    cols = tl.arange(0, WIDTH)[None, :]                                      # (1, WIDTH)
    inside = (rows < n_rows) & (cols < C)
    at = rows.to(tl.int64) * C + cols
    s = tl.load(x + at, mask=inside, other=0.0)                              # (ROWS, WIDTH)
    dtype = s.dtype
    s = s.to(tl.float32)
    if SHIFT:
        s += tl.load(shift + cols, mask=cols < C, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if SHIFT or RESIDUAL:
        tl.store(total + at, s.to(dtype), mask=inside)
        s = s.to(dtype).to(tl.float32)  # as the addition on its own would round
    mean = tl.sum(s, 1)[:, None] / C                                         # (ROWS, 1)
    s = tl.where(cols < C, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1)[:, None] / C + eps)             # (ROWS, 1)
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(out + at, (s * rstd * w + b).to(dtype), mask=inside)


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    shift: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these, as a sentence; None if it does."""
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
    """(y, s): the LayerNorm of s over the last axis, and s = x + shift + residual (x itself without
    both), rounded to x's dtype.

    x and residual (..., C), contiguous; shift, weight and bias (C,). Raises ValueError with the
    sentence of `refusal`.
    """
    if why := refusal(x, weight, bias, residual, shift):
        raise ValueError(f"layer_norm: {why}")
    out = x.new_empty(x.shape)
    total = x if residual is None and shift is None else x.new_empty(x.shape)
    launch.run([plan(x, residual, weight, bias, total, out, eps, shift)])
    return out, total


def plan(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, total: Tensor, out: Tensor,
    eps: float, shift: Tensor | None = None,
) -> launch.Call:
    """The launch for these tensors: as many rows a program as fill a tile."""
    channels = x.shape[-1]
    n_rows = x.numel() // channels
    tile = launch.setting(x.device, "layer norm", 0)
    width = triton.next_power_of_2(channels)
    rows = max(1, tile.elements // width)
    sizes = dict(C=channels, WIDTH=width, ROWS=rows, SHIFT=shift is not None,
                 RESIDUAL=residual is not None)
    # The type is a comment because code that was measured stays as it is (proof.py).
    args = (  # type: tuple
        x, weight if shift is None else shift, x if residual is None else residual)
    args += (weight, bias, total, out, n_rows, eps)
    return launch.Call(_kernel, (triton.cdiv(n_rows, rows),), args, sizes, tile.warps)


def cost(elements: int, itemsize: int, residual: bool = False, shift: bool = False) -> launch.Cost:
    """The least work of one call: x read and y written; the residual read, and s written."""
    moved = 2 + residual + (residual or shift)
    return launch.Cost((8 + residual + shift) * elements, moved * elements * itemsize, 0)
