"""Which functions compute, and which networks take the steps."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from reference_models import error, randn

import minisd
from minisd.backends import Call, resolve, watch
from minisd.models.ops import REFERENCE, TORCH, Ops

CPU, GPU = torch.device("cpu"), torch.device("meta")  # "meta" mocks a GPU: nothing is launched
FLOAT = torch.float32
CALL = dict(num_inference_steps=2, width=24, height=16, output_type="pt", guidance_scale=5.0)


@pytest.fixture
def proven(monkeypatch):
    """On "meta", as on a GPU where the kernels are proven."""
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("minisd_kernels.proof.proven", lambda *of: "")


# --- resolve


def test_by_name():
    assert resolve("torch", None, CPU, FLOAT).ops is TORCH
    assert resolve("reference", None, CPU, FLOAT).ops is REFERENCE
    for wrong in ("numpy", None, 3, ["torch"]):
        with pytest.raises(ValueError, match="ops must be one of auto, torch, reference, triton"):
            resolve(wrong, None, CPU, FLOAT)
    for wrong in (1.5, 1, "yes", "auto"):
        with pytest.raises(TypeError, match="fused must be True, False or None"):
            resolve("torch", wrong, CPU, FLOAT)


@pytest.mark.parametrize("ops, fused, wanted", [
    ("auto", None, False), ("auto", True, True), ("auto", False, False), ("torch", True, True),
    ("reference", True, True), ("fused", None, True), ("fused", True, True), (TORCH, None, False),
    (replace(TORCH, geglu=REFERENCE.geglu), True, True),
])
def test_fused_on_a_cpu(ops, fused, wanted):
    backend = resolve(ops, fused, CPU, FLOAT)
    assert backend.fused is wanted and isinstance(backend.ops, Ops)
    assert backend.at(CPU, torch.float64) == backend


def test_fused_by_name_is_not_false():
    with pytest.raises(ValueError, match="contradict"):
        resolve("fused", False, CPU, FLOAT)


@pytest.mark.parametrize("ops, wanted", [
    ("auto", True), (TORCH, True), ("torch", False), ("reference", False), ("triton", False),
    ("fused", True),
])
def test_fused_where_the_kernels_are_proven(ops, wanted, proven):
    assert resolve(ops, None, GPU, torch.float16).fused is wanted
    assert resolve("auto", False, GPU, torch.float16).fused is False


def test_auto_is_torch_without_a_gpu_and_says_why():
    backend = resolve("auto", None, CPU, FLOAT)
    assert backend.ops is TORCH
    calls = []
    x = randn(1, 5, 16)
    assert torch.equal(watch(backend, calls).attention(x, x, x, 2), TORCH.attention(x, x, x, 2))
    assert calls == [Call("attention", "2 heads of 8, 5x5", "torch", backend.why)]
    assert "run on a GPU" in backend.why or "triton" in backend.why


def test_kernels_by_name_never_fall_back():
    with pytest.raises(ValueError, match='ops="triton" cannot be had: .*(run on a GPU|triton)'):
        resolve("triton", None, CPU, FLOAT)


@pytest.mark.parametrize("name", ["triton", "auto"])
def test_without_triton(name, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("minisd_kernels")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)  # now importing it fails
    sentence = "no module named triton: pip install triton, on Linux"
    if name == "triton":
        with pytest.raises(ValueError, match=sentence):
            resolve(name, None, CPU, FLOAT)
    else:
        assert re.search(sentence, resolve(name, None, CPU, FLOAT).why)


def test_auto_on_a_proven_gpu_chooses_call_by_call(proven, monkeypatch):
    with monkeypatch.context() as unproven:
        unproven.setattr("minisd_kernels.proof.proven", "not on {0[0]}.{0[1]}".format)
        assert resolve("auto", None, GPU, torch.float16).why == "not on 9.0"
    calls = []
    ops = watch(resolve("auto", None, GPU, torch.float16), calls)
    for d, dtype in ((40, torch.float16), (42, torch.float16), (40, torch.float64)):
        x = torch.empty(2, 16, 2 * d, dtype=dtype, device=GPU)
        assert ops.attention(x, x, x, 2).shape == x.shape
    image, row = torch.empty(2, 64, 3, 3, device=GPU), torch.empty(64, device=GPU)
    assert ops.group_norm_silu(image, row, row, 32, 1e-5, True).shape == image.shape
    assert ops.group_norm_silu(image[..., ::2], row, row, 32, 1e-5, False).shape[-1] == 2
    tokens = torch.empty(2, 5, 64, device=GPU)
    assert ops.layer_norm(tokens, row, row, 1e-5, tokens)[0].shape == tokens.shape
    assert ops.geglu(tokens.mT.mT[..., ::2].mT.contiguous().mT).shape == (2, 5, 16)
    assert [(call.took, call.why) for call in calls] == [
        ("triton", ""),
        ("torch", "a head of width 42: it must be a multiple of 4 up to 256, or 512"),
        ("torch", "q is torch.float64, not float16, bfloat16 or float32"),
        ("triton", ""),
        ("torch", "x is neither NCHW nor channels_last"),
        ("triton", ""),
        ("torch", "h is not contiguous"),
    ]
    assert [call.sizes for call in calls[3:6]] == ["64 at 3x3, SiLU", "64 at 3x2", "64 in 10 rows"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2], ids=str)
def test_auto_is_torch_in_a_dtype_that_the_kernels_do_not_take(dtype, proven):
    why = f"the kernels take float16, bfloat16 and float32, not {str(dtype)[6:]}"
    backend = resolve("auto", None, GPU, dtype)
    assert backend.ops is TORCH and backend.why == why and not backend.fused
    for name in ("triton", "fused"):
        with pytest.raises(ValueError, match=f'ops="{name}" cannot be had: {why}'):
            resolve(name, None, GPU, dtype)
    for kept in (torch.float16, torch.bfloat16, torch.float32):
        assert resolve("auto", None, GPU, kept).fused
    assert resolve("fused", None, CPU, dtype).ops is TORCH


def test_auto_leaves_interpreted_kernels_alone(monkeypatch):
    """With TRITON_INTERPRET set they run on a CPU, and an image takes minutes."""
    pytest.importorskip("triton")
    monkeypatch.setattr("minisd_kernels.ops.launch.interpreted", lambda kernel: True)
    assert "interpreted" in resolve("auto", None, CPU, FLOAT).why


# --- functions of the caller's own


def my_attention(q, k, v, heads, causal=False):
    my_attention.calls += 1
    return REFERENCE.attention(q, k, v, heads, causal)


def my_group_norm(*args, **options):
    my_group_norm.calls += 1
    return REFERENCE.group_norm_silu(*args, **options)


@pytest.mark.parametrize("fused", [False, True])
def test_functions_of_the_callers_own_are_taken(fused):
    if fused:
        pytest.importorskip("triton")
    ask = dict(prompt="a red heart", seed=0, num_inference_steps=2, output_type="pt")
    exact = minisd.load(ops="reference", device="cpu")(**ask).images
    mine = replace(TORCH, attention=my_attention, group_norm_silu=my_group_norm)
    my_attention.calls = my_group_norm.calls = 0
    sd = minisd.load(ops=mine, fused=fused, device="cpu")
    assert error(sd(**ask).images, exact) <= 1e-4
    norms = len([m for m in sd.unet.modules() if isinstance(m, torch.nn.GroupNorm)])
    decoder = [m for m in sd.vae.decoder.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert my_group_norm.calls == 2 * norms + len(decoder)
    assert my_attention.calls >= 2 * 2 + 1
