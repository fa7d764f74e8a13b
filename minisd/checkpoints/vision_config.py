"""The config.json of a CLIP image tower."""

from pathlib import Path

from minisd.checkpoints.json_file import MAX_WIDTH, JsonFile
from minisd.config import VisionConfig

# transformers' names of the two functions.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_python": "gelu"}
FIXED: dict[str, tuple] = {"layer_norm_eps": (1e-5,), "num_channels": (3,)}


def read(path: Path) -> VisionConfig:
    """The tower of a config.json, which may be that of a whole CLIP: then the tower's is inside it,
    but for the width of what both halves give."""
    file = JsonFile(path)
    inner = file.fields.get("vision_config")
    if isinstance(inner, dict):
        width = {name: n for name, n in file.fields.items() if name == "projection_dim"}
        file.fields = inner | width
    return read_vision(file)


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
