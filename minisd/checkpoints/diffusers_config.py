"""A folder of diffusers JSON files, read as a Config: known fields, in known ranges.

An absent field has the default of the class that the file configures (UNet2DConditionModel,
AutoencoderKL, CLIPTextModel, DDIMScheduler). A field that changes the function of the model is
rejected unless it has the value that minisd computes. All others are ignored: training tools leave
many in the files, and how to sample is the caller's choice.
"""

from pathlib import Path

from minisd.checkpoints.names import REJECTED_INPUTS
from minisd.checkpoints.safetensors_file import parse_json
from minisd.config import (
    KINDS,
    PREDICTION_TYPES,
    Config,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from minisd.errors import WeightError

SCHEDULER = Path("scheduler", "scheduler_config.json")
MAX_BYTES = 2**20
MAX_LEVELS = 8
MAX_WIDTH = 2**14

DOWN_TYPES = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_TYPES = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# Field -> the one value that minisd computes, which is also the default.
UNET_FIXED = {
    **{"act_fn": "silu", "norm_eps": 1e-5, "mid_block_type": "UNetMidBlock2DCrossAttn"},
    **{"center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0},
    **{"downsample_padding": 1, "conv_in_kernel": 3, "conv_out_kernel": 3},
    **{"mid_block_scale_factor": 1, "resnet_out_scale_factor": 1, "resnet_skip_time_act": False},
    **{"only_cross_attention": False, "dual_cross_attention": False, "attention_type": "default"},
    **{"transformer_layers_per_block": 1, "cross_attention_norm": None},
    **{"reverse_transformer_layers_per_block": None, "mid_block_only_cross_attention": None},
    **{"resnet_time_scale_shift": "default", "time_embedding_type": "positional"},
    **{"time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None},
    **{"time_cond_proj_dim": None, "class_embed_type": None, "num_class_embeds": None},
    **{"class_embeddings_concat": False, "addition_embed_type": None, "encoder_hid_dim": None},
    # attention_head_dim is what holds the number of heads, see _unet.
    **{"encoder_hid_dim_type": None, "num_attention_heads": None},
}
VAE_FIXED = {
    **{"act_fn": "silu", "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True},
    **{"use_quant_conv": True, "use_post_quant_conv": True},
    **{"shift_factor": None, "latents_mean": None, "latents_std": None},
    **{"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"},
}
TEXT_FIXED = {"layer_norm_eps": 1e-5}
SCHEDULER_FIXED = {"trained_betas": None, "rescale_betas_zero_snr": False}


class JsonFile:
    """The fields of one JSON file; every error names the file and the field."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES):
        if not path.is_file():
            raise WeightError(f"{path} is missing")
        if path.stat().st_size > max_bytes:
            raise WeightError(f"{path} is too large (over {max_bytes} bytes)")
        self.path, self.fields = path, parse_json(path.read_bytes(), path)

    def fault(self, name: str, want: str) -> WeightError:
        shown = repr(self.fields.get(name))[:80]
        return WeightError(f"{self.path}: {name} is {shown}; minisd computes only {want}")

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        return self._number(name, default, low, high, (int,))

    def real(self, name: str, default: float, low: float, high: float) -> float:
        return float(self._number(name, default, low, high, (int, float)))

    def choice(self, name: str, default, choices):
        value = self.fields.get(name, default)
        if value not in list(choices):  # a list: what JSON holds need not be hashable
            raise self.fault(name, " or ".join(map(repr, choices)))
        return value

    def levels(self, name: str, default: tuple, choices=None) -> tuple:
        """One entry per level: names among the choices, or widths."""
        values = self.fields.get(name, default)
        if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= MAX_LEVELS:
            raise self.fault(name, f"lists of 1 to {MAX_LEVELS} levels")
        good = (lambda v: v in list(choices)) if choices else _is_width
        if not all(map(good, values)):
            raise self.fault(name, f"{list(choices)}" if choices else f"1 to {MAX_WIDTH}")
        return tuple(values)

    def fixed(self, table: dict) -> None:
        """Reject any field of the table that has another value; a list must repeat the value."""
        for name, want in table.items():
            value = self.fields.get(name, want)
            values = value if isinstance(value, list) else [value]
            if not values or any(v != want for v in values):
                raise self.fault(name, repr(want))

    def _number(self, name, default, low, high, types):
        value = self.fields.get(name, default)
        if type(value) not in types or not low <= value <= high:
            raise self.fault(name, f"{low} to {high}")
        return value


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
    return Config("", text, unet, vae, schedule, _sample_size(folder, vae, schedule))


def read_schedule(folder: Path) -> ScheduleConfig:
    """A folder's scheduler_config.json; the sampler's own settings in it are ignored."""
    file = JsonFile(folder / SCHEDULER)
    file.fixed(SCHEDULER_FIXED)
    # Absent means "linear" to diffusers, which is another schedule.
    if file.fields.get("beta_schedule") != "scaled_linear":
        raise file.fault("beta_schedule", "'scaled_linear'")
    schedule = ScheduleConfig(
        num_train_timesteps=file.whole("num_train_timesteps", 1000, 1, 10**6),
        beta_start=file.real("beta_start", 0.0001, 1e-8, 0.999),
        beta_end=file.real("beta_end", 0.02, 1e-8, 0.999),
        prediction_type=file.choice("prediction_type", "epsilon", PREDICTION_TYPES),
    )
    if schedule.beta_start > schedule.beta_end:
        raise file.fault("beta_start", "a beta_start of at most beta_end")
    return schedule


def _text(folder: Path) -> TextConfig:
    file = JsonFile(folder / "text_encoder" / "config.json")
    file.fixed(TEXT_FIXED)
    act = file.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu"))
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
    file.fixed(UNET_FIXED)
    widths = file.levels("block_out_channels", (320, 640, 1280, 1280))
    default = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    attends = tuple(DOWN_TYPES[t] for t in file.levels("down_block_types", default, DOWN_TYPES))
    default = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    ups = tuple(UP_TYPES[t] for t in file.levels("up_block_types", default, UP_TYPES))
    if len(attends) != len(widths) or ups != attends[::-1]:
        raise file.fault("up_block_types", "as many levels up as down, with the same blocks")
    return UNetConfig(
        in_channels=inputs,
        out_channels=file.whole("out_channels", 4, 1, 1024),
        block_out_channels=widths,
        layers_per_block=file.whole("layers_per_block", 2, 1, 8),
        has_attention=attends,
        num_heads=_heads(file, widths, attends),
        cross_attention_dim=file.whole("cross_attention_dim", 1280, 1, MAX_WIDTH),
        use_linear_projection=file.choice("use_linear_projection", False, (True, False)),
        norm_num_groups=_groups(file, widths),
    )


def _heads(
    file: JsonFile, widths: tuple[int, ...], attends: tuple[bool, ...]
) -> tuple[int, ...]:
    # Despite its name the field is the number of heads: an old mistake that every folder repeats.
    value = file.fields.get("attention_head_dim", 8)
    heads = tuple(value) if isinstance(value, list) else (value,) * len(widths)
    fits = len(heads) == len(widths) and all(map(_is_width, heads))
    used = (*attends[:-1], True)  # the middle block always attends, with the last level's heads
    if not fits or any(use and w % n for w, n, use in zip(widths, heads, used, strict=True)):
        raise file.fault("attention_head_dim", f"numbers of heads that divide {list(widths)}")
    return heads


def read_vae(path: Path) -> VAEConfig:
    """The VAE that a config.json describes; WeightError, naming the field, if we have none such."""
    file = JsonFile(path)
    file.fixed(VAE_FIXED)
    widths = file.levels("block_out_channels", (64,))
    return VAEConfig(
        block_out_channels=widths,
        layers_per_block=file.whole("layers_per_block", 1, 1, 8),
        latent_channels=file.whole("latent_channels", 4, 1, 1024),
        norm_num_groups=_groups(file, widths),
        scaling_factor=file.real("scaling_factor", 0.18215, 1e-6, 1e6),
    )


def _groups(file: JsonFile, widths: tuple[int, ...]) -> int:
    groups = file.whole("norm_num_groups", 32, 1, MAX_WIDTH)
    if any(width % groups for width in widths):
        raise file.fault("norm_num_groups", f"divisors of {list(widths)}")
    return groups


def _check_fit(folder: Path, text: TextConfig, unet: UNetConfig, vae: VAEConfig) -> None:
    latent = vae.latent_channels
    inputs = [latent + extra(latent) for extra in KINDS.values()]
    if unet.cross_attention_dim != text.hidden_size:
        widths = f"{unet.cross_attention_dim} wide, but the text encoder's are {text.hidden_size}"
        fault = f"reads contexts {widths}"
    elif unet.out_channels != latent:
        fault = f"has {unet.out_channels} output channels, but the VAE's latents have {latent}"
    elif unet.in_channels not in inputs:
        fault = f"has {unet.in_channels} input channels, not {' or '.join(map(str, inputs))}"
    else:
        return
    raise WeightError(f"{folder}: the UNet {fault}")


def _sample_size(folder: Path, vae: VAEConfig, schedule: ScheduleConfig) -> int:
    file = JsonFile(folder / "unet" / "config.json")
    if file.fields.get("sample_size") is None:
        return 768 if schedule.prediction_type == "v_prediction" else 512
    return file.whole("sample_size", 64, 1, 4096) * vae.downscale  # it counts latent cells


def _is_width(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_WIDTH
