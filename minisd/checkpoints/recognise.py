"""Which model a single file is, by the names and shapes of its tensors and by what lies beside it.

Most files do not say it. The sizes are read from two tensors. What the UNet predicts can be a
guess, which is then reported as one.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from minisd.checkpoints import names
from minisd.checkpoints.diffusers_config import SCHEDULER, read_config, read_schedule
from minisd.checkpoints.found import Found, Group, tokenizer_of
from minisd.checkpoints.safetensors_file import (
    StoredTensor,
    read_header_and_metadata,
    read_tensor,
)
from minisd.config import SD1, SD1_INPAINT, SD2, SD2_INPAINT, SD2_V, Config
from minisd.errors import WeightError

# A row for each official model. A file is the first one whose sizes it has.
OFFICIAL = (SD1, SD2, SD2_V, SD1_INPAINT, SD2_INPAINT)

UNET = "model.diffusion_model."
CONV_IN = UNET + "input_blocks.0.0.weight"  # (width, input channels, 3, 3)
CONTEXT_KEY = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # (width, context)
# SD2's is 1024 wide, that of the SDXL refiner, which has the same names, 1280.
OTHER_OPENCLIP = "conditioner.embedders.0.model.ln_final.weight"

# The rule of thumb of AUTOMATIC1111's web UI: among descendants of the official models, those
# that predict v vary more in this bias.
TELLTALE = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
TELLTALE_STD = 0.09

# Metadata that training tools write: https://github.com/Stability-AI/ModelSpec
MODELSPEC = "modelspec.prediction_type"
SPELLINGS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
}

PARAMETERIZATION = re.compile(r"""^\s*parameterization:\s*["']?(\w+)["']?\s*(#.*)?$""", re.M)
MAX_SIDECAR = 2**20

Tensors = Mapping[str, StoredTensor]


def read_file(path: Path, config: Config | Path | None, prediction_type: str | None) -> Found:
    """What a single file holds; WeightError where it is no Stable Diffusion 1 or 2.

    ``config``: its sizes, or a folder of diffusers JSON files with them, else they are recognised.
    ``prediction_type`` outranks what is found.
    """
    tensors, metadata = read_header_and_metadata(path)
    folder, source = None, "given by the caller"
    reject(path, tensors)
    if isinstance(config, Config):
        prediction_type = prediction_type or config.schedule.prediction_type
    elif config is not None:
        folder = config
        config = read_config(folder)
    else:
        config = recognise(path, tensors)
    if prediction_type is None:
        prediction_type, source = find_prediction(
            path, folder, config, tensors, metadata)
    config = resolve(config, prediction_type)
    group = Group(tensors, names.single_file(config), names.SINGLE_FILE_PREFIXES)
    return Found(path, "single file", config, source, tokenizer_of(folder), [group])


def reject(path: Path, tensors: Tensors) -> None:
    """WeightError for a file that is known to be something else, or that has no UNet of ours."""
    what = names.rejected(list(tensors))
    if OTHER_OPENCLIP in tensors and tensors[OTHER_OPENCLIP].shape == (1280,):
        what = "the SDXL refiner"
    if CONV_IN in tensors and len(tensors[CONV_IN].shape) == 4:
        what = what or names.REJECTED_INPUTS.get(tensors[CONV_IN].shape[1])
    if what:
        raise WeightError(f"{path} looks like {what}; minisd loads Stable Diffusion 1 and 2")
    if not any(name.startswith(UNET) for name in tensors):
        some = ", ".join(list(tensors)[:3]) or "none"
        raise WeightError(f"{path} has no tensor named {UNET}...; what it has: {some}")


def recognise(path: Path, tensors: Tensors) -> Config:
    """The official model of these sizes; WeightError if there is none."""
    shapes = {name: getattr(tensors.get(name), "shape", None) for name in (CONV_IN, CONTEXT_KEY)}
    for config in OFFICIAL:
        width = config.unet.block_out_channels[0]
        inputs, context = config.unet.in_channels, config.unet.cross_attention_dim
        if tuple(shapes.values()) == ((width, inputs, 3, 3), (width, context)):
            return config
    found = " and ".join(
        f"no {name}" if shape is None else f"{name} {list(shape)}" for name, shape in shapes.items()
    )
    raise WeightError(
        f"{path} has {found}, which is no official Stable Diffusion 1 or 2; for a model of other "
        "sizes give config= (--config), a folder of diffusers JSON files"
    )


def find_prediction(
    path: Path, folder: Path | None, config: Config, tensors: Tensors,
    metadata: Mapping[str, str],
) -> tuple[str, str]:
    """What the UNet predicts, and in words how that is known.

    In this order: a scheduler's config in ``folder`` or beside the file, a yaml file of the same
    name, the file's own metadata, the rule of thumb for models that might predict v.
    """
    for place in (folder, path.parent):
        if place is not None and (place / SCHEDULER).is_file():
            return read_schedule(place).prediction_type, f"from {place / SCHEDULER}"
    for sidecar in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
        if sidecar.is_file():
            return _read_sidecar(sidecar), f"from {sidecar}"
    said = SPELLINGS.get(metadata.get(MODELSPEC, "").lower())
    if said:
        return said, f"from the file's {MODELSPEC}"
    unet = config.unet
    if (unet.cross_attention_dim, unet.in_channels) != (1024, 4) or TELLTALE not in tensors:
        return "epsilon", "the default, as nothing says otherwise"
    bias = read_tensor(tensors[TELLTALE], torch.float32)
    std = bias.std(correction=0).item()
    guess = "v_prediction" if std > TELLTALE_STD else "epsilon"
    sign = ">" if std > TELLTALE_STD else "<="
    return guess, f"a guess: a bias with standard deviation {std:.3f} {sign} {TELLTALE_STD}"


def resolve(config: Config, prediction_type: str) -> Config:
    """The config with its prediction type, and with a name if it has none."""
    if config == SD2 and prediction_type == "v_prediction":
        return SD2_V
    schedule = replace(config.schedule, prediction_type=prediction_type)
    sizes = (config.text, config.unet, config.vae)
    same = [known for known in OFFICIAL if (known.text, known.unet, known.vae) == sizes]
    same.sort(key=lambda known: known.schedule != schedule)
    name = config.name or (same[0].name if same else "Stable Diffusion of unusual size")
    return replace(config, schedule=schedule, name=name)


def _read_sidecar(path: Path) -> str:
    # Only one line of it matters, so no YAML parser has to read what others wrote.
    if path.stat().st_size > MAX_SIDECAR:
        raise WeightError(f"{path} is too large for a configuration (over {MAX_SIDECAR} bytes)")
    found = PARAMETERIZATION.search(path.read_text("utf-8", errors="replace"))
    word = found[1] if found else "eps"  # what LDM's code does without the line
    if word not in ("eps", "v"):
        raise WeightError(f"{path}: parameterization is {word!r}; minisd knows eps and v")
    return "v_prediction" if word == "v" else "epsilon"
