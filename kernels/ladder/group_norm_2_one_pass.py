"""GroupNorm and SiLU, rung 2, one pass: mean and variance together, by the formula of Chan.

    n_tile, mean_tile, m2_tile = sum((x - mean_tile)^2)      of a block, while it is in registers
    n, mean, m2                                              of all blocks so far; var = m2 / n

What changed from rung 1: the first two passes are one, so x is read twice instead of three times.
It is as exact, because what is squared are differences: of x from the mean of its block, and of
that mean from the mean so far. Blocks may be joined in any order, so many programs could share a
group: ../ops/group_norm.py does that with large groups, and reads small ones once, into the
registers of one program.

Takes x (B, C, H, W), contiguous, in fp16, bf16 or fp32; weight and bias (C,).
B batch, C channels, CG channels of a group, L pixels
"""

import torch
import triton
import triton.language as tl
from minisd_kernels.ladder.shared import Cost, check_group_norm
from minisd_kernels.ops import launch
from torch import Tensor

BLOCK_L = 4096  # at most


@triton.jit
def _load(x_ptr, c, offs_l, n_pixels):
    """Pixels of channel c in float32; zeros past the last one."""
    x = tl.load(x_ptr + c * n_pixels + offs_l, mask=offs_l < n_pixels, other=0.0)
    return x.to(tl.float32)                                                  # (BLOCK_L,)


@triton.jit
def _kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, n_pixels, eps,
    CG: tl.constexpr, BLOCK_L: tl.constexpr, SILU: tl.constexpr,
):
    off_g, off_b = tl.program_id(0), tl.program_id(1)
    start = (off_b * tl.num_programs(0) + off_g).to(tl.int64) * CG * n_pixels
    x_ptr, out_ptr = x_ptr + start, out_ptr + start
    n, mean, m2 = 0.0, 0.0, 0.0
    for c in range(CG):
        for start_l in range(0, n_pixels, BLOCK_L):
            offs_l = start_l + tl.arange(0, BLOCK_L)
            x = _load(x_ptr, c, offs_l, n_pixels)
            n_tile = tl.minimum(n_pixels - start_l, BLOCK_L) * 1.0
            mean_tile = tl.sum(x, 0) / n_tile
            centred = tl.where(offs_l < n_pixels, x - mean_tile, 0.0)
            m2_tile = tl.sum(centred * centred, 0)
            # Chan, Golub & LeVeque 1983 (https://doi.org/10.1080/00031305.1983.10483115):
            # m2 = m2_a + m2_b + delta^2 n_a n_b / n,  mean = mean_a + delta n_b / n
            delta = mean_tile - mean
            m2 += m2_tile + delta * delta * (n * n_tile / (n + n_tile))
            n += n_tile
            mean += delta * (n_tile / n)
    rstd = 1.0 / tl.sqrt_rn(m2 / (CG * n_pixels) + eps)
    for c in range(CG):
        weight = tl.load(weight_ptr + off_g * CG + c).to(tl.float32)
        bias = tl.load(bias_ptr + off_g * CG + c).to(tl.float32)
        for start_l in range(0, n_pixels, BLOCK_L):
            offs_l = start_l + tl.arange(0, BLOCK_L)
            x = _load(x_ptr, c, offs_l, n_pixels)
            # Wu & He 2018 (https://arxiv.org/abs/1803.08494), and silu(y) = y sigmoid(y)
            y = (x - mean) * rstd * weight + bias
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out_ptr + c * n_pixels + offs_l, y.to(out_ptr.dtype.element_ty),
                     mask=offs_l < n_pixels)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True,
) -> Tensor:
    """GroupNorm, then SiLU if asked; in the shape and dtype of x.

    Raises ValueError for what is not taken (`check_group_norm`)."""
    check_group_norm(_kernel, x, groups, weight, bias)
    (batch, channels), pixels = x.shape[:2], x[0, 0].numel()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args = (x, weight, bias, out, pixels, eps)
    constants = dict(CG=channels // groups, BLOCK_L=block(pixels), SILU=silu)
    launch.run([launch.Call(_kernel, (groups, batch), args, constants, num_warps=8)])
    return out


def block(pixels: int) -> int:
    """BLOCK_L."""
    return min(BLOCK_L, triton.next_power_of_2(pixels))


def cost(batch: int, channels: int, pixels: int, itemsize: int, silu: bool = True) -> Cost:
    """x is read twice, weight and bias once for each item. A pixel takes 4 operations in the first
    pass and 4 in the last, and SiLU another 4."""
    elements, rows = batch * channels * pixels, 2 * batch * channels
    flops = (8 + 4 * silu) * batch * channels * triton.cdiv(pixels, block(pixels)) * block(pixels)
    return Cost(1, flops, (2 * elements + rows) * itemsize, elements * itemsize)
