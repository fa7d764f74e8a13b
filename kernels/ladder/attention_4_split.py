"""Attention, rung 4, split: the width of a head is two powers of two, and nearly nothing is padded.

    d = 40: 32 + 16 instead of 64      80: 64 + 16 instead of 128      160: 128 + 32 instead of 256

What changed from rung 3: a tile of q, k, v or acc is two tiles side by side, and a product is two
products. The second piece is at least 16 wide, so at d = 40 its last 8 columns are padding. This is
how ../ops/attention.py has it, which also leaves the second piece out where one is enough, does not
mask whole tiles, and chooses its tile sizes for each GPU.

Takes q (B, Lq, H*d), k and v (B, Lk, H*d), any strides of item and row, in fp16, bf16 or fp32; d up
to 256; any Lq, Lk >= 1. B batch, L rows (queries or keys), H heads, d channels a head.
"""

import torch
import triton
import triton.language as tl
from minisd_kernels.ladder.shared import Cost, block, check_attention, head, load, store
from minisd_kernels.ops import launch
from torch import Tensor


@triton.jit
def _kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stride_qb, stride_kb, stride_vb, stride_ob,
    stride_qm, stride_kn, stride_vn, stride_om, heads, seqlen_q, seqlen_k, scale,
    D: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    q_ptr, k_ptr = head(q_ptr, stride_qb, heads, D), head(k_ptr, stride_kb, heads, D)
    v_ptr, out_ptr = head(v_ptr, stride_vb, heads, D), head(out_ptr, stride_ob, heads, D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d1, offs_d2 = tl.arange(0, BLOCK_D1), BLOCK_D1 + tl.arange(0, BLOCK_D2)
    q1 = load(q_ptr, offs_m, stride_qm, offs_d1, seqlen_q, D)                # (BLOCK_M, BLOCK_D1)
    q2 = load(q_ptr, offs_m, stride_qm, offs_d2, seqlen_q, D)                # (BLOCK_M, BLOCK_D2)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_D1), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_D2), tl.float32)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k1 = load(k_ptr, offs_n, stride_kn, offs_d1, seqlen_k, D)            # (BLOCK_N, BLOCK_D1)
        k2 = load(k_ptr, offs_n, stride_kn, offs_d2, seqlen_k, D)            # (BLOCK_N, BLOCK_D2)
        v1 = load(v_ptr, offs_n, stride_vn, offs_d1, seqlen_k, D)            # (BLOCK_N, BLOCK_D1)
        v2 = load(v_ptr, offs_n, stride_vn, offs_d2, seqlen_k, D)            # (BLOCK_N, BLOCK_D2)
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")                 # (BLOCK_M, BLOCK_N)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee") * scale      # (BLOCK_M, BLOCK_N)
        s = tl.where((offs_n < seqlen_k)[None, :], s, float("-inf"))
        # Milakov & Gimelshein 2018 (https://arxiv.org/abs/1805.02867), Algorithm 3, and Dao et al.
        # 2022 (https://arxiv.org/abs/2205.14135), Algorithm 1
        m_new = tl.maximum(m_i, tl.max(s, 1))                                # (BLOCK_M,)
        alpha = tl.exp(m_i - m_new)                                          # (BLOCK_M,)
        p = tl.exp(s - m_new[:, None])                                       # (BLOCK_M, BLOCK_N)
        l_i = l_i * alpha + tl.sum(p, 1)                                     # (BLOCK_M,)
        acc1, acc2 = acc1 * alpha[:, None], acc2 * alpha[:, None]
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1, input_precision="ieee")      # (BLOCK_M, BLOCK_D1)
        acc2 = tl.dot(p.to(v2.dtype), v2, acc2, input_precision="ieee")      # (BLOCK_M, BLOCK_D2)
        m_i = m_new
    store(out_ptr, offs_m, stride_om, offs_d1, seqlen_q, acc1 / l_i[:, None], D)
    store(out_ptr, offs_m, stride_om, offs_d2, seqlen_q, acc2 / l_i[:, None], D)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: (B, Lq, H*d), contiguous, in the dtype of q.

    Raises ValueError for what is not taken (`check_attention`)."""
    check_attention(_kernel, q, k, v, heads)
    (batch, seqlen_q, _), seqlen_k, d = q.shape, k.shape[1], q.shape[2] // heads
    tensors = (q, k, v, out := torch.empty(q.shape, dtype=q.dtype, device=q.device))
    size = block(q.element_size())
    grid = (triton.cdiv(seqlen_q, size), batch * heads)
    args = (*tensors, *(x.stride(0) for x in tensors), *(x.stride(1) for x in tensors),
            heads, seqlen_q, seqlen_k, d**-0.5)
    d1, d2 = pieces(d)
    blocks = dict(D=d, BLOCK_D1=d1, BLOCK_D2=d2, BLOCK_M=size, BLOCK_N=size)
    launch.run([launch.Call(_kernel, grid, args, blocks, num_warps=4)])
    return out


def pieces(d: int) -> tuple[int, int]:
    """BLOCK_D1 and BLOCK_D2. Matrix units take no less than 16."""
    d1 = max(16, triton.next_power_of_2(d) // 2)
    return d1, max(16, triton.next_power_of_2(max(1, d - d1)))


def cost(batch: int, seqlen_q: int, seqlen_k: int, heads: int, d: int, itemsize: int) -> Cost:
    """A tile of queries reads the keys and the values once, and computes two products."""
    rows, size = batch * heads * seqlen_q, block(itemsize)
    tiles = batch * heads * triton.cdiv(seqlen_q, size)
    scores = tiles * triton.cdiv(seqlen_k, size) * size**2
    loaded = (rows + tiles * 2 * seqlen_k) * d * itemsize
    return Cost(1, 4 * scores * sum(pieces(d)), loaded, rows * d * itemsize)
