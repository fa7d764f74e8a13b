"""The UNet equals diffusers' UNet2DConditionModel, module by module."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention as official_attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from reference_models import (
    DENOISER,
    error,
    errors_by_module,
    official_unet,
    randn,
    randomise,
    with_weights,
)

from minisd.config import SD1, SD1_INPAINT, SD2, SD2_INPAINT
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.transformer import Attention, SpatialTransformer
from minisd.models.unet import UNet, timestep_embedding

LINEAR = replace(DENOISER, use_linear_projection=True, num_heads=(4, 6, 10))
CASES = {
    "as SD1": DENOISER,  # convolutions around the transformers
    "as SD2": LINEAR,  # linear layers there, other heads
    "inpainting": replace(DENOISER, in_channels=9),
    "attention at the bottom only": replace(DENOISER, has_attention=(False, False, True)),
    "classes, and cross-attention first": replace(
        LINEAR, only_cross_attention=(True, False, True), num_class_embeds=9),
    "class vectors": replace(LINEAR, projection_class_embeddings_input_dim=10),
    "one res block a level": replace(DENOISER, layers_per_block=1),
    "one level": replace(
        DENOISER, block_out_channels=(24,), has_attention=(True,), num_heads=(3,)
    ),
}
PAIR = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])


def pair(config, ops, dtype=torch.float64):
    ours = randomise(UNet(config, ops)).to(dtype)
    return ours, with_weights(official_unet(config), ours)


def inputs(config, h, w, dtype=torch.float64, tokens=7):
    """Three latents at three timesteps, including both ends of the schedule; and three classes."""
    x = randn(3, config.in_channels, h, w, seed=1, dtype=dtype)
    context = randn(3, tokens, config.cross_attention_dim, seed=2, dtype=dtype)
    n = config.projection_class_embeddings_input_dim
    classes = torch.tensor([0, 5, 8]) if n is None else randn(3, n, seed=3, dtype=dtype)
    return x, torch.tensor([0, 481, 999]), context, classes


@PAIR
@pytest.mark.parametrize("name", CASES)
def test_every_module_in_float64(name, ops):
    config = CASES[name]
    errors = errors_by_module(*pair(config, ops), *inputs(config, 8, 12))
    assert len(errors) > 60 and "conv_out" in errors
    assert max(errors.values()) <= 1e-10, max(errors, key=errors.get)


@PAIR
@pytest.mark.parametrize("config", [DENOISER, LINEAR], ids=["conv", "linear"])
def test_every_module_in_float32(config, ops):
    errors = errors_by_module(
        *pair(config, ops, torch.float32), *inputs(config, 8, 12, torch.float32)
    )
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)


@pytest.mark.parametrize("h, w", [(1, 1), (2, 3), (7, 13), (9, 4), (5, 8)])
def test_sizes_that_do_not_halve_evenly(h, w):
    ours, official = pair(DENOISER, TORCH)
    args = inputs(DENOISER, h, w)
    assert error(ours(*args), official(*args).sample) <= 1e-10


@pytest.mark.parametrize("width", [16, 320])
def test_timestep_embedding(width):
    t = torch.arange(1000)
    official = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, width), official)
    assert timestep_embedding(t.half(), width).dtype == torch.float32


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", [SD1.unet, SD2.unet], ids=["SD1", "SD2"])
def test_a_transformer_of_the_official_width(config):
    channels, heads = config.block_out_channels[0], config.num_heads[0]
    ours = randomise(SpatialTransformer(channels, heads, False, config, TORCH)).float()
    official = with_weights(Transformer2DModel(
        heads, channels // heads, channels, cross_attention_dim=config.cross_attention_dim,
        use_linear_projection=config.use_linear_projection,
    ), ours)
    x = randn(2, channels, 3, 2, dtype=torch.float32)
    context = randn(2, 77, config.cross_attention_dim, seed=1, dtype=torch.float32)
    assert error(ours(x, context), official(x, context).sample) <= 1e-5


@PAIR
@pytest.mark.parametrize("config", [SD1.unet, SD2.unet], ids=["SD1", "SD2"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_attention_of_the_official_widths(config, level, ops):
    """Heads of 40, 80 and 160 channels in SD1, of 64 in SD2."""
    channels, heads = config.block_out_channels[level], config.num_heads[level]
    ours = randomise(Attention(channels, config.cross_attention_dim, heads, ops)).float()
    official = with_weights(official_attention(
        channels, config.cross_attention_dim, heads=heads, dim_head=channels // heads
    ), ours)
    x = randn(2, 6, channels, dtype=torch.float32)
    context = randn(2, 77, config.cross_attention_dim, seed=1, dtype=torch.float32)
    assert error(ours(x, context), official(x, context)) <= 1e-5


OFFICIAL = [  # parameters counted in the published checkpoints
    (SD1, 859_520_964), (SD2, 865_910_724), (SD1_INPAINT, 859_535_364), (SD2_INPAINT, 865_925_124)
]


@pytest.mark.parametrize("config, parameters", OFFICIAL, ids=lambda x: getattr(x, "name", ""))
def test_names_and_shapes_of_the_official_models(config, parameters):
    with torch.device("meta"):
        ours, official = UNet(config.unet, TORCH), official_unet(config.unet)
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in official.state_dict().items()}
    assert len(shapes) == 686
    assert sum(shape.numel() for shape in shapes.values()) == parameters
