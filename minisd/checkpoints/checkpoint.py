"""Weights from a file or folder into a model: recognised, checked name by name, then copied.

``open_checkpoint`` reads headers and configs and says what the weights are; ``check`` compares
them with a model; ``fill`` copies them into it. Nothing in a file is ever executed. Every tensor is
used, or dropped by a rule in names.py, or an error.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from minisd.checkpoints import hub, names_vision, parts
from minisd.checkpoints.folder import read_folder, read_stand_alone_vae
from minisd.checkpoints.found import Group
from minisd.checkpoints.recognise import read_file
from minisd.checkpoints.safetensors_file import DTYPES, StoredTensor, read_tensor
from minisd.checkpoints.unclip_statistics import with_statistics
from minisd.config import PREDICTION_TYPES, Config
from minisd.errors import WeightError
from minisd.files import is_address

READERS = 2  # threads that copy; more are no faster with one disk or one memory bus
SHOWN = 5  # how many names an error lists


@dataclass(frozen=True)
class Checkpoint:
    """What a file or folder holds, before any weight is read.

    ``parts`` maps "text_encoder", "unet", "vae" and what else the model has to parameter name ->
    place in a file.
    """

    path: Path
    layout: str  # "single file" or "folder"
    config: Config
    prediction_source: str  # how the prediction type is known
    tokenizer_folder: Path | None
    parts: Mapping[str, Mapping[str, StoredTensor]]

    @property
    def dtypes(self) -> Counter:
        """How many tensors are stored in each dtype, under safetensors' name for it."""
        return Counter(t.dtype for part in self.parts.values() for t in part.values())


def open_checkpoint(
    path: str | PathLike | None,
    config: Config | str | PathLike | None = None,
    vae: str | PathLike | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Recognise a .safetensors file, a folder in diffusers layout, or a downloaded model's name.

    ``path``: one of these, or None for the shipped model.
    ``config``: the sizes of a single file, or a folder of diffusers JSON files that has them.
    ``vae``: a file, a folder with a diffusers file, or a downloaded name, whose VAE is used
    instead.
    ``prediction_type``: outranks what is found.
    Raises FileNotFoundError, or WeightError where this is no Stable Diffusion 1 or 2.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type is {prediction_type!r}, not one of {PREDICTION_TYPES}")
    place = locate(Path(str(resources.files("minisd_weights") / "tiny")) if path is None else path)
    if not place.is_dir():
        if config is not None and not isinstance(config, Config):
            config = locate(config)
        found = with_statistics(read_file(place, config, prediction_type), config)
    elif config is None:
        found = read_folder(place, prediction_type)
    else:
        raise ValueError(f"config= (--config) is for single files; the folder {place} has its own")
    groups = list(found.groups)
    if vae is not None:
        groups.append(read_stand_alone_vae(locate(vae), found.config))
    places: dict[str, dict[str, StoredTensor]] = {}
    for group in groups:
        places |= _assign(group, found.config)
    return Checkpoint(found.path, found.layout, found.config, found.prediction_source,
                      found.tokenizer_folder, places)


def locate(path: str | PathLike) -> Path:
    """The path itself, or what the Hugging Face cache holds under that name; no network.

    A name is a short one of hub.KNOWN, or an "owner/name", of a model or of a VAE alone.
    """
    # os.path where pathlib would raise for names that can be none: too long, ~ of an unknown user.
    place = Path(os.path.expanduser(path))
    if os.path.exists(place) and str(path):
        return place
    if is_address(path):
        raise FileNotFoundError(f"{path} is an address, which is never opened: {_instead(path)}")
    hint = ""
    if place.suffix != ".safetensors" and hub.is_name(str(path)):
        if folder := hub.cached(str(path)):
            return folder
        run = f"run `minisd download {path}` first"
        if str(path) in hub.KNOWN:
            raise FileNotFoundError(f"{path} has not been downloaded: {run}")
        hint = f"; if it is a model or a VAE on the Hugging Face hub, {run}"
    beside = os.listdir(place.parent) if os.path.isdir(place.parent) else []
    near = difflib.get_close_matches(place.name, beside) or sorted(beside)[:SHOWN]
    there = f" ({place.parent} has {', '.join(near)})" if near else ""
    raise FileNotFoundError(f"{path} does not exist{there}{hint}")


def _instead(address: str | PathLike) -> str:
    """What to do with an address; a repository of the Hub has a name that ``download`` takes."""
    page = re.fullmatch(r"(?i)https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)/?",
                        str(address))
    if page and hub.is_name(page[1]):
        return f"run `minisd download {page[1]}`, then give {page[1]}"
    return "download it, and give the path of the file or folder"


def check(checkpoint: Checkpoint, part: str, module: nn.Module) -> None:
    """WeightError, with counts and first names, unless module and file agree on every tensor."""
    have = checkpoint.parts[part]
    told = differences(have, module, partial(_official_names, checkpoint, part))
    if told:
        if part == "vae" and not have:
            told += "; a VAE from another file can be given as vae= (--vae)"
        raise WeightError(f"{_home(checkpoint, part)}, {part}: {told}")


def differences(have: Mapping[str, StoredTensor], module: nn.Module,
                official_names: Callable[[], dict[str, str]] = dict) -> str:
    """What tensors and a module do not agree on, with counts and first names; "" for nothing.

    ``official_names`` gives parameter name -> what the file calls it, or would.
    """
    want = module.state_dict()
    shared = [(stored, tuple(want[name].shape)) for name, stored in have.items() if name in want]
    missing = [name for name in want if name not in have]
    spelled = official_names() if missing else {}
    faults = {
        "missing": [spelled.get(name, name) for name in missing],
        "unexpected": [stored.name for name, stored in have.items() if name not in want],
        "of the wrong shape": [
            f"{s.name} {list(s.shape)} for {list(shape)}" for s, shape in shared if s.shape != shape
        ],
        f"of a dtype other than {', '.join(DTYPES)} (save the model in float16)": [
            f"{s.name} {s.dtype}" for s in have.values() if s.dtype not in DTYPES
        ],
    }
    return "; ".join(f"{len(rows)} {what}: {_first(rows)}" for what, rows in faults.items() if rows)


def fill(
    checkpoint: Checkpoint, part: str, module: nn.Module, dtype: torch.dtype, device: torch.device
) -> None:
    """Give a module on the meta device its weights, in ``dtype`` on ``device``.

    Raises WeightError where ``check`` does, and for a weight that is not finite.
    """
    check(checkpoint, part, module)
    copy_into(module, checkpoint.parts[part], dtype, device)


def copy_into(module: nn.Module, have: Mapping[str, StoredTensor], dtype: torch.dtype,
              device: torch.device) -> None:
    """Give a module on the meta device these weights, by parameter name.

    Raises WeightError for a weight that is not finite.
    """
    stored = sorted(have.items(), key=lambda row: (row[1].path, row[1].start))
    with ThreadPoolExecutor(READERS) as pool:
        tensors = pool.map(lambda row: read_tensor(row[1], dtype, device), stored)
        state = {name: tensor for (name, _), tensor in zip(stored, tensors, strict=True)}
    module.load_state_dict(state, strict=True, assign=True)


def _assign(group: Group, config: Config) -> dict[str, dict[str, StoredTensor]]:
    """Part -> parameter -> place, by the rows of names.py and of parts.py.

    An unknown tensor under a part's prefix stays with that part under its own name, so that
    ``check`` can report it beside what is missing.
    """
    tensors, rows, prefixes = group
    places: dict[str, dict[str, StoredTensor]] = {part: {} for part in rows}
    dropped, unknown = parts.dropped(config), []
    table = {name: (part, ours) for part, row in rows.items() for name, ours in row.items()}
    for name, tensor in tensors.items():
        if dropped.fullmatch(name):
            continue
        beside = next((part for prefix, part in prefixes.items() if name.startswith(prefix)), "")
        if not beside and name not in table:
            unknown.append(tensor)
            continue
        part, parameters = table.get(name, (beside, (name,)))
        for parameter, piece in zip(parameters, tensor.unstack(len(parameters)), strict=True):
            if parameter in places[part]:
                twice = f"{places[part][parameter].name} and {name}"
                raise WeightError(f"{tensor.path} has one tensor twice: {twice}")
            linear = part == "vae" and ".attentions." in parameter
            piece = piece.transpose() if name in names_vision.TRANSPOSED else piece
            places[part][parameter] = _as_linear(piece) if linear else piece
    if unknown:
        rest = _first([tensor.name for tensor in unknown])
        raise WeightError(f"{unknown[0].path} has {len(unknown)} unexpected: {rest}")
    return places


def _as_linear(tensor: StoredTensor) -> StoredTensor:
    # A 1x1 convolution is a linear layer: (C, C, 1, 1) and (C, C, 1) are what we hold as (C, C).
    while len(tensor.shape) > 2 and tensor.shape[-1] == 1:
        tensor = replace(tensor, shape=tensor.shape[:-1])
    return tensor


def _home(checkpoint: Checkpoint, part: str) -> Path:
    """The file of a part that has a file of its own, else that of the checkpoint."""
    homes = {tensor.path for tensor in checkpoint.parts[part].values()}
    return homes.pop() if len(homes) == 1 else checkpoint.path


def _official_names(checkpoint: Checkpoint, part: str) -> dict[str, str]:
    """Parameter name -> what the file calls it, or would."""
    if checkpoint.layout == "single file" and _home(checkpoint, part) != checkpoint.path:
        return {}
    layout = parts.single_file if checkpoint.layout == "single file" else parts.folder
    rows = layout(checkpoint.config)[part]
    return {ours: name for name, parameters in reversed(rows.items()) for ours in parameters}


def _first(rows: list[str]) -> str:
    return ", ".join(rows[:SHOWN]) + (", ..." if len(rows) > SHOWN else "")
