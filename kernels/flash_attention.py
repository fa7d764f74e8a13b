"""Flash attention for any head width: softmax(q k^T / sqrt(d)) v without ever storing the scores.

q, k and v are read where a projection left them, (B, L, H*d) with any strides of item and row, and
the result is written the same way: no transpose, no copy, no padding of d in memory.

Takes: fp16, bf16, fp32; d a multiple of 4 up to 256, and 512; any Lq, Lk >= 1. Refuses the rest
with a ValueError that says why: `refusal`.

One program makes one tile of queries of one head:

         d = 40                     keys, a tile at a time
       +----+--+            +------+------+------+---+
       | 32 |16|  queries   |  s   |  ->  |  ->  |   |     s = q k^T, then p = 2^(s - top), and
       +----+--+            +------+------+------+---+     o = o * 2^(old top - top) + p v
         A    B                                  ragged

`_kernel`: the matrix units want powers of two, and d is none in SD1. 40, 80 and 160 padded to 64,
128 and 256 would cost 60% more work and spill registers, so d is covered by two named pieces,
A + B: 32 + 16, 64 + 16, 128 + 32. A piece under 16 would fall off the matrix units. Up to 128 keys
(77 in cross-attention) make one tile, and no online softmax, but where A is 128.

`_sliced_kernel`: where o does not fit in registers, at d over 160 (the VAE has one head of 512),
and in float32, which has no matrix units without tf32. Scores are summed over chunks of d, and a
program writes one slice of the output's columns, so that scores are made anew for each slice.

Source: Dao et al. 2022, FlashAttention; Milakov & Gimelshein 2018, the online softmax.

B batch, L rows (queries or keys), H heads, d channels a head
"""

import torch
import triton
import triton.language as tl
from minisd_kernels import launch
from torch import Tensor

LOG2_E = 1.4426950408889634
WIDEST_IN_PIECES = 160
ONE_TILE_KEYS = 128
WIDEST_IN_ONE_TILE = 64  # of piece A: with 128 keys a piece of 128 spills on sm_80
SLICES = {2: (64, 128), 4: (16, 64)}  # by bytes an element: a chunk of d, a slice of the output
PRECISIONS = ("ieee", "tf32x3", "tf32")


@triton.jit
def _tile(
    base, rows, stride, cols, n_rows, D: tl.constexpr,
    RAGGED_ROWS: tl.constexpr, RAGGED_COLS: tl.constexpr,
):
    """base[rows, cols]; zeros past the last row and past column D, where these may be reached."""
    at = base + rows[:, None] * stride + cols[None, :]                       # (rows, cols)
    if RAGGED_ROWS and RAGGED_COLS:
        tile = tl.load(at, mask=(rows < n_rows)[:, None] & (cols < D)[None, :], other=0.0)
    elif RAGGED_ROWS:
        tile = tl.load(at, mask=(rows < n_rows)[:, None], other=0.0)
    elif RAGGED_COLS:
        tile = tl.load(at, mask=(cols < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _store(base, rows, stride, cols, n_rows, tile, D: tl.constexpr):
    """base[rows, cols] = tile, in base's dtype, inside the rows and column D."""
    inside = (rows < n_rows)[:, None] & (cols < D)[None, :]
    at = base + rows[:, None] * stride + cols[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _head(q, k, v, out, q_b, k_b, v_b, out_b, heads, D: tl.constexpr):
    """Where this program's head begins in each tensor."""
    item = (tl.program_id(1) // heads).to(tl.int64)
    column = (tl.program_id(1) % heads) * D
    return (q + item * q_b + column, k + item * k_b + column, v + item * v_b + column,
            out + item * out_b + column)


@triton.jit
def _hide(s, queries, keys, n_keys, RAGGED: tl.constexpr, CAUSAL: tl.constexpr):
    """-inf where there is no key, or a later one than the query."""
    if RAGGED:
        s = tl.where((keys < n_keys)[None, :], s, float("-inf"))
    if CAUSAL:
        s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
    return s


@triton.jit
def _weigh(s, top, total, scale):
    """The online softmax takes in a tile: p, the new top and total, and by what o shrinks."""
    # scale is positive, so the top of the scaled scores is the scaled top.
    new_top = tl.maximum(top, tl.max(s, 1) * scale)                          # (queries,)
    p = tl.exp2(s * scale - new_top[:, None])                                # (queries, keys)
    shrink = tl.exp2(top - new_top)                                          # (queries,)
    return p, new_top, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def _pieces(
    base, rows, stride, n_rows, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Both pieces of a tile of rows; the first twice where there is but one."""
    a = _tile(base, rows, stride, tl.arange(0, A), n_rows, D, RAGGED, A > D)  # (rows, A)
    b = a
    if B > 0:
        b = _tile(base, rows, stride, A + tl.arange(0, B), n_rows, D, RAGGED, A + B > D)
    return a, b                                                              # (rows, B)


@triton.jit
def _scores(q_a, q_b, k_a, k_b, queries, keys, n_keys, B: tl.constexpr,
            RAGGED: tl.constexpr, CAUSAL: tl.constexpr):
    """q k^T over both pieces."""
    s = tl.dot(q_a, tl.trans(k_a))                                           # (queries, keys)
    if B > 0:
        s = tl.dot(q_b, tl.trans(k_b), s)
    return _hide(s, queries, keys, n_keys, RAGGED, CAUSAL)


@triton.jit
def _add(o_a, o_b, p, v_a, v_b, B: tl.constexpr):
    """o + p v, both pieces."""
    p = p.to(v_a.dtype)
    o_a = tl.dot(p, v_a, o_a)                                                # (queries, A)
    if B > 0:
        o_b = tl.dot(p, v_b, o_b)                                            # (queries, B)
    return o_a, o_b


@triton.jit
def _step(
    o_a, o_b, top, total, q_a, q_b, k, v, k_l, v_l, queries, start, n_keys, scale,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr,
    RAGGED: tl.constexpr, CAUSAL: tl.constexpr,
):
    """One tile of keys."""
    keys = start + tl.arange(0, KEYS)
    k_a, k_b = _pieces(k, keys, k_l, n_keys, D, A, B, RAGGED)
    v_a, v_b = _pieces(v, keys, v_l, n_keys, D, A, B, RAGGED)
    s = _scores(q_a, q_b, k_a, k_b, queries, keys, n_keys, B, RAGGED, CAUSAL)
    p, top, total, shrink = _weigh(s, top, total, scale)
    o_a = o_a * shrink[:, None]
    if B > 0:
        o_b = o_b * shrink[:, None]
    o_a, o_b = _add(o_a, o_b, p, v_a, v_b, B)
    return o_a, o_b, top, total


@triton.jit
def _kernel(
    q, k, v, out, q_b, k_b, v_b, out_b, q_l, k_l, v_l, out_l, heads, n_queries, n_keys, scale,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, ONE_TILE: tl.constexpr, CAUSAL: tl.constexpr,
):
    q, k, v, out = _head(q, k, v, out, q_b, k_b, v_b, out_b, heads, D)
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    q_a, q_b = _pieces(q, queries, q_l, n_queries, D, A, B, True)            # (queries, A and B)
    o_a = tl.zeros((QUERIES, A), tl.float32)
    o_b = o_a  # never looked at where there is no second piece
    if B > 0:
        o_b = tl.zeros((QUERIES, B), tl.float32)
    if ONE_TILE:
        keys = tl.arange(0, KEYS)
        # All is loaded before the first product. ptxas 12.8, which Triton 3.6 brings, takes a
        # register that nothing wrote for the address of a tile in shared memory, where one of
        # another width lay before it (`python -m bench.compile` looks for such registers).
        k_a, k_b = _pieces(k, keys, k_l, n_keys, D, A, B, True)
        v_a, v_b = _pieces(v, keys, v_l, n_keys, D, A, B, True)
        s = _scores(q_a, q_b, k_a, k_b, queries, keys, n_keys, B, True, CAUSAL)
        p = tl.exp2((s - tl.max(s, 1)[:, None]) * scale)                     # (queries, keys)
        total = tl.sum(p, 1)                                                 # (queries,)
        o_a, o_b = _add(o_a, o_b, p, v_a, v_b, B)
    else:
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        whole = n_keys // KEYS * KEYS
        for start in range(0, whole, KEYS):
            o_a, o_b, top, total = _step(o_a, o_b, top, total, q_a, q_b, k, v, k_l, v_l, queries,
                                         start, n_keys, scale, D, A, B, KEYS, False, CAUSAL)
        if whole < n_keys:
            o_a, o_b, top, total = _step(o_a, o_b, top, total, q_a, q_b, k, v, k_l, v_l, queries,
                                         whole, n_keys, scale, D, A, B, KEYS, True, CAUSAL)
    _store(out, queries, out_l, tl.arange(0, A), n_queries, o_a / total[:, None], D)
    if B > 0:
        _store(out, queries, out_l, A + tl.arange(0, B), n_queries, o_b / total[:, None], D)


@triton.jit
def _sliced_kernel(
    q, k, v, out, q_b, k_b, v_b, out_b, q_l, k_l, v_l, out_l, heads, n_queries, n_keys, scale,
    D: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    q, k, v, out = _head(q, k, v, out, q_b, k_b, v_b, out_b, heads, D)
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    columns = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    o = tl.zeros((QUERIES, SLICE), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    # In float32 each product begins at zero and is added afterwards: a sum of a hundred numbers is
    # three times as far off as sums of sixteen. The addition is an fma by 1, because of a plain sum
    # Triton makes a product that begins at the other summand. The matrix units need no such care,
    # and would have to wait for each product.
    APART: tl.constexpr = q.dtype.element_ty == tl.float32
    for start in range(0, n_keys, KEYS):
        keys = start + tl.arange(0, KEYS)
        s = tl.zeros((QUERIES, KEYS), tl.float32)
        for chunk in range(0, D, CHUNK):
            c = chunk + tl.arange(0, CHUNK)
            q_c = _tile(q, queries, q_l, c, n_queries, D, True, D % CHUNK > 0)  # (queries, CHUNK)
            k_c = _tile(k, keys, k_l, c, n_keys, D, True, D % CHUNK > 0)     # (keys, CHUNK)
            if APART:
                part = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
                s = tl.fma(part, 1.0, s)
            else:
                s = tl.dot(q_c, tl.trans(k_c), s)
        s = _hide(s, queries, keys, n_keys, True, CAUSAL)
        p, top, total, shrink = _weigh(s, top, total, scale)
        v_s = _tile(v, keys, v_l, columns, n_keys, D, True, D % SLICE > 0)   # (keys, SLICE)
        o = o * shrink[:, None]
        if APART:
            o = tl.fma(tl.dot(p, v_s, input_precision=PRECISION), 1.0, o)
        else:
            o = tl.dot(p.to(v_s.dtype), v_s, o)
    _store(out, queries, out_l, columns, n_queries, o / total[:, None], D)


def pieces(d: int) -> tuple[int, int]:
    """The one or two powers of two, 16 at least, that cover d best; (A, 0) is one."""
    one = max(16, triton.next_power_of_2(d))
    a = one // 2
    b = max(16, triton.next_power_of_2(max(d - a, 1)))
    return (a, b) if a >= 16 and a + b < one else (one, 0)


def refusal(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    """Why the kernel does not take these, as a sentence; None if it does."""
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
    in q's dtype. ``scale`` is 1/sqrt(d) unless given. ``causal`` hides later keys. ``precision`` is
    of float32 products only: "ieee", or "tf32x3" or "tf32" for those who want matrix units.

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
    """The launch for these tensors: which kernel, over which tiles."""
    (batch, n_queries, width), n_keys = q.shape, k.shape[1]
    tensors = (q, k, v, out)
    args = (*tensors, *(x.stride(0) for x in tensors), *(x.stride(1) for x in tensors),
            heads, n_queries, n_keys, scale * LOG2_E)
    d = width // heads
    sliced = d > WIDEST_IN_PIECES or q.dtype == torch.float32
    a, b = pieces(d)
    if sliced:
        kernel, tile = _sliced_kernel, launch.setting(q.device, "sliced", q.element_size())
        chunk, columns = SLICES[q.element_size()]
        sizes = dict(D=d, CHUNK=chunk, SLICE=columns, PRECISION=precision)
    else:
        one_tile = n_keys <= ONE_TILE_KEYS and a <= WIDEST_IN_ONE_TILE
        kernel = _kernel
        tile = launch.setting(q.device, "one tile" if one_tile else "attention", a)
        sizes = dict(D=d, A=a, B=b, ONE_TILE=one_tile)
    sizes |= dict(QUERIES=tile.queries, KEYS=tile.keys, CAUSAL=causal)
    slices = triton.cdiv(d, columns) if sliced else 1
    grid = (triton.cdiv(n_queries, tile.queries), batch * heads, slices)
    return launch.Call(kernel, grid, args, sizes, tile.warps, tile.stages)


def cost(batch: int, n_queries: int, n_keys: int, heads: int, d: int, itemsize: int) -> launch.Cost:
    """The least work of one call: two products, 2 FLOP a multiply-add; an exponential a score."""
    scores = batch * heads * n_queries * n_keys
    elements = 2 * batch * heads * d * (n_queries + n_keys)
    return launch.Cost(4 * scores * d, elements * itemsize, scores)
