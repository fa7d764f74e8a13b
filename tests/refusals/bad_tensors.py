"""Tensors that are no model of minisd: what is changed, and words of the error."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from bad_files import file
from bad_folders import STEM, folder
from files import all_shapes, as_single_file, header, random_modules, save, write
from reference_models import SMALL
from row import Make, Row, wrong_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisd.config import SD1
from minisd.errors import WeightError

UNET = "model.diffusion_model."
IN = f"{UNET}input_blocks.0.0"
USED = [name for name in all_shapes(SD1) if not name.endswith("position_ids")]

# --- tensors of an official file: its header over zeros

EDITS = {
    "dropped": lambda shapes, name: {n: s for n, s in shapes.items() if n != name},
    "renamed": lambda shapes, name: {n + "x" * (n == name): s for n, s in shapes.items()},
    "reshaped": lambda shapes, name: shapes | {name: (*shapes[name], 1, 2)},
}
EDITED = {  # what the error says of a tensor after each edit
    "dropped": "1 missing: {0}", "renamed": "1 missing: {0}; 1 unexpected: {0}x",
    "reshaped": "1 of the wrong shape: {0} ", "retyped": "1 of a dtype other than .*: {0} I8",
}


def edited(name: str, how: str) -> Make:
    """SD1's file with one tensor dropped, renamed, reshaped or retyped."""
    return lambda here, good: file(damaged(all_shapes(SD1), name, how))(here, good)


def damaged(shapes: dict, name: str, how: str) -> dict:
    if how != "retyped":
        return header(EDITS[how](shapes, name))
    rows = header({n: s for n, s in shapes.items() if n != name})
    end = max(row["data_offsets"][1] for row in rows.values())
    odd = header({name: shapes[name]}, "I8")[name]
    odd["data_offsets"] = [end, end + odd["data_offsets"][1]]
    return rows | {name: odd}


def many_faults(here: Path, good: Path) -> Path:
    """95 tensors are missing and 80 are unexpected."""
    shapes = {name.replace("resnets", "x").replace(".attn2.", ".attn9."): shape
              for name, shape in all_shapes(SD1).items() if ".attn1.to_q" not in name}
    shapes[f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = (320, 768)
    return write(here / "a.safetensors", header(shapes))


FIRST = rf"{UNET}input_blocks.1.1"
TENSORS = [
    *((f"{IN}.bias {how}", edited(f"{IN}.bias", how), words.format(f"{IN}.bias"))
      for how, words in EDITED.items()),
    # This one tells which model it is.
    *((f"{IN}.weight {how}", edited(f"{IN}.weight", how), f"has (no )?{IN}.weight.*give config=")
      for how in EDITS),
    (f"{IN}.weight retyped", edited(f"{IN}.weight", "retyped"),
     EDITED["retyped"].format(f"{IN}.weight")),
    ("many faults", many_faults,
     rf"unet: 95 missing: {FIRST}.transformer_blocks.0.*; 80 unexpected: {FIRST}"),
    ("of no part", file(header(all_shapes(SD1) | {"stranger": (1,)})), "1 unexpected: stranger"),
]

# --- other models: some of their tensors

OTHERS = {
    "LoRA": {"lora_unet_down_blocks_0_x.lora_down.weight": (1,)},
    "LoRA ": {"unet.down_blocks.0.attn1.to_q.lora.down.weight": (1,)},
    "LoRA  ": {"base_model.model.to_q.lora_A.weight": (1,)},
    "SDXL": {"conditioner.embedders.1.model.ln_final.weight": (1280,)},
    "SDXL refiner": {"conditioner.embedders.0.model.ln_final.weight": (1280,), UNET + "x": (1,)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "ControlNet ": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "SDXL ": {UNET + "label_emb.0.0.weight": (1280, 2816)},
    "SDXL refiner ": {UNET + "label_emb.0.0.weight": (1536, 2560)},
    "instruct-pix2pix": {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (1,)},
    "Flux ": {"single_transformer_blocks.0.proj_out.weight": (1,)},
    "UNet alone": {"time_embedding.linear_1.weight": (1280, 320)},
    "VAE alone": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "text encoder alone": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "stranger": {"stranger": (1,)},
    "unusual": {UNET + "input_blocks.0.0.weight": (64, 4, 3, 3)},
}
UNUSUAL = {"unusual": "input_blocks.0.0.weight.*give config="}

# --- tensors of a small model


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Make:
    """The folder with changed tensors of its UNet."""
    def write_again(model: Path) -> None:
        there = load_file(model / "unet" / STEM)
        change(there)
        save_file(there, model / "unet" / STEM)

    return folder(write_again)


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    """The last number of a tensor is another."""
    def change(there: dict[str, Tensor]) -> None:
        there[name] = there[name].clone()
        there[name].view(-1)[-1] = value

    return change


@cache
def small_file() -> dict[str, Tensor]:
    return as_single_file(SMALL, random_modules(SMALL))


def single(change: Callable[[dict[str, Tensor]], object]) -> Make:
    """The same for a single file, which is loaded with its sizes."""
    def make(here: Path, good: Path) -> Path:
        there = dict(small_file())
        change(there)
        return save(here / "a.safetensors", there)

    return make


NAN, LAST = "has NaN or infinity", f"{UNET}out.2.weight"
VALUES = [torch.nan, torch.inf, -torch.inf]
LARGE = put("first_stage_model.quant_conv.bias", 1e5)

ROWS = [
    *(wrong_model(*row, WeightError) for row in TENSORS),
    # One of each part in the same way: once is enough.
    *(wrong_model(f"{name} {how}", edited(name, how), words.format(name), WeightError, line=None)
      for name in USED[::450] for how, words in EDITED.items()),
    *(wrong_model(case, file(header(shapes)), UNUSUAL.get(case, case.strip()), WeightError)
      for case, shapes in OTHERS.items()),
    wrong_model("dropped in a folder", tensors(lambda there: there.pop("conv_in.bias")),
                "unet: 1 missing: conv_in.bias", WeightError),
    *(wrong_model(f"{value} in a folder", tensors(put("conv_out.bias", value)),
                  f"conv_out.bias {NAN}", WeightError, late=True) for value in VALUES),
    *(wrong_model(f"{value} in a file", single(put(LAST, value)), f"{LAST} {NAN}", WeightError,
                  load={"config": SMALL}, line=None, late=True) for value in VALUES),
    wrong_model("too large for float16", single(LARGE),
                "quant_conv.bias has NaN or inf.*read as torch.float16", WeightError,
                load={"config": SMALL, "dtype": "float16"}, line=None, late=True),
    # A good file of an inpainting model, and a call that lacks what it needs.
    Row(what="an inpainting model without a mask", said="give it image and mask_image",
        make=file(header(all_shapes(SD1) | {f"{IN}.weight": (320, 9, 3, 3)})),
        line=["x"]),
]
