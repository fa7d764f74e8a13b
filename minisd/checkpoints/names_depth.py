"""Where every tensor of the depth estimator belongs: tensor name -> parameter name, as data.

Our parameters have transformers' names, so the folder depth_estimator/ needs no map. A single file
has those of MiDaS and timm after ``depth_model.model.``. As in names.py, a map may list names that
the model does not have.
"""

from minisd.checkpoints.names import NameMap
from minisd.config import DPTConfig

# Matches the whole name of what no image needs: the classifier that timm's ViT was trained with.
DROPPED = r"depth_model\.model\.pretrained\.model\.head\..*"

VIT, BIT = "pretrained.model", "dpt.embeddings.backbone.bit"
POST, STAGE = "pretrained.act_postprocess", "neck.reassemble_stage"

TENSORS = {
    f"{VIT}.cls_token": "dpt.embeddings.cls_token",
    f"{VIT}.pos_embed": "dpt.embeddings.position_embeddings",
}
ENDS = {
    f"{VIT}.patch_embed.backbone.stem.conv": f"{BIT}.embedder.convolution",
    f"{VIT}.patch_embed.backbone.stem.norm": f"{BIT}.embedder.norm",
    f"{VIT}.patch_embed.proj": "dpt.embeddings.projection",
    f"{VIT}.norm": "dpt.layernorm",
    f"{POST}3.0.project.0": f"{STAGE}.readout_projects.2.0",
    f"{POST}4.0.project.0": f"{STAGE}.readout_projects.3.0",
    f"{POST}3.3": f"{STAGE}.layers.2.projection",
    f"{POST}4.3": f"{STAGE}.layers.3.projection",
    f"{POST}4.4": f"{STAGE}.layers.3.resize",
    **{f"scratch.output_conv.{i}": f"head.head.{i}" for i in (0, 2, 4)},
}
BOTTLENECK = (
    "downsample.conv", "downsample.norm", "conv1", "norm1", "conv2", "norm2", "conv3", "norm3",
)
VIT_LAYER = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
FUSE = {
    "resConfUnit1.conv1": "residual_layer1.convolution1",
    "resConfUnit1.conv2": "residual_layer1.convolution2",
    "resConfUnit2.conv1": "residual_layer2.convolution1",
    "resConfUnit2.conv2": "residual_layer2.convolution2",
    "out_conv": "projection",
}


def depth(config: DPTConfig) -> NameMap:
    """The names in a single file, whose ViT stacks the weights of q, k and v."""
    names: NameMap = {name: (ours,) for name, ours in TENSORS.items()}
    for end in ("weight", "bias"):
        names |= {f"{name}.{end}": (f"{ours}.{end}",) for name, ours in _layers(config).items()}
        for i in range(config.num_hidden_layers):
            ours = f"dpt.encoder.layer.{i}.attention.attention"
            qkv = tuple(f"{ours}.{x}.{end}" for x in ("query", "key", "value"))
            names[f"{VIT}.blocks.{i}.attn.qkv.{end}"] = qkv
    return {f"depth_model.model.{name}": ours for name, ours in names.items()}


def _layers(config: DPTConfig) -> dict[str, str]:
    rows = dict(ENDS)
    for i, blocks in enumerate(config.depths):
        for j in range(blocks):
            theirs = f"{VIT}.patch_embed.backbone.stages.{i}.blocks.{j}"
            ours = f"{BIT}.encoder.stages.{i}.layers.{j}"
            rows |= {f"{theirs}.{part}": f"{ours}.{part}" for part in BOTTLENECK}
    for i in range(config.num_hidden_layers):
        theirs, ours = f"{VIT}.blocks.{i}", f"dpt.encoder.layer.{i}"
        rows |= {f"{theirs}.{part}": f"{ours}.{own}" for part, own in VIT_LAYER.items()}
    for n in (1, 2, 3, 4):
        rows[f"scratch.layer{n}_rn"] = f"neck.convs.{n - 1}"
        # MiDaS numbers the fusions from the largest map, transformers from the smallest.
        theirs, ours = f"scratch.refinenet{n}", f"neck.fusion_stage.layers.{4 - n}"
        rows |= {f"{theirs}.{part}": f"{ours}.{own}" for part, own in FUSE.items()}
    return rows
