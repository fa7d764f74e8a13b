"""The rungs of kernels/ladder, interpreted: values against float64, and their costs counted."""

import re
from collections import Counter
from itertools import product
from pathlib import Path
from unittest.mock import patch

import interpreted_attention as attentions
import interpreted_group_norm as norms
import interpreter
import pytest
import torch
from interpreter import (
    CANARY,
    DTYPES,
    InterpreterBuilder,
    table,  # noqa: F401 - a fixture
    take,
)
from minisd_kernels.ladder import (
    attention_1_naive,
    attention_2_tiled,
    attention_3_online,
    attention_4_split,
    group_norm_1_two_passes,
    group_norm_2_one_pass,
    group_norm_3_fused,
    shared,
)
from minisd_kernels.ladder.shared import Cost
from minisd_kernels.ops import attention as final, launch
from triton.runtime.interpreter import ReduceOps

README = Path(shared.__file__).with_name("README.md")
ATTENTION = [attention_1_naive, attention_2_tiled, attention_3_online, attention_4_split]
GROUP_NORM = [group_norm_1_two_passes, group_norm_2_one_pass, group_norm_3_fused]
name_of = lambda rung: rung.__name__.rpartition(".")[2]
each_attention, each_group_norm = (
    pytest.mark.parametrize("rung", rungs, ids=name_of) for rungs in (ATTENTION, GROUP_NORM))
SIZES = [  # B, Lq, Lk, heads, d, layout: why. A tile has 64 rows, in float32 16
    (1, 1, 1, 1, 4, "alone"),  # one score; most of a tile is padding
    (2, 2, 77, 3, 12, "gaps"),  # heads no power of two; ragged keys
    (1, 66, 66, 1, 40, "packed"),  # SD1's first width; two ragged tiles of queries
    (1, 4, 128, 2, 44, "pair"),  # the shipped model's; whole tiles of keys
    (1, 2, 131, 2, 64, "alone"),  # a width of two equal pieces; three tiles of keys
    (1, 3, 70, 1, 80, "pair"),  # 64 + 16, both whole
    (1, 2, 65, 1, 160, "gaps"),  # 128 + 32
    (1, 9, 20, 1, 256, "alone"),  # the widest
]


def run(function, *args):
    """The result, written over NaN between canaries. The arguments must not change."""
    given, made = [x for x in args if isinstance(x, torch.Tensor)], []
    kept = [x.clone() for x in given]

    def empty(*shape, dtype, device):
        shape = torch.Size(shape[0] if len(shape) == 1 else shape)
        whole = torch.full((shape.numel() + 512,), CANARY, dtype=dtype, device=device)
        made.append((whole[256:-256].view(shape).fill_(float("nan")), whole))
        return made[-1][0]

    with patch.object(torch, "empty", empty):
        out = function(*args)
    assert out.shape == args[0].shape and out.dtype == args[0].dtype
    assert all(map(torch.equal, kept, given))
    out = out.clone()
    for view, whole in made:
        take(view, whole)
    return out


def compare(rung, out, *others):
    """As of every kernel; but float32 on a GPU may be 8 times as far off as torch's own. There ops
    keeps its sums short (`_sliced_kernel`), for which the rungs have no lines."""
    long_sums = out.dtype == torch.float32 and not out.is_cpu
    interpreter.compare(name_of(rung), out, *others, times=8 if long_sums else 2)


# --- attention


def check_attention(rung, *args):
    compare(rung, run(rung.attention, *args), attentions.torchs(*args), attentions.exact(*args))


@DTYPES
@each_attention
@pytest.mark.parametrize("batch, lq, lk, heads, d, layout", SIZES)
def test_attention(rung, batch, lq, lk, heads, d, layout, dtype):
    """All scores are negative, so a key past the end, whose score is 0, would win."""
    q, k, v = attentions.inputs(batch, lq, lk, heads, d, layout, dtype)
    check_attention(rung, q.neg_(), k, v, heads)


@each_attention
def test_a_maximum_that_rises_and_falls(rung):
    """The scores of the first tile of keys are about 100, of the second 103, of the last 0. Without
    the largest of all, exp(103) is infinite in float32."""
    q, k, v = torch.ones(1, 2, 8), *torch.randn(2, 1, 40, 8)
    k[:, :16] += 100 * 8**-0.5
    k[:, 16:32] += 103 * 8**-0.5
    check_attention(rung, q, k, v, 1)


@each_attention
def test_logits_past_the_end_of_float16(rung):
    q, k, v = (torch.randn(1, n, 40) for n in (2, 70, 70))
    q[..., 0], k[..., 0], k[:, ::2, 0] = 500, -800, 800
    check_attention(rung, q.half(), k.half(), v.half(), 1)


X = torch.zeros(2, 5, 16)
LONG = torch.empty_strided((1, 3, 8), (1, 2**30, 1), device="meta")


@each_attention
@pytest.mark.parametrize("said, q, k, v, heads", [
    ("q is (B, Lq, H*d), k and v are (B, Lk, H*d)", X[0], X[0], X[0], 2),
    ("q is (B, Lq, H*d), k and v are (B, Lk, H*d)", X, X, X[:, 1:], 2),
    ("q is (B, Lq, H*d), k and v are (B, Lk, H*d)", X, X[:, :0], X[:, :0], 2),
    ("shapes do not fit", X, X, X, 3),
    ("a head is at most 256 wide, not 257", *[torch.zeros(1, 1, 257)] * 3, 1),
    ("dtypes differ", X, X.half(), X.half(), 2),
    ("are not next to each other", X, X.mT.contiguous().mT, X, 2),
    ("one item passes 2^31", *[LONG] * 3, 1),
    ("not float16, bfloat16 or float32", *[X.double()] * 3, 2),
    ("requires a gradient", X, X, X.clone().requires_grad_(), 2),
])
def test_attention_rejects(rung, said, q, k, v, heads):
    with torch.enable_grad(), pytest.raises(ValueError, match=re.escape(said)):
        rung.attention(q, k, v, heads)


# --- GroupNorm


def inputs(shape, dtype, mean=-2.3, deviation=0.5):
    x, weight, bias = norms.inputs(shape, False, dtype, mean, deviation)
    return x.contiguous(), weight, bias


def check_group_norm(rung, x, weight, bias, groups, *options):
    """``options``: eps, silu, shift, residual."""
    args = (x, weight, bias, groups, *options)
    compare(rung, run(rung.group_norm_silu, *args), norms.torchs(*args), norms.exact(*args))


@DTYPES
@each_group_norm
@pytest.mark.parametrize("shape, groups", [
    ((2, 2, 1, 1), 2),  # groups of one value, whose variance is 0
    ((2, 16, 3, 3), 8),  # an odd number of pixels
    ((3, 12, 5, 7), 3),  # groups no power of two
    ((1, 20, 16, 16), 2),  # SD1's 10 channels a group; pixels fill the block
    ((1, 2, 65, 65), 1),  # a block and 129 pixels
])
def test_group_norm(rung, shape, groups, dtype):
    check_group_norm(rung, *inputs(shape, dtype), groups, 1e-5)


@each_group_norm
@pytest.mark.parametrize("mean, deviation", [(1000, 1), (-1e-4, 1e-6)])
def test_far_from_one(rung, mean, deviation):
    """Where E[x^2] - E[x]^2 is wrong in the first digit. The bound is two roundings of x in
    float32, 1.2e-4 at 1000, in units of the deviation; torch's own error is 1e-4 there."""
    args = *inputs((2, 20, 18, 20), torch.float32, mean, deviation), 2, 1e-13, False
    out, exact = run(rung.group_norm_silu, *args), norms.exact(*args)
    bound = 2 * torch.finfo(torch.float32).eps * abs(mean) / deviation * args[1].abs().max()
    assert (out - exact).abs().max() <= bound < 1e-3


@DTYPES
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [None, "(C,)", "(B, C)"])
def test_front(rows, residual, dtype):
    x, weight, bias = inputs((2, 12, 5, 7), dtype)
    shift = {None: None, "(C,)": 3 * bias, "(B, C)": torch.randn(2, 15).to(dtype)[:, :12]}[rows]
    skip = torch.randn(x.shape).to(dtype) if residual else None
    check_group_norm(group_norm_3_fused, x, weight, bias, 3, 1e-5, True, shift, skip)


P, ROW = torch.zeros(2, 8, 6, 4), torch.zeros(8)


@pytest.mark.parametrize("said, x, weight, bias, groups, options", [
    ("is not (B, C, H, W) with 2 groups", P[0, 0], ROW, ROW, 2, {}),
    ("is not (B, C, H, W) with 3 groups", P, ROW, ROW, 3, {}),
    ("x must be contiguous", P.contiguous(memory_format=torch.channels_last), ROW, ROW, 2, {}),
    ("residual must be contiguous", P, ROW, ROW, 2, dict(residual=P[:1])),
    ("weight is (7,), not (8,)", P, ROW[1:], ROW, 2, {}),
    ("shift is (3, 8), not (8,) or (2, 8)", P, ROW, ROW, 2, dict(shift=ROW.expand(3, 8))),
    ("not float16, bfloat16 or float32", P.double(), ROW, ROW, 2, {}),
    ("one item passes 2^31", torch.empty(1, 8, 2**14, 2**14, device="meta"), ROW, ROW, 2, {}),
])
def test_group_norm_rejects(said, x, weight, bias, groups, options):
    with pytest.raises(ValueError, match=re.escape(said)):
        group_norm_3_fused.group_norm_silu(x, weight, bias, groups, 1e-5, **options)


# --- costs


def counted(monkeypatch, operations, function, *args) -> Cost:
    """The Cost of a call: what its loads and stores do not mask, and what it allocates besides the
    result. ``operations``: owner, method, and how many operations it does with its arguments."""
    found = Counter()

    def watch(owner, name, field, amount):
        plain = getattr(owner, name)

        def watching(*args, **options):
            result = plain(*args, **options)
            found[field] += amount(result, *args)
            return result
        monkeypatch.setattr(owner, name, watching)

    def bytes_of(ptrs, mask):
        return mask.data.sum().item() * ptrs.get_element_ty().primitive_bitwidth // 8

    watch(InterpreterBuilder, "create_masked_load", "loaded",
          lambda x, self, ptrs, mask, *_: bytes_of(ptrs, mask))
    watch(InterpreterBuilder, "create_masked_store", "stored",
          lambda x, self, ptrs, tile, mask, *_: bytes_of(ptrs, mask))
    for owner, name, amount in operations:
        watch(owner, name, "flops", amount)
    watch(launch, "run", "launches", lambda x, calls: len(calls))
    watch(torch, "empty", "scratch", lambda x, *_: x.nbytes)
    result = function(*args)
    found["scratch"] -= result.nbytes
    return Cost(**found)


DOT = [(InterpreterBuilder, "create_dot",
        lambda x, self, a, *_: 2 * a.data.size * x.data.shape[1])]
# Without tl.dot: a multiplication of two blocks and its sum.
SUMS = [(InterpreterBuilder, "create_fmul", lambda x, *_: 2 * x.data.size * (x.data.ndim == 2))]
# Each operation of GroupNorm on a block; those on single numbers do not count.
EACH = [(ReduceOps, "sum", lambda x, self, block: block.handle.data.size)] + [
    (InterpreterBuilder, f"create_{name}", lambda x, *_: x.data.size * (x.data.size > 1))
    for name in ("fadd", "fsub", "fmul", "fdiv", "fneg", "exp")
    if hasattr(InterpreterBuilder, f"create_{name}")]  # Triton 3.6 negates by a subtraction


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@each_attention
@pytest.mark.parametrize("batch, lq, lk, heads, d, layout", SIZES[1:2] + SIZES[4:5])
def test_attention_cost_is_what_it_does(rung, batch, lq, lk, heads, d, layout, dtype, monkeypatch):
    args = attentions.inputs(batch, lq, lk, heads, d, layout, dtype)
    operations = SUMS if rung is attention_1_naive else DOT
    found = counted(monkeypatch, operations, rung.attention, *args, heads)
    assert found == rung.cost(batch, lq, lk, heads, d, dtype.itemsize)


@each_group_norm
@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (1, 4, 65, 65)])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_cost_is_what_it_does(rung, shape, silu, monkeypatch):
    args = *inputs(shape, torch.float16), 2, 1e-5, silu
    sizes = (*shape[:2], shape[2] * shape[3], 2, silu)
    for front in product(*[(False, True)] * 2 if rung is group_norm_3_fused else []):
        addends = [x if given else None for given, x in zip(front, (args[1], args[0]))]
        with monkeypatch.context() as patches:
            found = counted(patches, EACH, rung.group_norm_silu, *args, *addends)
        assert found == rung.cost(*sizes, *front)


def line(name: str, cost: Cost) -> str:
    """A line of the README's tables."""
    launches, flops, *sizes = cost
    cells = [f"{launches} | {flops / 1e9:.3g}", *(f"{x / 1e6:,.1f}" if x else "0" for x in sizes)]
    return f"| {name} | {' | '.join(cells)} |"


HEAD = """
| | launches | GFLOP | loaded, MB | stored, MB | memory of its own, MB |
|---|---|---|---|---|---|"""


def test_the_tables_of_the_readme():
    """They are what `cost` says at these sizes."""
    size = batch, lq, lk, heads, d, itemsize = 2, 4096, 4096, 8, 40, 2
    output = batch * lq * heads * d * itemsize
    least = final.cost(*size)
    lines = [line(name, rung.cost(*size)) for name, rung in zip(
        ("1 naive", "2 tiled", "3 online", "4 split"), ATTENTION)]
    lines += [line("the least there can be", Cost(1, least.flops, least.bytes - output, output))]
    tables = ["\n".join([HEAD, *lines, ""])]
    size = batch, channels, pixels, itemsize = 2, 320, 64 * 64, 2
    image, rows = batch * channels * pixels, batch * channels
    add = Cost(1, image, (image + rows) * itemsize, image * itemsize, image * itemsize)
    costs = {"1 two passes": group_norm_1_two_passes.cost(*size),
             "2 one pass": (one := group_norm_2_one_pass.cost(*size)),
             "x + shift by torch, then 2": Cost(*map(sum, zip(add, one))),
             "3 fused, with the shift": group_norm_3_fused.cost(*size, shift=True)}
    tables += ["\n".join([HEAD, *map(line, costs, costs.values()), ""])]
    for lines in tables:
        assert lines in README.read_text(), f"kernels/ladder/README.md should have{lines}"
