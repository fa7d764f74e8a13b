"""What the rungs share: tiles of a head are read and written, tensors checked, work counted."""

from typing import NamedTuple

import triton
import triton.language as tl
from minisd_kernels.ops import launch
from torch import Tensor


class Cost(NamedTuple):
    """What the programs of one call do, all together, whether a cache helps them or not."""

    launches: int
    flops: int  # of whole tiles, padding too. Attention: the products; GroupNorm: each operation
    loaded: int  # bytes
    stored: int  # bytes
    scratch: int = 0  # bytes of memory that the call takes for itself


def block(itemsize: int) -> int:
    """BLOCK_M and BLOCK_N: 64 rows are what the matrix units of sm_90 take. Those have no float32,
    for which a tile must fit in registers."""
    return 64 if itemsize == 2 else 16


@triton.jit
def head(ptr, stride_b, heads, D: tl.constexpr):
    """Where the head of this program begins. program_id(1) counts the heads of all items."""
    off_b, off_h = tl.program_id(1) // heads, tl.program_id(1) % heads
    return ptr + off_b.to(tl.int64) * stride_b + off_h * D


@triton.jit
def load(ptr, offs_r, stride_r, offs_d, n_rows, D: tl.constexpr):
    """The tile ptr[offs_r, offs_d]; zeros past the last row and past column D."""
    mask = (offs_r < n_rows)[:, None] & (offs_d < D)[None, :]                # (rows, columns)
    return tl.load(ptr + offs_r[:, None] * stride_r + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store(ptr, offs_r, stride_r, offs_d, n_rows, tile, D: tl.constexpr):
    """ptr[offs_r, offs_d] = tile, in the dtype of ptr, inside the rows and column D."""
    mask = (offs_r < n_rows)[:, None] & (offs_d < D)[None, :]                # (rows, columns)
    ptrs = ptr + offs_r[:, None] * stride_r + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


def check_attention(kernel, q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    """Raises ValueError, with a sentence, for what no rung of attention takes."""
    shapes = f"q {(*q.shape,)}, k {(*k.shape,)}, v {(*v.shape,)}, {heads} heads"
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape != v.shape or 0 in (*q.shape, *k.shape):
        raise ValueError(f"q is (B, Lq, H*d), k and v are (B, Lk, H*d), not {shapes}")
    if q.shape[::2] != k.shape[::2] or heads < 1 or q.shape[2] % heads:
        raise ValueError(f"shapes do not fit: {shapes}")
    if q.shape[2] // heads > 256:
        raise ValueError(f"a head is at most 256 wide, not {q.shape[2] // heads}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        raise ValueError("the channels of q, k or v are not next to each other in memory")
    if max(abs(x.stride(1)) * x.shape[1] for x in (q, k, v)) > launch.MAX_OFFSET:
        raise ValueError("one item passes 2^31 elements")
    if why := launch.refusal(kernel, q=q, k=k, v=v):
        raise ValueError(why)


def check_group_norm(
    kernel, x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raises ValueError, with a sentence, for what no rung of GroupNorm takes."""
    if x.dim() < 3 or 0 in x.shape or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x {(*x.shape,)} is not (B, C, H, W) with {groups} groups of channels")
    images = {"x": x} | ({} if residual is None else {"residual": residual})
    rows = {"weight": weight, "bias": bias} | ({} if shift is None else {"shift": shift})
    for name, image in images.items():
        if image.shape != x.shape or image.dtype != x.dtype or not image.is_contiguous():
            raise ValueError(f"{name} must be contiguous, {(*x.shape,)} and {x.dtype}")
    for name, row in rows.items():
        shapes = [(x.shape[1],)] + [(*x.shape[:2],)] * (name == "shift")
        if tuple(row.shape) not in shapes or row.stride(-1) != 1:
            raise ValueError(f"{name} is {(*row.shape,)}, not {' or '.join(map(str, shapes))}")
    if x[0].numel() > launch.MAX_OFFSET:
        raise ValueError("one item passes 2^31 elements")
    if why := launch.refusal(kernel, **images, **rows):
        raise ValueError(why)
