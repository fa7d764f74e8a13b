"""Which parts a model has in each layout: part -> every name that its tensors may have there.

Every model has those of names.py; Stable unCLIP has two more.
"""

import re

from minisd.checkpoints import names, names_vision
from minisd.checkpoints.names import NameMap
from minisd.config import Config

# All that a single file holds under these prefixes belongs to that part, known or not.
SINGLE_FILE_PREFIXES = {**names.SINGLE_FILE_PREFIXES, names_vision.PREFIX: "image_encoder"}


def single_file(config: Config) -> dict[str, NameMap]:
    """The parts of a single file."""
    parts = names.single_file(config)
    if config.vision is not None:
        parts["image_encoder"] = names_vision.single_file(config.vision.num_hidden_layers)
        parts["image_normalizer"] = names_vision.NORMALIZER
    return parts


def folder(config: Config) -> dict[str, NameMap]:
    """The parts of a diffusers folder, each of which has a folder and a file of its own."""
    parts = names.folder(config)
    if config.vision is not None:
        parts["image_encoder"] = names_vision.folder(config.vision.num_hidden_layers)
        parts["image_normalizer"] = {"mean": ("mean",), "std": ("std",)}
    return parts


def dropped(config: Config) -> re.Pattern:
    """Matches the whole name of a tensor that no image needs."""
    if config.vision is None:
        return names.dropped(config)
    return re.compile(f"{names.dropped(config).pattern}|{names_vision.DROPPED.pattern}")
