"""The depth network once more, as a function of a single file's tensors, under MiDaS's names.

MiDaS 3.0 and timm's vit_base_resnet50_384 are not installed with the tests. This shares no line
with minisd/models, and says what transformers' class cannot: where each tensor of a single file
belongs, since many have the same shape, and what becomes of an image that is no square.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd.config import DPTConfig

Tensors = dict[str, Tensor]


def same_conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Weight standardisation, and TensorFlow's padding computed for each side."""
    rows = weight.flatten(1)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    rows = (rows - mean) / (var + 1e-8) ** 0.5
    return F.conv2d(same_pad(x, weight.shape[-1], stride), rows.view_as(weight), stride=stride)


def same_pad(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    pads = []
    for n in (x.shape[3], x.shape[2]):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def resnet(t: Tensors, x: Tensor, config: DPTConfig) -> list[Tensor]:
    at = "pretrained.model.patch_embed.backbone"

    def norm(x, name):
        return F.group_norm(x, config.norm_num_groups, t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    x = norm(same_conv(x, t[f"{at}.stem.conv.weight"], 2), f"{at}.stem.norm").relu()
    x = F.max_pool2d(same_pad(x, 3, 2, float("-inf")), 3, 2)
    outputs = []
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            block, stride = f"{at}.stages.{i}.blocks.{j}", 2 if i > 0 and j == 0 else 1
            h = norm(same_conv(x, t[f"{block}.conv1.weight"]), f"{block}.norm1").relu()
            h = norm(same_conv(h, t[f"{block}.conv2.weight"], stride), f"{block}.norm2").relu()
            h = norm(same_conv(h, t[f"{block}.conv3.weight"]), f"{block}.norm3")
            if j == 0:
                shortcut = same_conv(x, t[f"{block}.downsample.conv.weight"], stride)
                x = norm(shortcut, f"{block}.downsample.norm")
            x = (h + x).relu()
        outputs.append(x)
    return outputs


def depth(tensors: Tensors, image: Tensor, config: DPTConfig) -> Tensor:
    """The depth (B, H, W) of an image (B, 3, H, W)."""
    t = {name.removeprefix("depth_model.model."): value for name, value in tensors.items()}
    vit = "pretrained.model"

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    def conv(x, name, **options):
        return F.conv2d(x, t[f"{name}.weight"], t.get(f"{name}.bias"), **options)

    maps = resnet(t, image, config)
    tokens = conv(maps.pop(), f"{vit}.patch_embed.proj")
    h, w = tokens.shape[2:]
    positions = t[f"{vit}.pos_embed"]
    side = round((positions.shape[1] - 1) ** 0.5)
    square = positions[0, 1:].T.reshape(1, -1, side, side)
    square = F.interpolate(square, (h, w), mode="bilinear", align_corners=False)
    x = torch.cat([
        (t[f"{vit}.cls_token"] + positions[:, :1]).expand(len(image), -1, -1),
        (tokens + square).permute(0, 2, 3, 1).flatten(1, 2)], 1)
    for i in range(config.num_hidden_layers):
        block = f"{vit}.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")),
                       f"{block}.mlp.fc2")
        if i in config.out_indices:
            post = f"pretrained.act_postprocess{len(maps) + 1}"
            both = torch.cat([x[:, 1:], x[:, :1].expand_as(x[:, 1:])], 2)
            y = F.gelu(linear(both, f"{post}.0.project.0")).mT.unflatten(2, (h, w))
            y = conv(y, f"{post}.3")
            maps.append(y if len(maps) == 2 else conv(y, f"{post}.4", stride=2, padding=1))

    def unit(x, name):
        inner = conv(x.relu(), f"{name}.conv1", padding=1).relu()
        return x + conv(inner, f"{name}.conv2", padding=1)

    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    path = None
    for n in (4, 3, 2, 1):
        net, layer = f"scratch.refinenet{n}", conv(maps[n - 1], f"scratch.layer{n}_rn", padding=1)
        path = layer if path is None else path + unit(layer, f"{net}.resConfUnit1")
        path = conv(up(unit(path, f"{net}.resConfUnit2")), f"{net}.out_conv")
    path = conv(up(conv(path, "scratch.output_conv.0", padding=1)), "scratch.output_conv.2",
                padding=1)
    return conv(path.relu(), "scratch.output_conv.4").relu().squeeze(1)
