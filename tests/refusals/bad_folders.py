"""Paths and folders that are no model of minisd: what is changed, and words of the error."""

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from files import all_shapes, header, save_folder, write
from reference_models import SMALL
from row import Make, wrong_model
from safetensors.torch import load_file, save_file

from minisd.config import SD1
from minisd.errors import WeightError

STEM = "diffusion_pytorch_model.safetensors"


def good_model(folder: Path) -> Path:
    """A whole small model in float32."""
    save_folder(SMALL, folder)
    for path in folder.glob("*/*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    return folder


def folder(change: Callable[[Path], object]) -> Make:
    """A copy of the good folder, changed."""
    def make(here: Path, good: Path) -> Path:
        model = shutil.copytree(good, here / "model")
        change(model)
        return model

    return make


# --- paths


def beside(name: str) -> Make:
    """A name that is not there, in a folder with others."""
    def make(here: Path, good: Path) -> Path:
        (here / "v1-5-pruned.safetensors").touch()
        (here / "readme").touch()
        return here / name

    return make


def bare(here: Path, good: Path) -> Path:
    (here / "empty").mkdir()
    return here / "empty"


def path(name: str) -> Make:
    return lambda here, good: name


PATHS = [
    ("similar names", beside("v1-5-prunde.safetensors"),
     r"v1-5-prunde.safetensors.*has v1-5-pruned.safet"),
    ("no similar name", beside("0"), "has readme, start.png, text.png, v1-5-pruned.safetensors"),
    ("above", path("../nowhere"), r"^\.\./nowhere does not exist"),
    ("beside a model", lambda here, good: good.parent / "modle", "modle .*has model"),
    *((name[:30], path(name), f"^{re.escape(name)} does not exist") for name in (
        "~nobody-of-this-name/x", "x" * 5000, "x/" * 5000, "a\0b", "a--b/c", "owner/na me",
        "\udcff")),
]

# --- a diffusers folder


def field(name: str, **fields) -> Make:
    """A JSON file with other fields."""
    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return folder(change)


MANY = 10**18
FIELDS = [  # file, its changed fields, words of the error
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "_class_name is 'Stable"),
    ("model_index.json", {"_class_name": "FluxPipeline"}, "_class_name is 'FluxPipe"),
    ("model_index.json", {"_class_name": ["x"]}, "_class_name"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is .*AutoencoderTiny"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
    ("unet/config.json", {"in_channels": 8}, "instruct-pix2pix"),
    ("unet/config.json", {"in_channels": 7}, "7 input channels and no classes"),
    ("unet/config.json", {"in_channels": 6}, "6 input channels"),
    ("unet/config.json", {"out_channels": 8}, "8 output channels"),
    ("unet/config.json", {"block_out_channels": [MANY] * 3}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16] * 99}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16, 24, 45]}, "norm_num_groups"),
    ("unet/config.json", {"block_out_channels": "16"}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16, 24]}, "up_block_types"),
    ("unet/config.json", {"down_block_types": ["DownBlock2D", "K", "DownBlock2D"]}, "down_block"),
    ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D"] * 3}, "up_block_types"),
    ("unet/config.json", {"layers_per_block": MANY}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": 2.5}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": True}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": None}, "layers_per_block"),
    ("unet/config.json", {"attention_head_dim": 7}, "attention_head_dim"),
    ("unet/config.json", {"attention_head_dim": 0}, "attention_head_dim"),
    ("unet/config.json", {"attention_head_dim": [2, 3]}, "attention_head_dim"),
    ("unet/config.json", {"cross_attention_dim": 24}, "24 wide, but the text encoder's are 20"),
    ("unet/config.json", {"sample_size": -8}, "sample_size"),
    ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'; minisd computes only 'silu'"),
    ("unet/config.json", {"norm_eps": 1e-6}, "norm_eps"),
    ("unet/config.json", {"only_cross_attention": [True, False]}, "only_cross_attention"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("unet/config.json", {"num_class_embeds": 1000}, "4 input channels and num_class_embeds 1000"),
    ("unet/config.json", {"num_class_embeds": 0}, "num_class_embeds is 0"),
    ("unet/config.json", {"in_channels": 7, "num_class_embeds": 9},
     "low_res_scheduler.scheduler_config.json is missing"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    ("unet/config.json", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers"),
    ("unet/config.json", {"num_attention_heads": 8}, "num_attention_heads"),
    ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type"),
    ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
    ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv"),
    ("vae/config.json", {"act_fn": "relu"}, "act_fn"),
    ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
    ("text_encoder/config.json", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ("text_encoder/config.json", {"num_hidden_layers": MANY}, "num_hidden_layers"),
    ("text_encoder/config.json", {"num_attention_heads": 3}, "num_attention_heads"),
    ("text_encoder/config.json", {"vocab_size": "many"}, "vocab_size"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"prediction_type": {}}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"beta_start": float("inf")}, "beta_start"),
    ("scheduler/scheduler_config.json", {"beta_start": 0.5}, "beta_start"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps"),
]
CONTENTS = {  # of each of these files
    "missing": (None, "missing|no model_index"),
    "empty": (b"", "not readable JSON"),
    "array": (b"[1]", "not an object"),
    "field twice": (b'{"a": 1, "a": 2}', "has 'a' twice"),
    "deep": (b"[" * 10**5, "not readable JSON"),
    "100 MB": (10**8, "is too large"),
}


def content(name: str, data: bytes | int | None) -> Make:
    """Another content of a JSON file: none, these bytes, or so many."""
    def change(model: Path) -> None:
        (model / name).unlink()
        if isinstance(data, bytes):
            (model / name).write_bytes(data)
        elif data:
            (model / name).touch()
            os.truncate(model / name, data)

    return folder(change)


INDEX = [  # the weight_map of the UNet's index of shards; words of the error
    ({"a": "../x.safetensors"}, r"names '../x.safetensors', which is not a shard in its own f"),
    ({"a": "x/y.safetensors"}, "which is not a shard in its own folder"),
    ({"a": "x\\y.safetensors"}, "which is not a shard in its own folder"),
    ({"a": "/etc/passwd"}, "which is not a shard in its own folder"),
    ({"a": "pickle.bin"}, "which is not a shard in its own folder"),
    ({"a": "x.safetensors"}, "names x.safetensors, which is missing"),
    ({"a": "one.safetensors"}, "do not hold the same tensors"),
    ({"a": 1}, "no weight_map"),
    (["a"], "no weight_map"),
    (None, "no weight_map"),
]


def index(weight_map: object, model: Path) -> None:
    (model / "unet" / STEM).rename(model / "unet" / "one.safetensors")
    shutil.copy(model / "unet" / "one.safetensors", model / "x.safetensors")  # to be left alone
    (model / "unet" / f"{STEM}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pickled(model: Path) -> None:
    (model / "vae" / STEM).rename(model / "vae" / "diffusion_pytorch_model.bin")


def yaml(here: Path, good: Path) -> Path:
    (here / "a.yaml").write_text("model: {params: {parameterization: x0}}")
    return write(here / "a.safetensors", header(all_shapes(SD1)))


FOLDERS = [
    ("no index", folder(lambda model: (model / "model_index.json").unlink()),
     "no model_index.json.*beside text_encoder, unet, vae"),
    ("an empty folder", bare, "no model_index.json.*beside text_encoder, unet, vae"),
    *((f"{name} {fields}"[:60], field(name, **fields), words) for name, fields, words in FIELDS),
    *((f"{name}: {case}", content(name, data), words) for case, (data, words) in CONTENTS.items()
      for name in sorted({name for name, _, _ in FIELDS})),
    *((f"shards {shards}", folder(partial(index, shards)), words) for shards, words in INDEX),
    ("pickles", folder(pickled), "vae has no diffusion_pytorch_model.safetensors.*save_f"),
    ("unknown parameterization", yaml, "parameterization is 'x0'"),
]

ROWS = [
    *(wrong_model(*row, FileNotFoundError) for row in PATHS),
    *(wrong_model(*row, WeightError) for row in FOLDERS),
]
