"""The JSON files that a folder of Stable unCLIP has beside Stable Diffusion's, read and written.

They say how an image is seen, and how noise is added to what CLIP makes of it.
"""

from dataclasses import asdict
from pathlib import Path

from minisd.checkpoints.json_file import MAX_WIDTH, JsonFile
from minisd.checkpoints.vision_config import read_vision
from minisd.config import UNetConfig, VAEConfig, VisionConfig
from minisd.errors import WeightError

PREPROCESSING = "feature_extractor/preprocessor_config.json"
# The noise of conditioning/unclip.py.
NOISING = "image_noising_scheduler/scheduler_config.json"
BETAS = "squaredcos_cap_v2"
NOISING_FIXED: dict[str, tuple] = {
    "num_train_timesteps": (1000,), "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
}
# What model_index.json names beside the networks.
INDEX = {"feature_extractor": ["transformers", "CLIPImageProcessor"],
         "image_noising_scheduler": ["diffusers", "DDPMScheduler"]}


def class_width(file: JsonFile) -> int | None:
    """Of the vector that a UNet's config says it is told as its class; None for no such UNet."""
    if file.fields.get("class_embed_type") is None:
        return None
    return file.whole("projection_class_embeddings_input_dim", 0, 4, 2 * MAX_WIDTH)


def read_unclip(folder: Path, unet: UNetConfig, vae: VAEConfig) -> VisionConfig | None:
    """The image tower of a Stable unCLIP folder; None where the UNet is told nothing of images.

    WeightError for other noise, for images that are seen in another way, and for parts that do not
    fit each other.
    """
    width = unet.projection_class_embeddings_input_dim
    if width is None:
        return None
    vision = read_vision(JsonFile(folder / "image_encoder" / "config.json"))
    noising = JsonFile(folder / NOISING)
    if noising.fields.get("beta_schedule") != BETAS:  # absent means another one
        raise noising.fault("beta_schedule", repr(BETAS))
    noising.fixed(NOISING_FIXED)
    if (folder / PREPROCESSING).is_file():
        JsonFile(folder / PREPROCESSING).fixed(_preprocessing(vision))
    if width != 2 * vision.projection_dim or unet.in_channels != vae.latent_channels:
        raise WeightError(
            f"{folder}: the UNet has {unet.in_channels} input channels and classes of width {width}"
            f", not {vae.latent_channels} and {2 * vision.projection_dim}, twice the image "
            "encoder's")
    return vision


def written(vision: VisionConfig) -> dict[str, dict]:
    """The JSON files of a folder: file -> fields."""
    return {
        "image_encoder/config.json": {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            **asdict(vision),
        },
        "image_normalizer/config.json": {
            "_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": vision.projection_dim,
        },
        NOISING: {"_class_name": "DDPMScheduler", "beta_schedule": BETAS,
                  "num_train_timesteps": 1000},
        PREPROCESSING: {
            "image_processor_type": "CLIPImageProcessor",
            **{name: same[0] for name, same in _preprocessing(vision).items()},
        },
    }


def _preprocessing(vision: VisionConfig) -> dict[str, tuple]:
    """What images.to_clip does, in CLIPImageProcessor's words, old and new."""
    side = vision.image_size
    return {
        "size": ({"shortest_edge": side}, side),
        "crop_size": ({"height": side, "width": side}, side),
        "resample": (3,),  # bicubic
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    }
