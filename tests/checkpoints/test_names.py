"""Official tensors and parameters map one to one."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from files import (
    as_single_file,
    official_modules,
    official_shapes,
    random_modules,
    with_unet,
)
from reference_models import SMALL, SMALL_V, SMALL_X4

from minisd.checkpoints import names, parts
from minisd.config import SD1, SD1_INPAINT, SD2, SD2_DEPTH, SD2_INPAINT, X4_UPSCALER
from minisd.loading import build
from minisd.models.ops import TORCH

OFFICIAL = pytest.mark.parametrize(
    "config", [SD1, SD1_INPAINT, SD2, SD2_INPAINT, SD2_DEPTH, X4_UPSCALER],
    ids=lambda config: config.name
)
# Other numbers of levels, of blocks in a level, and levels without attention (which change the
# index of the upsampler).
SHAPES = [
    SMALL,
    SMALL_V,
    SMALL_X4,
    with_unet(SMALL, layers_per_block=1, has_attention=(False, True, False)),
    replace(
        with_unet(SMALL, layers_per_block=3, has_attention=(False, False, True)),
        vae=replace(SMALL.vae, block_out_channels=(8, 16), layers_per_block=1),
    ),
    with_unet(
        SMALL, block_out_channels=(8, 16, 24, 32, 40), has_attention=(True,) * 5, num_heads=(2,) * 5
    ),
]


def on_meta(config):
    with torch.device("meta"):
        return official_modules(config)


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@OFFICIAL
def test_single_file_is_a_bijection_onto_the_official_models(config):
    modules, dropped = on_meta(config), parts.dropped(config)
    assert modules.keys() == parts.single_file(config).keys()
    for part, rows in parts.single_file(config).items():
        found = {}
        for name, shape in official_shapes(config)[part].items():
            if dropped.fullmatch(name):
                assert name not in rows
                continue
            stacked = len(rows[name])
            for parameter in rows[name]:
                assert parameter not in found
                if ".mid.attn_1." in name and len(shape) == 4:
                    shape = shape[:2]  # a 1x1 convolution there, a linear layer here
                found[parameter] = (shape[0] // stacked, *shape[1:])
        assert found == shapes(modules[part])


def test_of_the_depth_estimator_only_timms_classifier_is_dropped():
    """That each of its names means its tensor: tests/models/test_dpt.py."""
    official = official_shapes(SD2_DEPTH)["depth_estimator"]
    gone = {name for name in official if parts.dropped(SD2_DEPTH).fullmatch(name)}
    head = "depth_model.model.pretrained.model.head"
    assert gone == {f"{head}.weight", f"{head}.bias"}
    assert sum(math.prod(official[name]) for name in gone) == 769_000
    assert (len(official), sum(map(math.prod, official.values()))) == (368, 123_146_985)
    assert all(parts.dropped(replace(SD2_DEPTH, depth=None)).fullmatch(name) for name in official)


@OFFICIAL
def test_our_models_have_the_official_parameters(config):
    ours = build(config, TORCH)
    for part, module in on_meta(config).items():
        assert shapes(ours[part]) == shapes(module)
    if config is X4_UPSCALER:
        counts = [sum(p.numel() for p in part.parameters()) for part in ours.values()]
        assert counts[1:] == [473_398_020, 55_325_927] and sum(counts) == 869_111_787


@OFFICIAL
def test_folder_names_are_ours_but_for_the_text_prefix_and_old_attention(config):
    rows = parts.folder(config)
    for part, module in on_meta(config).items():
        for name in module.state_dict():
            assert rows[part][name] == (name,)
            if part == "text_encoder":
                assert rows[part][f"text_model.{name}"] == (name,)
    middle = "encoder.mid_block.attentions.0"
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in renamed.items():
        assert rows["vae"][f"{middle}.{old}.weight"] == (f"{middle}.{new}.weight",)


@pytest.mark.parametrize(
    ("config", "unused"),
    [
        (SD1, {"cond_stage_model.transformer.text_model.embeddings.position_ids"}),
        (SD2, {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"}),
    ],
    ids=["SD1", "SD2"],
)
def test_only_these_official_tensors_are_dropped(config, unused):
    dropped = parts.dropped(config)
    text, *others = official_shapes(config).values()
    assert not any(dropped.fullmatch(name) for part in others for name in part)
    last = "cond_stage_model.model.transformer.resblocks.23."
    gone = {name for name in text if dropped.fullmatch(name)}
    assert gone == unused | {name for name in text if name.startswith(last)}


@pytest.mark.parametrize("config", SHAPES)
def test_unet_and_vae_names_are_those_of_the_diffusers_converter(config):
    modules = random_modules(config)
    tensors = as_single_file(config, modules)
    settings = {"layers_per_block": config.unet.layers_per_block,
                "num_class_embeds": config.unet.num_class_embeds}
    assert same(convert_ldm_unet_checkpoint(tensors, settings), modules["unet"])
    levels = [""] * len(config.vae.block_out_channels)  # it only counts them
    settings = {"down_block_types": levels, "up_block_types": levels}
    assert same(convert_ldm_vae_checkpoint(tensors, settings), modules["vae"])


def test_openclip_names_are_those_of_the_diffusers_converter():
    encoder = random_modules(SMALL_V)["text_encoder"]
    tensors = as_single_file(SMALL_V, random_modules(SMALL_V))
    converted = convert_open_clip_checkpoint(encoder, tensors)
    stripped = {name.removeprefix("text_model."): value for name, value in converted.items()}
    assert same(stripped, encoder)


def same(state, module):
    want = module.state_dict()
    return state.keys() == want.keys() and all(torch.equal(state[n], want[n]) for n in want)


@pytest.mark.parametrize(
    "name",
    [
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "posterior_mean_coef1", "denoiser.sigmas", "global_step",
        "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "loss.logvar",
        "first_stage_model.loss.logvar", "depth_model.model.pretrained.cls_token",
        "low_scale_model.betas", "embedding_manager.string_to_token_dict.a",
        "cond_stage_model.model.transformer.text_model.embeddings.position_ids",
        "text_model.embeddings.position_ids", "cond_stage_model.logit_scale",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight", "text_projection.weight",
    ],
)
def test_training_state_is_dropped(name):
    assert parts.dropped(SD2).fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "alpha", "loss", "model.diffusion_model.out.0.weight", "first_stage_model.losses.a",
        "cond_stage_model.model.transformer.resblocks.22.ln_1.weight", "model_emas", "beta",
        "cond_stage_model.model.transformer.resblocks.24.ln_1.weight",
    ],
)
def test_nothing_else_is_dropped(name):
    assert not parts.dropped(SD2).fullmatch(name)


def test_no_official_tensor_looks_like_another_model():
    for config in (SD1, SD2, SD2_DEPTH, X4_UPSCALER):
        for part in official_shapes(config).values():
            assert names.rejected(list(part)) is None
