"""The folder depth_estimator/ of a depth model: what its config.json says, and what is written.

The fields are those of transformers' DPTConfig and, under ``backbone_config``, of its BitConfig. An
absent field has the default of its class. ``layer_norm_eps`` is not read: the published folder has
1e-12, and MiDaS was trained with 1e-6, see models/dpt.py.
"""

from pathlib import Path

from minisd.checkpoints.json_file import MAX_WIDTH, JsonFields, JsonFile
from minisd.config import DPTConfig

# As in diffusers_config.py: the value that minisd computes, which is also the default.
FIXED: dict[str, tuple] = {
    **{"hidden_act": ("gelu", "gelu_python"), "num_channels": (3,), "patch_size": (16, [16, 16])},
    **{"qkv_bias": (True,), "readout_type": ("project",), "neck_ignore_stages": ([0, 1],)},
    **{"head_in_index": (-1,), "add_projection": (False,)},
    **{"use_batch_norm_in_fusion_residual": (False, None)},
    **{"use_bias_in_fusion_residual": (None, True)},
}
BACKBONE_FIXED: dict[str, tuple] = {
    **{"model_type": ("bit",), "hidden_act": ("relu",), "num_channels": (3,)},
    **{"output_stride": (32,), "width_factor": (1,)},
}
# These differ from the defaults of BitConfig; DPTConfig has them where there is no backbone_config.
BACKBONE: dict = {
    "layer_type": "bottleneck", "global_padding": "SAME", "embedding_dynamic_padding": True,
    "depths": [3, 4, 9], "out_features": ["stage1", "stage2", "stage3"],
}


def read_depth(path: Path) -> DPTConfig:
    """The estimator that a config.json describes; WeightError, naming the field, if none of ours.
    """
    file = JsonFile(path)
    file.choice("is_hybrid", False, (True,))
    file.fixed(FIXED)
    bit = _backbone(file)
    layers = file.whole("num_hidden_layers", 12, 1, 100)
    depth = DPTConfig(
        embedding_size=bit.whole("embedding_size", 64, 1, MAX_WIDTH),
        # BitConfig has a fourth width, of a stage that MiDaS leaves out.
        hidden_sizes=_three(bit, "hidden_sizes", (256, 512, 1024, 2048)),
        depths=_three(bit, "depths", (3, 4, 6, 3)),
        norm_num_groups=bit.whole("num_groups", 32, 1, MAX_WIDTH),
        hidden_size=file.whole("hidden_size", 768, 1, MAX_WIDTH),
        intermediate_size=file.whole("intermediate_size", 3072, 1, 4 * MAX_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=file.whole("num_attention_heads", 12, 1, 512),
        out_indices=_out_indices(file, layers),
        image_size=file.whole("image_size", 384, 32, 4096, levels=2),
        fusion_hidden_size=file.whole("fusion_hidden_size", 256, 2, MAX_WIDTH),
    )
    _check_fit(file, bit, depth)
    return depth


def _backbone(file: JsonFile) -> JsonFields:
    fields = file.fields.get("backbone_config")
    if fields is None:
        fields = BACKBONE
    if not isinstance(fields, dict):
        raise file.fault("backbone_config", "an object")
    bit = JsonFields(Path(f"{file.path}, backbone_config"), fields)
    bit.fixed(BACKBONE_FIXED)
    bit.choice("layer_type", "preactivation", ("bottleneck",))
    bit.choice("global_padding", None, ("SAME", "same"))
    bit.choice("embedding_dynamic_padding", False, (True,))
    if bit.fields.get("out_indices") != [1, 2, 3]:  # which means the same
        bit.choice("out_features", None, (BACKBONE["out_features"],))
    return bit


def _three(bit: JsonFields, name: str, default: tuple[int, ...]) -> tuple[int, int, int]:
    values = bit.widths(name, default)
    if len(values) != 3 and (name, len(values)) != ("hidden_sizes", 4):
        raise bit.fault(name, "3 stages")
    return values[0], values[1], values[2]


def _out_indices(file: JsonFile, layers: int) -> tuple[int, int]:
    """The last two of four: the first two stand for the ResNet's outputs, whatever they are."""
    values = file.fields.get("backbone_out_indices", [2, 5, 8, 11])
    last = values[2:] if isinstance(values, list) and len(values) == 4 else []
    if [type(i) for i in last] != [int, int] or not 0 <= last[0] < last[1] < layers:
        raise file.fault("backbone_out_indices", f"4 of which the last two are layers of {layers}")
    return last[0], last[1]


def _check_fit(file: JsonFile, bit: JsonFields, depth: DPTConfig) -> None:
    """WeightError for sizes that do not go together, or that are said twice and differ."""
    widths, side = depth.hidden_sizes, depth.image_size // 16
    middles = [width // 4 for width in widths]
    if any(width % depth.norm_num_groups for width in (depth.embedding_size, *widths, *middles)):
        raise bit.fault("num_groups", f"divisors of {[depth.embedding_size, *middles]}")
    if depth.hidden_size % depth.num_attention_heads:
        raise file.fault("num_attention_heads", f"divisors of hidden_size {depth.hidden_size}")
    for name, default, want in (
        ("reassemble_factors", [4, 2, 1, 0.5], [1, 1, 1, 0.5]),
        ("neck_hidden_sizes", [96, 192, 384, 768], [*widths[:2], *[depth.hidden_size] * 2]),
        ("backbone_featmap_shape", [1, 1024, 24, 24], [1, widths[2], side, side]),
    ):
        file.choice(name, default, (want,))


def files(depth: DPTConfig) -> dict[str, dict]:
    """The JSON files of an estimator as transformers and diffusers read them: name -> fields."""
    return {"depth_estimator/config.json": _fields(depth),
            "feature_extractor/preprocessor_config.json": _preprocessor(depth)}


def _fields(depth: DPTConfig) -> dict:
    width, side = depth.hidden_size, depth.image_size // 16
    bit = BACKBONE | {
        "model_type": "bit", "depths": depth.depths, "embedding_size": depth.embedding_size,
        "hidden_sizes": depth.hidden_sizes, "num_groups": depth.norm_num_groups,
    }
    return {
        "architectures": ["DPTForDepthEstimation"],
        "model_type": "dpt",
        "is_hybrid": True,
        "backbone_config": bit,
        "backbone_featmap_shape": [1, depth.hidden_sizes[2], side, side],
        "backbone_out_indices": [2, 5, *depth.out_indices],
        "fusion_hidden_size": depth.fusion_hidden_size,
        "hidden_size": width,
        "image_size": depth.image_size,
        "intermediate_size": depth.intermediate_size,
        "layer_norm_eps": 1e-6,
        "neck_hidden_sizes": [*depth.hidden_sizes[:2], width, width],
        "num_attention_heads": depth.num_attention_heads,
        "num_hidden_layers": depth.num_hidden_layers,
        "reassemble_factors": [1, 1, 1, 0.5],
    }


def _preprocessor(depth: DPTConfig) -> dict:
    """How diffusers prepares an image: it makes a square of it, see depth_maps.prepared.

    By the bicubic filter, so that the map of a square image is the same there and here.
    """
    return {
        "image_processor_type": "DPTImageProcessor",
        "size": {"height": depth.image_size, "width": depth.image_size},
        "resample": 3, "keep_aspect_ratio": False, "ensure_multiple_of": 1,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }
