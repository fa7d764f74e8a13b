"""The checkpoint formats that people have are recognised, and load to the last bit."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from files import (
    as_single_file,
    official_modules,
    random_modules,
    save,
    save_folder,
)
from reference_models import SMALL, SMALL_V

from minisd.checkpoints import safetensors_file
from minisd.checkpoints.checkpoint import check, fill, open_checkpoint
from minisd.checkpoints.names import PARTS, VAE_PREFIXES
from minisd.errors import WeightError

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("config", [SMALL, SMALL_V], ids=["SD1", "SD2"])
MID = "mid_block.attentions.0"
TELLTALE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.fixture(scope="module")
def modules():
    return {config: random_modules(config) for config in (SMALL, SMALL_V)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that diffusers wrote, by config."""
    return {c: save_folder(c, tmp_path_factory.mktemp("saved")) for c in (SMALL, SMALL_V)}


@pytest.fixture
def folder(saved, modules, tmp_path):
    """A folder that a test may change, with float32 weights: call it with a config."""

    def copy(config):
        place = tmp_path / "model"
        shutil.copytree(saved[config], place)
        for part in PARTS:
            save(weights(place, part), modules[config][part].state_dict())
        return place

    return copy


def weights(folder: Path, part: str) -> Path:
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return folder / part / f"{stem}.safetensors"


def filled(checkpoint, dtype=torch.float32):
    """Official modules of the checkpoint's sizes, on the meta device and then filled."""
    with torch.device("meta"):
        modules = official_modules(checkpoint.config)
    for part, module in modules.items():
        fill(checkpoint, part, module, dtype, CPU)
    return modules


def assert_equal(modules, wanted, dtype=torch.float32):
    for part, module in modules.items():
        want = wanted[part].state_dict()
        for name, value in module.state_dict().items():
            assert value.dtype == dtype and torch.equal(value, want[name].to(dtype)), name


def edit_json(path: Path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Both layouts, all dtypes.


@BOTH
def test_single_file_has_the_values_of_its_parameters(config, modules, tmp_path):
    path = save(tmp_path / "a.safetensors", as_single_file(config, modules[config]))
    found = open_checkpoint(path, config=config)
    assert (found.layout, found.path, found.tokenizer_folder) == ("single file", path, None)
    assert_equal(filled(found), modules[config])


@BOTH
def test_folder_that_diffusers_wrote_is_read_as_its_config(config, saved):
    found = open_checkpoint(saved[config])
    assert replace(found.config, name="small") == config
    assert found.layout == "folder" and found.tokenizer_folder == saved[config] / "tokenizer"
    assert found.prediction_source == "from scheduler/scheduler_config.json"


@BOTH
def test_folder_has_the_values_of_its_parameters(config, modules, folder):
    assert_equal(filled(open_checkpoint(folder(config))), modules[config])


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_may_be_mixed_and_any_becomes_any(target, modules, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "CHUNK", 24)  # so that every tensor is read in pieces
    kinds = [torch.float16, torch.bfloat16, torch.float32]
    tensors = as_single_file(SMALL, modules[SMALL])
    big = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    config = replace(SMALL, text=replace(SMALL.text, vocab_size=50))
    tensors[big] = tensors[big][:50]
    mixed = {name: t.to(kinds[i % 3]) for i, (name, t) in enumerate(tensors.items())}
    found = open_checkpoint(save(tmp_path / "a.safetensors", mixed), config=config)
    assert set(found.dtypes) == {"F16", "BF16", "F32"}
    again = as_single_file(config, filled(found, target))
    assert all(torch.equal(again[name], mixed[name].to(target)) for name in mixed)


def test_no_map_of_the_file_outlives_the_load(modules, tmp_path):
    """If a file were mapped, cutting it would kill the process at the next read of a weight."""
    path = save(tmp_path / "a.safetensors", as_single_file(SMALL, modules[SMALL]))
    loaded = filled(open_checkpoint(path, config=SMALL))
    assert str(path) not in Path("/proc/self/maps").read_text()
    os.truncate(path, 100)
    assert_equal(loaded, modules[SMALL])


def test_folder_of_configs_gives_the_sizes_of_a_single_file(modules, saved, tmp_path):
    path = save(tmp_path / "a.safetensors", as_single_file(SMALL_V, modules[SMALL_V]))
    found = open_checkpoint(path, config=saved[SMALL_V])
    assert replace(found.config, name="small") == SMALL_V
    assert found.tokenizer_folder == saved[SMALL_V] / "tokenizer"
    assert_equal(filled(found), modules[SMALL_V])


def test_folder_takes_no_config(saved):
    with pytest.raises(ValueError, match=r"config= \(--config\) is for single files"):
        open_checkpoint(saved[SMALL], config=SMALL)


# Variants that exist in published files.


def test_half_precision_variant_is_used_only_without_another(modules, folder):
    place = folder(SMALL)
    for part in PARTS:
        half = {n: t.half() for n, t in modules[SMALL][part].state_dict().items()}
        save(weights(place, part).with_suffix(".fp16.safetensors"), half)
    assert set(open_checkpoint(place).dtypes) == {"F32"}
    for part in PARTS:
        weights(place, part).unlink()
    assert_equal(filled(open_checkpoint(place), torch.float16), modules[SMALL], torch.float16)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(variant, modules, folder):
    place = folder(SMALL)
    weights(place, "unet").unlink()
    rows = list(modules[SMALL]["unet"].state_dict().items())
    shards = {f"u{variant}-0000{i + 1}-of-00002.safetensors": dict(rows[i::2]) for i in (0, 1)}
    for name, tensors in shards.items():
        save(place / "unet" / name, tensors)
    index = place / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    where = {name: shard for shard, tensors in shards.items() for name in tensors}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_equal(filled(open_checkpoint(place)), modules[SMALL])


def rename(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


CLIP_PREFIX = "cond_stage_model.transformer."
OLD_ATTENTION = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
POSITIONS = torch.arange(77)[None]


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (SMALL, lambda t: rename(t, (CLIP_PREFIX + "text_model.", CLIP_PREFIX))),
        (SMALL_V, lambda t: rename(t, ("cond_stage_model.", "conditioner.embedders.0."))),
        (SMALL, lambda t: t | {CLIP_PREFIX + "text_model.embeddings.position_ids": POSITIONS}),
        (SMALL, lambda t: t | {CLIP_PREFIX + "embeddings.position_ids": -POSITIONS.half()}),
        (SMALL_V, lambda t: t | {
            "cond_stage_model.model.transformer.text_model.embeddings.position_ids": POSITIONS}),
        (SMALL_V, lambda t: t | {
            "cond_stage_model.model.transformer.resblocks.3.ln_1.weight": torch.tensor(torch.nan)}),
        (SMALL, lambda t: t | {"model_ema.x": torch.zeros(2), "global_step": torch.tensor(7)}),
        (SMALL, lambda t: rename(t, *[(f"attn_1.{old}.", f"attn_1.{new}.") for old, new in [
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]])),
        (SMALL, lambda t: {n: x[..., None] if ".mid.attn_1." in n and x.dim() == 2 else x
                           for n, x in t.items()}),
        (SMALL, lambda t: {n: x[..., None, None] if ".mid.attn_1." in n and x.dim() == 2 else x
                           for n, x in t.items()}),
    ],
    ids=["text without its prefix", "SD2 as a conditioner", "position ids", "wrong position ids",
         "stray position ids", "the unused last layer", "training state",
         "new attention names", "attention (C, C, 1)", "attention (C, C, 1, 1)"],
)
def test_variants_of_a_single_file(config, change, modules, tmp_path):
    path = save(tmp_path / "a.safetensors", change(as_single_file(config, modules[config])))
    assert_equal(filled(open_checkpoint(path, config=config)), modules[config])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vae", lambda t: rename(t, *OLD_ATTENTION)),
        ("vae", lambda t: {n: x[..., None, None] if MID in n and x.dim() == 2 else x
                           for n, x in t.items()}),
        ("text_encoder", lambda t: {f"text_model.{n}": x for n, x in t.items()}),
        ("text_encoder", lambda t: {f"text_model.{n}": x for n, x in t.items()}
         | {"text_model.embeddings.position_ids": POSITIONS}),
    ],
    ids=["old attention names", "attention (C, C, 1, 1)", "text_model.", "position ids"],
)
def test_variants_of_a_folder(part, change, modules, folder):
    place = folder(SMALL)
    save(weights(place, part), change(modules[SMALL][part].state_dict()))
    assert_equal(filled(open_checkpoint(place)), modules[SMALL])


@pytest.mark.parametrize("style", ["LDM", "diffusers", "old diffusers"])
@pytest.mark.parametrize("prefix", VAE_PREFIXES)
def test_stand_alone_vae_replaces_the_vae(prefix, style, modules, folder, tmp_path):
    other = modules[SMALL_V]["vae"]
    ldm = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in as_single_file(SMALL_V, modules[SMALL_V]).items()
        if name.startswith("first_stage_model.")
    }
    tensors = ldm if style == "LDM" else other.state_dict()
    if style == "old diffusers":
        tensors = rename(tensors, *OLD_ATTENTION)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    vae = save(tmp_path / "vae.safetensors", tensors | {"loss.logvar": torch.zeros(1)})
    found = filled(open_checkpoint(folder(SMALL), vae=vae))
    assert_equal(found, modules[SMALL] | {"vae": other})


def test_folder_with_a_vae_replaces_the_vae(modules, folder, tmp_path):
    other = modules[SMALL_V]["vae"]
    vae = save(tmp_path / "diffusion_pytorch_model.safetensors", other.state_dict()).parent
    found = filled(open_checkpoint(folder(SMALL), vae=vae))
    assert_equal(found, modules[SMALL] | {"vae": other})


def test_the_vae_of_a_whole_model_replaces_the_vae(modules, folder, tmp_path):
    """In a folder and in a file."""
    other = modules[SMALL_V]
    file = save(tmp_path / "other.safetensors", as_single_file(SMALL_V, other))
    whole = folder(SMALL_V).rename(tmp_path / "other")
    model = folder(SMALL)
    for vae in (file, whole):
        found = filled(open_checkpoint(model, vae=vae))
        assert_equal(found, modules[SMALL] | {"vae": other["vae"]})


@pytest.mark.parametrize("name, what", [
    ("lora_unet_down.lora_down.weight", "LoRA weights"), ("time_embedding.linear_1.weight", "UNet"),
    ("control_model.x", "a ControlNet"), ("double_blocks.0.x", "a Flux model"),
    ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
])
def test_what_is_no_vae_is_named(folder, tmp_path, name, what):
    path = save(tmp_path / "a.safetensors", {name: torch.zeros(1)})
    with pytest.raises(WeightError, match=f"a.safetensors looks like .*{what}.*not like a VAE"):
        open_checkpoint(folder(SMALL), vae=path)


def test_single_file_without_a_vae_needs_another(modules, tmp_path):
    tensors = as_single_file(SMALL, modules[SMALL])
    bare = {n: t for n, t in tensors.items() if not n.startswith("first_stage_model.")}
    found = open_checkpoint(save(tmp_path / "a.safetensors", bare), config=SMALL)
    with pytest.raises(WeightError, match="missing: first_stage_model.*can be given as vae="):
        check(found, "vae", modules[SMALL]["vae"])


def test_one_tensor_under_two_names_is_rejected(modules, tmp_path):
    tensors = as_single_file(SMALL, modules[SMALL])
    name = "first_stage_model.encoder.mid.attn_1.q.weight"
    tensors[name.replace(".q.", ".to_q.")] = tensors[name].clone()
    path = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(WeightError, match="one tensor twice: .*attn_1.q.weight"):
        open_checkpoint(path, config=SMALL)


# Folder configs.


def test_absent_fields_have_their_official_defaults(folder):
    place = folder(SMALL)
    for file, fields in {
        "unet": ["upcast_attention", "use_linear_projection", "sample_size", "norm_eps", "act_fn"],
        "vae": ["scaling_factor", "shift_factor", "use_quant_conv", "force_upcast"],
        "scheduler": ["prediction_type", "num_train_timesteps", "trained_betas"],
    }.items():
        path = place / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
        left = {key: v for key, v in json.loads(path.read_text()).items() if key not in fields}
        path.write_text(json.dumps(left))
    config = open_checkpoint(place).config
    assert replace(config, name="small") == replace(SMALL, sample_size=512)


def test_attention_head_dim_is_the_number_of_heads(folder):
    place = folder(SMALL)
    edit_json(place / "unet" / "config.json", attention_head_dim=4)
    assert open_checkpoint(place).config.unet.num_heads == (4, 4, 4)


def test_placeholders_among_the_token_ids_are_not_read(folder):
    place = folder(SMALL)
    edit_json(place / "text_encoder" / "config.json", eos_token_id=None, pad_token_id="x",
              bos_token_id=[], projection_dim=-1)
    assert open_checkpoint(place).config.text == SMALL.text
