"""The JSON files that a folder of Stable unCLIP has beside Stable Diffusion's, read and written.

They say how an image is seen, and how noise is added to what CLIP makes of it.
"""

from dataclasses import asdict, replace
from pathlib import Path

from minisd.checkpoints.json_file import MAX_WIDTH, JsonFile
from minisd.config import CLIP_MEAN, CLIP_STD, SD2_UNCLIP_H, Config, VisionConfig
from minisd.errors import WeightError

PREPROCESSING = "feature_extractor/preprocessor_config.json"
# The noise of conditioning/unclip.py.
NOISING = "image_noising_scheduler/scheduler_config.json"
BETAS = "squaredcos_cap_v2"
NOISING_FIXED: dict[str, tuple] = {
    "num_train_timesteps": (1000,), "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
}


def read_unclip(folder: Path, config: Config) -> Config:
    """The config of a folder with what only Stable unCLIP has.

    WeightError for other noise, for images that are seen in another way, and for a tower that the
    UNet does not fit.
    """
    vision = config.vision
    assert vision is not None
    noising = JsonFile(folder / NOISING)
    if noising.fields.get("beta_schedule") != BETAS:  # absent means another one
        raise noising.fault("beta_schedule", repr(BETAS))
    noising.fixed(NOISING_FIXED)
    if (folder / PREPROCESSING).is_file():
        JsonFile(folder / PREPROCESSING).fixed(_preprocessing(vision))
    width = config.unet.projection_class_embeddings_input_dim
    for part, n in (("encoder", vision.projection_dim), ("normalizer", config.normalizer_dim)):
        if n is None or width != 2 * n:
            raise WeightError(f"{folder}: the UNet is told classes of width {width}, not twice the "
                              f"image {part}'s {n}")
    usual = SD2_UNCLIP_H
    return replace(config, max_noise_level=usual.max_noise_level,
                   num_inference_steps=usual.num_inference_steps,
                   guidance_scale=usual.guidance_scale)


def read_normalizer(path: Path) -> int:
    """The width of the embeddings whose mean and standard deviation a folder has."""
    return JsonFile(path).whole("embedding_dim", 768, 1, MAX_WIDTH)


def normalizer_files(width: int) -> dict[str, dict]:
    """The JSON file of the statistics in a folder: file -> fields."""
    fields = {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": width}
    return {"image_normalizer/config.json": fields}


def files(vision: VisionConfig) -> dict[str, dict]:
    """The other JSON files of a folder: file -> fields."""
    return {
        "image_encoder/config.json": {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            **asdict(vision),
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
        "rescale_factor": (1 / 255,), "image_mean": ([*CLIP_MEAN],), "image_std": ([*CLIP_STD],),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    }
