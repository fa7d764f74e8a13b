"""GroupNorm and SiLU in one pass over memory or two, in the layout that the image already has.

    s = x [+ shift per channel] [+ residual]       the fused front: otherwise launches of their own
    y = (s - mean) / sqrt(var + eps) * weight + bias, over each group of channels
    y * sigmoid(y), if silu

Takes    x (B, C, ...) in fp16, bf16 or fp32, NCHW or channels_last (neither is copied into the
         other), or a run of channels of a larger tensor; any number of pixels.
Refuses  everything else, and gradients, with a ValueError that says why: `refusal`.
Tested   on an NVIDIA H200 at the sizes of SD1 and SD2 (proven.json), and against float64 in
         Triton's interpreter (tests/kernels/interpreted_group_norm.py).

The same code reads both layouts, through strides: a tile is (BLOCK_L, BLOCK_C), and neighbouring
threads read along the side with stride 1, 16 bytes per thread where that is possible.

    small groups    one launch: a program reads its group once and holds it in registers
    large groups    three: `_moments_kernel` writes the mean and the centred squares of each channel
                    over each split of the pixels, one program per slot, and s if asked;
                    `_join_kernel` joins them per group; `_apply_kernel` normalises. A group of SD1
                    has 10 channels, no power of two, so a tile takes 32 channels of any groups.

There are no atomics: every run gives the same bits. The variance is the mean of centred squares,
never E[x^2] - E[x]^2, which loses every digit when the mean is large.

B batch, C channels, G groups, CG channels of a group, L pixels
"""

import torch
import triton
import triton.language as tl
from minisd_kernels.ops import launch
from torch import Tensor

PROGRAMS = 1024  # about the number of programs that compute the moments of a large image
JOINED = 4096  # moments that `_join_kernel` takes at once


@triton.jit
def _load(
    x_ptr, shift_ptr, residual_ptr, stride_xc, stride_xl, stride_rc, stride_rl, offs_l, offs_c,
    mask, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    """A tile of s in float32, rounded to the dtype of x as separate launches would round it."""
    # s (BLOCK_L, BLOCK_C)
    s = tl.load(x_ptr + offs_l * stride_xl + offs_c * stride_xc, mask=mask, other=0.0)
    dtype = s.dtype
    s = s.to(tl.float32)
    if HAS_SHIFT:
        s += tl.load(shift_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        ptrs = residual_ptr + offs_l * stride_rl + offs_c * stride_rc
        s += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return s.to(dtype).to(tl.float32)


@triton.jit
def _join(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """The count, mean and sum of centred squares of two parts together."""
    # Chan, Golub & LeVeque 1983 (https://doi.org/10.1080/00031305.1983.10483115):
    # mean = mean_a + delta n_b / n,  m2 = m2_a + m2_b + delta^2 n_a n_b / n
    delta = mean_b - mean_a
    n = n_a + n_b
    return n, mean_a + delta * (n_b / n), m2_a + m2_b + delta * delta * (n_a * n_b / n)


@triton.jit
def _normalise(s, mean, rstd, weight, bias, SILU: tl.constexpr):
    """A tile of s to a tile of the result."""
    # Wu & He 2018 (https://arxiv.org/abs/1803.08494):
    # y = (s - mean) / sqrt(var + eps) * weight + bias,  and silu(y) = y sigmoid(y)
    y = (s - mean) * rstd * weight + bias
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _whole_kernel(
    x_ptr, shift_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, s_ptr,
    stride_xb, stride_xc, stride_xl, stride_shift_b, stride_rb, stride_rc, stride_rl,
    stride_ob, stride_oc, stride_ol, stride_sb, stride_sc, stride_sl, n_pixels, eps,
    CG: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, STORE_S: tl.constexpr, SILU: tl.constexpr,
):
    """One group of one item."""
    start_c, off_b = tl.program_id(0) * CG, tl.program_id(1).to(tl.int64)
    x_ptr += off_b * stride_xb
    shift_ptr += off_b * stride_shift_b
    residual_ptr += off_b * stride_rb
    offs_l = tl.arange(0, BLOCK_L)[:, None]                                  # (BLOCK_L, 1)
    offs_c = start_c + tl.arange(0, BLOCK_C)[None, :]                        # (1, BLOCK_C)
    mask = (offs_l < n_pixels) & (offs_c < start_c + CG)                     # (BLOCK_L, BLOCK_C)
    s = _load(x_ptr, shift_ptr, residual_ptr, stride_xc, stride_xl, stride_rc, stride_rl,
              offs_l, offs_c, mask, HAS_SHIFT, HAS_RESIDUAL)
    if STORE_S:
        ptrs = s_ptr + off_b * stride_sb + offs_l * stride_sl + offs_c * stride_sc
        tl.store(ptrs, s.to(s_ptr.dtype.element_ty), mask=mask)
    # Sums are taken around the first value: at a mean of 1000 a sum of 4096 loses four digits.
    pivot = _load(x_ptr, shift_ptr, residual_ptr, stride_xc, stride_xl, stride_rc, stride_rl,
                  0, start_c, True, HAS_SHIFT, HAS_RESIDUAL)
    s = tl.where(mask, s - pivot, 0.0)
    n = n_pixels * CG
    mean = tl.sum(tl.sum(s, 1), 0) / n
    centred = tl.where(mask, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(centred * centred, 1), 0) / n + eps)
    # weight, bias (1, BLOCK_C)
    weight = tl.load(weight_ptr + offs_c, mask=offs_c < start_c + CG, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=offs_c < start_c + CG, other=0.0).to(tl.float32)
    y = _normalise(s, mean, rstd, weight, bias, SILU)
    ptrs = out_ptr + off_b * stride_ob + offs_l * stride_ol + offs_c * stride_oc
    tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moments_kernel(
    x_ptr, shift_ptr, residual_ptr, s_ptr, moments_ptr, stride_xb, stride_xc, stride_xl,
    stride_shift_b, stride_rb, stride_rc, stride_rl, stride_sb, stride_sc, stride_sl,
    n_pixels, split_size, n_channels, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, STORE_S: tl.constexpr,
):
    """Mean and sum of centred squares of BLOCK_C channels over one split of the pixels."""
    off_b, start_l = tl.program_id(2).to(tl.int64), tl.program_id(0) * split_size
    end_l = min(start_l + split_size, n_pixels)
    x_ptr += off_b * stride_xb
    shift_ptr += off_b * stride_shift_b
    residual_ptr += off_b * stride_rb
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]     # (1, BLOCK_C)
    # Sums are taken around the first value of each channel, as in `_whole_kernel`.
    pivot = _load(x_ptr, shift_ptr, residual_ptr, stride_xc, stride_xl, stride_rc, stride_rl,
                  start_l, offs_c, offs_c < n_channels, HAS_SHIFT, HAS_RESIDUAL)
    n = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(start_l, end_l, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)[:, None]                      # (BLOCK_L, 1)
        mask = (offs_l < end_l) & (offs_c < n_channels)                      # (BLOCK_L, BLOCK_C)
        s = _load(x_ptr, shift_ptr, residual_ptr, stride_xc, stride_xl, stride_rc, stride_rl,
                  offs_l, offs_c, mask, HAS_SHIFT, HAS_RESIDUAL)
        if STORE_S:
            ptrs = s_ptr + off_b * stride_sb + offs_l * stride_sl + offs_c * stride_sc
            tl.store(ptrs, s.to(s_ptr.dtype.element_ty), mask=mask)
        s = tl.where(mask, s - pivot, 0.0)
        n_tile = tl.minimum(BLOCK_L, end_l - start) * 1.0
        mean_tile = tl.sum(s, 0) / n_tile                                    # (BLOCK_C,)
        s = tl.where(mask, s - mean_tile[None, :], 0.0)
        n, mean, m2 = _join(n, mean, m2, n_tile, mean_tile, tl.sum(s * s, 0))
    slot = (off_b * tl.num_programs(0) + tl.program_id(0)) * (2 * n_channels)
    ptrs = moments_ptr + slot + offs_c
    tl.store(ptrs, mean[None, :] + pivot, mask=offs_c < n_channels)
    tl.store(ptrs + n_channels, m2[None, :], mask=offs_c < n_channels)


@triton.jit
def _join_kernel(
    moments_ptr, stats_ptr, n_pixels, split_size, n_splits, n_channels, eps,
    CG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):
    """mean and rstd = 1 / sqrt(var + eps) of a group, from the moments of its channels."""
    off_g, off_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)[None, :]                                  # (1, BLOCK_C)
    moments_ptr += off_b * n_splits * (2 * n_channels) + off_g * CG
    pivot = tl.load(moments_ptr)
    n, mean, m2 = 0.0, 0.0, 0.0
    for start in range(0, n_splits, BLOCK_SPLITS):
        offs_s = start + tl.arange(0, BLOCK_SPLITS)[:, None]                 # (BLOCK_SPLITS, 1)
        # count (BLOCK_SPLITS, 1); mask, delta and m2s (BLOCK_SPLITS, BLOCK_C)
        count = tl.maximum(tl.minimum(n_pixels - offs_s * split_size, split_size), 0) * 1.0
        mask = (offs_s < n_splits) & (offs_c < CG)
        ptrs = moments_ptr + offs_s * (2 * n_channels) + offs_c
        delta = tl.where(mask, tl.load(ptrs, mask=mask, other=0.0) - pivot, 0.0)
        m2s = tl.load(ptrs + n_channels, mask=mask, other=0.0)
        n_tile = tl.sum(tl.sum(count, 1), 0) * CG
        mean_tile = tl.sum(tl.sum(delta * count, 1), 0) / n_tile
        delta = tl.where(mask, delta - mean_tile, 0.0)
        # The formula of `_join`, for many parts at once: m2 = sum(m2_i + n_i delta_i^2)
        m2_tile = tl.sum(tl.sum(m2s + delta * delta * count, 1), 0)
        n, mean, m2 = _join(n, mean, m2, n_tile, mean_tile, m2_tile)
    ptrs = stats_ptr + off_b * (2 * tl.num_programs(0)) + off_g
    tl.store(ptrs, mean + pivot)
    tl.store(ptrs + tl.num_programs(0), 1.0 / tl.sqrt_rn(m2 / n + eps))


@triton.jit
def _apply_kernel(
    x_ptr, shift_ptr, residual_ptr, stats_ptr, weight_ptr, bias_ptr, out_ptr,
    stride_xb, stride_xc, stride_xl, stride_shift_b, stride_rb, stride_rc, stride_rl,
    stride_ob, stride_oc, stride_ol, n_pixels, split_size, n_channels, n_groups,
    CG: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SILU: tl.constexpr,
):
    """BLOCK_C channels of the result over one split of the pixels."""
    off_b, start_l = tl.program_id(2).to(tl.int64), tl.program_id(0) * split_size
    end_l = min(start_l + split_size, n_pixels)
    x_ptr += off_b * stride_xb
    shift_ptr += off_b * stride_shift_b
    residual_ptr += off_b * stride_rb
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    stats_ptrs = stats_ptr + off_b * (2 * n_groups) + offs_c // CG
    # mean, rstd, weight, bias (1, BLOCK_C)
    mean = tl.load(stats_ptrs, mask=offs_c < n_channels, other=0.0)
    rstd = tl.load(stats_ptrs + n_groups, mask=offs_c < n_channels, other=0.0)
    weight = tl.load(weight_ptr + offs_c, mask=offs_c < n_channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=offs_c < n_channels, other=0.0).to(tl.float32)
    for start in range(start_l, end_l, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)[:, None]                      # (BLOCK_L, 1)
        mask = (offs_l < end_l) & (offs_c < n_channels)                      # (BLOCK_L, BLOCK_C)
        s = _load(x_ptr, shift_ptr, residual_ptr, stride_xc, stride_xl, stride_rc, stride_rl,
                  offs_l, offs_c, mask, HAS_SHIFT, HAS_RESIDUAL)
        y = _normalise(s, mean, rstd, weight, bias, SILU)
        ptrs = out_ptr + off_b * stride_ob + offs_l * stride_ol + offs_c * stride_oc
        tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


def _view(x: Tensor) -> Tensor | None:
    """x as (B, C, L) without a copy; None unless one side of an image has stride 1."""
    try:
        view = x.view(*x.shape[:2], -1)
    except RuntimeError:
        return None
    return view if view.stride(1) == 1 or view.stride(2) == 1 or view.shape[2] == 1 else None


def _flat(x: Tensor) -> Tensor:
    """The same for a tensor that `refusal` has let through."""
    view = _view(x)
    assert view is not None
    return view


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32,
    shift: Tensor | None = None, residual: Tensor | None = None, s: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these tensors, as a sentence; None if it does."""
    if x.dim() < 2 or 0 in x.shape:
        return f"x is (B, C, ...) with something in it, not {(*x.shape,)}"
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        return f"{channels} channels do not split into {groups} groups"
    given = {"x": x, "residual": residual, "return_sum": s}
    images = {name: image for name, image in given.items() if image is not None}
    for name, image in images.items():
        if image.shape != x.shape or image.dtype != x.dtype:
            return f"{name} is {(*image.shape,)} {image.dtype}, x {(*x.shape,)} {x.dtype}"
        view = _view(image)
        if view is None:
            return f"{name} is neither NCHW nor channels_last"
        if channels * view.stride(1) + view.shape[2] * view.stride(2) > launch.MAX_OFFSET:
            return f"{name} is too large: one item passes 2^31 elements"
    rows = {"weight": weight, "bias": bias} | ({} if shift is None else {"shift": shift})
    for name, row in rows.items():
        shapes = [(channels,)] + [(x.shape[0], channels)] * (name == "shift")
        if tuple(row.shape) not in shapes or row.stride(-1) != 1:
            return f"{name} is {(*row.shape,)}, not {' or '.join(map(str, shapes))} in a row"
    return launch.refusal(_whole_kernel, **images, **rows)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-5,
    silu: bool = True, shift: Tensor | None = None, residual: Tensor | None = None,
    return_sum: bool | Tensor = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm, then SiLU if asked; the same bits every time.

    x (B, C, ...); weight and bias (C,); returns the shape, dtype and layout of x. First x becomes
    s = x + shift + residual, rounded to the dtype of x: ``shift`` (C,) or (B, C), such as the bias
    of a convolution or a time embedding; ``residual`` in the shape of x. ``return_sum`` returns
    (result, s); if it is a tensor in the shape of x, s is written there.

    Raises ValueError with the sentence of `refusal`.
    """
    s = return_sum if isinstance(return_sum, Tensor) else None
    if why := refusal(x, weight, bias, groups, shift, residual, s):
        raise ValueError(f"group_norm_silu: {why}")
    out = _like(x)
    s = _like(x) if return_sum is True else s
    launch.run(plan(x, weight, bias, out, s, groups, eps, silu, shift, residual))
    return out if s is None else (out, s)


def _channels_last(flat: Tensor) -> bool:
    return flat.stride(1) == 1 and (flat.stride(2) != 1 or flat.shape[2] == 1)


def _like(x: Tensor) -> Tensor:
    """Uninitialised, in the shape and memory order of x, without gaps."""
    batch, channels, pixels = (flat := _flat(x)).shape
    if _channels_last(flat):
        return x.new_empty(batch, pixels, channels).transpose(1, 2).view(x.shape)
    return x.new_empty(x.shape)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, s: Tensor | None, groups: int,
    eps: float, silu: bool, shift: Tensor | None = None, residual: Tensor | None = None,
) -> list[launch.Call]:
    """The launches for these tensors: one or three, by the size of a group. ``s`` is an output."""
    store_s = s is not None
    front = dict(HAS_SHIFT=shift is not None, HAS_RESIDUAL=residual is not None)
    # The kernels never read an argument that stands in for a missing tensor.
    shift = weight if shift is None else shift
    x, out = _flat(x), _flat(out)
    residual, s = (x if y is None else _flat(y) for y in (residual, s))
    (batch, channels, pixels), power = x.shape, triton.next_power_of_2
    strides = (shift.stride(0) if shift.dim() == 2 else 0, *residual.stride())
    cg, tile = channels // groups, launch.setting(x.device, "group norm", 0)
    if (size := power(pixels) * power(cg)) <= tile.elements:
        args = (x, shift, residual, weight, bias, out, s, *x.stride(), *strides)
        args += (*out.stride(), *s.stride(), pixels, eps)
        blocks = dict(CG=cg, BLOCK_L=power(pixels), BLOCK_C=power(cg))
        num_warps = min(tile.num_warps, max(1, size // 1024))
        constants = blocks | front | dict(STORE_S=store_s, SILU=silu)
        return [launch.Call(_whole_kernel, (groups, batch), args, constants, num_warps)]
    tile = launch.setting(x.device, "group norm", 1)
    if _channels_last(x):
        block_c = min(tile.block_c, power(channels))
        block_l = min(tile.elements // block_c, power(pixels))
    else:
        block_l = min(tile.elements, power(pixels))
        block_c = min(tile.elements // block_l, power(channels))
    n_blocks = triton.cdiv(channels, block_c)
    n_splits = max(1, PROGRAMS // (n_blocks * batch))
    split_size = triton.cdiv(triton.cdiv(pixels, n_splits), block_l) * block_l  # whole tiles
    n_splits = triton.cdiv(pixels, split_size)
    grid, blocks = (n_splits, n_blocks, batch), dict(BLOCK_L=block_l, BLOCK_C=block_c)
    moments = x.new_empty(batch, n_splits, 2, channels, dtype=torch.float32)
    stats = x.new_empty(batch, 2, groups, dtype=torch.float32)
    args = (x, shift, residual, s, moments, *x.stride(), *strides, *s.stride())
    constants = blocks | front | dict(STORE_S=store_s)
    calls = [launch.Call(_moments_kernel, grid, (*args, pixels, split_size, channels), constants,
                         tile.num_warps)]
    args = (moments, stats, pixels, split_size, n_splits, channels, eps)
    block_splits = min(max(1, JOINED // power(cg)), power(n_splits))
    constants = dict(CG=cg, BLOCK_C=power(cg), BLOCK_SPLITS=block_splits)
    calls += [launch.Call(_join_kernel, (groups, batch), args, constants, 4)]
    if store_s:  # the first launch has written s
        x, shift, residual, front = s, weight, s, dict.fromkeys(front, False)
        strides = (0, *residual.stride())
    args = (x, shift, residual, stats, weight, bias, out, *x.stride(), *strides, *out.stride())
    constants = blocks | front | dict(CG=cg, SILU=silu)
    return [*calls, launch.Call(_apply_kernel, grid, (*args, pixels, split_size, channels, groups),
                                constants, tile.num_warps)]


def cost(
    elements: int, itemsize: int, silu: bool = True, residual: bool = False, s: bool = False,
) -> launch.Cost:
    """The least work of one call: per element 10 operations and, for SiLU, an exponential."""
    return launch.Cost(10 * elements, (2 + residual + s) * elements * itemsize, silu * elements)
