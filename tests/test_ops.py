"""Reference ops and torch ops equal the formulas in NumPy float64."""

import re
import sys

import numpy as np
import pytest
import torch
from reference_models import error, randn

import minisd
from minisd.ops import REFERENCE, TORCH, Call, choose, watch
from minisd.unet import UNet

# Rounding errors of sums of a few hundred numbers of size one.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
PAIR = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=lambda ops: ops.name)
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
def test_group_norm_keeps_its_digits_far_from_zero(ops):
    """E[x^2] - E[x]^2 in float32 is wrong in the first digit here."""
    x = 1000 + 0.5 * randn(2, 8, 16, 16, dtype=torch.float32)
    weight, bias = randn(8, seed=1, dtype=torch.float32), randn(8, seed=2, dtype=torch.float32)
    out = ops.group_norm_silu(x, weight, bias, 2, 1e-5, False)
    assert error(out, numpy_group_norm_silu(x, weight, bias, 2, 1e-5, False)) <= 1e-3


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


CPU = torch.device("cpu")


def test_choose():
    assert choose("torch", CPU) is TORCH and choose("reference", CPU) is REFERENCE
    with pytest.raises(ValueError, match="ops must be one of auto, torch, reference, triton"):
        choose("numpy", CPU)


def test_auto_is_torch_without_a_gpu_and_says_why():
    ops = choose("auto", CPU)
    assert (ops.attention, ops.group_norm_silu) == (TORCH.attention, TORCH.group_norm_silu)
    calls = []
    x = randn(1, 5, 16)
    assert torch.equal(watch(ops, calls).attention(x, x, x, 2), TORCH.attention(x, x, x, 2))
    assert calls == [Call("attention", "2 heads of 8, 5x5", "torch", ops.why)]
    assert "run on a GPU" in ops.why or "triton" in ops.why


def test_kernels_chosen_by_name_never_fall_back():
    with pytest.raises(ValueError, match='ops="triton" cannot be had: .*(run on a GPU|triton)'):
        choose("triton", CPU)


@pytest.mark.parametrize("name", ["triton", "auto"])
def test_without_triton(name, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("minisd_kernels")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)  # now importing it fails
    sentence = r"no module named triton; pip install 'minisd\[kernels\]' brings it"
    if name == "triton":
        with pytest.raises(ValueError, match=sentence):
            choose(name, CPU)
    else:
        assert re.search(sentence, choose(name, CPU).why)


def test_auto_on_a_proven_gpu_chooses_call_by_call(monkeypatch):
    """The device "meta" mocks a GPU: the kernels' checks pass there, and nothing is launched."""
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    gpu = torch.device("meta")
    monkeypatch.setattr("minisd_kernels.proof.proven", "not on {0[0]}.{0[1]}".format)
    assert choose("auto", gpu).why == "not on 9.0"
    monkeypatch.setattr("minisd_kernels.proof.proven", lambda *of: "")
    calls = []
    ops = watch(choose("auto", gpu), calls)
    for d, dtype in ((40, torch.float16), (42, torch.float16), (40, torch.float64)):
        x = torch.empty(2, 16, 2 * d, dtype=dtype, device=gpu)
        assert ops.attention(x, x, x, 2).shape == x.shape
    image, row = torch.empty(2, 64, 3, 3, device=gpu), torch.empty(64, device=gpu)
    assert ops.group_norm_silu(image, row, row, 32, 1e-5, True).shape == image.shape
    assert ops.group_norm_silu(image[..., ::2], row, row, 32, 1e-5, False).shape[-1] == 2
    assert [(call.took, call.why) for call in calls] == [
        ("triton", ""),
        ("torch", "a head of width 42: it must be a multiple of 4 up to 256, or 512"),
        ("torch", "q is torch.float64, not float16, bfloat16 or float32"),
        ("triton", ""),
        ("torch", "x is neither NCHW nor channels_last"),
    ]
    assert calls[3].sizes == "64 at 3x3, SiLU" and calls[4].sizes == "64 at 3x2"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2], ids=str)
def test_auto_is_torch_in_a_dtype_that_the_kernels_do_not_take(dtype, monkeypatch):
    """For all ops, because a repacked model has no other ops to fall back on."""
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("minisd_kernels.proof.proven", lambda *of: "")
    gpu = torch.device("meta")
    why = f"the kernels take float16, bfloat16 and float32, not {str(dtype)[6:]}"
    ops = choose("auto", gpu, dtype)
    assert ops.name == "torch" and ops.attention is TORCH.attention and ops.why == why
    for name in ("triton", "fused"):
        with pytest.raises(ValueError, match=f'ops="{name}" cannot be had: {why}'):
            choose(name, gpu, dtype)
    for kept in (torch.float16, torch.bfloat16, torch.float32):
        assert choose("auto", gpu, kept).name == "auto"
    assert choose("fused", CPU, dtype).attention is TORCH.attention


def test_auto_leaves_interpreted_kernels_alone(monkeypatch):
    """With TRITON_INTERPRET set they run on a CPU, and an image takes minutes."""
    pytest.importorskip("triton")
    monkeypatch.setattr("minisd_kernels.launch.interpreted", lambda kernel: True)
    assert "interpreted" in choose("auto", CPU).why


@pytest.mark.parametrize("dtype, packed", [("float64", False), ("float32", True)])
def test_a_model_loaded_with_auto_is_repacked_if_the_kernels_take_its_dtype(
        dtype, packed, monkeypatch):
    """A CPU mocks a proven GPU, and nothing is run."""
    pytest.importorskip("triton")
    monkeypatch.setattr("minisd.ops._not_proven", lambda device: "")
    monkeypatch.setattr("minisd_kernels.launch.interpreted", lambda kernel: True)
    sd = minisd.load(dtype=dtype, device="cpu", ops="auto")
    assert isinstance(sd.unet, UNet) != packed and sd.unet.ops.name == ["torch", "auto"][packed]
    assert ("not float64" in sd.unet.ops.why) != packed
