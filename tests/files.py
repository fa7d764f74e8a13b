"""Checkpoint files for tests: official names and shapes, small random weights, broken headers.

manifests/ lists every tensor that the single-file checkpoints hold, as the reference classes of
CompVis/stable-diffusion, Stability-AI/stablediffusion and OpenCLIP declare them: name, shape.
"""

import gzip
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from reference_models import (
    official_dpt,
    official_pipeline,
    official_text_encoder,
    official_unet,
    official_vae,
    randomise,
    small_model,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd.checkpoints import parts
from minisd.config import Config
from minisd.text import tokenizer

MANIFESTS = Path(__file__).parent / "manifests"
ITEM_SIZE = {"I8": 1, "F16": 2, "F32": 4, "F64": 8}

Shapes = dict[str, tuple[int, ...]]


def manifest(name: str) -> Shapes:
    lines = (MANIFESTS / f"{name}.txt").read_text().splitlines()
    return {row[0]: tuple(map(int, row[1:])) for row in map(str.split, lines)}


def official_shapes(config: Config) -> dict[str, Shapes]:
    """Part -> the tensors of an official single file, under their full names."""
    old = config.unet.cross_attention_dim == 768
    upscaler = config.kind == "upscaling"
    unet = manifest("x4_unet") if upscaler else manifest("v1_unet") | (
        {} if old else manifest("v2_unet_differences"))
    unet["input_blocks.0.0.weight"] = (
        config.unet.block_out_channels[0], config.unet.in_channels, 3, 3)
    text = "cond_stage_model.transformer." if old else "cond_stage_model.model."
    more = {}
    if config.vision is not None:
        letter = "h" if config.vision.hidden_act == "gelu" else "l"
        unet |= manifest(f"unclip_{letter}_unet_differences")
        more["image_encoder"] = _prefixed("embedder.model.", manifest(f"clip_{letter}_vision"))
    if config.depth is not None:
        more["depth_estimator"] = _prefixed("depth_model.model.", manifest("depth"))
    return {
        "text_encoder": _prefixed(text, manifest("v1_text" if old else "v2_text")),
        "unet": _prefixed("model.diffusion_model.", unet),
        "vae": _prefixed("first_stage_model.", manifest("x4_vae" if upscaler else "vae")),
        **more,
    }


def all_shapes(config: Config) -> Shapes:
    parts = official_shapes(config).values()
    return {name: shape for part in parts for name, shape in part.items()}


def _prefixed(prefix: str, rows: dict) -> dict:
    return {prefix + name: row for name, row in rows.items()}


def official_modules(config: Config) -> dict[str, nn.Module]:
    """The official classes in these sizes."""
    modules = {
        "text_encoder": official_text_encoder(config.text),
        "unet": official_unet(config.unet, config.sample_size // config.vae.downscale),
        "vae": official_vae(config.vae),
    }
    return modules | ({"depth_estimator": official_dpt(config.depth)} if config.depth else {})


def random_modules(config: Config) -> dict[str, nn.Module]:
    parts = official_modules(config)
    return {part: randomise(module, i).float() for i, (part, module) in enumerate(parts.items())}


def as_single_file(config: Config, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The modules' weights under the names of a single file, stacked as they are there."""
    tensors = {}
    for part, rows in parts.single_file(config).items():
        left = dict(modules[part].state_dict())
        for name, parameters in rows.items():
            if all(parameter in left for parameter in parameters):
                tensors[name] = torch.cat([left.pop(parameter) for parameter in parameters])
        assert not left
    return tensors


def save_folder(config: Config, folder: Path) -> Path:
    """A folder that diffusers writes, with our small model's weights in float64."""
    official_pipeline(StableDiffusionPipeline, small_model(config)).save_pretrained(folder)
    return folder


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def header(shapes: Shapes, dtype: str = "F16") -> dict:
    """A safetensors header for these tensors, one after the other."""
    rows, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * ITEM_SIZE[dtype]
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return rows


def framed(head: bytes, data: bytes = bytes(8)) -> bytes:
    """The bytes of a file with that header."""
    return struct.pack("<Q", len(head)) + head + data


def write(path: Path, head: dict | bytes, size: int | None = None) -> Path:
    """A file with that header and zeros as data, sparse on the disk."""
    if isinstance(head, dict):
        size = max((row["data_offsets"][1] for row in head.values()), default=0)
        head = json.dumps(head).encode()
    with open(path, "wb") as file:
        file.write(framed(head, b""))
        file.truncate(8 + len(head) + (size or 0))
    return path


def with_unet(config: Config, **changes) -> Config:
    return replace(config, unet=replace(config.unet, **changes))


def clip_merges() -> list[str]:
    packed = Path(tokenizer.__file__).with_name("merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().split("\n")[1:-1]


def clip_vocab(merges: list[str]) -> dict[str, int]:
    """CLIP's ids, from its description: printable bytes as themselves, the others as characters
    from U+0100 on; each again as the end of a word; the merges; the special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = len(set(range(256)) - set(printable))
    symbols = [chr(point) for point in printable + list(range(0x100, 0x100 + moved))]
    symbols += [symbol + "</w>" for symbol in symbols]
    symbols += [merge.replace(" ", "") for merge in merges] + [tokenizer.BOS, tokenizer.EOS]
    return {symbol: index for index, symbol in enumerate(symbols)}


def save_tokenizer(folder: Path, vocab: dict, merges: list[str], **settings) -> Path:
    """A tokenizer/ folder as the official checkpoints have it."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
