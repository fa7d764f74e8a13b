"""GEGLU in one pass over memory: value * GELU(gate), of the two halves of a projection.

Takes: h (..., 2C) in fp16, bf16 or fp32, contiguous. Returns (..., C). Refuses the rest with a
ValueError that says why: `refusal`.

The GELU is the exact one, with the error function: the tanh approximation is another function.

Source: Shazeer 2020, GLU Variants Improve Transformer; Hendrycks & Gimpel 2016 for GELU.

C channels of a half
"""

import triton
import triton.language as tl
from minisd_kernels import launch
from torch import Tensor


@triton.jit
def _kernel(h, out, n_rows, channels, COLS: tl.constexpr, ROWS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]           # (ROWS, 1)
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]           # (1, COLS)
    inside = (rows < n_rows) & (cols < channels)
    at = h + rows.to(tl.int64) * (2 * channels) + cols
    value = tl.load(at, mask=inside, other=0.0)                              # (ROWS, COLS)
    gate = tl.load(at + channels, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    # Rounded before the product, as GELU on its own would.
    y = value.to(tl.float32) * gelu.to(value.dtype).to(tl.float32)
    tl.store(out + rows.to(tl.int64) * channels + cols, y.to(value.dtype), mask=inside)


def refusal(h: Tensor) -> str | None:
    """Why the kernel does not take this, as a sentence; None if it does."""
    if h.dim() < 1 or h.numel() == 0 or h.shape[-1] % 2:
        return f"h is (..., 2C) with something in it, not {(*h.shape,)}"
    if not h.is_contiguous():
        return "h is not contiguous"
    return launch.refusal(_kernel, h=h)


def geglu(h: Tensor) -> Tensor:
    """h (..., 2C), contiguous -> the first half times the GELU of the second, (..., C).

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
    cols = min(triton.next_power_of_2(channels), tile.width)
    rows = tile.elements // cols
    grid = (triton.cdiv(n_rows, rows), triton.cdiv(channels, cols))
    return launch.Call(_kernel, grid, (h, out, n_rows, channels), dict(COLS=cols, ROWS=rows),
                       tile.warps)


def cost(elements: int, itemsize: int) -> launch.Cost:
    """The least work of one call: both halves read, ``elements`` written, an erf for each."""
    return launch.Cost(6 * elements, 3 * elements * itemsize, elements)
