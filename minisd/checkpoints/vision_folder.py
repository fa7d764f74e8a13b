"""A folder with a CLIP image tower, or with the safety checker of Stable Diffusion 1 around one."""

from pathlib import Path

from minisd.checkpoints import names_vision
from minisd.checkpoints.diffusers_config import ACTIVATIONS
from minisd.checkpoints.folder import part_tensors
from minisd.checkpoints.json_file import MAX_WIDTH, JsonFile
from minisd.checkpoints.safetensors_file import StoredTensor
from minisd.config import VisionConfig
from minisd.errors import WeightError

FIXED: dict[str, tuple] = {"layer_norm_eps": (1e-5,), "num_channels": (3,)}


def read_vision(file: JsonFile) -> VisionConfig:
    """The tower that a CLIPVisionConfig's fields describe; WeightError if we have none such."""
    file.fixed(FIXED)
    vision = VisionConfig(
        hidden_size=file.whole("hidden_size", 768, 1, MAX_WIDTH),
        intermediate_size=file.whole("intermediate_size", 3072, 1, 4 * MAX_WIDTH),
        num_hidden_layers=file.whole("num_hidden_layers", 12, 1, 100),
        num_attention_heads=file.whole("num_attention_heads", 12, 1, 512),
        hidden_act=ACTIVATIONS[file.choice("hidden_act", "quick_gelu", ACTIVATIONS)],
        image_size=file.whole("image_size", 224, 1, 2048),
        patch_size=file.whole("patch_size", 32, 1, 2048),
        projection_dim=file.whole("projection_dim", 512, 1, MAX_WIDTH),
    )
    if vision.hidden_size % vision.num_attention_heads:
        raise file.fault("num_attention_heads", f"divisors of hidden_size {vision.hidden_size}")
    return vision


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
