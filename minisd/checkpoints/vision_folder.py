"""The folder of Stable Diffusion 1's safety checker, which is around a CLIP image tower."""

from pathlib import Path

from minisd.checkpoints import names_vision
from minisd.checkpoints.folder import part_tensors
from minisd.checkpoints.json_file import JsonFile
from minisd.checkpoints.safetensors_file import StoredTensor
from minisd.checkpoints.vision_config import read_vision
from minisd.config import VisionConfig
from minisd.errors import WeightError


def read_safety_checker(folder: Path) -> tuple[VisionConfig, dict[str, StoredTensor]]:
    """The sizes of a safety checker's tower, and parameter name -> place in a file.

    ``folder`` is the checker's own, or that of a model which has one.
    """
    if (folder / "model_index.json").is_file():
        folder = folder / "safety_checker"
    file = JsonFile(folder / "config.json")
    # The config of a whole CLIP: the tower's is inside, but for the width of what both halves give.
    inner = file.fields.get("vision_config")
    width = {name: n for name, n in file.fields.items() if name == "projection_dim"}
    file.fields = (inner if isinstance(inner, dict) else {}) | width
    config = read_vision(file)
    tensors: dict[str, StoredTensor] = {}
    for name, stored in part_tensors(folder, "model").items():
        if names_vision.DROPPED.fullmatch(name):
            continue
        name = name.replace(names_vision.SAFETY_PREFIX, "vision_model.", 1)
        if name in tensors:
            raise WeightError(f"{stored.path} has one tensor twice: {tensors[name].name} and "
                              f"{stored.name}")
        tensors[name] = stored
    return config, tensors
