"""The sizes and constants of every model that minisd computes, as frozen records.

Nothing here runs a network or opens a file: a model is built *from* one of these records, and a
checkpoint is recognised *as* one of them. Sources: CompVis/stable-diffusion (v1-inference.yaml),
Stability-AI/stablediffusion (v2-inference.yaml, v2-inference-v.yaml), and the JSON files of the
same models in diffusers layout, whose field names these are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

PREDICTION_TYPES = ("epsilon", "v_prediction")
# The mean and standard deviation of red, green and blue in the images that CLIP was trained on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Kind(NamedTuple):
    """What the UNet of a kind of model is told beside x, t and the prompt."""

    extra: Callable[[int], int]  # the channels that it reads after those of x, a latent's n
    classes: str = ""            # the field of UNetConfig that says what a class is, if it has any
    in_tiles: bool = False       # whether a part of a latent says enough of what belongs there


KINDS = {
    "text to image": Kind(lambda n: 0),
    "inpainting": Kind(lambda n: 1 + n),  # the mask, and the latent of the masked image
    "depth": Kind(lambda n: 1),
    # The small image in colours, and how much noise was added to it.
    "upscaling": Kind(lambda n: 3, "num_class_embeds", in_tiles=True),
    # What an image is like, and how much noise was added to that.
    "image variation": Kind(lambda n: 0, "projection_class_embeddings_input_dim"),
}
CLASSES = ("num_class_embeds", "projection_class_embeddings_input_dim")


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
class VisionConfig:
    """A CLIP image tower (openai/clip-vit-large-patch14, image half)."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"  # or "gelu", as in OpenCLIP
    image_size: int = 224  # pixels along one side
    patch_size: int = 14
    projection_dim: int = 768  # of the embedding that the image becomes


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
    # Whether its decoder overflows in float16.
    force_float32: bool = False

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: each level but the last halves the image."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class DPTConfig:
    """The depth estimator, MiDaS 3.0's dpt_hybrid (models/dpt.py)."""

    # The ResNet: the stem's channels, then one entry per stage.
    embedding_size: int = 64
    hidden_sizes: tuple[int, int, int] = (256, 512, 1024)
    depths: tuple[int, int, int] = (3, 4, 9)
    norm_num_groups: int = 32
    # The ViT.
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    out_indices: tuple[int, int] = (8, 11)  # the layers, from 0, whose outputs are read
    image_size: int = 384                   # of training: the positions are a square of this side
    # What the four maps are joined with.
    fusion_hidden_size: int = 256


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
    # The noise that is added to what an upscaler is shown: how, and how much of it at most.
    low_res_schedule: ScheduleConfig | None = None
    noise_level: int = 0
    max_noise_level: int = 0
    depth: DPTConfig | None = None  # a depth model's estimator, if it has one
    # The tower that sees the image of which variations are made, and how many values the mean and
    # the standard deviation of its embeddings have, if they are known.
    vision: VisionConfig | None = None
    normalizer_dim: int | None = None

    @property
    def kind(self) -> str:
        """Which of KINDS it is, by what its UNet is told; "" if it is none."""
        n = self.vae.latent_channels
        classes = next((name for name in CLASSES if getattr(self.unet, name) is not None), "")
        told = (self.unet.in_channels - n, classes)
        return next((k for k, row in KINDS.items() if (row.extra(n), row.classes) == told), "")

    @property
    def unet_in_tiles(self) -> bool:
        """Whether its UNet may be shown large latents in tiles, as any VAE may."""
        return bool(self.kind) and KINDS[self.kind].in_tiles


VIT_L = VisionConfig()  # OpenAI's CLIP ViT-L/14

VIT_H = VisionConfig(  # OpenCLIP ViT-H/14
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    hidden_act="gelu",
    projection_dim=1024,
)

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

SD2_DEPTH = replace(SD2, name="Stable Diffusion 2 depth", unet=replace(SD2.unet, in_channels=5),
                    depth=DPTConfig())

# Stability-AI/stablediffusion, x4-upscaling.yaml. Its latents are a quarter of the image's side.
X4_LOW_RES = ScheduleConfig(beta_start=0.0001, beta_end=0.02, sampler="ddpm")
X4_UPSCALER = Config(
    "Stable Diffusion x4 upscaler",
    text=SD2.text,
    unet=UNetConfig(
        in_channels=7, block_out_channels=(256, 512, 512, 1024),
        has_attention=(False, True, True, True), cross_attention_dim=1024,
        use_linear_projection=True, only_cross_attention=(True, True, True, False),
        num_class_embeds=1000,
    ),
    vae=VAEConfig(
        block_out_channels=(128, 256, 512), scaling_factor=0.08333, force_float32=True),
    schedule=ScheduleConfig(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction"),
    low_res_schedule=X4_LOW_RES,
    noise_level=20,
    max_noise_level=350,
    num_inference_steps=75,
    guidance_scale=9.0,
)


def _unclip(letter: str, vision: VisionConfig) -> Config:
    """Stability-AI/stablediffusion, v2-1-stable-unclip-h-inference.yaml and -l-: an image's
    embedding and the embedding of its noise level, side by side."""
    width = vision.projection_dim
    return replace(
        SD2_V,
        name=f"Stable Diffusion 2 unCLIP {letter}",
        unet=replace(SD2.unet, projection_class_embeddings_input_dim=2 * width),
        vision=vision,
        normalizer_dim=width,
        max_noise_level=999,
        num_inference_steps=20,
        guidance_scale=10.0,
    )


SD2_UNCLIP_H, SD2_UNCLIP_L = _unclip("H", VIT_H), _unclip("L", VIT_L)
