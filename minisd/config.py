"""The sizes and constants of every model that minisd computes, as frozen records.

Nothing here runs a network or opens a file: a model is built *from* one of these records, and a
checkpoint is recognised *as* one of them. Sources: CompVis/stable-diffusion (v1-inference.yaml),
Stability-AI/stablediffusion (v2-inference.yaml, v2-inference-v.yaml), and the JSON files of the
same models in diffusers layout, whose field names these are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

PREDICTION_TYPES = ("epsilon", "v_prediction")

# The kinds of model: the channels that the UNet reads after those of x, of a latent's n channels.
KINDS: dict[str, Callable[[int], int]] = {
    "text to image": lambda n: 0,
    "inpainting": lambda n: 1 + n,  # the mask, and the latent of the masked image
}


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text transformer (openai/clip-vit-large-patch14, text half)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"  # or "gelu", the exact one with erf
    max_position_embeddings: int = 77
    # What fills a prompt up to 77. SD1 repeats the end token; SD2 was trained with 0 instead.
    pad_token_id: int = 49407


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. Tuples have one entry per level, full resolution first."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    has_attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    # Levels whose first attention reads the prompt too, instead of x; () is none.
    only_cross_attention: tuple[bool, ...] = ()
    # The UNet may be told a class: one of so many, or a vector of this width.
    num_class_embeds: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    # Latent consistency models are told the guidance scale, as an embedding of this width.
    time_cond_proj_dim: int | None = None


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pixels and latents (KL-f8)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    # Makes the latents of the training set have about unit variance (v1-inference.yaml).
    scaling_factor: float = 0.18215

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: each level but the last halves the image."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """How noise was added in training, what the UNet was trained to predict, and how a call samples
    that does not say."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"  # or "v_prediction"
    rescale_betas_zero_snr: bool = False  # whether the last timestep is noise alone
    sampler: str = "ddim"              # a name of samplers.SAMPLERS
    timestep_spacing: str = "leading"  # a name of samplers.schedule.SPACINGS


@dataclass(frozen=True)
class Config:
    """One whole model. ``sample_size`` is the side in pixels of the images it was trained on."""

    name: str
    text: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sample_size: int = 512
    # What a call uses that does not say; diffusers has the same for all of these models.
    num_inference_steps: int = 50
    guidance_scale: float = 7.5

    @property
    def kind(self) -> str:
        """Which of KINDS it is, by the channels that its UNet reads; "" if it is none."""
        n = self.vae.latent_channels
        reads = self.unet.in_channels - n
        return next((kind for kind, extra in KINDS.items() if extra(n) == reads), "")


SD1 = Config("Stable Diffusion 1")

SD2 = Config(
    "Stable Diffusion 2 base",
    # OpenCLIP ViT-H/14 has 24 layers, but SD2 reads the output of the 23rd.
    text=TextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        pad_token_id=0,
    ),
    # SD1 has 8 heads everywhere; SD2 has heads of 64 channels everywhere.
    unet=UNetConfig(
        num_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    ),
)

SD2_V = replace(
    SD2,
    name="Stable Diffusion 2 v",
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    sample_size=768,
)

SD_TURBO = replace(
    SD2,
    name="SD-Turbo",
    schedule=ScheduleConfig(sampler="euler", timestep_spacing="trailing"),
    num_inference_steps=1,
    guidance_scale=1.0,
)

SD1_INPAINT = replace(
    SD1, name="Stable Diffusion 1 inpainting", unet=replace(SD1.unet, in_channels=9)
)
SD2_INPAINT = replace(
    SD2, name="Stable Diffusion 2 inpainting", unet=replace(SD2.unet, in_channels=9)
)
