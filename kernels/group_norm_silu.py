"""GroupNorm and SiLU in one pass over memory, in whichever layout the picture already has.

    s = x [+ shift per channel] [+ residual]       the fused front: what would be launches before
    y = (s - mean) / sqrt(variance + eps) * weight + bias, over each group of channels
    y * sigmoid(y), if silu

Takes: x (B, C, ...) in fp16, bf16 or fp32, NCHW or channels_last (neither is copied into the other)
or a run of channels of a larger such tensor; any number of pixels. `refusal` says why not the rest.

Both layouts are read by the same code, through strides. A tile is (PIXELS, GROUPS, CHANNELS), and
the side with stride 1 is the one that neighbouring threads read. In NCHW, CHANNELS is a power of
two that divides a group's channels, so that no lane idles; in channels_last it covers them all, and
a tile spans several groups, because a row of one group is only 20 bytes wide in SD1.

    small groups    one launch: a program reads its group twice, the second time from cache
    large groups    two: `_moments_kernel` writes the moments of each split of the pixels, one
                    writer a slot, and s if asked; `_apply_kernel` joins them and normalises

No atomics: the same bits every run. Moments are means and sums of centred squares joined by Chan's
formula, never E[x^2] - E[x]^2, which loses every digit when the mean is large.

Source: Wu & He 2018, Group Normalization; Chan, Golub & LeVeque 1979, joining moments.

B batch, C channels, G groups, CG channels of a group, S pixels
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisd_kernels import launch

LARGEST_IN_ONE_LAUNCH = 16384  # elements of a group
SPLITS = 64  # at most; each program of the second launch reads the moments of all


@triton.jit
def _load(
    x, shift, residual, x_c, x_s, r_c, r_s, pixels, channels, inside,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
):
    """A tile of s in float32, rounded to x's dtype as the launches it replaces would."""
    s = tl.load(x + pixels * x_s + channels * x_c, mask=inside, other=0.0)   # (PIXELS, GROUPS, ...)
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
def _moments(
    x, shift, residual, total, x_c, x_s, r_c, r_s, t_c, t_s, group, first, last, CG: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr,
):
    """Mean and sum of centred squares of GROUPS groups over pixels [first, last); s, if TOTAL."""
    dtype = total.dtype.element_ty
    p = tl.arange(0, PIXELS)[:, None, None]
    g = group + tl.arange(0, GROUPS)[None, :, None]
    c = tl.arange(0, CHANNELS)[None, None, :]
    # Sums around the first value, or at a mean of 1000 a sum of 4096 loses four digits.
    pivot = _load(x, shift, residual, x_c, x_s, r_c, r_s, first, g * CG, True, SHIFT, RESIDUAL)
    n = 0.0
    mean = tl.zeros((GROUPS,), tl.float32)
    m2 = tl.zeros((GROUPS,), tl.float32)
    for start in range(first, last, PIXELS):
        for channel in range(0, CG, CHANNELS):
            channels = g * CG + channel + c                                  # (1, GROUPS, CHANNELS)
            inside = (start + p < last) & (channel + c < CG)                 # (PIXELS, 1, CHANNELS)
            s = _load(x, shift, residual, x_c, x_s, r_c, r_s, start + p, channels, inside,
                      SHIFT, RESIDUAL)                                       # (PIXELS, GROUPS, ...)
            if TOTAL:
                tl.store(total + (start + p) * t_s + channels * t_c, s.to(dtype), mask=inside)
            s = tl.where(inside, s - pivot, 0.0)
            n_tile = tl.minimum(PIXELS, last - start) * tl.minimum(CHANNELS, CG - channel) * 1.0
            mean_tile = tl.sum(tl.sum(s, 2), 0) / n_tile                     # (GROUPS,)
            s = tl.where(inside, s - mean_tile[None, :, None], 0.0)
            m2_tile = tl.sum(tl.sum(s * s, 2), 0)                            # (GROUPS,)
            n, mean, m2 = _join(n, mean, m2, n_tile, mean_tile, m2_tile)
    return mean + tl.sum(tl.sum(pivot, 2), 0), m2


@triton.jit
def _normalise(
    x, shift, residual, weight, bias, out, x_c, x_s, r_c, r_s, o_c, o_s,
    group, first, last, mean, rstd, CG: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr,
):
    """GROUPS groups of the result over the pixels [first, last)."""
    p = tl.arange(0, PIXELS)[:, None, None]
    g = group + tl.arange(0, GROUPS)[None, :, None]
    c = tl.arange(0, CHANNELS)[None, None, :]
    dtype = out.dtype.element_ty
    for channel in range(0, CG, CHANNELS):
        channels = g * CG + channel + c                                      # (1, GROUPS, CHANNELS)
        w = tl.load(weight + channels, mask=channel + c < CG, other=0.0).to(tl.float32)
        b = tl.load(bias + channels, mask=channel + c < CG, other=0.0).to(tl.float32)
        for start in range(first, last, PIXELS):
            inside = (start + p < last) & (channel + c < CG)                 # (PIXELS, 1, CHANNELS)
            s = _load(x, shift, residual, x_c, x_s, r_c, r_s, start + p, channels, inside,
                      SHIFT, RESIDUAL)                                       # (PIXELS, GROUPS, ...)
            y = (s - mean[None, :, None]) * rstd[None, :, None] * w + b
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out + (start + p) * o_s + channels * o_c, y.to(dtype), mask=inside)


@triton.jit
def _one_launch_kernel(
    x, shift, residual, weight, bias, out, total, x_b, x_c, x_s, s_b, r_b, r_c, r_s, o_b, o_c, o_s,
    t_b, t_c, t_s, n_pixels, eps, CG: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr, SILU: tl.constexpr,
):
    group, item = tl.program_id(0) * GROUPS, tl.program_id(1).to(tl.int64)
    x, shift, residual = x + item * x_b, shift + item * s_b, residual + item * r_b
    mean, m2 = _moments(x, shift, residual, total + item * t_b, x_c, x_s, r_c, r_s, t_c, t_s,
                        group, 0, n_pixels, CG, PIXELS, GROUPS, CHANNELS, SHIFT, RESIDUAL, TOTAL)
    rstd = 1.0 / tl.sqrt_rn(m2 / (n_pixels * CG) + eps)                      # (GROUPS,)
    _normalise(x, shift, residual, weight, bias, out + item * o_b, x_c, x_s, r_c, r_s, o_c, o_s,
               group, 0, n_pixels, mean, rstd, CG, PIXELS, GROUPS, CHANNELS, SHIFT, RESIDUAL, SILU)


@triton.jit
def _moments_kernel(
    x, shift, residual, total, moments, x_b, x_c, x_s, s_b, r_b, r_c, r_s, t_b, t_c, t_s,
    n_pixels, split, CG: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr, SPLITS: tl.constexpr,
):
    group, item = tl.program_id(1) * GROUPS, tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * split
    mean, m2 = _moments(x + item * x_b, shift + item * s_b, residual + item * r_b,
                        total + item * t_b, x_c, x_s, r_c, r_s, t_c, t_s, group, first,
                        min(first + split, n_pixels), CG,
                        PIXELS, GROUPS, CHANNELS, SHIFT, RESIDUAL, TOTAL)
    row = tl.program_id(2) * tl.num_programs(1) * GROUPS + group + tl.arange(0, GROUPS)
    at = moments + row * (2 * SPLITS) + tl.program_id(0)
    tl.store(at, mean)
    tl.store(at + SPLITS, m2)


@triton.jit
def _apply_kernel(
    x, shift, residual, moments, weight, bias, out, x_b, x_c, x_s, s_b, r_b, r_c, r_s,
    o_b, o_c, o_s, n_pixels, split, eps, CG: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr, SPLITS: tl.constexpr,
):
    group, item = tl.program_id(1) * GROUPS, tl.program_id(2).to(tl.int64)
    row = tl.program_id(2) * tl.num_programs(1) * GROUPS + group + tl.arange(0, GROUPS)
    row = row[:, None] * (2 * SPLITS)                                        # (GROUPS, 1)
    i = tl.arange(0, SPLITS)[None, :]
    n = tl.maximum(tl.minimum(n_pixels - i * split, split), 0) * CG * 1.0    # (1, SPLITS)
    means = tl.load(moments + row + i, mask=n > 0, other=0.0)                # (GROUPS, SPLITS)
    m2s = tl.load(moments + row + SPLITS + i, mask=n > 0, other=0.0)
    # All splits at once: around the first one's mean, so that no large numbers are added.
    pivot = tl.load(moments + row)                                           # (GROUPS, 1)
    away = tl.where(n > 0, means - pivot, 0.0)                               # (GROUPS, SPLITS)
    offset = tl.sum(away * n, 1) / (n_pixels * CG)                           # (GROUPS,)
    mean = tl.sum(pivot, 1) + offset
    away -= offset[:, None]
    m2 = tl.sum(m2s + away * away * n, 1)                                    # (GROUPS,)
    rstd = 1.0 / tl.sqrt_rn(m2 / (n_pixels * CG) + eps)
    first = tl.program_id(0) * split
    _normalise(x + item * x_b, shift + item * s_b, residual + item * r_b, weight, bias,
               out + item * o_b, x_c, x_s, r_c, r_s, o_c, o_s, group,
               first, min(first + split, n_pixels), mean, rstd, CG,
               PIXELS, GROUPS, CHANNELS, SHIFT, RESIDUAL, SILU)


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
    return launch.refusal(_one_launch_kernel, **pictures, **rows)


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
    """The launches for these tensors, one or two by the size of a group; s goes into ``total``."""
    front, keeps = dict(SHIFT=shift is not None, RESIDUAL=residual is not None), total is not None
    shift = weight if shift is None else shift  # never looked at, as are the next two
    x, out = _flat(x), _flat(out)
    residual, total = (x if y is None else _flat(y) for y in (residual, total))
    batch, channels, pixels = x.shape
    two = (cg := channels // groups) * pixels > LARGEST_IN_ONE_LAUNCH
    tile = launch.setting(x.device, "group norm", int(two))
    last = _channels_last(x)
    spans = math.gcd(tile.groups, groups) if last else 1
    width = triton.next_power_of_2(cg) if last else cg & -cg  # covers cg, or divides it
    rows = max(1, min(tile.elements // (spans * width), triton.next_power_of_2(pixels)))
    grid, sizes = (groups // spans, batch), dict(CG=cg, PIXELS=rows, GROUPS=spans, CHANNELS=width)
    strides = (shift.stride(0) if shift.dim() == 2 else 0, *residual.stride())
    if not two:
        args = (x, shift, residual, weight, bias, out, total, *x.stride(), *strides)
        args += (*out.stride(), *total.stride(), pixels, eps)
        sizes |= front | dict(TOTAL=keeps, SILU=silu)
        return [launch.Call(_one_launch_kernel, grid, args, sizes, tile.warps)]
    split = triton.cdiv(triton.cdiv(pixels, SPLITS), rows) * rows  # pixels, in whole tiles
    grid = (triton.cdiv(pixels, split), *grid)
    moments = x.new_empty(batch * groups, 2, SPLITS, dtype=torch.float32)
    args = (x, shift, residual, total, moments, *x.stride(), *strides, *total.stride())
    args, sizes = (*args, pixels, split), sizes | front | dict(SPLITS=SPLITS)
    first = launch.Call(_moments_kernel, grid, args, sizes | dict(TOTAL=keeps), tile.warps)
    if keeps:  # the sum is there by then
        x, shift, residual, sizes = total, weight, total, sizes | dict.fromkeys(front, False)
    args = (x, shift, residual, moments, weight, bias, out, *x.stride(), *strides, *out.stride())
    args, constants = (*args, pixels, split, eps), sizes | dict(SILU=silu)
    return [first, launch.Call(_apply_kernel, grid, args, constants, tile.warps)]


def cost(
    elements: int, itemsize: int, silu: bool = True, residual: bool = False, total: bool = False,
) -> launch.Cost:
    """The least work of one call; 10 operations and, for SiLU, an exponential an element."""
    return launch.Cost(10 * elements, (2 + residual + total) * elements * itemsize, silu * elements)
