"""Which functions compute, which networks take the steps, and that the answer is the same."""

import copy
import pickle
import re
import sys
import threading
from dataclasses import replace

import pytest
import torch
from reference_models import SMALL, error, randn, small_model

import minisd
from minisd.backends import Backend, Call, resolve, watch
from minisd.models.ops import REFERENCE, TORCH, Ops
from minisd.pipeline import StableDiffusion

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


# --- the repacked networks


@pytest.fixture
def model():
    """A small model whose networks are repacked."""
    pytest.importorskip("triton")
    m = copy.deepcopy(small_model(SMALL)).to(dtype="float32")
    return StableDiffusion(m.config, m.tokenizer, m.text_encoder, m.unet, m.vae,
                           Backend(TORCH, fused=True, asked=("torch", True)))


def readable(model):
    return StableDiffusion(model.config, model.tokenizer, model.text_encoder, model.unet, model.vae)


def test_the_unet_is_readable_whoever_takes_the_steps(model):
    before = {name: tuple(p.shape) for name, p in readable(model).unet.state_dict().items()}
    image = model("a", seed=0, **CALL).images
    assert {name: tuple(p.shape) for name, p in model.unet.state_dict().items()} == before
    assert error(image, readable(model)("a", seed=0, **CALL).images) <= 1e-5


def test_a_changed_weight_counts(model):
    first = model("a", seed=0, **CALL).images
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(0.5)
        model.vae.decoder.conv_in.bias.add_(0.1)
    second = model("a", seed=0, **CALL).images
    assert error(first, second) > 1e-3
    assert error(second, readable(model)("a", seed=0, **CALL).images) <= 1e-5


@pytest.mark.parametrize("wrapped", [
    lambda unet: torch.compile(unet, backend="eager"), lambda unet: (lambda *args: unet(*args)),
    copy.deepcopy,
], ids=["torch.compile", "a function", "a copy"])
def test_a_replaced_unet_takes_the_steps(model, wrapped):
    exact = readable(model)("a", seed=0, **CALL).images
    calls = []

    def toy(x, t, context):
        calls.append(t)
        return unet(x, t, context)

    unet, model.unet = wrapped(model.unet), toy
    assert error(model("a", seed=0, **CALL).images, exact) <= 1e-5
    assert len(calls) == CALL["num_inference_steps"]


def test_a_replaced_decoder_decodes(model):
    model.vae.decoder = torch.nn.Upsample(scale_factor=4)
    assert model("a", seed=0, **CALL).images.shape[-2:] == (16, 24)


@pytest.mark.parametrize("clone", [
    copy.deepcopy, lambda sd: pickle.loads(pickle.dumps(sd))], ids=["deepcopy", "pickle"])
def test_a_used_model_is_copied_and_pickled(model, clone):
    first = model("a", seed=0, **CALL).images
    other = clone(model)
    assert torch.equal(other("a", seed=0, **CALL).images, first)
    with torch.no_grad():
        other.unet.conv_out.weight.zero_()
    assert torch.equal(model("a", seed=0, **CALL).images, first)


def test_released_and_moved(model):
    first = model("a", seed=0, **CALL).images
    model.release()
    assert torch.equal(model("a", seed=0, **CALL).images, first)
    model.to(dtype="float64")
    assert 0 < error(model("a", seed=0, **CALL).images, first) <= 1e-5


def test_a_call_in_inference_mode_leaves_the_weights_trainable(model):
    with torch.inference_mode():
        first = model("a", seed=0, **CALL).images.clone()
    model.unet.requires_grad_(True)
    assert not any(p.is_inference() for p in model.unet.parameters())
    assert error(model("a", seed=0, **CALL).images, first) <= 1e-6


def test_a_model_made_by_hand_keeps_its_ops_when_it_is_moved():
    m = copy.deepcopy(small_model(SMALL, REFERENCE))
    sd = StableDiffusion(m.config, m.tokenizer, m.text_encoder, m.unet, m.vae)
    sd.to(dtype="float32")
    assert sd.unet.mid_block.resnets[0].ops == REFERENCE
    sd.unet = lambda *args: m.unet(*args)
    assert sd.to(dtype="float64").vae.quant_conv.weight.dtype == torch.float64


def test_saved(model, tmp_path):
    first = model("a", seed=0, **CALL).images
    model.save(tmp_path / "model")
    again = minisd.load(tmp_path / "model", device="cpu", fused=True)
    assert torch.equal(again("a", seed=0, **CALL).images, first)


def test_two_threads_with_two_prompts_get_their_own_images(model):
    """With the graphs of a GPU replaced by calls on the same buffers, as a replay is."""
    alone = {prompt: model(prompt, seed=0, **CALL).images for prompt in ("a cat", "two boats")}
    made = {prompt: [] for prompt in alone}

    def draw(prompt):
        made[prompt] += [model(prompt, seed=0, **CALL).images for _ in range(5)]

    class SameBuffers:
        """Records a call's buffers, and computes from them what a replay would."""

        def __init__(self, function, changing, fixed, pool):
            self.function = function
            self.given = [None if x is None else x.clone() for x in (*changing, *fixed)]

        def replay(self, changing, fixed):
            for mine, new in zip(self.given, (*changing, *fixed)):
                if mine is not None:
                    mine.copy_(new)
            return self.function(*self.given)

    fused = model._fused()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("minisd_kernels.fused.graph.Graph", SameBuffers)
        patched.setattr("torch.cuda.graph_pool_handle", lambda: None)
        patched.setattr("minisd_kernels.fused.graph.records", lambda x: True)
        threads = [threading.Thread(target=draw, args=(prompt,)) for prompt in alone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(fused.unet.graphs) == 2  # one of the steps, one of the decoding
    for prompt, images in made.items():
        assert len(images) == 5
        assert all(error(image, alone[prompt]) <= 1e-6 for image in images)
