"""flash_attention, interpreted, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import (
    CANARY,
    DTYPES,
    InterpreterBuilder,
    compare,
    corrections_needed,
    embed,
    table,  # noqa: F401 - a fixture
    take,
)
from minisd_kernels.ops import launch
from minisd_kernels.ops.attention import PRECISIONS, cost, flash_attention, plan, refusal

NAN = float("nan")
# The memory layouts of q, k and v. NaN surrounds each of them: a wrong read makes the result NaN.
LAYOUTS = {
    "alone": ([0], [1], [2]),  # three tensors, contiguous
    "gaps": ([0], [1], [2]),  # three, with different gaps between rows and items
    "pair": ([0], [1, 2]),  # k and v side by side in the rows of one projection
    "packed": ([0, 1, 2],),  # all three
}
ROWS = [  # B, Lq, Lk, heads, d, layout, causal: why
    (1, 1, 1, 1, 8, "alone", False),  # one score; half a piece
    (2, 5, 77, 3, 4, "gaps", True),  # the narrowest: most of a piece belongs to other heads
    (1, 130, 130, 3, 12, "packed", False),  # most rows are not aligned to 16 bytes
    (2, 65, 77, 2, 20, "pair", False),  # one piece of 32, as two of 16 are no narrower
    (2, 65, 77, 2, 16, "pair", False),  # the prompt's 77 keys, one tile; a tile and one query
    (1, 63, 128, 1, 24, "gaps", False),  # the most keys in one tile; a tile less one query
    (1, 64, 129, 2, 32, "alone", False),  # one key more: online softmax; the last tile has one key
    (2, 130, 130, 2, 40, "packed", False),  # SD1's first width: two pieces, the second ragged
    (1, 9, 77, 5, 40, "pair", False),  # and its cross-attention; heads no power of two
    (2, 130, 130, 2, 44, "packed", False),  # the shipped model's: 32 + 16, no multiple of 8
    (1, 9, 77, 4, 44, "pair", False),  # and its cross-attention
    (3, 7, 192, 1, 48, "gaps", False),  # two whole pieces; whole tiles of keys only
    (1, 5, 191, 2, 56, "alone", False),  # one ragged piece; whole tiles less one key
    (1, 77, 77, 5, 64, "packed", True),  # the text encoder
    (1, 150, 150, 1, 64, "packed", True),  # the diagonal crosses several tiles
    (1, 20, 150, 1, 72, "gaps", True),  # a whole tile of keys that no query sees
    (1, 150, 20, 1, 72, "gaps", True),  # more queries than keys
    (1, 9, 77, 2, 80, "pair", False),  # SD1's second width: 64 + 16, both whole, one tile
    (1, 9, 140, 1, 80, "alone", False),  # and online
    (1, 9, 130, 1, 88, "gaps", False),  # 64 + 32, the second ragged
    (1, 65, 130, 1, 104, "gaps", False),  # one piece of 128, ragged: smaller tiles
    (1, 3, 20, 1, 128, "gaps", True),  # too wide for one tile: online with less than a tile
    (1, 9, 77, 1, 136, "alone", False),  # 128 + 16, the second ragged
    (1, 5, 150, 1, 160, "pair", False),  # SD1's widest: 128 + 32, both whole
    (1, 5, 65, 2, 168, "gaps", False),  # the first width in slices: chunk and slice both ragged
    (1, 5, 65, 2, 172, "pair", False),  # and with no multiple of 8
    (1, 9, 70, 1, 192, "alone", True),  # whole chunks, a ragged slice
    (1, 5, 129, 1, 256, "pair", False),  # two whole slices
    (1, 5, 65, 1, 512, "alone", False),  # the autoencoder
]


def inputs(batch, lq, lk, heads, d, layout, dtype):
    """q, k and v with a mean, surrounded by NaN."""
    q, k = (-2.3 + 0.5 * torch.randn(batch, n, heads * d) for n in (lq, lk))
    tensors = [q, k, 0.7 + torch.randn(batch, lk, heads * d)]
    views = []
    for i, together in enumerate(LAYOUTS[layout]):
        margins = (0, 1 + i, 8 + 8 * i) if layout == "gaps" else (1, 0, 0)
        projection = torch.cat([tensors[n] for n in together], -1).to(dtype)
        views += embed(projection, margins, NAN)[0].chunk(len(together), -1)
    return views


def attend(q, k, v, heads, scale=None, causal=False):
    """The kernel's result, written over NaN and surrounded by canaries; q, k, v must not change."""
    assert refusal(q, k, v, heads) is None
    kept = [x.clone() for x in (q, k, v)]
    out = embed(torch.full_like(q, NAN), (0, 128, 8), CANARY)  # as many rows as a tile has
    scale = (q.shape[2] // heads) ** -0.5 if scale is None else scale
    launch.run([plan(q, k, v, out[0], heads, scale, causal, "ieee")])
    assert all(map(torch.equal, kept, (q, k, v)))
    return take(*out)


def exact(q, k, v, heads, scale=None, causal=False):
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def torchs(q, k, v, heads, scale=None, causal=False):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


def check(name, *args):
    compare(name, attend(*args), torchs(*args), exact(*args))


@DTYPES
@pytest.mark.parametrize("batch, lq, lk, heads, d, layout, causal", ROWS)
def test_values(batch, lq, lk, heads, d, layout, causal, dtype):
    check("attention", *inputs(batch, lq, lk, heads, d, layout, dtype), heads, None, causal)


@pytest.mark.parametrize("d, tile", [(40, (32, 16)), (80, (16, 128)), (168, (16, 32))])
def test_values_with_another_tile(d, tile, monkeypatch):
    """A launch setting may have tiles of any size; 77 keys are always in one."""
    for row in launch.DEFAULT:
        if row[0] in ("attention", "sliced"):
            monkeypatch.setitem(launch.DEFAULT, row, launch.Tile(*tile, 4, 1))
    check("attention", *inputs(2, 35, 135, 1, d, "pair", torch.float16), 1)


@DTYPES
@pytest.mark.parametrize("d", [16, 40])
def test_many_keys(d, dtype):
    """Values with mean 0 nearly cancel, so that a rounded weight or sum shows."""
    q, k, v = inputs(1, 40, 1024, 1, d, "alone", dtype)
    check("attention, 1024 keys", q, k, v - 0.7, 1, 0.1)


@DTYPES
@pytest.mark.parametrize("lk", [77, 130])
def test_another_scale(lk, dtype):
    check("attention", *inputs(1, 5, lk, 1, 40, "alone", dtype), 1, 0.05)


@pytest.mark.parametrize("lk, d, dtype", [
    (77, 72, torch.float16), (150, 72, torch.float16), (150, 256, torch.float16),
    (70, 72, torch.float32),
])  # one tile, online, in slices, and float32
def test_logits_of_ten_thousand(lk, d, dtype):
    """q k^T exceeds 65504, the largest float16, and each query still attends to many keys."""
    q, k, v = torch.randn(1, 5, 2, d), torch.randn(1, lk, 2, d), torch.randn(1, lk, 2, d)
    q[..., 0] = 1e4 * d**0.5 / 800
    k[..., 0] = -800  # the second head's logits are all negative
    k[:, ::2, 0, 0] = 800  # the first head's have both signs
    q, k, v = (x.to(dtype).flatten(2) for x in (q, k, v))
    check("attention, logits of 1e4", q, k, v, 2)


@pytest.mark.parametrize("lk, d, dtype", [
    (77, 40, torch.bfloat16), (150, 40, torch.bfloat16), (70, 168, torch.bfloat16),
    (70, 40, torch.float32),
])
def test_the_function_gives_the_same_bits_every_time(lk, d, dtype):
    """From run to run, and at any address of the result."""
    q, k, v = inputs(2, 9, lk, 2, d, "pair", dtype)
    first, second = (flash_attention(q, k, v, 2, causal=True) for _ in range(2))
    assert first.is_contiguous() and first.dtype == dtype
    assert torch.equal(first, second) and torch.equal(first, attend(q, k, v, 2, causal=True))
    assert torch.equal(first, flash_attention(q, k, v, 2, scale=d**-0.5, causal=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision):
    """Every precision is accepted; the interpreter multiplies float32 exactly with any of them."""
    q, k, v = inputs(1, 5, 9, 2, 8, "alone", torch.float32)
    out = flash_attention(q, k, v, 2, precision=precision)
    compare("attention", out, torchs(q, k, v, 2), exact(q, k, v, 2))


@pytest.mark.parametrize("lk, online", [(128, False), (192, True)])
def test_cost_is_what_the_kernel_does(lk, online, monkeypatch):
    """Counted in whole tiles; the online softmax adds an exponential for each row of each tile."""
    flops, exponentials = [], []
    dot, exp2 = InterpreterBuilder.create_dot, InterpreterBuilder.create_exp2

    def counting_dot(self, a, b, *rest):
        flops.append(2 * a.data.size * b.data.shape[1])
        return dot(self, a, b, *rest)

    def counting_exp2(self, x):
        exponentials.append(x.data.size)
        return exp2(self, x)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", counting_exp2)
    q, k, v = inputs(2, 128, lk, 2, 32, "pair", torch.float16)
    call = plan(q, k, v, torch.empty_like(q), 2, 1.0, False, "ieee")
    launch.run([call])
    alphas = online * 2 * 2 * 128 * lk // call.constants["BLOCK_N"]
    expected = cost(2, 128, lk, 2, 32, q.itemsize)
    assert (sum(flops), sum(exponentials)) == (expected.flops, expected.exponentials + alphas)


def test_the_corrections_of_the_interpreter_are_needed():
    """When this fails, Triton's interpreter is right with bfloat16: remove the corrections."""
    assert corrections_needed() == (True, True)
