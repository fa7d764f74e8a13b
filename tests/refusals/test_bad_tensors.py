"""A tensor that is missing, unexpected, of another model or not finite is rejected by name."""

import os

import pytest
import torch
from files import (
    all_shapes,
    as_single_file,
    header,
    official_modules,
    random_modules,
    save,
    write,
)
from reference_models import SMALL

from minisd.checkpoints.checkpoint import check, fill, open_checkpoint
from minisd.config import SD1
from minisd.errors import WeightError

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return official_modules(SD1)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """An official checkpoint: the header, with zeros as data."""
    path = tmp_path_factory.mktemp("sd1") / "sd1.safetensors"
    return write(path, header(all_shapes(SD1)))


USED = [name for name in all_shapes(SD1) if not name.endswith("position_ids")]
EDITS = {
    "dropped": lambda shapes, name: {n: s for n, s in shapes.items() if n != name},
    "renamed": lambda shapes, name: {n + "x" * (n == name): s for n, s in shapes.items()},
    "reshaped": lambda shapes, name: shapes | {name: (*shapes[name], 1, 2)},
}


def rejection(path, modules) -> str:
    try:
        found = open_checkpoint(path)
        for part, module in modules.items():
            check(found, part, module)
    except WeightError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("edit", [*EDITS, "retyped"])
@pytest.mark.parametrize("name", [*USED[::97], *(n for n in USED if "input_blocks.0.0." in n)])
def test_every_tensor_is_needed_under_its_name_in_its_shape_and_dtype(
    name, edit, full_size, tmp_path
):
    path, shapes = tmp_path / "a.safetensors", all_shapes(SD1)
    message = rejection(write(path, damaged(shapes, name, edit)), full_size)
    assert name in message and str(path) in message


def damaged(shapes, name, edit):
    if edit != "retyped":
        return header(EDITS[edit](shapes, name))
    rows = header({n: s for n, s in shapes.items() if n != name})
    end = max(row["data_offsets"][1] for row in rows.values())
    odd = header({name: shapes[name]}, "I8")[name]
    odd["data_offsets"] = [end, end + odd["data_offsets"][1]]
    return rows | {name: odd}


def test_error_counts_and_names_the_first(full_size, tmp_path):
    shapes = {name.replace("resnets", "x").replace(".attn2.", ".attn9."): shape
              for name, shape in all_shapes(SD1).items() if ".attn1.to_q" not in name}
    shapes[UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = (320, 768)
    message = rejection(write(tmp_path / "a", header(shapes)), full_size)
    assert f"unet: 95 missing: {UNET}input_blocks.1.1.transformer_blocks.0" in message
    assert f"; 80 unexpected: {UNET}input_blocks.1.1" in message
    assert message.count("attn") <= 11 and message.count(", ...") == 2


def test_tensor_of_no_part_is_rejected(tmp_path):
    path = write(tmp_path / "a", header(all_shapes(SD1) | {"stranger": (1,)}))
    with pytest.raises(WeightError, match="1 unexpected: stranger"):
        open_checkpoint(path)


OTHERS = {
    "LoRA": {"lora_unet_down_blocks_0_x.lora_down.weight": (1,)},
    "LoRA ": {"unet.down_blocks.0.attn1.to_q.lora.down.weight": (1,)},
    "LoRA  ": {"base_model.model.to_q.lora_A.weight": (1,)},
    "SDXL": {"conditioner.embedders.1.model.ln_final.weight": (1280,)},
    "SDXL refiner": {"conditioner.embedders.0.model.ln_final.weight": (1280,), UNET + "x": (1,)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "ControlNet ": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "unCLIP": {UNET + "label_emb.0.0.weight": (1280, 2048), "noise_augmentor.a": (1,)},
    "instruct-pix2pix": {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "depth": {UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)},
    "x4 upscaler": {UNET + "input_blocks.0.0.weight": (256, 7, 3, 3)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (1,)},
    "Flux ": {"single_transformer_blocks.0.proj_out.weight": (1,)},
    "UNet alone": {"time_embedding.linear_1.weight": (1280, 320)},
    "VAE alone": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "text encoder alone": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "stranger": {"stranger": (1,)},
    "unusual": {UNET + "input_blocks.0.0.weight": (64, 4, 3, 3)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_rejected_by_name(kind, tmp_path):
    path = write(tmp_path / "a.safetensors", header(OTHERS[kind]))
    words = {"unusual": "input_blocks.0.0.weight.*give config="}
    with pytest.raises(WeightError, match=words.get(kind, kind.strip())):
        open_checkpoint(path)


# Values.


@pytest.fixture
def small(tmp_path):
    def make(**changes):
        tensors = as_single_file(SMALL, random_modules(SMALL))
        for name, change in changes.items():
            tensors[name] = change(tensors[name])
        return save(tmp_path / "a.safetensors", tensors)

    return make


def put(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite(value, small):
    name = "model.diffusion_model.out.2.weight"
    found = open_checkpoint(small(**{name: put(value)}), config=SMALL)
    with pytest.raises(WeightError, match=f"{name} has NaN or infinity"):
        fill(found, "unet", meta()["unet"], torch.float32, torch.device("cpu"))


def test_weight_too_large_for_half_precision(small):
    found = open_checkpoint(small(**{"first_stage_model.quant_conv.bias": put(1e5)}), config=SMALL)
    fill(found, "vae", meta()["vae"], torch.float32, torch.device("cpu"))
    with pytest.raises(WeightError, match="quant_conv.bias has NaN or inf.*read as torch.float16"):
        fill(found, "vae", meta()["vae"], torch.float16, torch.device("cpu"))


def test_file_cut_short_after_it_was_checked(small):
    path = small()
    found = open_checkpoint(path, config=SMALL)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightError, match="ended within"):
        for part, module in meta().items():
            fill(found, part, module, torch.float32, torch.device("cpu"))


def meta():
    with torch.device("meta"):
        return official_modules(SMALL)
