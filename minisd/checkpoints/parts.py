"""The networks of a model: those of names.py, which all have, and those that only some have.

Stable unCLIP has two more: the tower that sees an image, and the mean and standard deviation of
what it makes of images.
"""

import re

from minisd.checkpoints import names, names_vision, unclip_config
from minisd.checkpoints.names import NameMap
from minisd.config import Config


def single_file(config: Config) -> dict[str, NameMap]:
    """Part -> every name that its tensors may have in a single file."""
    parts = names.single_file(config)
    if config.vision is not None:
        parts["image_encoder"] = names_vision.single_file(config.vision.num_hidden_layers)
        parts["image_normalizer"] = names_vision.NORMALIZER
    return parts


def folder(config: Config) -> dict[str, NameMap]:
    """Part -> every name that its tensors may have in that part's file of a diffusers folder."""
    parts = names.folder(config)
    if config.vision is not None:
        parts["image_encoder"] = names_vision.folder(config.vision.num_hidden_layers)
        parts["image_normalizer"] = {"mean": ("mean",), "std": ("std",)}
    return parts


def prefixes() -> dict[str, str]:
    """What a tensor's name in a single file begins with -> the part that it belongs to."""
    return names.SINGLE_FILE_PREFIXES | {names_vision.PREFIX: "image_encoder"}


def dropped(config: Config) -> re.Pattern:
    """Matches the whole name of a tensor that no image needs."""
    if config.vision is None:
        return names.dropped(config)
    return re.compile(f"{names.dropped(config).pattern}|{names_vision.DROPPED.pattern}")


def index(config: Config) -> dict[str, list]:
    """What model_index.json says of the parts that its kind of model has more."""
    return {} if config.vision is None else unclip_config.INDEX


def json_files(config: Config) -> dict[str, dict]:
    """The JSON files of these in a folder: file -> fields."""
    return {} if config.vision is None else unclip_config.written(config.vision)
