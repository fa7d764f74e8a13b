"""The folder of Stable Diffusion 1's safety checker, which is around a CLIP image tower."""

from pathlib import Path

from minisd.checkpoints import names_vision, vision_config
from minisd.checkpoints.folder import part_tensors
from minisd.checkpoints.safetensors_file import StoredTensor
from minisd.config import VisionConfig
from minisd.errors import WeightError


def read_safety_checker(folder: Path) -> tuple[VisionConfig, dict[str, StoredTensor]]:
    """The sizes of a safety checker's tower, and parameter name -> place in a file.

    ``folder`` is the checker's own, or that of a model which has one.
    """
    if (folder / "model_index.json").is_file():
        folder = folder / "safety_checker"
    path = folder.absolute() / "config.json"
    if not path.is_file():
        raise WeightError(f"{path} is missing: the folder holds no safety checker")
    config = vision_config.read(path)
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
