"""The tensors of image towers in single files and folders map one to one, to the right places."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from files import manifest
from reference_models import VISION, error, randn, randomise

from minisd.checkpoints import names_vision
from minisd.checkpoints.names_vision import DROPPED, PREFIX, TRANSPOSED
from minisd.config import VIT_H, VIT_L
from minisd.models.clip_vision import VisionTower
from minisd.models.ops import TORCH


@pytest.mark.parametrize("name, config", [("clip_l_vision", VIT_L), ("clip_h_vision", VIT_H)])
def test_official_names_are_a_bijection(name, config):
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in VisionTower(config, TORCH).state_dict().items()}
    rows, found = names_vision.single_file(config.num_hidden_layers), {}
    for theirs, shape in manifest(name).items():
        theirs = f"embedder.model.{theirs}"
        assert not DROPPED.fullmatch(theirs)
        for parameter in rows[theirs]:
            assert parameter not in found
            shape_here = shape[::-1] if theirs in TRANSPOSED else shape
            found[parameter] = (shape_here[0] // len(rows[theirs]), *shape_here[1:])
    assert found == ours and len(rows) == len(manifest(name))


@pytest.mark.parametrize("name", [
    "embedder.model.token_embedding.weight", "embedder.model.logit_scale", "embedder.mean",
    "embedder.model.transformer.resblocks.3.ln_1.bias", "embedder.std",
    "vision_model.embeddings.position_ids",
])
def test_the_rest_of_clip_is_dropped(name):
    assert DROPPED.fullmatch(name)


def as_openclip(tower, layers):
    """The tower's weights under the names of a single file, stacked and transposed as there."""
    ours, tensors = tower.state_dict(), {}
    for name, parameters in names_vision.single_file(layers).items():
        value = torch.cat([ours[parameter] for parameter in parameters])
        tensors[name.removeprefix(PREFIX)] = value.mT if name in TRANSPOSED else value
    return tensors


def openclip(w, config, images):
    """What OpenCLIP computes with the tensors of a single file."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(images, w["conv1.weight"], stride=config.patch_size).flatten(2).mT
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(config.num_hidden_layers):
        layer = f"transformer.resblocks.{i}"
        h = norm(x, f"{layer}.ln_1").transpose(0, 1)
        h, _ = F.multi_head_attention_forward(
            h, h, h, config.hidden_size, config.num_attention_heads,
            w[f"{layer}.attn.in_proj_weight"], w[f"{layer}.attn.in_proj_bias"], None, None, False,
            0.0, w[f"{layer}.attn.out_proj.weight"], w[f"{layer}.attn.out_proj.bias"])
        x = x + h.transpose(0, 1)
        h = F.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"))
        x = x + linear(h, f"{layer}.mlp.c_proj")
    return norm(x[:, 0], "ln_post") @ w["proj"]


def test_each_tensor_means_what_it_does_in_openclip():
    config = replace(VISION, hidden_act="gelu")
    tower, pixels = randomise(VisionTower(config, TORCH)), randn(2, 3, 12, 12)
    tensors = as_openclip(tower, config.num_hidden_layers)
    assert error(tower(pixels), openclip(tensors, config, pixels)) <= 1e-10
