"""A folder of diffusers JSON files, read as a Config: known fields, in known ranges.

An absent field has the default of the class that the file configures (UNet2DConditionModel,
AutoencoderKL, CLIPTextModel). A field that changes the function of the model is rejected unless it
has a value that minisd computes, in any spelling that these classes take. All others are ignored:
training tools leave many in the files.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints import parts
from minisd.checkpoints.json_file import MAX_WIDTH, JsonFile, is_width, plain
from minisd.checkpoints.names import REJECTED_INPUTS
from minisd.checkpoints.scheduler_config import (
    LOW_RES_SCHEDULER,
    SCHEDULER,
    read_schedule,
    schedule_of,
)
from minisd.checkpoints.unclip_config import read_unclip
from minisd.checkpoints.vision_config import ACTIVATIONS
from minisd.config import (
    KINDS,
    X4_UPSCALER,
    Config,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from minisd.errors import WeightError

# The blocks, and whether they attend; names of 2022 begin with UNetRes.
DOWN_TYPES = {
    **{"CrossAttnDownBlock2D": True, "DownBlock2D": False},
    **{"UNetResCrossAttnDownBlock2D": True, "UNetResDownBlock2D": False},
}
UP_TYPES = {
    **{"CrossAttnUpBlock2D": True, "UpBlock2D": False},
    **{"UNetResCrossAttnUpBlock2D": True, "UNetResUpBlock2D": False},
}
SILU = ("silu", "swish", "SiLU")

# Field -> the value that minisd computes, which is also the default, and the other spellings of it.
# None is one where diffusers takes it as False; norm_num_groups None, say, would drop the norms.
UNET_FIXED: dict[str, tuple] = {
    **{"act_fn": SILU, "norm_eps": (1e-5,), "mid_block_type": ("UNetMidBlock2DCrossAttn",)},
    **{"center_input_sample": (False, None), "flip_sin_to_cos": (True,), "freq_shift": (0,)},
    **{"downsample_padding": (1,), "conv_in_kernel": (3,), "conv_out_kernel": (3,)},
    **{"mid_block_scale_factor": (1,)},
    **{"dual_cross_attention": (False, None), "attention_type": ("default", None)},
    **{"transformer_layers_per_block": (1,), "reverse_transformer_layers_per_block": (None, 1)},
    **{"resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",)},
    **{"time_embedding_act_fn": (None,), "timestep_post_act": (None,)},
    **{"class_embeddings_concat": (False, None), "addition_embed_type": (None,)},
    **{"encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,)},
}
# class_embed_type -> the field that says how many classes the UNet may be told, or how wide one is.
CLASS_FIELDS = {None: "num_class_embeds", "projection": "projection_class_embeddings_input_dim"}
VAE_FIXED: dict[str, tuple] = {
    **{"act_fn": SILU, "in_channels": (3,), "out_channels": (3,)},
    **{"mid_block_add_attention": (True,), "use_quant_conv": (True,)},
    **{"use_post_quant_conv": (True,), "shift_factor": (None, 0)},
    **{"latents_mean": (None,), "latents_std": (None,)},
    **{"down_block_types": ("DownEncoderBlock2D", "UNetResDownEncoderBlock2D")},
    **{"up_block_types": ("UpDecoderBlock2D", "UNetResUpDecoderBlock2D")},
}
# The VAEs of kinds of models that differ in what their files do not say.
USUAL_VAES = {"upscaling": X4_UPSCALER.vae}
TEXT_FIXED: dict[str, tuple] = {"layer_norm_eps": (1e-5,)}


def read_config(folder: Path) -> Config:
    """The model that a folder's configs describe, its name left empty.

    A folder without a scheduler's config has the betas of Stable Diffusion; one without a
    ``sample_size`` has 768 where v is predicted, else 512. WeightError, naming file and field, for
    a model that minisd does not compute.
    """
    text, unet, vae = _text(folder), _unet(folder), read_vae(folder / "vae" / "config.json")
    has_schedule = (folder / SCHEDULER).is_file()
    schedule = read_schedule(folder) if has_schedule else ScheduleConfig()
    _check_fit(folder, text, unet, vae)
    config = parts.of_folder(Config("", text, unet, vae, schedule,
                                    sample_size=_sample_size(folder, vae, schedule)), folder)
    return OF_KIND.get(config.kind, lambda _, config: config)(folder, config)


def _upscaling(folder: Path, config: Config) -> Config:
    """The config with what only an upscaler has; what no file says is the official one's."""
    usual, file = X4_UPSCALER, JsonFile(folder / LOW_RES_SCHEDULER)
    file.fixed({"rescale_betas_zero_snr": (False, None)})
    low_res = schedule_of(file)
    levels = min(config.unet.num_class_embeds or 0, low_res.num_train_timesteps)
    most = min(usual.max_noise_level, levels - 1)
    if (index := folder / "model_index.json").is_file():  # not beside the sizes of a single file
        most = JsonFile(index).whole("max_noise_level", most, 0, levels - 1)
    return replace(
        config, vae=read_vae(folder / "vae" / "config.json", config.kind),
        schedule=config.schedule if (folder / SCHEDULER).is_file() else usual.schedule,
        low_res_schedule=low_res, max_noise_level=most,
        noise_level=min(usual.noise_level, most), guidance_scale=usual.guidance_scale,
        num_inference_steps=usual.num_inference_steps)


# What the config of a kind of model has more than others.
OF_KIND: dict[str, Callable[[Path, Config], Config]] = {
    "upscaling": _upscaling, "image variation": read_unclip}


def _text(folder: Path) -> TextConfig:
    file = JsonFile(folder / "text_encoder" / "config.json")
    # The config of a whole CLIP has that of its text half inside; transformers descends too.
    if isinstance(inner := file.fields.get("text_config"), dict):
        file.fields = inner
    file.fixed(TEXT_FIXED)
    act = ACTIVATIONS[file.choice("hidden_act", "quick_gelu", ACTIVATIONS)]
    text = TextConfig(
        vocab_size=file.whole("vocab_size", 49408, 2, 10**6),
        hidden_size=file.whole("hidden_size", 512, 1, MAX_WIDTH),
        intermediate_size=file.whole("intermediate_size", 2048, 1, 4 * MAX_WIDTH),
        num_hidden_layers=file.whole("num_hidden_layers", 12, 1, 100),
        num_attention_heads=file.whole("num_attention_heads", 8, 1, 512),
        hidden_act=act,
        max_position_embeddings=file.whole("max_position_embeddings", 77, 2, 4096),
        # The file's own token ids are placeholders. The exact GELU is OpenCLIP's, which was
        # trained with 0 after the end token.
        pad_token_id=0 if act == "gelu" else TextConfig.pad_token_id,
    )
    if text.hidden_size % text.num_attention_heads:
        raise file.fault("num_attention_heads", f"divisors of hidden_size {text.hidden_size}")
    return text


def _unet(folder: Path) -> UNetConfig:
    file = JsonFile(folder / "unet" / "config.json")
    inputs = file.whole("in_channels", 4, 1, 1024)
    if inputs in REJECTED_INPUTS:
        raise WeightError(f"{folder} is {REJECTED_INPUTS[inputs]}")
    widths = file.widths("block_out_channels", (320, 640, 1280, 1280))
    levels = len(widths)
    file.fixed(UNET_FIXED | {"time_embedding_dim": (4 * widths[0], None, 0)}, levels)
    default = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    attends = file.names("down_block_types", default, DOWN_TYPES)
    default = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    ups = file.names("up_block_types", default, UP_TYPES)
    if len(attends) != levels or ups != attends[::-1]:
        raise file.fault("up_block_types", "as many levels up as down, with the same blocks")
    return UNetConfig(
        in_channels=inputs,
        out_channels=file.whole("out_channels", 4, 1, 1024),
        block_out_channels=widths,
        layers_per_block=file.whole("layers_per_block", 2, 1, 8, levels),
        has_attention=attends,
        num_heads=_heads(file, widths, attends),
        cross_attention_dim=file.whole("cross_attention_dim", 1280, 1, MAX_WIDTH, levels),
        use_linear_projection=bool(
            file.choice("use_linear_projection", False, (True, False, None))),
        norm_num_groups=_groups(file, widths),
        only_cross_attention=_only_cross(file, levels),
        time_cond_proj_dim=_even(file, "time_cond_proj_dim"),
        **_classes(file),
    )


def _only_cross(file: JsonFile, levels: int) -> tuple[bool, ...]:
    """For each level; the middle block has self-attention whatever the file says."""
    value = file.fields.get("only_cross_attention", False)
    values = value if isinstance(value, list) else [value] * levels
    if len(values) != levels or any(type(v) is not bool for v in values):
        raise file.fault(
            "only_cross_attention", f"true or false, or one of them for each of {levels} levels")
    return tuple(values) if any(values) else ()


def _classes(file: JsonFile) -> dict[str, int]:
    """The field of UNetConfig that says what classes the UNet is told; none where it is told none.
    """
    name = CLASS_FIELDS[file.choice("class_embed_type", None, CLASS_FIELDS)]
    return {} if file.fields.get(name) is None else {name: file.whole(name, 0, 1, 10**5)}


def _even(file: JsonFile, name: str) -> int | None:
    if file.fields.get(name) is None:
        return None
    width = file.whole(name, 0, 4, MAX_WIDTH)
    if width % 2:
        raise file.fault(name, "even numbers")
    return width


def _heads(
    file: JsonFile, widths: tuple[int, ...], attends: tuple[bool, ...]
) -> tuple[int, ...]:
    def per_level(value) -> tuple:
        values = value if isinstance(value, list) else [value] * len(widths)
        return tuple(map(plain, values))

    # Despite its name the field is the number of heads: an old mistake that every folder repeats.
    heads = per_level(file.fields.get("attention_head_dim", 8))
    fits = len(heads) == len(widths) and all(map(is_width, heads))
    used = (*attends[:-1], True)  # the middle block always attends, with the last level's heads
    if not fits or any(use and w % n for w, n, use in zip(widths, heads, used, strict=True)):
        raise file.fault("attention_head_dim", f"numbers of heads that divide {list(widths)}")
    other = file.fields.get("num_attention_heads")
    if other is not None and per_level(other) != heads:
        raise file.fault("num_attention_heads", f"{list(heads)}, by attention_head_dim")
    return heads


def read_vae(path: Path, kind: str = "") -> VAEConfig:
    """The VAE that a config.json describes, of a kind of model; WeightError, naming the field, if
    we have none such."""
    usual = USUAL_VAES.get(kind, VAEConfig())
    file = JsonFile(path)
    widths = file.widths("block_out_channels", (64,))
    file.fixed(VAE_FIXED, len(widths))
    return VAEConfig(
        block_out_channels=widths,
        layers_per_block=file.whole("layers_per_block", 1, 1, 8, len(widths)),
        latent_channels=file.whole("latent_channels", 4, 1, 1024),
        norm_num_groups=_groups(file, widths),
        scaling_factor=file.real("scaling_factor", usual.scaling_factor, 1e-6, 1e6),
        force_float32=usual.force_float32,
    )


def _groups(file: JsonFile, widths: tuple[int, ...]) -> int:
    groups = file.whole("norm_num_groups", 32, 1, MAX_WIDTH)
    if any(width % groups for width in widths):
        raise file.fault("norm_num_groups", f"divisors of {list(widths)}")
    return groups


def _check_fit(folder: Path, text: TextConfig, unet: UNetConfig, vae: VAEConfig) -> None:
    latent = vae.latent_channels
    inputs = sorted({latent + kind.extra(latent) for kind in KINDS.values()})
    if unet.cross_attention_dim != text.hidden_size:
        widths = f"{unet.cross_attention_dim} wide, but the text encoder's are {text.hidden_size}"
        fault = f"reads contexts {widths}"
    elif unet.out_channels != latent:
        fault = f"has {unet.out_channels} output channels, but the VAE's latents have {latent}"
    elif unet.in_channels not in inputs:
        fault = f"has {unet.in_channels} input channels, not {' or '.join(map(str, inputs))}"
    elif not Config("", text, unet, vae).kind:
        classes = " and ".join(
            f"{name} {n}" for name in CLASS_FIELDS.values()
            if (n := getattr(unet, name)) is not None)
        fault = (f"has {unet.in_channels} input channels and {classes or 'no classes'}, which no "
                 "model has that minisd computes")
    else:
        return
    raise WeightError(f"{folder}: the UNet {fault}")


def _sample_size(folder: Path, vae: VAEConfig, schedule: ScheduleConfig) -> int:
    file = JsonFile(folder / "unet" / "config.json")
    size = file.fields.get("sample_size")
    if size is None:
        return 768 if schedule.prediction_type == "v_prediction" else 512
    sides = [size] if not isinstance(size, list) else size[:2] if len(size) == 2 else [None]
    cells = [file.within("sample_size", plain(side), 1, 4096, (int,)) for side in sides]
    side = max(cells) * vae.downscale  # it counts latent cells
    if min(cells) < max(cells):
        warnings.warn(f"{file.path}: sample_size is {size}; without height and width minisd draws "
                      f"a square, {side}x{side}", stacklevel=2)
    return side
