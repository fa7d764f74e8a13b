"""Flash attention for any head width: softmax(q k^T / sqrt(d)) v, and the scores are never stored.

Takes    q (B, Lq, H*d), k and v (B, Lk, H*d), as a projection left them: any strides of item and
         row; fp16, bf16, fp32; d a multiple of 4 up to 256, and 512; any Lq, Lk >= 1. No tensor is
         transposed, copied or padded in memory.
Refuses  everything else, and gradients, with a ValueError that says why: `refusal`.
Tested   on an NVIDIA H200 at the sizes of SD1 and SD2 (proven.json), and against float64 in
         Triton's interpreter (tests/kernels/interpreted_attention.py).

One program computes BLOCK_M queries of one head:

         d = 40                 keys, BLOCK_N at a time
       +----+--+            +------+------+------+---+
       | 32 |16|  BLOCK_M   |  s   |  ->  |  ->  |   |     s = q k^T, then p = exp(s - m_i), and
       +----+--+            +------+------+------+---+     acc = alpha * acc + p v
         D1  D2                                  masked

`_kernel`: matrix units need powers of two, and d of SD1 is none. Padding 40, 80 and 160 to 64, 128
and 256 would cost 60% more work and spill registers, so two pieces cover d, BLOCK_D1 + BLOCK_D2:
32 + 16, 64 + 16, 128 + 32. A piece under 16 would not run on the matrix units. Up to 128 keys (77
in cross-attention) fit in one tile without the online softmax, unless BLOCK_D1 is 128.

`_sliced_kernel`: for a d over 160, where acc does not fit in registers (the VAE has one head of
512), and for float32, which has no matrix units without tf32. The product q k^T is summed over
chunks of BLOCK_D, and a program computes BLOCK_DV columns of the output, so each slice of the
output computes the scores again.

B batch, L rows (queries or keys), H heads, d channels a head
"""

import torch
import triton
import triton.language as tl
from minisd_kernels.ops import launch
from torch import Tensor

LOG2_E = 1.4426950408889634
WIDEST_IN_PIECES = 160
ONE_TILE_KEYS = 128
WIDEST_IN_ONE_TILE = 64  # BLOCK_D1: with 128 keys, 128 columns spill on sm_80
SLICES = {2: (64, 128), 4: (16, 64)}  # bytes per element -> BLOCK_D, BLOCK_DV
PRECISIONS = ("ieee", "tf32x3", "tf32")


@triton.jit
def _load(
    ptr, offs_r, stride_r, offs_d, n_rows, D: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
):
    """ptr[offs_r, offs_d]; zeros past the last row and past column D, where masked."""
    ptrs = ptr + offs_r[:, None] * stride_r + offs_d[None, :]                # (rows, columns)
    if MASK_ROWS and MASK_COLS:
        mask = (offs_r < n_rows)[:, None] & (offs_d < D)[None, :]
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=(offs_r < n_rows)[:, None], other=0.0)
    elif MASK_COLS:
        tile = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def _store(ptr, offs_r, stride_r, offs_d, n_rows, tile, D: tl.constexpr):
    """ptr[offs_r, offs_d] = tile, in the dtype of ptr, inside the rows and column D."""
    mask = (offs_r < n_rows)[:, None] & (offs_d < D)[None, :]                # (rows, columns)
    ptrs = ptr + offs_r[:, None] * stride_r + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head(
    q_ptr, k_ptr, v_ptr, out_ptr, stride_qb, stride_kb, stride_vb, stride_ob, heads,
    D: tl.constexpr,
):
    """Where the head of this program begins in each tensor."""
    off_b = (tl.program_id(1) // heads).to(tl.int64)
    off_h = (tl.program_id(1) % heads) * D
    return (q_ptr + off_b * stride_qb + off_h, k_ptr + off_b * stride_kb + off_h,
            v_ptr + off_b * stride_vb + off_h, out_ptr + off_b * stride_ob + off_h)


@triton.jit
def _mask(s, offs_m, offs_n, seqlen_k, MASK_N: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """-inf where there is no key, or where the key comes after the query."""
    if MASK_N:
        s = tl.where((offs_n < seqlen_k)[None, :], s, float("-inf"))
    if IS_CAUSAL:
        s = tl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
    return s


@triton.jit
def _online_softmax(s, m_i, l_i, qk_scale):
    """One tile of scores enters the softmax: p, the new m_i and l_i, and alpha, which rescales acc.
    """
    # Milakov & Gimelshein 2018 (https://arxiv.org/abs/1805.02867), and Dao 2023, Algorithm 1
    # (https://arxiv.org/abs/2307.08691). exp is a power of 2: qk_scale contains log2(e).
    # m_new = max(m_i, rowmax(s)), and a positive scale commutes with the maximum
    m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)                         # (BLOCK_M,)
    # p = exp(s - m_new),  alpha = exp(m_i - m_new),  l_new = alpha l_i + rowsum(p)
    p = tl.exp2(s * qk_scale - m_new[:, None])                               # (BLOCK_M, BLOCK_N)
    alpha = tl.exp2(m_i - m_new)                                             # (BLOCK_M,)
    return p, m_new, l_i * alpha + tl.sum(p, 1), alpha


@triton.jit
def _load_pieces(
    ptr, offs_r, stride_r, n_rows, D: tl.constexpr, BLOCK_D1: tl.constexpr,
    BLOCK_D2: tl.constexpr, MASK_ROWS: tl.constexpr,
):
    """Both pieces of a tile of rows; the first one twice if there is no second."""
    offs_d = tl.arange(0, BLOCK_D1)
    x1 = _load(ptr, offs_r, stride_r, offs_d, n_rows, D, MASK_ROWS, BLOCK_D1 > D)
    x2 = x1
    if BLOCK_D2 > 0:
        offs_d = BLOCK_D1 + tl.arange(0, BLOCK_D2)
        x2 = _load(ptr, offs_r, stride_r, offs_d, n_rows, D, MASK_ROWS, BLOCK_D1 + BLOCK_D2 > D)
    return x1, x2                                             # (rows, BLOCK_D1), (rows, BLOCK_D2)


@triton.jit
def _scores(q1, q2, k1, k2, offs_m, offs_n, seqlen_k, BLOCK_D2: tl.constexpr,
            MASK_N: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """s = q k^T over both pieces."""
    s = tl.dot(q1, tl.trans(k1))                                             # (BLOCK_M, BLOCK_N)
    if BLOCK_D2 > 0:
        s = tl.dot(q2, tl.trans(k2), s)
    return _mask(s, offs_m, offs_n, seqlen_k, MASK_N, IS_CAUSAL)


@triton.jit
def _add_pv(acc1, acc2, p, v1, v2, BLOCK_D2: tl.constexpr):
    """acc + p v, both pieces."""
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1)                                               # (BLOCK_M, BLOCK_D1)
    if BLOCK_D2 > 0:
        acc2 = tl.dot(p, v2, acc2)                                           # (BLOCK_M, BLOCK_D2)
    return acc1, acc2


@triton.jit
def _step(
    acc1, acc2, m_i, l_i, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, offs_m, start_n, seqlen_k,
    qk_scale, D: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_D2: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
):
    """One tile of keys."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k1, k2 = _load_pieces(k_ptr, offs_n, stride_kn, seqlen_k, D, BLOCK_D1, BLOCK_D2, MASK_N)
    v1, v2 = _load_pieces(v_ptr, offs_n, stride_vn, seqlen_k, D, BLOCK_D1, BLOCK_D2, MASK_N)
    s = _scores(q1, q2, k1, k2, offs_m, offs_n, seqlen_k, BLOCK_D2, MASK_N, IS_CAUSAL)
    p, m_i, l_i, alpha = _online_softmax(s, m_i, l_i, qk_scale)
    # Dao 2023, Algorithm 1: acc = alpha acc + p v
    acc1 = acc1 * alpha[:, None]
    if BLOCK_D2 > 0:
        acc2 = acc2 * alpha[:, None]
    acc1, acc2 = _add_pv(acc1, acc2, p, v1, v2, BLOCK_D2)
    return acc1, acc2, m_i, l_i


@triton.jit
def _kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stride_qb, stride_kb, stride_vb, stride_ob,
    stride_qm, stride_kn, stride_vn, stride_om, heads, seqlen_q, seqlen_k, qk_scale,
    D: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, IS_CAUSAL: tl.constexpr,
):
    q_ptr, k_ptr, v_ptr, out_ptr = _head(
        q_ptr, k_ptr, v_ptr, out_ptr, stride_qb, stride_kb, stride_vb, stride_ob, heads, D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # q1 (BLOCK_M, BLOCK_D1), q2 (BLOCK_M, BLOCK_D2)
    q1, q2 = _load_pieces(q_ptr, offs_m, stride_qm, seqlen_q, D, BLOCK_D1, BLOCK_D2, True)
    acc1 = tl.zeros((BLOCK_M, BLOCK_D1), tl.float32)
    acc2 = acc1  # not read if there is no second piece
    if BLOCK_D2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_D2), tl.float32)
    if ONE_TILE:
        offs_n = tl.arange(0, BLOCK_N)
        # Every load comes before the first product. Where a tile follows one of another width in
        # shared memory, ptxas 12.8 (of Triton 3.6) takes its address from a register that nothing
        # wrote; `python -m bench.compile` looks for such registers.
        k1, k2 = _load_pieces(k_ptr, offs_n, stride_kn, seqlen_k, D, BLOCK_D1, BLOCK_D2, True)
        v1, v2 = _load_pieces(v_ptr, offs_n, stride_vn, seqlen_k, D, BLOCK_D1, BLOCK_D2, True)
        s = _scores(q1, q2, k1, k2, offs_m, offs_n, seqlen_k, BLOCK_D2, True, IS_CAUSAL)
        p = tl.exp2((s - tl.max(s, 1)[:, None]) * qk_scale)                  # (BLOCK_M, BLOCK_N)
        l_i = tl.sum(p, 1)                                                   # (BLOCK_M,)
        acc1, acc2 = _add_pv(acc1, acc2, p, v1, v2, BLOCK_D2)
    else:
        m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        end_full = seqlen_k // BLOCK_N * BLOCK_N
        for start_n in range(0, end_full, BLOCK_N):
            acc1, acc2, m_i, l_i = _step(
                acc1, acc2, m_i, l_i, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, offs_m, start_n,
                seqlen_k, qk_scale, D, BLOCK_D1, BLOCK_D2, BLOCK_N, False, IS_CAUSAL)
        if end_full < seqlen_k:
            acc1, acc2, m_i, l_i = _step(
                acc1, acc2, m_i, l_i, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, offs_m, end_full,
                seqlen_k, qk_scale, D, BLOCK_D1, BLOCK_D2, BLOCK_N, True, IS_CAUSAL)
    # out = acc / l_i, once at the end (Dao 2023, Algorithm 1)
    _store(out_ptr, offs_m, stride_om, tl.arange(0, BLOCK_D1), seqlen_q, acc1 / l_i[:, None], D)
    if BLOCK_D2 > 0:
        offs_d = BLOCK_D1 + tl.arange(0, BLOCK_D2)
        _store(out_ptr, offs_m, stride_om, offs_d, seqlen_q, acc2 / l_i[:, None], D)


@triton.jit
def _sliced_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stride_qb, stride_kb, stride_vb, stride_ob,
    stride_qm, stride_kn, stride_vn, stride_om, heads, seqlen_q, seqlen_k, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    q_ptr, k_ptr, v_ptr, out_ptr = _head(
        q_ptr, k_ptr, v_ptr, out_ptr, stride_qb, stride_kb, stride_vb, stride_ob, heads, D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    # In float32 every product starts at zero and is added afterwards: a sum of a hundred numbers is
    # three times as far off as sums of sixteen. The addition is an fma by 1, because Triton would
    # merge a plain addition into the product. Half precision needs no such care, and its matrix
    # units would have to wait for each product.
    ADD_AFTER: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            # q (BLOCK_M, BLOCK_D), k (BLOCK_N, BLOCK_D)
            q = _load(q_ptr, offs_m, stride_qm, offs_d, seqlen_q, D, True, D % BLOCK_D > 0)
            k = _load(k_ptr, offs_n, stride_kn, offs_d, seqlen_k, D, True, D % BLOCK_D > 0)
            if ADD_AFTER:
                part = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                s = tl.fma(part, 1.0, s)
            else:
                s = tl.dot(q, tl.trans(k), s)
        s = _mask(s, offs_m, offs_n, seqlen_k, True, IS_CAUSAL)
        p, m_i, l_i, alpha = _online_softmax(s, m_i, l_i, qk_scale)
        # v (BLOCK_N, BLOCK_DV)
        v = _load(v_ptr, offs_n, stride_vn, offs_dv, seqlen_k, D, True, D % BLOCK_DV > 0)
        acc = acc * alpha[:, None]
        if ADD_AFTER:
            acc = tl.fma(tl.dot(p, v, input_precision=PRECISION), 1.0, acc)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc)
    _store(out_ptr, offs_m, stride_om, offs_dv, seqlen_q, acc / l_i[:, None], D)


def pieces(d: int) -> tuple[int, int]:
    """BLOCK_D1 and BLOCK_D2: the one or two powers of two, at least 16, that cover d best.

    BLOCK_D2 is 0 if one piece is best.
    """
    one = max(16, triton.next_power_of_2(d))
    d1 = one // 2
    d2 = max(16, triton.next_power_of_2(max(d - d1, 1)))
    return (d1, d2) if d1 >= 16 and d1 + d2 < one else (one, 0)


def refusal(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    """Why the kernel does not take these tensors, as a sentence; None if it does."""
    if not q.dim() == k.dim() == v.dim() == 3:
        return "q, k and v are (B, L, H*d)"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        return f"shapes do not fit: q {(*q.shape,)}, k {(*k.shape,)}, v {(*v.shape,)}"
    if 0 in q.shape or 0 in k.shape or heads < 1 or q.shape[2] % heads:
        return f"q {(*q.shape,)} and k {(*k.shape,)} do not split into {heads} heads"
    d = q.shape[2] // heads
    if d % 4 or d > 256 and d != 512:
        return f"a head of width {d}: it must be a multiple of 4 up to 256, or 512"
    if not q.dtype == k.dtype == v.dtype:
        return f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}"
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.stride(2) != 1:
            return f"the channels of {name} are not next to each other in memory"
        if abs(x.stride(1)) * x.shape[1] > launch.MAX_OFFSET:
            return f"{name} is too long: one item passes 2^31 elements"
    return launch.refusal(_kernel, q=q, k=k, v=v)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None, causal: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """softmax(q k^T * scale) v for every head; the same bits every time.

    q (B, Lq, H*d), k and v (B, Lk, H*d), rows anywhere in memory; returns (B, Lq, H*d), contiguous,
    in the dtype of q. ``scale`` is 1/sqrt(d) unless given. ``causal`` hides later keys.
    ``precision`` applies to float32 products only: "ieee", or "tf32x3" or "tf32" for matrix units.

    Raises ValueError with the sentence of `refusal`, or for a scale that is not positive.
    """
    if why := refusal(q, k, v, heads):
        raise ValueError(f"flash_attention: {why}")
    d = q.shape[2] // heads
    scale = d**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"flash_attention: scale must be positive, not {scale}")
    if precision not in PRECISIONS:
        raise ValueError(f"flash_attention: precision is one of {PRECISIONS}, not {precision!r}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch.run([plan(q, k, v, out, heads, scale, causal, precision)])
    return out


def plan(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: int, scale: float, causal: bool,
    precision: str,
) -> launch.Call:
    """The launch for these tensors: which kernel, and over which tiles."""
    (batch, seqlen_q, width), seqlen_k = q.shape, k.shape[1]
    tensors = (q, k, v, out)
    args = (*tensors, *(x.stride(0) for x in tensors), *(x.stride(1) for x in tensors),
            heads, seqlen_q, seqlen_k, scale * LOG2_E)
    d = width // heads
    sliced = d > WIDEST_IN_PIECES or q.dtype == torch.float32
    d1, d2 = pieces(d)
    if sliced:
        kernel, tile = _sliced_kernel, launch.setting(q.device, "sliced", q.element_size())
        block_d, block_dv = SLICES[q.element_size()]
        constants = dict(D=d, BLOCK_D=block_d, BLOCK_DV=block_dv, PRECISION=precision)
    else:
        one_tile = seqlen_k <= ONE_TILE_KEYS and d1 <= WIDEST_IN_ONE_TILE
        kernel = _kernel
        tile = launch.setting(q.device, "one tile" if one_tile else "attention", d1)
        constants = dict(D=d, BLOCK_D1=d1, BLOCK_D2=d2, ONE_TILE=one_tile)
    constants |= dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, IS_CAUSAL=causal)
    slices = triton.cdiv(d, block_dv) if sliced else 1
    grid = (triton.cdiv(seqlen_q, tile.block_m), batch * heads, slices)
    return launch.Call(kernel, grid, args, constants, tile.num_warps, tile.num_stages)


def cost(
    batch: int, seqlen_q: int, seqlen_k: int, heads: int, d: int, itemsize: int,
) -> launch.Cost:
    """The least work of one call: two products, 2 FLOP per multiply-add; an exponential per score.
    """
    scores = batch * heads * seqlen_q * seqlen_k
    elements = 2 * batch * heads * d * (seqlen_q + seqlen_k)
    return launch.Cost(4 * scores * d, elements * itemsize, scores)
