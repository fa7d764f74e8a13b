"""The networks of a model: those of names.py, which all have, and those that only some have.

An optional network is a row of `OPTIONAL`, and a function that builds it in loading.py.
"""

import re
from collections.abc import Callable, Collection, Container
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from minisd.checkpoints import (
    depth_folder,
    names,
    names_depth,
    names_vision,
    unclip_config,
    vision_config,
)
from minisd.checkpoints.names import NameMap
from minisd.config import Config


class Part(NamedTuple):
    """A network that only models of one kind have."""

    kind: str                                 # of these models, in config.KINDS
    needed: bool                              # whether each of these has it
    field: str                                # of Config: its sizes; None there is a model without
    prefix: str                               # of its tensors in a single file
    single_file: Callable[[Any], NameMap]     # its sizes -> the names of its tensors there
    dropped: str                              # matches those of its tensors that no image needs
    classes: dict[str, list[str]]             # of it and of its helpers, in model_index.json
    stem: str                                 # of its weights in a folder
    read: Callable[[Path], Any]               # its config.json -> its sizes
    write: Callable[[Any], dict[str, dict]]   # its sizes -> the JSON files beside its weights


OPTIONAL = {
    "depth_estimator": Part(
        "depth", False, "depth", "depth_model.", names_depth.depth, names_depth.DROPPED,
        {"depth_estimator": ["transformers", "DPTForDepthEstimation"],
         "feature_extractor": ["transformers", "DPTImageProcessor"]},
        "model", depth_folder.read_depth, depth_folder.files),
    "image_encoder": Part(
        "image variation", True, "vision", names_vision.PREFIX,
        lambda vision: names_vision.single_file(vision.num_hidden_layers),
        names_vision.DROPPED.pattern,
        {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
         "feature_extractor": ["transformers", "CLIPImageProcessor"],
         "image_noising_scheduler": ["diffusers", "DDPMScheduler"]},
        "model", vision_config.read, unclip_config.files),
    # The mean and standard deviation of what the encoder makes of images. A single file may lack
    # them, see unclip_statistics.py.
    "image_normalizer": Part(
        "image variation", True, "normalizer_dim", names_vision.NORMALIZER_PREFIX,
        lambda width: names_vision.NORMALIZER, names_vision.DROPPED.pattern,
        {"image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"]},
        "diffusion_pytorch_model", unclip_config.read_normalizer, unclip_config.normalizer_files),
}


def optional(config: Config) -> dict[str, tuple[Part, Any]]:
    """The optional networks that a model has: part -> its row and its sizes."""
    rows = ((part, row, getattr(config, row.field)) for part, row in OPTIONAL.items())
    return {part: (row, sizes) for part, row, sizes in rows if sizes is not None}


def single_file(config: Config) -> dict[str, NameMap]:
    """Part -> every name that its tensors may have in a single file."""
    more = {part: row.single_file(sizes) for part, (row, sizes) in optional(config).items()}
    return names.single_file(config) | more


def folder(config: Config) -> dict[str, NameMap]:
    """Part -> every name that its tensors may have in that part's file of a diffusers folder."""
    more = {part: names.identity(row.single_file(sizes))
            for part, (row, sizes) in optional(config).items()}
    return names.folder(config) | more


def prefixes() -> dict[str, str]:
    """What a tensor's name in a single file begins with -> the part that it belongs to."""
    return names.SINGLE_FILE_PREFIXES | {row.prefix: part for part, row in OPTIONAL.items()}


def dropped(config: Config) -> re.Pattern:
    """Matches the whole name of a tensor that no image needs, or of a network that is not there."""
    there = optional(config)
    more = [row.dropped if part in there else f"{re.escape(row.prefix)}.*"
            for part, row in OPTIONAL.items()]
    return re.compile("|".join((names.dropped(config).pattern, *more)))


def of_folder(config: Config, place: Path) -> Config:
    """The config with the sizes of the optional networks that a folder has."""
    return replace(config, **{
        row.field: row.read(place / part / "config.json") for part, row in OPTIONAL.items()
        if row.kind == config.kind and (row.needed or (place / part).is_dir())})


def of_file(config: Config, tensors: Collection[str]) -> Config:
    """The config without the optional networks of which a single file has no tensor."""
    return only(config, [part for part, row in OPTIONAL.items()
                         if row.needed or any(name.startswith(row.prefix) for name in tensors)])


def only(config: Config, there: Container[str]) -> Config:
    """The config without the optional networks that are not there."""
    absent: dict[str, Any] = {row.field: None for part, row in OPTIONAL.items()
                              if part not in there}
    return replace(config, **absent)


def index(config: Config) -> dict[str, list]:
    """What model_index.json says of the networks that its kind of model can have."""
    said: dict[str, list] = {}
    for row in OPTIONAL.values():
        if row.kind == config.kind:
            absent = getattr(config, row.field) is None
            said |= dict.fromkeys(row.classes, [None, None]) if absent else row.classes
    return said


def json_files(config: Config) -> dict[str, dict]:
    """The other JSON files of these networks in a folder: file -> fields."""
    return {file: fields for row, sizes in optional(config).values()
            for file, fields in row.write(sizes).items()}
