"""group_norm_silu, interpreted, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import (
    CANARY,
    DTYPES,
    InterpreterBuilder,
    compare,
    embed,
    table,  # noqa: F401 - a fixture
    take,
)
from minisd_kernels.ops import launch
from minisd_kernels.ops.group_norm import cost, group_norm_silu, plan, refusal

NAN = float("nan")
LAST = pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
ONE = [  # shape, groups: why; all in one launch, a group a program
    ((2, 2, 1, 1), 2),  # groups of one value, whose variance is 0
    ((2, 8), 2),  # no pixels at all
    ((2, 16, 3, 3), 8),  # an odd number of pixels
    ((3, 12, 5, 7), 3),  # groups no power of two
    ((1, 15, 11), 3),  # an odd number of channels a group; (B, C, L)
    ((1, 20, 9, 7), 2),  # SD1 has 10, 20, 30, 40, 60 and 80 channels a group
    ((1, 40, 16, 16), 2),  # 20; pixels fill the tile
    ((1, 60, 3, 3), 2),  # 30
    ((1, 80, 10, 12), 2),  # 40
    ((1, 120, 5, 5), 2),  # 60
    ((1, 160, 4, 5), 2),  # 80
    ((1, 2, 65, 65), 2),  # one channel a group
    ((1, 16, 64, 64), 2),  # the largest group in one launch
]
THREE = [  # in three launches
    ((1, 8, 33, 249), 2),  # just too large for one; pixels no multiple of a tile's
    ((1, 40, 47, 47), 4),  # SD1's 10 channels a group
    ((1, 9, 96, 87), 3),  # groups no power of two
    ((1, 160, 25, 41), 2),  # in channels_last several tiles side by side, one ragged
]


def place(x, last, around):
    """x as a slice of the channels of a larger tensor, in either layout; and that tensor."""
    if not last:
        return embed(x, (0, 1) + (0,) * (x.dim() - 2), around)
    view, whole = embed(x.movedim(1, -1), (0,) * (x.dim() - 1) + (1,), around)
    return view.movedim(-1, 1), whole


def inputs(shape, last, dtype, mean=-2.3, deviation=0.5):
    """x with a mean, surrounded by NaN; a weight and a bias."""
    x = (mean + deviation * torch.randn(shape)).to(dtype)
    weight, bias = (m + torch.randn(shape[1]) for m in (1, -0.5))
    return place(x, last, NAN)[0], weight.to(dtype), bias.to(dtype)


def normalise(x, weight, bias, groups, eps=1e-5, silu=True, shift=None, residual=None):
    """The kernel's result and sum, written over NaN and surrounded by canaries; inputs must not
    change."""
    assert refusal(x, weight, bias, groups, shift, residual) is None
    tensors = [t for t in (x, weight, bias, shift, residual) if t is not None]
    kept = [t.clone() for t in tensors]
    last = x.stride(1) == 1
    out, total = (place(torch.full_like(x, NAN), last, CANARY) for _ in range(2))
    launch.run(plan(x, weight, bias, out[0], total[0], groups, eps, silu, shift, residual))
    assert all(map(torch.equal, kept, tensors))
    return take(*out), take(*total)


def add(x, shift=None, residual=None):
    """x + shift + residual by torch, one after the other, in their dtype."""
    if shift is not None:
        x = x + shift.reshape(-1, x.shape[1], *[1] * (x.dim() - 2))
    return x if residual is None else x + residual


def torchs(x, weight, bias, groups, eps=1e-5, silu=True, shift=None, residual=None):
    """By torch, in NCHW: in channels_last on a CPU it computes E[x^2] - E[x]^2, which cancels."""
    s = add(x, shift, residual).contiguous().to(weight.dtype)  # a GPU needs equal dtypes
    y = F.group_norm(s, groups, weight, bias, eps).to(x.dtype)
    return F.silu(y) if silu else y


def exact(x, weight, bias, groups, eps=1e-5, silu=True, shift=None, residual=None):
    shift, residual = (t if t is None else t.double() for t in (shift, residual))
    s = add(x.double(), shift, residual)
    grouped = s.unflatten(1, (groups, -1)).flatten(2)                        # (B, G, CG * S)
    centred = grouped - grouped.mean(2, keepdim=True)
    variance = (centred * centred).mean(2, keepdim=True)
    y = (centred / (variance + eps).sqrt()).reshape(s.shape)
    weight, bias = (t.double().view(-1, *[1] * (x.dim() - 2)) for t in (weight, bias))
    y = y * weight + bias
    return y * y.sigmoid() if silu else y


def check(name, *args, **options):
    out, total = normalise(*args, **options)
    compare(name, out, torchs(*args, **options), exact(*args, **options))
    return out, total


@DTYPES
@LAST
@pytest.mark.parametrize("shape, groups", ONE)
def test_values(shape, groups, last, dtype):
    check("group norm", *inputs(shape, last, dtype), groups)


@LAST
@pytest.mark.parametrize("shape, groups", THREE)
def test_values_in_three_launches(shape, groups, last):
    """In float32, where errors show; test_front has the other dtypes."""
    check("group norm", *inputs(shape, last, torch.float32), groups)


@LAST
@pytest.mark.parametrize("largest, programs", [(2**14, 1), (1, 1), (1, 12), (1, 1000)])
def test_values_with_another_tile(largest, programs, last, monkeypatch):
    """Any launch setting: splits of one tile and of many, joined in several rounds."""
    monkeypatch.setattr("minisd_kernels.ops.group_norm.PROGRAMS", programs)
    monkeypatch.setattr("minisd_kernels.ops.group_norm.JOINED", 4)
    monkeypatch.setitem(launch.DEFAULT, ("group norm", 0), launch.Norm(largest, 1, 4))
    monkeypatch.setitem(launch.DEFAULT, ("group norm", 1), launch.Norm(32, 8, 4))
    check("group norm", *inputs((2, 24, 5, 3), last, torch.float32), 8)


@pytest.mark.parametrize("rows, launches", [(ONE, 1), (THREE, 3)])
def test_number_of_launches(rows, launches):
    """ONE and THREE are what they are called."""
    for shape, groups in rows:
        x, weight, bias = inputs(shape, False, torch.float16)
        assert len(plan(x, weight, bias, x, None, groups, 1e-5, True)) == launches


@DTYPES
@LAST
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_without_silu(eps, last, dtype):
    """The transformer's norm and the autoencoder have eps 1e-6."""
    check("group norm", *inputs((1, 12, 5, 7), last, dtype), 3, eps, False)


FRONTS = {  # shift's and residual's shapes
    "bias": ("(C,)", False),  # bias of the preceding convolution
    "time": ("(B, C)", False),  # a row for each item, a slice of longer rows
    "skip": (None, True),
    "all": ("(B, C)", True),
}


@DTYPES
@LAST
@pytest.mark.parametrize("front, shape", [
    *((front, (2, 12, 5, 7)) for front in FRONTS), ("all", (2, 4, 33, 249)),
])
def test_front(shape, front, last, dtype):
    """x + shift + residual is rounded once; then the result equals the kernel's on that sum, to the
    last bit when interpreted."""
    x, weight, bias = inputs(shape, last, dtype)
    groups = shape[1] // 4
    rows, skip = FRONTS[front]
    shift = {
        None: None, "(C,)": torch.randn(shape[1]).to(dtype),
        "(B, C)": embed(torch.randn(shape[:2]).to(dtype), (0, 3), NAN)[0],
    }[rows]
    residual = place(torch.randn(shape).to(dtype), last, NAN)[0] if skip else None
    options = dict(shift=shift, residual=residual)
    out, total = check("group norm, fused front", x, weight, bias, groups, **options)
    compare("its sum", total, add(x, **options), add(
        x.double(), *(t if t is None else t.double() for t in (shift, residual))))
    if x.is_cpu:
        assert torch.equal(out, normalise(place(total, last, NAN)[0], weight, bias, groups)[0])
    else:  # compiled, the order of sums differs
        args = total, weight, bias, groups
        compare("group norm of that sum", out, torchs(*args), exact(*args))


@LAST
@pytest.mark.parametrize("shape, groups", [((2, 12, 5, 7), 2), ((1, 4, 33, 249), 1)])
def test_the_function_gives_the_same_bits_every_time(shape, groups, last):
    """From run to run, and with the residual and the sum in the other layout."""
    x, weight, bias = inputs(shape, last, torch.bfloat16)
    shift, residual = bias.flip(0), place(x.flip(1), not last, NAN)[0]
    args = x, weight, bias, groups, 1e-6, False, shift, residual
    first, s = group_norm_silu(*args, return_sum=True)
    for y in (first, s):
        assert y.movedim(1, -1).is_contiguous() if last else y.is_contiguous()
    own, whole = place(torch.full_like(x, NAN), not last, CANARY)
    second, same = group_norm_silu(*args, return_sum=own)
    assert same is own
    assert torch.equal(take(own, whole), s)
    third, total = normalise(*args)
    assert torch.equal(first, second) and torch.equal(first, third) and torch.equal(s, total)
    assert torch.equal(first, group_norm_silu(*args))


@LAST
def test_weights_in_float32(last):
    x, *rows = inputs((1, 8, 5, 5), last, torch.float16)
    check("group norm", x, *(row.float() + 1e-4 for row in rows), 2)


@LAST
@pytest.mark.parametrize("shape", [(2, 20, 18, 20), (1, 8, 33, 249)], ids=["one", "three"])
@pytest.mark.parametrize("mean, deviation", [(1000, 1), (-1e-4, 1e-6), (1e15, 1e14)])
def test_far_from_one(mean, deviation, shape, last):
    """E[x^2] - E[x]^2 in float32 would be wrong in the first digit at a mean of 1000."""
    x, weight, bias = inputs(shape, last, torch.float32, mean, deviation)
    check(f"group norm, {mean:g} +- {deviation:g}", x, weight, bias, 2, 1e-12, False)


@LAST
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_squares_past_the_end_of_float16(dtype, last):
    check("group norm", *inputs((1, 8, 9, 9), last, dtype, -20000, 10000), 2)


@LAST
@pytest.mark.parametrize("shape", [(1, 16, 9, 9), (1, 16, 129, 131)], ids=["one", "three"])
def test_a_group_of_one_value_becomes_the_bias(shape, last):
    """To the last bit: any difference of mean and value is multiplied by 1 / sqrt(eps)."""
    x, weight, bias = inputs(shape, last, torch.float32)
    x.copy_(1000 * torch.randn(8, 1, 1).repeat_interleave(2, 0))
    out, _ = normalise(x, weight, bias, 8, 1e-12, False)
    assert torch.equal(out, bias.view(-1, 1, 1).expand(shape))


@LAST
def test_cost_is_what_the_kernel_does(last, monkeypatch):
    """Exponentials, counted where tiles are whole."""
    exponentials, exp = [], InterpreterBuilder.create_exp

    def counting_exp(self, x):
        exponentials.append(x.data.size)
        return exp(self, x)

    monkeypatch.setattr(InterpreterBuilder, "create_exp", counting_exp)
    x, weight, bias = inputs((2, 8, 16, 16), last, torch.float16)
    normalise(x, weight, bias, 2)
    assert sum(exponentials) == cost(x.numel(), x.itemsize).exponentials
    exponentials.clear()
    group_norm_silu(x, weight, bias, 2, silu=False)
    assert sum(exponentials) == cost(x.numel(), x.itemsize, silu=False).exponentials
