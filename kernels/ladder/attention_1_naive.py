"""Attention, rung 1, naive: three launches, as the formula is read, and the scores are stored.

    scores = q k^T / sqrt(d)      _scores_kernel: a program computes one query's row of scores
    p = softmax(scores)           _softmax_kernel: a program overwrites one row
    out = p v                     _values_kernel: a program computes one query's row of the output

A program is one run of a function below; program_id says which one it is. It has one query, so it
reads all keys for that query alone. Products are sums of multiplications: matrix units are idle.

Takes q (B, Lq, H*d), k and v (B, Lk, H*d), any strides of item and row, in fp16, bf16 or fp32; d up
to 256; Lk up to 2^20, as a row of scores is one block. B batch, L rows (queries or keys), H heads,
d channels a head.
"""

import torch
import triton
import triton.language as tl
from minisd_kernels.ladder.shared import Cost, check_attention, head, load
from minisd_kernels.ops import launch
from torch import Tensor

BLOCK_N = 64


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, scores_ptr, stride_qb, stride_kb, stride_qm, stride_kn, heads, seqlen_q, seqlen_k,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    off_m = tl.program_id(0)
    q_ptr, k_ptr = head(q_ptr, stride_qb, heads, D), head(k_ptr, stride_kb, heads, D)
    scores_ptr += (tl.program_id(1).to(tl.int64) * seqlen_q + off_m) * seqlen_k
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + off_m * stride_qm + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load(k_ptr, offs_n, stride_kn, offs_d, seqlen_k, D)              # (BLOCK_N, BLOCK_D)
        s = tl.sum(q[None, :] * k.to(tl.float32), 1) * scale                 # (BLOCK_N,)
        tl.store(scores_ptr + offs_n, s, mask=offs_n < seqlen_k)


@triton.jit
def _softmax_kernel(scores_ptr, seqlen_k, BLOCK_N: tl.constexpr):
    scores_ptr += tl.program_id(0).to(tl.int64) * seqlen_k
    offs_n = tl.arange(0, BLOCK_N)
    s = tl.load(scores_ptr + offs_n, mask=offs_n < seqlen_k, other=float("-inf"))
    p = tl.exp(s - tl.max(s, 0))                                             # (BLOCK_N,)
    tl.store(scores_ptr + offs_n, p / tl.sum(p, 0), mask=offs_n < seqlen_k)


@triton.jit
def _values_kernel(
    scores_ptr, v_ptr, out_ptr, stride_vb, stride_ob, stride_vn, stride_om, heads, seqlen_q,
    seqlen_k, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    off_m = tl.program_id(0)
    v_ptr, out_ptr = head(v_ptr, stride_vb, heads, D), head(out_ptr, stride_ob, heads, D)
    scores_ptr += (tl.program_id(1).to(tl.int64) * seqlen_q + off_m) * seqlen_k
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        v = load(v_ptr, offs_n, stride_vn, offs_d, seqlen_k, D)              # (BLOCK_N, BLOCK_D)
        p = tl.load(scores_ptr + offs_n, mask=offs_n < seqlen_k, other=0.0)
        acc += tl.sum(p[:, None] * v.to(tl.float32), 0)                      # (BLOCK_D,)
    tl.store(out_ptr + off_m * stride_om + offs_d, acc.to(out_ptr.dtype.element_ty),
             mask=offs_d < D)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: (B, Lq, H*d), contiguous, in the dtype of q.

    Raises ValueError for what is not taken (`check_attention`)."""
    check_attention(_scores_kernel, q, k, v, heads)
    (batch, seqlen_q, _), seqlen_k, d = q.shape, k.shape[1], q.shape[2] // heads
    if seqlen_k > 2**20:
        raise ValueError(f"{seqlen_k} keys: a block has at most 2^20 elements")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # In float32: q k^T may exceed 65504, the largest number of float16.
    scores = torch.empty(batch, heads, seqlen_q, seqlen_k, dtype=torch.float32, device=q.device)
    grid, sizes = (seqlen_q, batch * heads), (heads, seqlen_q, seqlen_k)
    blocks = dict(D=d, BLOCK_D=triton.next_power_of_2(d), BLOCK_N=BLOCK_N)
    launch.run([
        launch.Call(_scores_kernel, grid, (q, k, scores, q.stride(0), k.stride(0), q.stride(1),
                                           k.stride(1), *sizes, d**-0.5), blocks, num_warps=4),
        launch.Call(_softmax_kernel, (batch * heads * seqlen_q,), (scores, seqlen_k),
                    dict(BLOCK_N=triton.next_power_of_2(seqlen_k)), num_warps=4),
        launch.Call(_values_kernel, grid, (scores, v, out, v.stride(0), out.stride(0), v.stride(1),
                                           out.stride(1), *sizes), blocks, num_warps=4),
    ])
    return out


def cost(batch: int, seqlen_q: int, seqlen_k: int, heads: int, d: int, itemsize: int) -> Cost:
    """Every query reads every key and every value; the scores, 4 bytes each, are written twice and
    read twice."""
    rows, scores = batch * heads * seqlen_q, 4 * batch * heads * seqlen_q * seqlen_k
    columns = triton.cdiv(seqlen_k, BLOCK_N) * BLOCK_N
    flops = 4 * rows * columns * triton.next_power_of_2(d)
    loaded = rows * (1 + 2 * seqlen_k) * d * itemsize + 2 * scores
    return Cost(3, flops, loaded, rows * d * itemsize + 2 * scores, scores)
