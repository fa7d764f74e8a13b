"""Stable unCLIP as a single file and as a folder, official and small, read and written."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from files import all_shapes, header, official_shapes, write
from PIL import Image
from reference_models import (
    SMALL_UNCLIP,
    draw_noise_in_float32,
    error,
    official_unclip,
    randn,
    small_model,
)
from safetensors.torch import load_file, save_file

import minisd
from minisd.app.cli import main
from minisd.checkpoints import parts, save
from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.names_vision import NORMALIZER
from minisd.config import SD2, SD2_UNCLIP_H, SD2_UNCLIP_L
from minisd.errors import WeightError
from minisd.loading import build
from minisd.models.ops import TORCH

BOTH = pytest.mark.parametrize("config", [SD2_UNCLIP_H, SD2_UNCLIP_L], ids=["H", "L"])
BUFFERS = {f"noise_augmentor.{name}": (1000,) for name in (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod")}
REST_OF_CLIP = {f"embedder.model.{name}": (1,) for name in (
    "token_embedding.weight", "positional_embedding", "ln_final.weight", "text_projection",
    "logit_scale", "transformer.resblocks.23.ln_1.weight")}
CALL = dict(image_embeds=randn(1, 16, seed=6), num_inference_steps=3, seed=3, noise_level=100,
            output_type="latent")


def official(path, config, **more):
    """A header over zeros of all that an official file holds."""
    return write(path, header(all_shapes(config) | BUFFERS | REST_OF_CLIP | more))


# --- official sizes


@BOTH
def test_official_files_are_recognised_and_complete(config, tmp_path):
    found = open_checkpoint(official(tmp_path / "a.safetensors", config))
    known = config.vision == SD2_UNCLIP_H.vision  # the statistics of the other tower are not there
    assert found.config == (config if known else replace(
        config, normalizer_dim=None, max_noise_level=0))
    assert found.config.kind == "image variation"
    assert found.prediction_source == "the default, as nothing says otherwise"
    built = build(found.config, TORCH)
    assert built.keys() - found.parts.keys() == ({"image_normalizer"} if known else set())
    for part in found.parts:
        check(found, part, built[part])


@BOTH
def test_counts_of_the_official_models(config):
    shapes = official_shapes(config)
    unet, tower = ((869_517_764, 303_966_208) if config is SD2_UNCLIP_L
                   else (870_173_124, 632_076_800))
    built = build(config, TORCH)
    assert sum(p.numel() for p in built["unet"].parameters()) == unet
    assert sum(p.numel() for p in built["image_encoder"].parameters()) == tower
    assert (len(shapes["unet"]), len(shapes["image_encoder"])) == (
        690, 296 if config is SD2_UNCLIP_L else 392)
    assert built["image_normalizer"].mean.shape == (1, config.vision.projection_dim)


@BOTH
def test_a_saved_file_has_the_official_names(config):
    weights = {part: module.state_dict() for part, module in build(config, TORCH).items()}
    found = {name: tuple(t.shape) for name, t in save.original_tensors(config, weights).items()}
    extra = {name: (1, config.vision.projection_dim) for name in NORMALIZER}
    dropped = parts.dropped(config)
    assert found == extra | {name: shape for name, shape in all_shapes(config).items()
                             if not dropped.fullmatch(name)}


@BOTH
def test_the_towers_last_layers_are_not_taken_for_the_texts(config, tmp_path):
    """SD2 drops OpenCLIP's last text layer, of number 23; the tower has one of that number too."""
    name = "embedder.model.visual.transformer.resblocks.23.ln_1.weight"
    assert name in official_shapes(config)["image_encoder"]
    assert not parts.dropped(config).fullmatch(name)
    assert parts.dropped(config).fullmatch(
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight")


def test_what_is_left_of_clip_is_an_error_elsewhere(tmp_path):
    path = write(tmp_path / "a.safetensors", header(all_shapes(SD2) | REST_OF_CLIP))
    with pytest.raises(WeightError, match="4 unexpected: embedder.model.token_embedding.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize("edit, words", [
    ({"embedder.model.visual.proj": None}, "image_encoder: 1 missing: embedder.model.visual.proj$"),
    ({"embedder.model.visual.proj": (768, 1024)}, r"of the wrong shape: \S+.proj \[1024, 768\]"),
    ({"embedder.model.visual.strange": (1,)}, "1 unexpected: embedder.model.visual.strange$"),
    ({"noise_augmentor.strange": (1,)}, "1 unexpected: noise_augmentor.strange$"),
    ({"noise_augmentor.data_std": (1, 768)}, "1 missing: noise_augmentor.data_mean$"),
    ({"model.diffusion_model.label_emb.0.2.bias": None}, "unet: 1 missing: .*label_emb.0.2.bias$"),
    ({"model.diffusion_model.label_emb.0.0.weight": (1280, 2816)}, "looks like an SDXL model"),
    ({"model.diffusion_model.label_emb.0.0.weight": (1280, 2560)}, "looks like the SDXL refiner"),
    ({"model.diffusion_model.label_emb.0.0.weight": (1280, 99)}, "label_emb.0.0.weight .1280, 99.,"
     " which is no official"),
])
def test_files_that_are_incomplete_or_others(edit, words, tmp_path):
    shapes = all_shapes(SD2_UNCLIP_L) | BUFFERS | edit
    path = write(tmp_path / "a.safetensors",
                 header({name: shape for name, shape in shapes.items() if shape is not None}))
    with pytest.raises(WeightError, match=words):
        minisd.load(path, device="cpu")


# --- small models, written and read


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model, and where it is saved: "folder", "a.safetensors" and that without statistics.
    """
    sd, place = small_model(SMALL_UNCLIP), tmp_path_factory.mktemp("unclip")
    sd.save(place / "folder")
    sd.save(place / "a.safetensors")
    tensors = load_file(place / "a.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in NORMALIZER}, place / "b.safetensors",
              {"modelspec.prediction_type": "v"})
    return sd, place


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("file", ["folder", "a.safetensors", "b.safetensors"])
def test_what_is_saved_is_read_again(model, file):
    sd, place = model
    sizes = {} if file == "folder" else {"config": place / "folder"}
    again = minisd.load(place / file, device="cpu", dtype="float64", **sizes)
    assert replace(again.config, name="") == replace(sd.config, name="")
    for part, module in sd.parts.items():
        assert same(module, again.parts[part]), part
    # Not to the bit: another test may have left the model's weights in another memory order.
    assert error(again(**CALL).images, sd(**CALL).images) < 1e-12


def test_diffusers_reads_the_folder_and_draws_the_same(model, monkeypatch):
    draw_noise_in_float32(monkeypatch)
    sd, place = model
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
        place / "folder", dtype=torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    call = {name: value for name, value in CALL.items() if name != "seed"}
    theirs = pipeline(**call, width=64, height=64, generator=torch.Generator().manual_seed(3))
    assert error(sd(**CALL).images, theirs.images) < 1e-5  # its schedules are in float32
    side = pipeline.feature_extractor.size, pipeline.feature_extractor.crop_size
    assert dict(side[0]) == {"shortest_edge": 12} and dict(side[1]) == {"height": 12, "width": 12}


def test_a_folder_that_diffusers_writes(model, tmp_path):
    sd, _ = model
    official_unclip(sd).save_pretrained(tmp_path / "theirs")
    again = minisd.load(tmp_path / "theirs", device="cpu", dtype="float64")
    assert again.config.kind == "image variation" and again.config.vision == sd.config.vision
    for part, module in sd.parts.items():
        assert same(module, again.parts[part]), part


def test_the_unets_names_are_those_of_the_diffusers_converter(model):
    sd, place = model
    tensors = load_file(place / "a.safetensors")
    settings = {"layers_per_block": 2, "class_embed_type": "projection"}
    converted = convert_ldm_unet_checkpoint(tensors, settings)
    want = sd.unet.state_dict()
    assert converted.keys() == want.keys()
    assert all(torch.equal(converted[name], want[name]) for name in want)


def test_the_projection_is_transposed_in_the_file(model):
    sd, place = model
    stored = load_file(place / "a.safetensors")["embedder.model.visual.proj"]
    assert torch.equal(stored, sd.image_encoder.visual_projection.weight.mT)


# --- statistics


def test_without_statistics_there_is_level_0_alone(model):
    """Mean 0 and standard deviation 1 are not those of ViT-L/14, and level 0 hardly depends on it.
    """
    sd, place = model
    bare = minisd.load(place / "b.safetensors", device="cpu", dtype="float64",
                       config=SMALL_UNCLIP)
    assert bare.image_normalizer is None and bare.config.max_noise_level == 0
    assert bare(**CALL | {"noise_level": 0}).images.isfinite().all()
    with pytest.raises(ValueError, match=r"^noise_level must be 0 with this single file, .* config"
                                         r"= \(--config\), a diffusers folder .* image_normalizer"):
        bare(**CALL)
    with pytest.raises(ValueError, match="must be an integer from 0 to 0"):
        bare(**CALL | {"noise_level": "a"})


def test_a_folder_without_statistics_is_not_written(model, tmp_path):
    bare = minisd.load(model[1] / "b.safetensors", device="cpu", config=SMALL_UNCLIP)
    with pytest.raises(ValueError, match="was loaded without: save a .safetensors file, or load"):
        bare.save(tmp_path / "folder")
    bare.save(tmp_path / "c.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_those_of_the_large_tower_are_0_and_1(tmp_path):
    found = open_checkpoint(official(tmp_path / "a.safetensors", SD2_UNCLIP_H))
    normalizer = build(found.config, TORCH)["image_normalizer"]
    assert found.config.max_noise_level == 999
    assert not normalizer.mean.any() and (normalizer.std == 1).all()


# --- folders that are others


@pytest.mark.parametrize("file, change, words", [
    ("image_noising_scheduler/scheduler_config.json", {"beta_schedule": "linear"},
     r"beta_schedule is 'linear'; minisd computes only 'squaredcos_cap_v2'$"),
    ("image_noising_scheduler/scheduler_config.json", {"num_train_timesteps": 100}, "only 1000"),
    ("image_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("image_encoder/config.json", {"projection_dim": 8}, "width 32, not twice the image encoder's"),
    ("image_encoder/config.json", {"num_hidden_layers": 2}, "16 unexpected: vision_model.encoder"),
    ("feature_extractor/preprocessor_config.json", {"resample": 2}, "resample is 2"),
    ("feature_extractor/preprocessor_config.json", {"size": 224}, "size is 224"),
    ("feature_extractor/preprocessor_config.json", {"image_mean": [0.5] * 3}, r"0.40821073\]$"),
    ("feature_extractor/preprocessor_config.json", {"image_std": [0.5] * 3}, "image_std is"),
    ("feature_extractor/preprocessor_config.json", {"rescale_factor": 1 / 127.5}, "rescale_factor"),
    ("image_noising_scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero_snr"),
    ("image_noising_scheduler/scheduler_config.json", {"beta_schedule": ...}, "_schedule is No"),
    ("image_encoder/config.json", {"vision_config": {"hidden_act": "relu"}}, "hidden_act is"),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "is for image variation$"),
    ("unet/config.json", {"class_embed_type": "simple_projection"}, "class_embed_type is"),
    ("unet/config.json", {"in_channels": 9}, "9 input channels and projection_class_emb.* 32"),
    ("unet/config.json", {"class_embed_type": None}, "UNet beside it is for text to image$"),
    ("model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, "image_encoder"),
    ("image_normalizer/diffusion_pytorch_model.safetensors", None, "has no diffusion_pytorch_mod"),
    ("image_encoder/config.json", None, r"image_encoder/config.json is missing"),
    ("image_noising_scheduler/scheduler_config.json", None, "is missing"),
])
def test_folders_that_are_rejected(model, file, change, words, tmp_path):
    place = shutil.copytree(model[1] / "folder", tmp_path / "folder")
    if change is None:
        (place / file).unlink()
    else:
        fields = json.loads((place / file).read_text()) | change  # ... for an absent one
        (place / file).write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    with pytest.raises(WeightError, match=words):
        minisd.load(place, device="cpu")


def test_an_older_preprocessor_has_numbers_for_sizes(model, tmp_path):
    place = shutil.copytree(model[1] / "folder", tmp_path / "folder")
    (place / "feature_extractor/preprocessor_config.json").write_text(
        json.dumps({"size": 12, "crop_size": 12, "resample": 3}))
    assert minisd.load(place, device="cpu").config.vision.image_size == 12


# --- the command line


def test_the_command_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "red").save("photo.png")
    line = ["", "-m", str(model[1] / "folder"), "--image", "photo.png", "--steps", "2", "--quiet"]
    assert main([*line, "--noise-level", "100", "--seed", "1", "-o", "a.png"]) == 0
    with Image.open("a.png") as made:
        assert made.size == (64, 64)
    capsys.readouterr()
    assert main(["info", "a.png"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["noise_level"], said["image"], said["prompt"]) == (100, "photo.png", "")
    assert said["asked"]["noise_level"] == 100
    assert main([*line, "--noise-level", "1000", "-o", "b.png"]) == 2
    assert "--noise-level: noise_level must be an integer from 0 to 999" in capsys.readouterr().err
    assert main(["", "-m", str(model[1] / "folder"), "-o", "b.png"]) == 2
    assert "give it image or image_embeds (--image)" in capsys.readouterr().err
    assert main(["x", "--noise-level", "5", "-o", "b.png"]) == 2
    assert "takes no noise_level (--noise-level)" in capsys.readouterr().err
    assert main(["info", str(model[1] / "folder")]) == 0
    assert re.search(r"kind +image variation \(text_encoder, ", capsys.readouterr().out)
