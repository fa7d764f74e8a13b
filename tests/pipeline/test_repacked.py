"""A model whose networks are repacked is used as any other: changed, copied, moved, in threads."""

import copy
import pickle
import threading

import pytest
import torch
from reference_models import SMALL, error, small_model

import minisd
from minisd.backends import Backend
from minisd.models.ops import REFERENCE, TORCH
from minisd.pipeline import StableDiffusion

CALL = dict(num_inference_steps=2, width=24, height=16, output_type="pt", guidance_scale=5.0)


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
