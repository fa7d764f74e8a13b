"""A folder in diffusers layout: its JSON files, and its weights, whole or in shards."""

import re
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints import names, parts
from minisd.checkpoints.diffusers_config import read_config, read_vae
from minisd.checkpoints.found import Found, Group, tokenizer_of, unwrapped
from minisd.checkpoints.json_file import JsonFile
from minisd.checkpoints.recognise import resolve
from minisd.checkpoints.safetensors_file import TO_CONVERT, StoredTensor, read_header
from minisd.checkpoints.scheduler_config import SCHEDULER, check_zero_snr
from minisd.config import Config
from minisd.errors import WeightError

# What model_index.json says for each kind of model: the first is written, and all are read. Then
# the classes of the parts, and the stems of their weight files.
DRAWING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline",
           "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
INPAINTING = ("StableDiffusionInpaintPipeline",)
PIPELINES = {
    "text to image": DRAWING + INPAINTING,
    "inpainting": INPAINTING + DRAWING,
    "image variation": ("StableUnCLIPImg2ImgPipeline",),
    "depth": ("StableDiffusionDepth2ImgPipeline",),
    "upscaling": ("StableDiffusionUpscalePipeline",),
}
CLASSES = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# What a folder is that has a config.json and no model_index.json, by its class there.
ALONE = {
    "AutoencoderKL": names.VAE_ALONE,
    "UNet2DConditionModel": "a UNet alone: give the whole folder that it is from",
    "ControlNetModel": "a ControlNet, which minisd does not compute yet",
}
STEMS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def read_folder(folder: Path, prediction_type: str | None) -> Found:
    """What a folder holds; WeightError where it is no Stable Diffusion 1 or 2.

    ``prediction_type`` outranks what the folder says.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightError(_without_index(folder))
    file = JsonFile(index)
    known = dict.fromkeys(name for names_of_kind in PIPELINES.values() for name in names_of_kind)
    file.choice("_class_name", None, known)  # without it, it is the index of nothing
    for part, kind in CLASSES.items():
        file.choice(part, kind, (kind,))
    for part, row in parts.OPTIONAL.items():
        kind = file.choice(part, None, (row.classes[part], [None, None], None))
        if kind == row.classes[part] and not (folder / part).is_dir():
            raise WeightError(f"{folder / part} is missing, which {index} names")
    if prediction_type is None and not (folder / SCHEDULER).is_file():
        raise WeightError(f"{folder / SCHEDULER} is missing")
    config, source = read_config(folder), f"from {SCHEDULER}"
    if file.fields["_class_name"] not in PIPELINES[config.kind]:
        raise WeightError(f"{index} names a {file.fields['_class_name']}, but the UNet beside it "
                          f"is for {config.kind}")
    schedule = config.schedule
    if prediction_type is not None:
        schedule = replace(schedule, prediction_type=prediction_type)
        source = "given by the caller"
    check_zero_snr(folder, schedule, source)
    stem = stems(config)
    groups = [Group(part_tensors(folder / part, stem[part]), {part: rows}, {"": part})
              for part, rows in parts.folder(config).items()]
    config = resolve(config, schedule)
    return Found(folder, "folder", config, source, tokenizer_of(folder), groups)


def stems(config: Config) -> dict[str, str]:
    """Part -> the stem of its weight file."""
    return STEMS | {part: row.stem for part, (row, _) in parts.optional(config).items()}


def read_stand_alone_vae(path: Path, config: Config) -> Group:
    """A VAE in a file or a folder of its own, or that of a whole model in either.

    WeightError if it is not of the model's sizes, or no VAE.
    """
    if (path / "model_index.json").is_file():
        path = path / "vae"
    if (path / "config.json").is_file():
        JsonFile(path / "config.json").choice("_class_name", "AutoencoderKL", ("AutoencoderKL",))
    tensors = part_tensors(path, STEMS["vae"]) if path.is_dir() else unwrapped(read_header(path))
    what = names.rejected(list(tensors))
    if what not in (None, names.VAE_ALONE):
        raise WeightError(f"{path} looks like {what}, not like a VAE")
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        tensors = {name: t for name, t in tensors.items() if name.startswith("first_stage_model.")}
    if (path / "config.json").is_file() and read_vae(
            path / "config.json", config.kind) != config.vae:
        raise WeightError(f"{path} has a VAE of other sizes or another scaling_factor")
    return Group(tensors, {"vae": names.stand_alone_vae(config.vae)}, {"": "vae"})


def _without_index(folder: Path) -> str:
    """What a folder is that is no model, as far as its config.json tells."""
    try:
        kind = JsonFile(folder / "config.json").fields.get("_class_name")
    except WeightError:
        kind = None
    if isinstance(kind, str) and kind in ALONE:
        return f"{folder} is {ALONE[kind]}"
    return (f"{folder} has no model_index.json, which a folder in diffusers layout has beside "
            f"{', '.join(names.PARTS)}")


def part_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """A part's tensors, in one file or in shards; half precision where there is nothing else."""
    for variant in ("", ".fp16"):
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return unwrapped(read_header(whole))
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _shards(index)
    advice = TO_CONVERT.replace("model.safetensors", f"{stem}.safetensors")
    pickled = f"; of the pickles there: {advice}" if any(folder.glob("*.bin")) else ""
    raise WeightError(f"{folder} has no {stem}.safetensors (nor .fp16, nor shards){pickled}")


def _shards(index: Path) -> dict[str, StoredTensor]:
    rows = JsonFile(index).fields.get("weight_map")
    if not isinstance(rows, dict) or not all(isinstance(v, str) for v in rows.values()):
        raise WeightError(f"{index} has no weight_map from tensors to files")
    tensors: list[StoredTensor] = []
    for shard in sorted(set(rows.values())):
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise WeightError(f"{index} names {shard!r}, which is not a shard in its own folder")
        if not (index.parent / shard).is_file():
            raise WeightError(f"{index} names {shard}, which is missing")
        tensors += read_header(index.parent / shard).values()
    if sorted((t.name, t.path.name) for t in tensors) != sorted(rows.items()):
        raise WeightError(f"{index} and its shards do not hold the same tensors")
    return unwrapped({tensor.name: tensor for tensor in tensors})
