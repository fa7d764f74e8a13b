"""GroupNorm and SiLU, rung 3, the fused front: what is added to x is added where x is read.

    s = x + shift per channel + residual          in registers, each time that x is read
    y = (s - mean) / sqrt(var + eps) * weight + bias, then y sigmoid(y), if silu

What changed from rung 2: `_load` returns s instead of x. In a res block of the UNet the shift is
the row of the timestep, and a GroupNorm follows. As a launch of its own the sum would read x and
write s, for the norm to read; here s is never in memory. It is rounded to the dtype of x, as it
would be there.

Takes x (B, C, H, W), contiguous, in fp16, bf16 or fp32; weight and bias (C,); a shift, (C,) or
(B, C); a residual in the shape of x. B batch, C channels, CG channels of a group, L pixels
"""

import torch
import triton
import triton.language as tl
from minisd_kernels.ladder.shared import Cost, check_group_norm
from minisd_kernels.ops import launch
from torch import Tensor

BLOCK_L = 4096  # at most


@triton.jit
def _load(
    x_ptr, shift_ptr, residual_ptr, c, offs_l, n_pixels,
    HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    """Pixels of channel c of s in float32; zeros past the last one."""
    x = tl.load(x_ptr + c * n_pixels + offs_l, mask=offs_l < n_pixels, other=0.0)
    s = x.to(tl.float32)                                                     # (BLOCK_L,)
    if HAS_SHIFT:
        s += tl.load(shift_ptr + c).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + c * n_pixels + offs_l, mask=offs_l < n_pixels, other=0.0)
        s += residual.to(tl.float32)
    return tl.where(offs_l < n_pixels, s.to(x.dtype).to(tl.float32), 0.0)


@triton.jit
def _kernel(
    x_ptr, shift_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, stride_shift_b, n_pixels, eps,
    CG: tl.constexpr, BLOCK_L: tl.constexpr, SILU: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    off_g, off_b = tl.program_id(0), tl.program_id(1)
    start = (off_b * tl.num_programs(0) + off_g).to(tl.int64) * CG * n_pixels
    x_ptr, out_ptr = x_ptr + start, out_ptr + start
    residual_ptr += start
    shift_ptr += off_b * stride_shift_b + off_g * CG
    n, mean, m2 = 0.0, 0.0, 0.0
    for c in range(CG):
        for start_l in range(0, n_pixels, BLOCK_L):
            offs_l = start_l + tl.arange(0, BLOCK_L)
            s = _load(x_ptr, shift_ptr, residual_ptr, c, offs_l, n_pixels, HAS_SHIFT, HAS_RESIDUAL)
            n_tile = tl.minimum(n_pixels - start_l, BLOCK_L) * 1.0
            mean_tile = tl.sum(s, 0) / n_tile
            centred = tl.where(offs_l < n_pixels, s - mean_tile, 0.0)
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
            s = _load(x_ptr, shift_ptr, residual_ptr, c, offs_l, n_pixels, HAS_SHIFT, HAS_RESIDUAL)
            # Wu & He 2018 (https://arxiv.org/abs/1803.08494), and silu(y) = y sigmoid(y)
            y = (s - mean) * rstd * weight + bias
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out_ptr + c * n_pixels + offs_l, y.to(out_ptr.dtype.element_ty),
                     mask=offs_l < n_pixels)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True,
    shift: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:
    """GroupNorm of x + shift + residual, then SiLU if asked; in the shape and dtype of x.

    Raises ValueError for what is not taken (`check_group_norm`)."""
    check_group_norm(_kernel, x, groups, weight, bias, shift, residual)
    (batch, channels), pixels = x.shape[:2], x[0, 0].numel()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    front = dict(HAS_SHIFT=shift is not None, HAS_RESIDUAL=residual is not None)
    shift, residual = weight if shift is None else shift, x if residual is None else residual
    stride_shift_b = shift.stride(0) if shift.dim() == 2 else 0
    args = (x, shift, residual, weight, bias, out, stride_shift_b, pixels, eps)
    constants = dict(CG=channels // groups, BLOCK_L=block(pixels), SILU=silu) | front
    launch.run([launch.Call(_kernel, (groups, batch), args, constants, num_warps=8)])
    return out


def block(pixels: int) -> int:
    """BLOCK_L."""
    return min(BLOCK_L, triton.next_power_of_2(pixels))


def cost(batch: int, channels: int, pixels: int, itemsize: int, silu: bool = True,
         shift: bool = False, residual: bool = False) -> Cost:
    """x and the residual are read twice, the shift twice a block, weight and bias once for each
    item. A pixel takes 4 operations in the first pass and 4 in the last, SiLU another 4, and an
    addend one in each pass."""
    elements, rows = batch * channels * pixels, 2 * batch * channels
    blocks = batch * channels * triton.cdiv(pixels, block(pixels))
    flops = (8 + 4 * silu + 2 * shift + 2 * residual) * blocks * block(pixels)
    loaded = (2 + 2 * residual) * elements + rows + 2 * shift * blocks
    return Cost(1, flops, loaded * itemsize, elements * itemsize)
