"""Attention, rung 3, the online softmax: one pass over the keys.

    m_new = max(m_i, the scores of this tile)      the largest score so far
    alpha = exp(m_i - m_new)                       corrects what was summed with the old maximum
    l_i = alpha l_i + sum(p),  acc = alpha acc + p v

What changed from rung 2: the first pass is gone, and with it a third of the FLOPs and of the bytes
loaded. The maximum is not known before the last key, so p is computed with the largest score so
far, and when a larger one comes, alpha rescales the sums. No approximation: exp(s - m_i) times
exp(m_i - m_new) is exp(s - m_new).

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
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    q_ptr, k_ptr = head(q_ptr, stride_qb, heads, D), head(k_ptr, stride_kb, heads, D)
    v_ptr, out_ptr = head(v_ptr, stride_vb, heads, D), head(out_ptr, stride_ob, heads, D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q = load(q_ptr, offs_m, stride_qm, offs_d, seqlen_q, D)                  # (BLOCK_M, BLOCK_D)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load(k_ptr, offs_n, stride_kn, offs_d, seqlen_k, D)              # (BLOCK_N, BLOCK_D)
        v = load(v_ptr, offs_n, stride_vn, offs_d, seqlen_k, D)              # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale           # (BLOCK_M, BLOCK_N)
        s = tl.where((offs_n < seqlen_k)[None, :], s, float("-inf"))
        # Milakov & Gimelshein 2018 (https://arxiv.org/abs/1805.02867), Algorithm 3, and Dao et al.
        # 2022 (https://arxiv.org/abs/2205.14135), Algorithm 1
        m_new = tl.maximum(m_i, tl.max(s, 1))                                # (BLOCK_M,)
        alpha = tl.exp(m_i - m_new)                                          # (BLOCK_M,)
        p = tl.exp(s - m_new[:, None])                                       # (BLOCK_M, BLOCK_N)
        l_i = l_i * alpha + tl.sum(p, 1)                                     # (BLOCK_M,)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")          # (BLOCK_M, BLOCK_D)
        m_i = m_new
    store(out_ptr, offs_m, stride_om, offs_d, seqlen_q, acc / l_i[:, None], D)


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
    blocks = dict(D=d, BLOCK_D=padded(d), BLOCK_M=size, BLOCK_N=size)
    launch.run([launch.Call(_kernel, grid, args, blocks, num_warps=4)])
    return out


def padded(d: int) -> int:
    """BLOCK_D. Matrix units take no less than 16."""
    return max(16, triton.next_power_of_2(d))


def cost(batch: int, seqlen_q: int, seqlen_k: int, heads: int, d: int, itemsize: int) -> Cost:
    """A tile of queries reads the keys and the values once, and computes two products."""
    rows, size = batch * heads * seqlen_q, block(itemsize)
    tiles = batch * heads * triton.cdiv(seqlen_q, size)
    scores = tiles * triton.cdiv(seqlen_k, size) * size**2
    loaded = (rows + tiles * 2 * seqlen_k) * d * itemsize
    return Cost(1, 4 * scores * padded(d), loaded, rows * d * itemsize)
