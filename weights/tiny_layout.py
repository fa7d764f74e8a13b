"""A trained model written as a folder in diffusers layout, which diffusers and minisd both load."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from minisd.config import Config
from minisd.tokenizer import Tokenizer


def write_json(path: Path, fields: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n")


def write_tokenizer(folder: Path, symbols: list[str], merges: list[tuple[str, str]]) -> None:
    """The four files that transformers' CLIPTokenizer reads; a symbol's place is its id."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    write_json(folder / "vocab.json", {symbol: i for i, symbol in enumerate(symbols)})
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings)


def diffusers_configs(config: Config, tokenizer: Tokenizer) -> dict[str, dict]:
    """The JSON files of a diffusers folder, by path."""
    text, unet, vae = config.text, config.unet, config.vae
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in unet.has_attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(unet.has_attention)]
    unet_fields = asdict(unet)
    del unet_fields["has_attention"]
    # What diffusers calls attention_head_dim is the number of heads.
    unet_fields["attention_head_dim"] = unet_fields.pop("num_heads")
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.42.0",
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "down_block_types": down,
            "up_block_types": up,
            "sample_size": config.sample_size // vae.downscale,
            **unet_fields,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.block_out_channels),
            "sample_size": config.sample_size,
            **asdict(vae),
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            # Else transformers computes in the file's float16 beside diffusers' float32.
            "dtype": "float32",
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "layer_norm_eps": 1e-5,
            "projection_dim": text.hidden_size,
            **asdict(text),
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            **asdict(config.schedule),
        },
    }


def export(tokenizer_folder: Path, out: Path, config: Config, models: dict[str, nn.Module]) -> None:
    """A folder in diffusers layout, weights in float16."""
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    for path, fields in diffusers_configs(config, tokenizer).items():
        write_json(out / path, fields)
    for part, model in models.items():
        text = part == "text_encoder"
        file = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
        prefix = "text_model." if text else ""
        tensors = {prefix + n: p.detach().half() for n, p in model.named_parameters()}
        save_file(tensors, out / part / file, metadata={"format": "pt"})
        (out / part / file).chmod(0o644)  # save_file leaves it readable by its owner alone
    (out / "tokenizer").mkdir(exist_ok=True)
    for file in tokenizer_folder.iterdir():
        (out / "tokenizer" / file.name).write_bytes(file.read_bytes())
