"""Saved models: minisd and diffusers read what is written, and make the same image."""

import copy
import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from files import all_shapes, header, write
from PIL import Image
from reference_models import (
    SMALL,
    SMALL_DEPTH,
    SMALL_UNCLIP,
    SMALL_V,
    SMALL_X4,
    error,
    small_model,
)
from safetensors.torch import load_file

import minisd
from minisd.checkpoints import save
from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.folder import PIPELINES
from minisd.config import SD1, SD1_INPAINT, SD2, SD2_DEPTH, SD2_INPAINT, SD2_V
from minisd.errors import WeightError
from minisd.loading import build
from minisd.models.ops import TORCH
from minisd.samplers import schedule

CALL = dict(num_inference_steps=3, guidance_scale=5.0, height=64, width=64)
INPAINT = replace(SMALL, unet=replace(SMALL.unet, in_channels=9))
MODELS = {"sd1": SMALL, "sd2 v": SMALL_V, "inpainting": INPAINT}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """A small model in float32."""
    config = replace(MODELS[request.param], name=f"saved {request.param}")
    return small_model(config).to(dtype="float32")


def draw(sd):
    call = {}
    if sd.config.unet.in_channels == 9:
        call = dict(image=Image.new("RGB", (64, 64), "red"),
                    mask_image=Image.new("L", (64, 64), 255))
    return sd("a cat", seed=3, output_type="pt", **CALL, **call).images


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def drawn_by_diffusers(pipeline, sd):
    pipeline.set_progress_bar_config(disable=True)
    call = dict(CALL, generator=torch.Generator().manual_seed(3), output_type="pt")
    if isinstance(pipeline, StableDiffusionInpaintPipeline):
        call |= dict(image=Image.new("RGB", (64, 64), "red"),
                     mask_image=Image.new("L", (64, 64), 255), strength=1.0)
    return pipeline("a cat", **call).images


def kind_of(sd):
    inpainting = sd.config.unet.in_channels == 9
    return StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline


def test_a_saved_folder(model, tmp_path):
    model.save(tmp_path / "model")
    again = minisd.load(tmp_path / "model", device="cpu")
    for part, module in model.parts.items():
        assert same_state(module, again.parts[part]), part
    # The folder has every field of the config but its name.
    assert replace(again.config, name="") == replace(model.config, name="")
    assert torch.equal(draw(again), draw(model))
    official = kind_of(model).from_pretrained(tmp_path / "model")
    assert error(drawn_by_diffusers(official, model), draw(model)) < 1e-5


def test_a_saved_file(model, tmp_path):
    model.save(tmp_path / "model")
    model.save(tmp_path / "model.safetensors")
    again = minisd.load(tmp_path / "model.safetensors", config=tmp_path / "model", device="cpu")
    for part, module in model.parts.items():
        assert same_state(module, again.parts[part]), part
    assert torch.equal(draw(again), draw(model))
    official = kind_of(model).from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "model"), local_files_only=True)
    assert error(drawn_by_diffusers(official, model), draw(model)) < 1e-5


def test_the_shipped_model_saved_is_the_shipped_model(tmp_path):
    sd = minisd.load(device="cpu")
    sd.save(tmp_path / "tiny")
    again = minisd.load(tmp_path / "tiny", device="cpu")
    call = dict(num_inference_steps=2, seed=0, output_type="pt")
    assert torch.equal(again("a red heart", **call).images, sd("a red heart", **call).images)
    with pytest.warns(UserWarning, match="not taught 'zeppelin'"):
        again.tokenizer("a zeppelin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.tokenizer("a red heart")


def test_the_names_of_an_official_file(tmp_path):
    """Every tensor of an SD1 and of an SD2 file has the name and shape of the manifests."""
    for config in (SD1, SD2_V):
        weights = {part: module.state_dict() for part, module in build(config, TORCH).items()}
        wanted = {name: shape for name, shape in all_shapes(config).items()
                  if not re.search(r"position_ids|logit_scale|text_projection|resblocks\.23", name)}
        found = {name: tuple(t.shape) for name, t in save.original_tensors(config, weights).items()}
        assert found == wanted


def test_the_file_stores_the_prediction_type(tmp_path):
    sd = minisd.load(device="cpu")
    assert sd.config.schedule.prediction_type == "v_prediction"
    sd.save(tmp_path / "a.safetensors")
    sd.save(tmp_path / "sizes")
    (tmp_path / "sizes/scheduler/scheduler_config.json").unlink()
    again = minisd.load(tmp_path / "a.safetensors", config=tmp_path / "sizes", device="cpu")
    assert again.config.schedule.prediction_type == "v_prediction"


def test_half_precision_stays_half(tmp_path):
    minisd.load(device="cpu", dtype="float16").save(tmp_path / "half")
    stored = load_file(tmp_path / "half/vae/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_a_name_that_is_taken_and_a_disk_that_is_full(name, tmp_path, monkeypatch):
    sd = small_model(SMALL)
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=re.escape(name)):
        sd.save(tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"
    (tmp_path / name).unlink()
    with pytest.raises(NotADirectoryError, match="none"):
        sd.save(tmp_path / "none" / name)
    monkeypatch.setattr("minisd.files.shutil.disk_usage",
                        lambda _: type("Disk", (), {"total": 10**9, "free": 1000}))
    with pytest.raises(OSError, match="No space left"):
        sd.save(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, where", [
    ("model", "minisd.checkpoints.save.save_file"), ("model", "os.replace"),
    ("model.safetensors", "minisd.checkpoints.save.save_file"), ("model.safetensors", "os.link"),
])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(name, where, error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, fail)
    if where == "os.link":  # without links a file is renamed
        monkeypatch.setattr("os.replace", fail)
    with pytest.raises(type(error)):
        small_model(SMALL).save(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["m.ckpt", "m.bin", "m.PT"])
def test_the_name_of_a_pickle_is_rejected(name, tmp_path):
    with pytest.raises(ValueError, match="must end in .safetensors"):
        small_model(SMALL).save(tmp_path / name)


def test_any_case_and_the_mode_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        small_model(SMALL).save(tmp_path / "m.SAFETENSORS")
    finally:
        os.umask(before)
    assert (tmp_path / "m.SAFETENSORS").stat().st_mode & 0o777 == 0o640


def test_tied_and_foreign_weights(tmp_path):
    sd = copy.deepcopy(small_model(SMALL))
    sd.unet.up_blocks[0].resnets[1].conv2.weight = sd.unet.up_blocks[0].resnets[2].conv2.weight
    sd.save(tmp_path / "tied")
    assert same_state(minisd.load(tmp_path / "tied", device="cpu", dtype="float64").unet, sd.unet)
    sd.unet.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(minisd.WeightError, match="adapter.weight"):
        sd.save(tmp_path / "foreign")


@pytest.mark.parametrize("said, meant", [
    ("epsilon", "epsilon"), ("V", "v_prediction"), ("v-prediction", "v_prediction"),
])
def test_what_other_tools_write_is_believed(said, meant, tmp_path):
    sd = minisd.load(device="cpu")
    sd.save(tmp_path / "sizes")
    (tmp_path / "sizes/scheduler/scheduler_config.json").unlink()
    tensors = save.original_tensors(
        sd.config, {part: module.state_dict() for part, module in sd.parts.items()})
    save.save_file({name: tensor.clone() for name, tensor in tensors.items()},
                   tmp_path / "m.safetensors", {"modelspec.prediction_type": said})
    again = minisd.load(tmp_path / "m.safetensors", config=tmp_path / "sizes", device="cpu")
    assert again.config.schedule.prediction_type == meant


@pytest.mark.parametrize("config", [SD1, SD2, SD2_V, SD1_INPAINT, SD2_INPAINT, SD2_DEPTH],
                         ids=lambda config: config.name)
def test_a_saved_file_of_official_size_needs_no_config(config, tmp_path):
    """Without its weights: its names and shapes are written as a header over zeros."""
    weights = {part: module.state_dict() for part, module in build(config, TORCH).items()}
    shapes = {n: tuple(t.shape) for n, t in save.original_tensors(config, weights).items()}
    write(tmp_path / "m.safetensors", header(shapes))
    found = open_checkpoint(tmp_path / "m.safetensors", prediction_type="epsilon")
    assert found.config.unet == config.unet and found.config.text == config.text
    for part, module in build(found.config, TORCH).items():
        check(found, part, module)


def test_the_schedule_of_a_saved_folder_is_the_official_one(tmp_path):
    small_model(SMALL_V).save(tmp_path / "model")
    official = StableDiffusionPipeline.from_pretrained(tmp_path / "model").scheduler
    ours = schedule.alphas_cumprod(SMALL_V.schedule)
    assert np.allclose(official.alphas_cumprod, ours, atol=1e-6)
    official.set_timesteps(30)
    assert official.timesteps.tolist() == [
        level.t for level in schedule.leading(30, ours.tolist())]


def test_a_path_may_be_a_string(tmp_path):
    small_model(SMALL).save(str(tmp_path / "model"))
    assert sorted(os.listdir(tmp_path / "model")) == [
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert Path(tmp_path / "model/unet/config.json").is_file()


@pytest.mark.parametrize("config", [SMALL, INPAINT, SMALL_DEPTH, SMALL_X4, SMALL_UNCLIP],
                         ids=lambda config: config.kind)
def test_the_pipelines_that_a_folder_may_name(config, tmp_path):
    """Those of its kind; one that draws may also inpaint. The guidance is told to any of them."""
    told = replace(config, unet=replace(config.unet, time_cond_proj_dim=8))
    small_model(told).save(tmp_path / "model")
    assert open_checkpoint(tmp_path / "model").config.kind == config.kind
    index = tmp_path / "model" / "model_index.json"
    fields = json.loads(index.read_text())
    drawing = ("text to image", "inpainting")
    for kind, names in PIPELINES.items():
        for name in names:
            index.write_text(json.dumps(fields | {"_class_name": name}))
            if kind == config.kind or kind in drawing and config.kind in drawing:
                assert open_checkpoint(tmp_path / "model").config.kind == config.kind
            else:
                with pytest.raises(WeightError, match=f"names a {name}, but the UNet beside it"):
                    open_checkpoint(tmp_path / "model")
    index.write_text(json.dumps(fields | {"_class_name": "Other"}))
    with pytest.raises(WeightError) as caught:
        open_checkpoint(tmp_path / "model")
    assert str(caught.value).count("'StableDiffusionPipeline'") == 1
