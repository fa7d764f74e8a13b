"""GroupNorm and SiLU in one pass over memory or two, in whichever layout the picture already has.

    s = x [+ shift per channel] [+ residual]       the fused front: what would be launches before
    y = (s - mean) / sqrt(variance + eps) * weight + bias, over each group of channels
    y * sigmoid(y), if silu

Takes: x (B, C, ...) in fp16, bf16 or fp32, NCHW or channels_last (neither is copied into the other)
or a run of channels of a larger such tensor; any number of pixels. `refusal` says why not the rest.

Both layouts are read by the same code, through strides: a tile is (PIXELS, CHANNELS), and the side
with stride 1 is the one that neighbouring threads read, 16 bytes a thread where it can be.

    small groups    one launch: a program holds its group in registers, read once
    large groups    three: `_moments_kernel` writes the moments of every channel over each split of
                    the pixels, one writer a slot, and s if asked; `_join_kernel` makes those of
                    every group of them; `_apply_kernel` normalises. A group of SD1 is ten channels
                    wide, no power of two: a tile there takes 32 channels, whatever their groups.

No atomics: the same bits every run. Moments are means and sums of centred squares joined by Chan's
formula, never E[x^2] - E[x]^2, which loses every digit when the mean is large.

Source: Wu & He 2018, Group Normalization; Chan, Golub & LeVeque 1979, joining moments.

B batch, C channels, G groups, CG channels of a group, S pixels
"""
# `_flat` gives no None for what `refusal` has let through, and mypy cannot know. An assert would be
# code that was not measured (proof.py).
# mypy: no-strict-optional

import torch
import triton
import triton.language as tl
from minisd_kernels import launch
from torch import Tensor

PROGRAMS = 1024  # about as many make the moments of a large picture
JOINED = 4096  # moments that `_join_kernel` takes at once


@triton.jit
def _load(
    x, shift, residual, x_c, x_s, r_c, r_s, pixels, channels, inside,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
):
    """A tile of s in float32, rounded to x's dtype as the launches it replaces would."""
    s = tl.load(x + pixels * x_s + channels * x_c, mask=inside, other=0.0)   # (PIXELS, CHANNELS)
    dtype = s.dtype
    s = s.to(tl.float32)
    if SHIFT:
        s += tl.load(shift + channels, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = residual + pixels * r_s + channels * r_c
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return s.to(dtype).to(tl.float32)


@triton.jit
def _join(n, mean, m2, n_2, mean_2, m2_2):
    """Chan's formula: the moments of two parts taken together."""
    delta = mean_2 - mean
    total = n + n_2
    return total, mean + delta * (n_2 / total), m2 + m2_2 + delta * delta * (n * n_2 / total)


@triton.jit
def _normalise(s, mean, rstd, weight, bias, SILU: tl.constexpr):
    """The formula, and the sigmoid of its result if asked."""
    y = (s - mean) * rstd * weight + bias
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _whole_kernel(
    x, shift, residual, weight, bias, out, total, x_b, x_c, x_s, s_b, r_b, r_c, r_s, o_b, o_c, o_s,
    t_b, t_c, t_s, n_pixels, eps, CG: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr, SILU: tl.constexpr,
):
    first, item = tl.program_id(0) * CG, tl.program_id(1).to(tl.int64)
    x, shift, residual = x + item * x_b, shift + item * s_b, residual + item * r_b
    p = tl.arange(0, PIXELS)[:, None]
    c = first + tl.arange(0, CHANNELS)[None, :]
    inside = (p < n_pixels) & (c < first + CG)                               # (PIXELS, CHANNELS)
    s = _load(x, shift, residual, x_c, x_s, r_c, r_s, p, c, inside, SHIFT, RESIDUAL)
    if TOTAL:
        at = total + item * t_b + p * t_s + c * t_c
        tl.store(at, s.to(total.dtype.element_ty), mask=inside)
    # Sums around the first value: at a mean of 1000 a sum of 4096 loses four digits.
    pivot = _load(x, shift, residual, x_c, x_s, r_c, r_s, 0, first, True, SHIFT, RESIDUAL)
    s = tl.where(inside, s - pivot, 0.0)
    n = n_pixels * CG
    mean = tl.sum(tl.sum(s, 1), 0) / n
    centred = tl.where(inside, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(centred * centred, 1), 0) / n + eps)
    w = tl.load(weight + c, mask=c < first + CG, other=0.0).to(tl.float32)   # (1, CHANNELS)
    b = tl.load(bias + c, mask=c < first + CG, other=0.0).to(tl.float32)
    y = _normalise(s, mean, rstd, w, b, SILU)
    tl.store(out + item * o_b + p * o_s + c * o_c, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _moments_kernel(
    x, shift, residual, total, moments, x_b, x_c, x_s, s_b, r_b, r_c, r_s, t_b, t_c, t_s,
    n_pixels, split, n_channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr,
):
    """Mean and sum of centred squares of CHANNELS channels over one split of the pixels."""
    item, first = tl.program_id(2).to(tl.int64), tl.program_id(0) * split
    last = min(first + split, n_pixels)
    x, shift, residual = x + item * x_b, shift + item * s_b, residual + item * r_b
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    # Around each channel's first value, for the reason given above.
    pivot = _load(x, shift, residual, x_c, x_s, r_c, r_s, first, c, c < n_channels, SHIFT, RESIDUAL)
    n = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    for start in range(first, last, PIXELS):
        p = start + tl.arange(0, PIXELS)[:, None]
        inside = (p < last) & (c < n_channels)                               # (PIXELS, CHANNELS)
        s = _load(x, shift, residual, x_c, x_s, r_c, r_s, p, c, inside, SHIFT, RESIDUAL)
        if TOTAL:
            at = total + item * t_b + p * t_s + c * t_c
            tl.store(at, s.to(total.dtype.element_ty), mask=inside)
        s = tl.where(inside, s - pivot, 0.0)
        n_tile = tl.minimum(PIXELS, last - start) * 1.0
        mean_tile = tl.sum(s, 0) / n_tile                                    # (CHANNELS,)
        s = tl.where(inside, s - mean_tile[None, :], 0.0)
        n, mean, m2 = _join(n, mean, m2, n_tile, mean_tile, tl.sum(s * s, 0))
    slot = (item * tl.num_programs(0) + tl.program_id(0)) * (2 * n_channels)
    at = moments + slot + c
    tl.store(at, mean[None, :] + pivot, mask=c < n_channels)
    tl.store(at + n_channels, m2[None, :], mask=c < n_channels)


@triton.jit
def _join_kernel(
    moments, statistics, n_pixels, split, n_splits, n_channels, eps,
    CG: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr,
):
    """Mean and 1 / standard deviation of a group, from the moments of its channels."""
    group, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CHANNELS)[None, :]
    moments += item * n_splits * (2 * n_channels) + group * CG
    pivot = tl.load(moments)
    n, mean, m2 = 0.0, 0.0, 0.0
    for start in range(0, n_splits, SPLITS):
        i = start + tl.arange(0, SPLITS)[:, None]
        pixels = tl.maximum(tl.minimum(n_pixels - i * split, split), 0) * 1.0  # (SPLITS, 1)
        there = (i < n_splits) & (c < CG)                                    # (SPLITS, CHANNELS)
        at = moments + i * (2 * n_channels) + c
        away = tl.where(there, tl.load(at, mask=there, other=0.0) - pivot, 0.0)
        m2s = tl.load(at + n_channels, mask=there, other=0.0)
        n_tile = tl.sum(tl.sum(pixels, 1), 0) * CG
        mean_tile = tl.sum(tl.sum(away * pixels, 1), 0) / n_tile
        away = tl.where(there, away - mean_tile, 0.0)
        m2_tile = tl.sum(tl.sum(m2s + away * away * pixels, 1), 0)
        n, mean, m2 = _join(n, mean, m2, n_tile, mean_tile, m2_tile)
    at = statistics + item * (2 * tl.num_programs(0)) + group
    tl.store(at, mean + pivot)
    tl.store(at + tl.num_programs(0), 1.0 / tl.sqrt_rn(m2 / n + eps))


@triton.jit
def _apply_kernel(
    x, shift, residual, statistics, weight, bias, out, x_b, x_c, x_s, s_b, r_b, r_c, r_s,
    o_b, o_c, o_s, n_pixels, split, n_channels, n_groups, CG: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr,
):
    """CHANNELS channels of the result over one split of the pixels."""
    item, first = tl.program_id(2).to(tl.int64), tl.program_id(0) * split
    last = min(first + split, n_pixels)
    x, shift, residual = x + item * x_b, shift + item * s_b, residual + item * r_b
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]        # (1, CHANNELS)
    at = statistics + item * (2 * n_groups) + c // CG
    mean = tl.load(at, mask=c < n_channels, other=0.0)
    rstd = tl.load(at + n_groups, mask=c < n_channels, other=0.0)
    w = tl.load(weight + c, mask=c < n_channels, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < n_channels, other=0.0).to(tl.float32)
    for start in range(first, last, PIXELS):
        p = start + tl.arange(0, PIXELS)[:, None]
        inside = (p < last) & (c < n_channels)                               # (PIXELS, CHANNELS)
        s = _load(x, shift, residual, x_c, x_s, r_c, r_s, p, c, inside, SHIFT, RESIDUAL)
        y = _normalise(s, mean, rstd, w, b, SILU)
        tl.store(out + item * o_b + p * o_s + c * o_c, y.to(out.dtype.element_ty), mask=inside)


def _flat(x: Tensor) -> Tensor | None:
    """x as (B, C, S) without a copy, if one side of a picture has stride 1."""
    try:
        flat = x.view(*x.shape[:2], -1)
    except RuntimeError:
        return None
    return flat if flat.stride(1) == 1 or flat.stride(2) == 1 or flat.shape[2] == 1 else None


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32,
    shift: Tensor | None = None, residual: Tensor | None = None, total: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these, as a sentence; None if it does."""
    if x.dim() < 2 or 0 in x.shape:
        return f"x is (B, C, ...) with something in it, not {(*x.shape,)}"
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        return f"{channels} channels do not split into {groups} groups"
    pictures = {"x": x, "residual": residual, "return_sum": total}
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    for name, picture in pictures.items():
        if picture.shape != x.shape or picture.dtype != x.dtype:
            return f"{name} is {(*picture.shape,)} {picture.dtype}, x {(*x.shape,)} {x.dtype}"
        if _flat(picture) is None:
            return f"{name} is neither NCHW nor channels_last"
        flat = _flat(picture)
        if channels * flat.stride(1) + flat.shape[2] * flat.stride(2) > launch.MAX_OFFSET:
            return f"{name} is too large: one item passes 2^31 elements"
    rows = {"weight": weight, "bias": bias} | ({} if shift is None else {"shift": shift})
    for name, row in rows.items():
        shapes = [(channels,)] + [(x.shape[0], channels)] * (name == "shift")
        if tuple(row.shape) not in shapes or row.stride(-1) != 1:
            return f"{name} is {(*row.shape,)}, not {' or '.join(map(str, shapes))} in a row"
    return launch.refusal(_whole_kernel, **pictures, **rows)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-5,
    silu: bool = True, shift: Tensor | None = None, residual: Tensor | None = None,
    return_sum: bool | Tensor = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm, then SiLU if asked; the same bits every time.

    x (B, C, ...); weight and bias (C,); returns x's shape, dtype and layout. First x becomes
    s = x + shift + residual, rounded to x's dtype: ``shift`` (C,) or (B, C), such as a
    convolution's bias or a time embedding; ``residual`` of x's shape. ``return_sum`` returns
    (result, s); given as a tensor of x's shape, s is written there.

    Raises ValueError with the sentence of `refusal`.
    """
    total = return_sum if isinstance(return_sum, Tensor) else None
    if why := refusal(x, weight, bias, groups, shift, residual, total):
        raise ValueError(f"group_norm_silu: {why}")
    out = _like(x)
    total = _like(x) if return_sum is True else total
    launch.run(plan(x, weight, bias, out, total, groups, eps, silu, shift, residual))
    return out if total is None else (out, total)


def _channels_last(flat: Tensor) -> bool:
    return flat.stride(1) == 1 and (flat.stride(2) != 1 or flat.shape[2] == 1)


def _like(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape and order of memory, without gaps."""
    batch, channels, pixels = (flat := _flat(x)).shape
    if _channels_last(flat):
        return x.new_empty(batch, pixels, channels).transpose(1, 2).view(x.shape)
    return x.new_empty(x.shape)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, total: Tensor | None, groups: int,
    eps: float, silu: bool, shift: Tensor | None = None, residual: Tensor | None = None,
) -> list[launch.Call]:
    """The launches for these tensors, one or three by the size of a group; s goes to ``total``."""
    front, keeps = dict(SHIFT=shift is not None, RESIDUAL=residual is not None), total is not None
    shift = weight if shift is None else shift  # never looked at, as are the next two
    x, out = _flat(x), _flat(out)
    residual, total = (x if y is None else _flat(y) for y in (residual, total))
    (batch, channels, pixels), power = x.shape, triton.next_power_of_2
    strides = (shift.stride(0) if shift.dim() == 2 else 0, *residual.stride())
    cg, tile = channels // groups, launch.setting(x.device, "group norm", 0)
    if (size := power(pixels) * power(cg)) <= tile.elements:
        args = (x, shift, residual, weight, bias, out, total, *x.stride(), *strides)
        args += (*out.stride(), *total.stride(), pixels, eps)
        sizes = dict(CG=cg, PIXELS=power(pixels), CHANNELS=power(cg))
        warps = min(tile.warps, max(1, size // 1024))
        constants = sizes | front | dict(TOTAL=keeps, SILU=silu)
        return [launch.Call(_whole_kernel, (groups, batch), args, constants, warps)]
    tile = launch.setting(x.device, "group norm", 1)
    if _channels_last(x):
        width = min(tile.width, power(channels))
        rows = min(tile.elements // width, power(pixels))
    else:
        rows = min(tile.elements, power(pixels))
        width = min(tile.elements // rows, power(channels))
    blocks = triton.cdiv(channels, width)
    splits = max(1, PROGRAMS // (blocks * batch))
    split = triton.cdiv(triton.cdiv(pixels, splits), rows) * rows  # pixels, in whole tiles
    splits = triton.cdiv(pixels, split)
    grid, sizes = (splits, blocks, batch), dict(PIXELS=rows, CHANNELS=width)
    moments = x.new_empty(batch, splits, 2, channels, dtype=torch.float32)
    statistics = x.new_empty(batch, 2, groups, dtype=torch.float32)
    args = (x, shift, residual, total, moments, *x.stride(), *strides, *total.stride())
    constants = sizes | front | dict(TOTAL=keeps)
    calls = [launch.Call(_moments_kernel, grid, (*args, pixels, split, channels), constants,
                         tile.warps)]
    args = (moments, statistics, pixels, split, splits, channels, eps)
    joined = dict(CG=cg, CHANNELS=power(cg), SPLITS=min(max(1, JOINED // power(cg)), power(splits)))
    calls += [launch.Call(_join_kernel, (groups, batch), args, joined, 4)]
    if keeps:  # the sum is there by then
        x, shift, residual, front = total, weight, total, dict.fromkeys(front, False)
        strides = (0, *residual.stride())
    args = (x, shift, residual, statistics, weight, bias, out, *x.stride(), *strides, *out.stride())
    constants = sizes | front | dict(CG=cg, SILU=silu)
    return [*calls, launch.Call(_apply_kernel, grid, (*args, pixels, split, channels, groups),
                                constants, tile.warps)]


def cost(
    elements: int, itemsize: int, silu: bool = True, residual: bool = False, total: bool = False,
) -> launch.Cost:
    """The least work of one call; 10 operations and, for SiLU, an exponential an element."""
    return launch.Cost(10 * elements, (2 + residual + total) * elements * itemsize, silu * elements)
