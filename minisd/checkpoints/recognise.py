"""Which model a single file is, by the names and shapes of its tensors.

Most files do not say it. The sizes are read from three tensors; what the UNet predicts is found by
prediction.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints import names, parts
from minisd.checkpoints.diffusers_config import read_config
from minisd.checkpoints.found import Found, Group, tokenizer_of, unwrapped
from minisd.checkpoints.prediction import find_schedule
from minisd.checkpoints.safetensors_file import StoredTensor, read_header_and_metadata
from minisd.checkpoints.scheduler_config import check_zero_snr
from minisd.config import (
    SD1,
    SD1_INPAINT,
    SD2,
    SD2_DEPTH,
    SD2_INPAINT,
    SD2_UNCLIP_H,
    SD2_UNCLIP_L,
    SD2_V,
    SD_TURBO,
    X4_UPSCALER,
    Config,
    ScheduleConfig,
    UNetConfig,
)
from minisd.errors import WeightError

# A row for each official model. A file is the first one whose sizes it has.
OFFICIAL = (
    SD1, SD2, SD2_V, SD1_INPAINT, SD2_INPAINT, SD2_DEPTH, X4_UPSCALER, SD2_UNCLIP_H, SD2_UNCLIP_L)

UNET = "model.diffusion_model."
CONV_IN = UNET + "input_blocks.0.0.weight"
CLASS_KEY = UNET + "label_emb.0.0.weight"
COND_PROJ = UNET + "time_embed.cond_proj.weight"
# SD2's is 1024 wide, that of the SDXL refiner, which has the same names, 1280.
OTHER_OPENCLIP = "conditioner.embedders.0.model.ln_final.weight"

Tensors = Mapping[str, StoredTensor]


def read_file(path: Path, config: Config | Path | None, prediction_type: str | None) -> Found:
    """What a single file holds; WeightError where it is no Stable Diffusion 1 or 2.

    ``config``: its sizes, or a folder of diffusers JSON files with them, else they are recognised.
    ``prediction_type`` outranks what is found.
    """
    tensors, metadata = read_header_and_metadata(path)
    tensors = unwrapped(tensors)
    folder, source = None, "given by the caller"
    reject(path, tensors)
    if isinstance(config, Config):
        schedule = replace(
            config.schedule, prediction_type=prediction_type or config.schedule.prediction_type)
    else:
        folder = config
        config = recognise(path, tensors) if folder is None else read_config(folder)
        schedule, source = find_schedule(
            path, folder, config, tensors, metadata, prediction_type)
    check_zero_snr(path, schedule, source)
    config = parts.of_file(resolve(config, schedule), tensors)
    group = Group(tensors, parts.single_file(config), parts.prefixes())
    return Found(path, "single file", config, source, tokenizer_of(folder), [group])


def reject(path: Path, tensors: Tensors) -> None:
    """WeightError for a file that is known to be something else, or that has no UNet of ours."""
    what = names.rejected(list(tensors))
    if OTHER_OPENCLIP in tensors and tensors[OTHER_OPENCLIP].shape == (1280,):
        what = "the SDXL refiner"
    if CONV_IN in tensors and len(tensors[CONV_IN].shape) == 4:
        what = what or names.REJECTED_INPUTS.get(tensors[CONV_IN].shape[1])
    if CLASS_KEY in tensors and len(tensors[CLASS_KEY].shape) == 2:
        what = what or names.REJECTED_CLASSES.get(tensors[CLASS_KEY].shape[1])
    if what:
        raise WeightError(f"{path} looks like {what}; minisd loads Stable Diffusion 1 and 2")
    if not any(name.startswith(UNET) for name in tensors):
        some = ", ".join(list(tensors)[:3]) or "none"
        raise WeightError(f"{path} has no tensor named {UNET}...; what it has: {some}")


def recognise(path: Path, tensors: Tensors) -> Config:
    """The official model of these sizes; WeightError if there is none."""
    for config in OFFICIAL:
        sizes = _sizes(config.unet)
        if all(getattr(tensors.get(name), "shape", None) == sizes[name] for name in sizes):
            return _told_the_guidance(path, config, tensors)
    found = " and ".join(
        f"{name} {list(tensors[name].shape)}" if name in tensors else f"no {name}"
        for name in _sizes(SD1.unet) if name in tensors or name != CLASS_KEY
    )
    raise WeightError(
        f"{path} has {found}, which is no official Stable Diffusion 1 or 2; for a model of other "
        "sizes give config= (--config), a folder of diffusers JSON files"
    )


def _sizes(unet: UNetConfig) -> dict[str, tuple[int, ...] | None]:
    """The tensors, and their shapes, that tell this UNet from the other official ones; None for one
    that it does not have."""
    level = unet.has_attention.index(True)
    block = 1 + level * (unet.layers_per_block + 1)  # the first that reads the context
    context_key = f"{UNET}input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight"
    width, n = unet.block_out_channels[0], unet.projection_class_embeddings_input_dim
    return {
        CONV_IN: (width, unet.in_channels, 3, 3),
        context_key: (unet.block_out_channels[level], unet.cross_attention_dim),
        CLASS_KEY: None if n is None else (4 * width, n),
    }


def _told_the_guidance(path: Path, config: Config, tensors: Tensors) -> Config:
    """The config of a latent consistency model, if the file has one more tensor than others."""
    if COND_PROJ not in tensors:
        return config
    shape = tensors[COND_PROJ].shape
    if len(shape) != 2 or shape[1] < 4 or shape[1] % 2:
        raise WeightError(f"{path} has {COND_PROJ} {list(shape)}, not (width, even number)")
    unet = replace(config.unet, time_cond_proj_dim=shape[1])
    schedule = replace(config.schedule, sampler="lcm", timestep_spacing="lcm")
    return replace(config, name="", unet=unet, schedule=schedule)


def resolve(config: Config, schedule: ScheduleConfig) -> Config:
    """The config with its schedule, with a name if it has none, and with the number of steps and
    the guidance that it is made for."""
    if config == SD2 and schedule.prediction_type == "v_prediction":
        return replace(SD2_V, schedule=schedule)
    told = config.unet.time_cond_proj_dim is not None
    if told:
        config = replace(config, num_inference_steps=4, guidance_scale=8.5)  # as in diffusers
    turbo = (SD_TURBO.text, SD_TURBO.unet, SD_TURBO.schedule)
    if (config.text, config.unet, schedule) == turbo:
        config = replace(config, name=SD_TURBO.name, guidance_scale=SD_TURBO.guidance_scale,
                         num_inference_steps=SD_TURBO.num_inference_steps)
    sizes = (config.text, replace(config.unet, time_cond_proj_dim=None), config.vae)
    same = [known for known in OFFICIAL if (known.text, known.unet, known.vae) == sizes]
    same.sort(key=lambda known: known.schedule.prediction_type != schedule.prediction_type)
    kind = "" if config.kind in ("", "text to image") else f" ({config.kind})"
    name = config.name or (same[0].name if same else f"Stable Diffusion of unusual size{kind}")
    if told and not config.name:
        name = f"latent consistency model of {name}"
    return replace(config, schedule=schedule, name=name)
