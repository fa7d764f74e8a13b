"""Depth models on the disk: both layouts, with and without the estimator, to the last tensor."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from files import all_shapes, as_single_file, header, official_shapes, save, write
from PIL import Image
from reference_models import (
    DEPTH,
    SMALL,
    SMALL_DEPTH,
    error,
    official_depth_pipeline,
    official_dpt,
    randn,
    small_model,
)
from safetensors.torch import load_file, save_file

import minisd
from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.depth_folder import files, read_depth
from minisd.config import SD2_DEPTH, DPTConfig
from minisd.errors import WeightError
from minisd.loading import build
from minisd.models.ops import TORCH

# As large as what transformers reads, so that both read the same square; and its tokens.
CONFIG = replace(SMALL_DEPTH, name="saved depth", depth=replace(DEPTH, image_size=384))
PATH = "depth_estimator/config.json"
MODEL = "depth_estimator/model.safetensors"
SQUARE = Image.effect_noise((48, 48), 80).convert("RGB")
CALL = dict(image=SQUARE, num_inference_steps=3, output_type="pt")


@pytest.fixture(scope="module")
def sd():
    return small_model(CONFIG).to(dtype="float32")


@pytest.fixture(scope="module")
def saved(sd, tmp_path_factory):
    place = tmp_path_factory.mktemp("depth")
    sd.save(place / "model")
    sd.save(place / "model.safetensors")
    return place


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "model", tmp_path / "model")


def load(saved, name, **more):
    sizes = {} if name == "model" else {"config": saved / "model"}
    return minisd.load(saved / name, device="cpu", **sizes, **more)


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_what_is_saved_is_read_back(name, saved, sd):
    again = load(saved, name)
    assert replace(again.config, name="") == replace(sd.config, name="")
    for part, module in sd.parts.items():
        ours, theirs = again.parts[part].state_dict(), module.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), part
    assert not any(p.requires_grad for p in again.depth_estimator.parameters())
    assert torch.equal(again("a", seed=3, **CALL).images, sd("a", seed=3, **CALL).images)


def test_diffusers_reads_the_folder_and_makes_the_same_image(saved, sd, recwarn):
    pipeline = StableDiffusionDepth2ImgPipeline.from_pretrained(saved / "model")
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a", generator=torch.Generator().manual_seed(3), **CALL).images
    assert error(made, sd("a", seed=3, **CALL).images) < 1e-4
    assert not [w for w in recwarn if "model_index" in str(w.message)]


def test_we_read_the_folder_that_diffusers_writes(sd, tmp_path):
    official_depth_pipeline(small_model(CONFIG)).save_pretrained(tmp_path / "model")
    again = minisd.load(tmp_path / "model", device="cpu")
    assert replace(again.config, name="") == replace(sd.config, name="")
    assert error(again("a", seed=3, **CALL).images, sd("a", seed=3, **CALL).images) < 1e-5


def test_the_file_has_the_official_names(saved, sd):
    """diffusers reads no single file of this kind; its converter knows the UNet's names."""
    tensors = load_file(saved / "model.safetensors")
    assert tensors.keys() == as_single_file(CONFIG, sd.parts).keys()
    unet = convert_ldm_unet_checkpoint(
        tensors, {"layers_per_block": CONFIG.unet.layers_per_block})
    assert all(torch.equal(unet[name], p) for name, p in sd.unet.state_dict().items())
    qkv = tensors["depth_model.model.pretrained.model.blocks.0.attn.qkv.weight"]
    first = sd.depth_estimator.dpt.encoder.layer[0].attention.attention
    assert torch.equal(qkv, torch.cat([layer.weight for layer in first.values()]))
    assert not hasattr(StableDiffusionDepth2ImgPipeline, "from_single_file")


# --- official sizes, on the meta device -----------------------------------------------------------


@pytest.mark.parametrize("without", [False, True])
def test_the_official_file(without, tmp_path):
    config = replace(SD2_DEPTH, depth=None) if without else SD2_DEPTH
    found = open_checkpoint(write(tmp_path / "512-depth-ema.safetensors",
                                  header(all_shapes(config))))
    assert found.config == config and found.config.name == "Stable Diffusion 2 depth"
    parts = build(found.config, TORCH)
    for part, module in parts.items():
        check(found, part, module)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    assert counts["unet"] == 865_913_604  # 2,880 more than Stable Diffusion 2's
    assert counts.get("depth_estimator", 0) == (0 if without else 122_377_985)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("depth_model.model.scratch.layer1_rn.weight"),
     "depth_estimator: 1 missing: depth_model.model.scratch.layer1_rn.weight"),
    (lambda t: t.update({"depth_model.model.scratch.stranger": (1,)}),
     "depth_estimator: 1 unexpected: depth_model.model.scratch.stranger"),
    (lambda t: t.update({"depth_model.model.pretrained.model.cls_token": (1, 1, 700)}),
     "depth_estimator: 1 of the wrong shape"),
], ids=["missing", "unexpected", "of the wrong shape"])
def test_it_is_strict(change, words, tmp_path):
    shapes = all_shapes(SD2_DEPTH)
    change(shapes)
    with pytest.raises(WeightError, match=words):
        minisd.load(write(tmp_path / "a.safetensors", header(shapes)), device="cpu")


def test_an_estimator_in_a_model_of_another_kind_is_dropped(tmp_path):
    shapes = all_shapes(minisd.config.SD1) | official_shapes(SD2_DEPTH)["depth_estimator"]
    found = open_checkpoint(write(tmp_path / "a.safetensors", header(shapes)))
    assert found.config == minisd.config.SD1 and "depth_estimator" not in found.parts


def test_a_folder_of_another_kind_has_no_estimator(saved, tmp_path):
    small_model(SMALL).save(tmp_path / "text")
    shutil.copytree(saved / "model" / "depth_estimator", tmp_path / "text" / "depth_estimator")
    found = open_checkpoint(tmp_path / "text")
    assert found.config.depth is None and "depth_estimator" not in found.parts


# --- without an estimator -------------------------------------------------------------------------


def test_a_model_without_its_estimator(folder, saved, sd, tmp_path):
    maps = randn(1, 9, 9)
    wanted = sd("a", seed=3, depth_map=maps, **CALL).images
    shutil.rmtree(folder / "depth_estimator")
    with pytest.raises(WeightError, match="depth_estimator is missing, which .*json names"):
        minisd.load(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"depth_estimator": [None, None]}))
    tensors = {name: t for name, t in load_file(saved / "model.safetensors").items()
               if not name.startswith("depth_model.")}
    file = save(tmp_path / "a.safetensors", tensors)
    for again in (minisd.load(folder, device="cpu"),
                  minisd.load(file, config=folder, device="cpu"),
                  minisd.load(file, config=saved / "model", device="cpu"),
                  minisd.load(file, config=CONFIG, device="cpu")):
        assert again.depth_estimator is None and again.config.depth is None
        assert torch.equal(again("a", seed=3, depth_map=maps, **CALL).images, wanted)
        with pytest.raises(ValueError, match="without its depth estimator"):
            again("a", seed=3, **CALL)
    again.save(tmp_path / "again")
    assert minisd.load(tmp_path / "again", device="cpu").depth_estimator is None
    pipeline = StableDiffusionDepth2ImgPipeline.from_pretrained(
        tmp_path / "again", depth_estimator=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a", generator=torch.Generator().manual_seed(3), depth_map=maps, **CALL).images
    assert error(made, wanted) < 1e-4


def test_an_estimator_that_was_taken_away_is_not_saved(tmp_path):
    sd = small_model(replace(CONFIG, name="taken away"))
    sd.depth_estimator = None
    sd.save(tmp_path / "model")
    sd.save(tmp_path / "model.safetensors")
    assert not (tmp_path / "model/depth_estimator").exists()
    assert minisd.load(tmp_path / "model", device="cpu").config.depth is None
    with pytest.raises(ValueError, match="^this model has no depth estimator$"):
        sd("a", **CALL)


# --- config.json ----------------------------------------------------------------------------------


def read(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_depth(tmp_path / "config.json")


# What the published folder says, as far as it changes anything.
PUBLISHED = {
    "architectures": ["DPTForDepthEstimation"], "is_hybrid": True, "layer_norm_eps": 1e-12,
    "backbone_config": {
        "depths": [3, 4, 9], "embedding_dynamic_padding": True, "embedding_size": 64,
        "global_padding": "SAME", "hidden_sizes": [256, 512, 1024, 2048],
        "layer_type": "bottleneck", "model_type": "bit", "out_features":
        ["stage1", "stage2", "stage3"]},
    "backbone_featmap_shape": [1, 1024, 24, 24], "backbone_out_indices": [2, 5, 8, 11],
    "neck_hidden_sizes": [256, 512, 768, 768], "reassemble_factors": [1, 1, 1, 0.5],
}


def test_published_and_written_configs(tmp_path):
    assert read(PUBLISHED, tmp_path) == DPTConfig()
    assert read(PUBLISHED | {"backbone_config": None}, tmp_path) == DPTConfig()
    for config in (DEPTH, DPTConfig(), replace(DEPTH, out_indices=(0, 1), num_attention_heads=3)):
        written = files(config)["depth_estimator/config.json"]
        assert read(written, tmp_path) == config
        assert written["layer_norm_eps"] == 1e-6  # transformers computes with what it reads
        with torch.device("meta"):
            theirs = official_dpt(config).config.to_dict()
        assert read(theirs, tmp_path) == config


def bit(**changes):
    return {"backbone_config": PUBLISHED["backbone_config"] | changes}


@pytest.mark.parametrize("changes", [
    {"is_hybrid": False}, {"hidden_act": "relu"}, {"patch_size": 8}, {"readout_type": "add"},
    {"qkv_bias": False}, {"num_channels": 1}, {"neck_ignore_stages": []}, {"head_in_index": 0},
    {"add_projection": True}, {"use_batch_norm_in_fusion_residual": True},
    {"use_bias_in_fusion_residual": False}, {"backbone_out_indices": [2, 5, 11, 8]},
    {"backbone_out_indices": [2, 5, 8, 12]}, {"backbone_out_indices": [8, 11]},
    {"backbone_out_indices": [2, 5, 8, True]}, {"reassemble_factors": [4, 2, 1, 0.5]},
    {"neck_hidden_sizes": [96, 192, 384, 768]}, {"backbone_featmap_shape": [1, 1024, 32, 32]},
    {"num_attention_heads": 7}, {"image_size": 10**9}, {"hidden_size": "768"},
    {"fusion_hidden_size": None}, {"backbone_config": [1]}, bit(layer_type="preactivation"),
    bit(global_padding=None), bit(embedding_dynamic_padding=False), bit(depths=[3, 4]),
    bit(depths=[3, 4, 6, 3]), bit(hidden_sizes=[256, 512]), bit(num_groups=48),
    bit(out_features=["stage3"]), bit(output_stride=8), bit(width_factor=2), bit(hidden_act="gelu"),
], ids=str)
def test_what_we_do_not_compute_is_named(changes, tmp_path):
    name, value = next(iter(changes.items()))
    if isinstance(value, dict):
        kept = PUBLISHED["backbone_config"]
        name = next(key for key in value if value[key] != kept.get(key))
    with pytest.raises(WeightError, match=rf"config.json.*: {name} is .*minisd computes only"):
        read(PUBLISHED | changes, tmp_path)


@pytest.mark.parametrize("missing", ["is_hybrid", "reassemble_factors", "neck_hidden_sizes"])
def test_fields_whose_default_is_another_network(missing, tmp_path):
    with pytest.raises(WeightError, match=missing):
        read({name: value for name, value in PUBLISHED.items() if name != missing}, tmp_path)


def test_a_backbone_without_depths_has_a_stage_too_many(tmp_path):
    backbone = {k: v for k, v in PUBLISHED["backbone_config"].items() if k != "depths"}
    with pytest.raises(WeightError, match="depths is None; minisd computes only 3 stages"):
        read(PUBLISHED | {"backbone_config": backbone}, tmp_path)


@pytest.mark.parametrize("name, words", [
    (PATH, "config.json is missing"), (MODEL, "has no model.safetensors"),
])
def test_a_folder_that_lacks_a_file(name, words, folder):
    (folder / name).unlink()
    with pytest.raises(WeightError, match=words):
        minisd.load(folder)


def test_another_estimator_and_a_damaged_one(folder):
    index = json.loads((folder / "model_index.json").read_text())
    other = {"depth_estimator": ["transformers", "GLPNForDepthEstimation"]}
    (folder / "model_index.json").write_text(json.dumps(index | other))
    with pytest.raises(WeightError, match="depth_estimator is .*GLPN"):
        minisd.load(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    tensors = load_file(folder / MODEL)
    tensors["head.head.4.bias"].fill_(float("nan"))
    save_file(tensors, folder / MODEL)
    with pytest.raises(WeightError, match="head.head.4.bias"):
        minisd.load(folder)


def test_the_sizes_are_in_the_config():
    """What read_depth reads is every field that there is."""
    assert asdict(DPTConfig()).keys() == asdict(DEPTH).keys()
    assert all(a != b for a, b in zip(asdict(DPTConfig()).values(), asdict(DEPTH).values()))
