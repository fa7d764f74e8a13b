"""Where every tensor of a CLIP image tower belongs: tensor name -> parameter name, as data.

Our parameters have the names of transformers, and so have the files of folders. A single file of
Stable unCLIP has OpenCLIP's names below ``embedder.model.visual.``, whichever tower it has, and
beside them CLIP's text half, which nothing reads.
"""

import re

from minisd.checkpoints import names
from minisd.checkpoints.names import NameMap

PREFIX = "embedder.model.visual."
ENDS = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
    "proj": "visual_projection.weight",
}
# Stored as (width, embedding), where the weight of a linear layer is (embedding, width).
TRANSPOSED = (f"{PREFIX}proj",)

# What the single file holds of CLIP and of the embedding's noise that no image needs. Matches a
# whole name.
DROPPED = re.compile(
    r"embedder\.(mean|std|model\.(?!visual\.).*)|(.*\.)?position_ids"
    r"|noise_augmentor\.(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*)")
# The statistics, which the original code has under these names and does not store; minisd does.
NORMALIZER_PREFIX = "noise_augmentor.data_"
NORMALIZER: NameMap = {NORMALIZER_PREFIX + name: (name,) for name in ("mean", "std")}

# What the published safety checker has for "vision_model."; transformers 5 writes the latter.
SAFETY_PREFIX = "vision_model.vision_model."


def single_file(layers: int) -> NameMap:
    """The names of a tower in a single file of Stable unCLIP; q, k and v are stacked there."""
    rows: NameMap = {PREFIX + theirs: (ours,) for theirs, ours in ENDS.items()}
    for name, parameters in names.openclip(layers).items():
        if name.startswith("transformer."):
            rows[PREFIX + name] = tuple(f"vision_model.{parameter}" for parameter in parameters)
    return rows
