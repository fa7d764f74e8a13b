"""What a reader of files finds: the value that a single file and a folder both become."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from minisd.checkpoints import names
from minisd.checkpoints.names import NameMap
from minisd.checkpoints.safetensors_file import StoredTensor
from minisd.config import Config
from minisd.errors import WeightError


class Group(NamedTuple):
    """Tensors that share a namespace, and where each belongs by its name."""

    tensors: Mapping[str, StoredTensor]   # name -> place in a file
    rows: Mapping[str, NameMap]           # part -> the names that its tensors may have
    prefixes: Mapping[str, str]           # what begins so belongs to that part, known or not


class Found(NamedTuple):
    """A model on disk: which one it is, and its tensors under the names of its files."""

    path: Path
    layout: str                    # "single file" or "folder"
    config: Config
    prediction_source: str         # how the prediction type is known
    tokenizer_folder: Path | None
    groups: list[Group]


def tokenizer_of(folder: Path | None) -> Path | None:
    """The tokenizer of a folder in diffusers layout, if it has one."""
    place = folder / "tokenizer" if folder else None
    return place if place and place.is_dir() else None


def unwrapped(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same under the names that they have without torch's wrappers, see names.py."""
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        known = plain.setdefault(names.unwrapped(name), tensor)
        if known is not tensor:
            raise WeightError(f"{tensor.path} has one tensor twice: {known.name} and {name}")
    return plain
