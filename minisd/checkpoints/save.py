"""A model to disk: a folder in diffusers layout, or one file in the original layout.

What is written is what `minisd.load`, diffusers' from_pretrained and its from_single_file read. The
names are those of names.py, read the other way round.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd import files
from minisd.checkpoints import names, names_vision, parts as networks, prediction
from minisd.checkpoints.folder import CLASSES, PIPELINES, stems
from minisd.checkpoints.scheduler_config import LOW_RES_SCHEDULER, schedule_fields
from minisd.checkpoints.tokenizer_folder import write_tokenizer
from minisd.config import Config
from minisd.errors import WeightError
from minisd.text.tokenizer import Tokenizer

# In the original layout these are convolutions of 1x1, and linear layers here.
VAE_ATTENTION = re.compile(r"first_stage_model\..*\.attn_1\.(q|k|v|proj_out)\.weight")
# What diffusers' pipelines of text to image and of inpainting can have beside; not all know them.
WITHOUT = {
    "feature_extractor": [None, None], "image_encoder": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None],
}

Weights = Mapping[str, Mapping[str, Tensor]]  # part -> parameter -> tensor


def save_model(
    path: Path, config: Config, tokenizer: Tokenizer, parts: Mapping[str, nn.Module]
) -> None:
    """Write ``parts`` ("text_encoder", "unet", "vae" and what else there is) whole or not at all.

    ``path`` ending in .safetensors is a single file; any other is a folder, made new. An existing
    one is a FileExistsError, a full disk the OSError that names ``path``; both before any work.
    """
    suffix = path.suffix.lower()
    if suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensor"):
        raise ValueError(f"{path}: a file's name must end in .safetensors")
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: choose another name")
    if config.vision is not None and "image_normalizer" not in parts and suffix != ".safetensors":
        raise ValueError(f"{path}: a folder of an unCLIP model has an image_normalizer, which this "
                         "model was loaded without: save a .safetensors file, or load it with "
                         "config= (--config), a folder that has one")
    weights = {part: module.state_dict() for part, module in parts.items()}
    config = networks.only(config, parts)
    size = sum(t.nbytes for tensors in weights.values() for t in tensors.values())
    files.check_writable(path, size=size)
    with files.written_whole(path) as temporary:
        if suffix == ".safetensors":
            metadata, markers = prediction.written(config.schedule)
            marked = {name: torch.empty(0) for name in markers}
            _write_tensors(temporary, original_tensors(config, weights) | marked, metadata)
        else:
            _write_folder(temporary, config, tokenizer, weights)


def original_tensors(config: Config, weights: Weights) -> dict[str, Tensor]:
    """All tensors of a model under the names, and in the shapes, of the original layout."""
    tensors: dict[str, Tensor] = {}
    for part, rows in networks.single_file(config).items():
        tensors |= _named(rows, weights[part])
    for name, tensor in tensors.items():
        if name in names_vision.TRANSPOSED:
            tensors[name] = tensor.mT                                        # (width, embedding)
        if VAE_ATTENTION.fullmatch(name):
            tensors[name] = tensor[:, :, None, None]                         # (C, C, 1, 1)
    return tensors


def _write_folder(folder: Path, config: Config, tokenizer: Tokenizer, weights: Weights) -> None:
    rows = networks.folder(config)
    for part, stem in stems(config).items():
        (folder / part).mkdir(parents=True)
        place = folder / part / f"{stem}.safetensors"
        _write_tensors(place, _named(rows[part], weights[part]), {})
    for file, fields in folder_configs(config, tokenizer).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(fields, indent=2) + "\n")
    write_tokenizer(folder / "tokenizer", tokenizer)


def _named(rows: names.NameMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official name -> tensor: each tensor once, under the first of the names that it may have."""
    named: dict[str, Tensor] = {}
    left = dict(tensors)
    for name, parameters in rows.items():
        if all(parameter in left for parameter in parameters):
            pieces = [left.pop(parameter) for parameter in parameters]
            named[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if left:
        raise WeightError(f"no official model has {', '.join(left)}, so it cannot be saved as one")
    return named


def _write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    path.touch()
    mode = path.stat().st_mode  # what the user's umask allows; save_file: the owner only
    # transformers refuses a file that does not say its format.
    save_file(_apart(tensors), path, {"format": "pt", **metadata})
    path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with tied weights as copies: safetensors writes no memory twice."""
    apart: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def folder_configs(config: Config, tokenizer: Tokenizer) -> dict[str, dict]:
    """The JSON files of a diffusers folder, but for the tokenizer's: file -> fields."""
    text, unet, vae, schedule = config.text, config.unet, config.vae, config.schedule
    attends = ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in unet.has_attention]
    lcm = unet.time_cond_proj_dim is not None and config.kind == "text to image"
    pipeline = "LatentConsistencyModelPipeline" if lcm else PIPELINES[config.kind][0]
    classes = unet.projection_class_embeddings_input_dim
    ups = ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in unet.has_attention[::-1]]
    files: dict[str, dict] = {
        "model_index.json": {
            "_class_name": pipeline,
            "_diffusers_version": "0.20.0",  # not written by it, but it is looked for
            "scheduler": ["diffusers", schedule_fields(schedule)["_class_name"]],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            **CLASSES,
            **networks.index(config),
            **(WITHOUT if config.kind in ("text to image", "inpainting") else {}),
        },
        "scheduler/scheduler_config.json": schedule_fields(schedule),
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "hidden_act": text.hidden_act,
            "max_position_embeddings": text.max_position_embeddings,
            "projection_dim": text.hidden_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": config.sample_size // vae.downscale,
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "block_out_channels": unet.block_out_channels,
            "layers_per_block": unet.layers_per_block,
            "down_block_types": attends,
            "up_block_types": ups,
            # Despite its name the field is the number of heads, see diffusers_config.py.
            "attention_head_dim": unet.num_heads,
            "cross_attention_dim": unet.cross_attention_dim,
            "use_linear_projection": unet.use_linear_projection,
            "norm_num_groups": unet.norm_num_groups,
            "only_cross_attention": unet.only_cross_attention or False,
            "num_class_embeds": unet.num_class_embeds,
            "time_cond_proj_dim": unet.time_cond_proj_dim,
            "class_embed_type": None if classes is None else "projection",
            "projection_class_embeddings_input_dim": classes,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "sample_size": config.sample_size,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": vae.block_out_channels,
            "layers_per_block": vae.layers_per_block,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.block_out_channels),
            "latent_channels": vae.latent_channels,
            "norm_num_groups": vae.norm_num_groups,
            "scaling_factor": vae.scaling_factor,
        },
        **networks.json_files(config),
    }
    for file, fields in OF_KIND.get(config.kind, lambda config: {})(config).items():
        files[file] = files.get(file, {}) | fields
    return files


def _upscaling(config: Config) -> dict[str, dict]:
    assert config.low_res_schedule is not None
    low_res = schedule_fields(config.low_res_schedule)
    return {
        "model_index.json": {
            "low_res_scheduler": ["diffusers", low_res["_class_name"]],
            "max_noise_level": config.max_noise_level,
        },
        LOW_RES_SCHEDULER.as_posix(): low_res,
    }


# What a kind of model has more: file -> fields.
OF_KIND: dict[str, Callable[[Config], dict[str, dict]]] = {"upscaling": _upscaling}
