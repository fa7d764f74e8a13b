"""Reference ops and torch ops equal the formulas in NumPy float64."""

from math import erf

import numpy as np
import pytest
import torch
from reference_models import error, randn

from minisd.models.ops import REFERENCE, TORCH

# Rounding errors of sums of a few hundred numbers of size one.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
LOOSE = BOUNDS | {torch.float32: 2e-4}  # after an erf or a division
PAIR = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)

ATTENTION = [  # (B, Lq, Lk, heads, d, causal)
    (1, 1, 1, 1, 1, False),  # a single element
    (3, 7, 5, 3, 20, False),  # no size a power of two, more queries than keys
    (2, 5, 77, 8, 40, False),  # cross-attention of SD1
    (1, 77, 77, 12, 64, True),  # SD1's text encoder
    (2, 130, 130, 1, 24, False),  # one head, as in the autoencoder
    (2, 9, 9, 2, 160, True),  # SD1's widest head
]
GROUP_NORM = [  # (shape, groups)
    ((1, 4, 1, 1), 2),
    ((3, 12, 5, 7), 4),
    ((2, 320, 3, 5), 32),
    ((2, 6, 11), 3),  # (B, C, L)
    ((2, 8, 4, 4), 8),  # a group for each channel
    ((2, 8, 4, 4), 1),
]


def attention_inputs(batch, lq, lk, heads, d, dtype):
    """With a mean, and as strided views, like the chunks of one projection."""
    width = heads * d
    q = (-2.3 + 0.5 * randn(batch, lq, 2 * width, dtype=dtype))[..., :width]
    kv = 0.7 + randn(batch, lk, 2 * width, seed=1, dtype=dtype)
    return q, kv[..., :width], kv[..., width:]


def numpy_attention(q, k, v, heads, causal):
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out, d = np.zeros(q.shape), q.shape[-1] // heads
    for b in range(q.shape[0]):
        for h in range(heads):
            head = slice(h * d, (h + 1) * d)
            for i in range(q.shape[1]):
                seen = slice(0, i + 1 if causal else None)
                scores = k[b, seen, head] @ q[b, i, head] / np.sqrt(d)
                weights = np.exp(scores - scores.max())
                out[b, i, head] = weights @ v[b, seen, head] / weights.sum()
    return torch.from_numpy(out)


def numpy_group_norm_silu(x, weight, bias, groups, eps, silu):
    x, weight, bias = (t.double().numpy() for t in (x, weight, bias))
    out, width = np.zeros(x.shape), x.shape[1] // groups
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            group = x[b, c // width * width : (c // width + 1) * width]
            y = (x[b, c] - group.mean()) / np.sqrt(group.var() + eps) * weight[c] + bias[c]
            out[b, c] = y / (1 + np.exp(-y)) if silu else y
    return torch.from_numpy(out)


@PAIR
@DTYPE
@pytest.mark.parametrize("batch, lq, lk, heads, d, causal", ATTENTION)
def test_attention(batch, lq, lk, heads, d, causal, dtype, ops):
    q, k, v = attention_inputs(batch, lq, lk, heads, d, dtype)
    kept = [x.clone() for x in (q, k, v)]
    out = ops.attention(q, k, v, heads, causal=causal)
    assert out.dtype == dtype
    assert error(out, numpy_attention(q, k, v, heads, causal)) <= BOUNDS[dtype]
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v)))


@PAIR
@DTYPE
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape, groups", GROUP_NORM)
def test_group_norm_silu(shape, groups, silu, dtype, ops):
    x = (-2.3 + 0.5 * randn(*shape, 2, dtype=dtype))[..., 1]  # a view with gaps
    weight = 1 + randn(shape[1], seed=1, dtype=dtype)
    bias = randn(shape[1], seed=2, dtype=dtype)
    kept = x.clone()
    out = ops.group_norm_silu(x, weight, bias, groups, 1e-5, silu)
    assert out.dtype == dtype
    assert error(out, numpy_group_norm_silu(x, weight, bias, groups, 1e-5, silu)) <= BOUNDS[dtype]
    assert torch.equal(x, kept)


@PAIR
def test_group_norm_in_channels_last(ops):
    x = (-2.3 + 0.5 * randn(2, 12, 5, 7)).to(memory_format=torch.channels_last)
    weight, bias = randn(12, seed=1), randn(12, seed=2)
    out = ops.group_norm_silu(x, weight, bias, 4, 1e-6, True)
    assert error(out, numpy_group_norm_silu(x, weight, bias, 4, 1e-6, True)) <= 1e-12


@PAIR
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_group_norm_keeps_its_digits_far_from_zero(ops, form, silu):
    """E[x^2] - E[x]^2 in float32 is wrong in the first digit here; so is torch's own on a CPU in
    channels_last."""
    x = (1000 + 0.5 * randn(2, 8, 16, 16, dtype=torch.float32)).contiguous(memory_format=form)
    weight, bias = randn(8, seed=1, dtype=torch.float32), randn(8, seed=2, dtype=torch.float32)
    out = ops.group_norm_silu(x, weight, bias, 2, 1e-5, silu)
    assert error(out, numpy_group_norm_silu(x, weight, bias, 2, 1e-5, silu)) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_survives_large_scores(dtype):
    """q k^T is 5 million here; the largest float16 is 65504."""
    q, k = (300 + 10 * randn(1, 6, 64, seed=seed, dtype=dtype) for seed in (0, 1))
    v = randn(1, 6, 64, seed=2, dtype=dtype)
    out = REFERENCE.attention(q, k, v, 1)
    assert out.dtype == dtype
    assert error(out, numpy_attention(q, k, v, 1, False)) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_group_norm(dtype):
    x = 200 + 100 * randn(2, 8, 9, 9, dtype=dtype)  # its squares exceed 65504
    weight, bias = (randn(8, seed=seed, dtype=dtype) for seed in (1, 2))
    out = REFERENCE.group_norm_silu(x, weight, bias, 2, 1e-5, True)
    assert out.dtype == dtype
    exact = numpy_group_norm_silu(x, weight, bias, 2, 1e-5, True)
    assert error(out, exact) <= torch.finfo(dtype).eps * exact.abs().max()


@PAIR
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shift", [None, (8,), (2, 8)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_group_norm_of_a_sum(ops, silu, shift, residual):
    """In both layouts; the sum is returned, or written where it is wanted; nothing else changes."""
    x, weight, bias = -2.3 + randn(2, 8, 5, 3), randn(8, seed=1), randn(8, seed=2)
    shift = None if shift is None else randn(*shift, seed=3)
    residual = 3 * randn(2, 8, 5, 3, seed=4) if residual else None
    s = x if shift is None else x + shift.reshape(-1, 8, 1, 1)
    s = s if residual is None else s + residual
    exact = numpy_group_norm_silu(s, weight, bias, 2, 1e-5, silu)
    same = 0 if ops is TORCH else 1e-15  # the reference adds in another order
    for form in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=form)
        args = (given, weight, bias, 2, 1e-5, silu, shift, residual)
        assert error(ops.group_norm_silu(*args), exact) <= BOUNDS[torch.float64]
        into = torch.full((2, 20, 5, 3), 7.0, dtype=x.dtype)
        for where in (True, into[:, 6:14]):
            y, total = ops.group_norm_silu(*args, return_sum=where)
            assert error(y, exact) <= BOUNDS[torch.float64] and error(total, s) <= same
        assert error(into[:, 6:14], s) <= same
        assert (into[:, :6] == 7).all() and (into[:, 14:] == 7).all()
        assert torch.equal(given, x)


@PAIR
@DTYPE
@pytest.mark.parametrize("shift, residual", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_layer_norm(ops, dtype, shift, residual):
    x, weight, bias = -2.3 + randn(2, 5, 12, dtype=dtype), randn(12, seed=1), randn(12, seed=2)
    shift = randn(12, seed=3).to(dtype) if shift else None
    residual = randn(2, 5, 12, seed=4).to(dtype) if residual else None
    before = x.clone()
    y, s = ops.layer_norm(x, weight.to(dtype), bias.to(dtype), 1e-5, residual, shift)
    rows = sum(part.double().numpy() for part in (x, shift, residual) if part is not None)
    mean, variance = rows.mean(-1, keepdims=True), rows.var(-1, keepdims=True)
    exact = (rows - mean) / np.sqrt(variance + 1e-5) * weight.numpy() + bias.numpy()
    assert error(y, torch.from_numpy(exact)) <= LOOSE[dtype]
    assert error(s, torch.from_numpy(rows)) <= BOUNDS[dtype]
    assert torch.equal(x, before) and y.dtype == s.dtype == dtype


@PAIR
@DTYPE
def test_geglu(ops, dtype):
    h = 3 * randn(2, 5, 14, dtype=dtype)
    value, gate = np.split(h.double().numpy(), 2, axis=-1)
    gelu = np.vectorize(lambda g: g * (1 + erf(g / 2**0.5)) / 2)
    assert error(ops.geglu(h), torch.from_numpy(value * gelu(gate))) <= LOOSE[dtype]


@PAIR
@torch.enable_grad()
def test_gradients_pass(ops):
    """Training goes through every function, and none overwrites what a gradient needs."""
    x, w, b = (randn(*shape).requires_grad_() for shape in ((2, 8, 3, 4), (8,), (8,)))
    rows = x.flatten(2).mT
    for y in (ops.group_norm_silu(x, w, b, 2, 1e-5, True, b, x), ops.geglu(rows),
              ops.layer_norm(rows, w, b, 1e-5, rows, b)[0], ops.attention(rows, rows, rows, 2)):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_in_half_precision(form, dtype):
    """Its mean and variance are those of float32: only the result is rounded."""
    x = (-2.3 + randn(2, 16, 24, 24)).to(dtype).contiguous(memory_format=form)
    weight, bias = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    exact = numpy_group_norm_silu(x.double(), weight.double(), bias.double(), 2, 1e-5, False)
    y = TORCH.group_norm_silu(x, weight, bias, 2, 1e-5, False)
    assert error(y, exact) <= torch.finfo(dtype).eps * exact.abs().max()
