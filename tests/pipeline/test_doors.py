"""The API besides a call: public names, loading, moving to a device or dtype."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from reference_models import SMALL, error, small_model

import minisd
from minisd.backends import resolve
from minisd.checkpoints import hub
from minisd.config import SD1
from minisd.models.ops import REFERENCE, TORCH
from minisd.request import Request

CALL = dict(num_inference_steps=3, guidance_scale=5.0, height=64, width=64)


# --- names


def test_every_public_name_exists_and_is_listed():
    assert set(dir(minisd)) == {*minisd.__all__, "__version__"}
    for name in minisd.__all__:
        assert getattr(minisd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'sd1'"):
        minisd.sd1


@pytest.mark.parametrize("kind, also", [
    (minisd.WeightError, ValueError), (minisd.ImageError, ValueError),
    (minisd.HubError, RuntimeError),
])
def test_one_base_of_all_errors(kind, also):
    assert issubclass(kind, minisd.MinisdError) and issubclass(kind, also)


# --- loading


def test_a_short_name_that_is_not_downloaded_names_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "cached", lambda name: None)
    with pytest.raises(FileNotFoundError, match="run `minisd download sd1.5` first"):
        minisd.load("sd1.5")


def test_a_short_name_that_is_downloaded_is_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    small_model(SMALL).save(tmp_path / "model")
    monkeypatch.setattr(hub, "cached", {"sd1.5": tmp_path / "model"}.get)
    assert minisd.load("sd1.5").config.unet == SMALL.unet
    (tmp_path / "sd1.5").mkdir()  # a folder of that name takes precedence
    with pytest.raises(minisd.WeightError, match="sd1.5 has no model_index.json"):
        minisd.load("sd1.5")


def test_a_tile_reaches_the_vae():
    assert minisd.load(tile=8).vae.tile == 8
    assert minisd.load().vae.tile is None


# --- defaults and sizes


def test_none_is_the_models_own_default():
    config = replace(SMALL, num_inference_steps=2, guidance_scale=3.0)
    m = small_model(SMALL)
    sd = minisd.StableDiffusion(config, m.tokenizer, m.text_encoder, m.unet, m.vae)
    own = sd("a", seed=0, output_type="latent")
    said = m("a", seed=0, output_type="latent", num_inference_steps=2, guidance_scale=3.0, eta=0)
    assert torch.equal(own.images, said.images)
    assert own.settings[0]["num_inference_steps"] == 2 and own.settings[0]["guidance_scale"] == 3
    assert (SD1.num_inference_steps, SD1.guidance_scale) == (50, 7.5)


@pytest.mark.parametrize("own, asked, made", [
    ((64, 64), {}, (64, 64)),
    ((160, 80), {}, (160, 80)),
    ((640, 480), {}, (184, 140)),                # 160 x 160 pixels are the most unasked
    ((90, 37), {}, (88, 36)),                    # the nearest multiples of 4
    ((1, 300), {}, (4, 300)),                    # at least one multiple
    ((200, 100), {"width": 40}, (40, 20)),
    ((200, 100), {"height": 20}, (40, 20)),
    ((200, 100), {"width": 64, "height": 64}, (64, 64)),
])
def test_image_to_image_keeps_the_proportions(own, asked, made):
    sd = small_model(SMALL)
    out = sd("a", image=Image.new("RGB", own), strength=1.0, num_inference_steps=1, seed=0, **asked)
    assert out.images[0].size == made
    assert (out.settings[0]["width"], out.settings[0]["height"]) == made


def test_a_size_out_of_reach_is_an_error():
    with pytest.raises(ValueError, match="width must be a multiple of 4 .*not 128000"):
        Request(prompt="a", image=Image.new("RGB", (20000, 10)), height=64).plan(SMALL)


# --- to


def test_to_another_dtype_and_back():
    sd, other = small_model(SMALL), small_model(replace(SMALL, name="to be moved"))
    assert (other.device, other.dtype) == (torch.device("cpu"), torch.float64)
    assert other.to(dtype="float32") is other and other.dtype == torch.float32
    assert other("a", seed=0, **CALL).images[0].size == (64, 64)
    other.to("cpu", torch.float64)
    assert error(other.unet.conv_in.weight, sd.unet.conv_in.weight) < 1e-6  # rounded once


def test_ops_are_chosen_again_and_an_error_moves_nothing(monkeypatch):
    """What the same word means elsewhere is found anew, and reaches every module."""
    sd = minisd.load(device="cpu")
    found = resolve("reference", True, torch.device("cpu"), torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr("minisd.backends.resolve", lambda *asked: found)
        assert sd.to(torch.float64) is sd and sd.dtype == torch.float64 and sd.backend is found
    for part in sd.parts.values():
        assert {m.ops for m in part.modules() if hasattr(m, "ops")} == {REFERENCE}
    sd = minisd.load(device="cpu").to(dtype="float32")
    assert sd.unet.mid_block.resnets[0].ops is TORCH is sd.backend.ops
    for call in (dict(device="gpu"), dict(dtype="int8")):
        with pytest.raises(ValueError, match="must be auto or one of"):
            sd.to(**call)
    assert sd.dtype == torch.float32


def test_a_fused_model_is_moved_and_released():
    sd = minisd.load(ops="fused", device="cpu")
    call = dict(num_inference_steps=2, seed=0, output_type="pt")
    first = sd("a heart", **call).images
    assert error(sd.to(dtype="float64")("a heart", **call).images, first) < 1e-4
    made = sd._fused()
    assert sd._fused() is made
    sd.release()
    assert sd._fused() is not made
    assert sd.backend.fused and error(sd("a heart", **call).images, first) < 1e-4
