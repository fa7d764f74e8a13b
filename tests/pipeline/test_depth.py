"""Depth to image equals diffusers' pipeline, in float64; what it takes, and what it refuses."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image
from reference_models import (
    DEPTH,
    SMALL,
    SMALL_DEPTH,
    SMALL_V,
    draw_noise_in_float32,
    error,
    official_depth_pipeline,
    randn,
    small_model,
)

from minisd import memory
from minisd.backends import Backend
from minisd.config import SD2_DEPTH
from minisd.models.ops import REFERENCE, TORCH
from minisd.pipeline import StableDiffusion
from minisd.request import Request

WIDTH, HEIGHT = 56, 40
DEPTH_V = replace(SMALL_V, unet=replace(SMALL_V.unet, in_channels=5), depth=DEPTH)
# The square that transformers' estimator reads is as large as that which ours does.
AS_LARGE = replace(SMALL_DEPTH, depth=replace(DEPTH, image_size=384))
WITHOUT = replace(SMALL_DEPTH, depth=None)
CALL = dict(prompt="a red heart on a blue background", negative_prompt="blurry, two hearts",
            num_inference_steps=10, guidance_scale=7.5, output_type="latent")
BOUND = 1e-10


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    draw_noise_in_float32(monkeypatch)


def drawing(width=WIDTH, height=HEIGHT):
    return Image.fromarray((255 * randn(height, width, 3, seed=5).sigmoid()).byte().numpy())


def both(config, call, count=1, theirs=None, ops=TORCH):
    """The results of minisd and of diffusers; ``theirs`` are arguments of the latter."""
    sd, call = small_model(config, ops), CALL | {"image": drawing()} | call
    generators = [torch.Generator().manual_seed(7 + i) for i in range(count)]
    official = official_depth_pipeline(sd)(generator=generators, **call | (theirs or {}))
    return sd(seed=7, **call).images, official.images


@pytest.mark.parametrize("call", [
    dict(strength=0.55, eta=0.5), dict(strength=1.0), dict(strength=0.1),
    dict(guidance_scale=1.0, negative_prompt=None), dict(num_images_per_prompt=2, eta=1.0),
    {"output_type": "pt"}, {"config": DEPTH_V},
], ids=lambda call: ", ".join(call))
def test_a_map_that_is_given(call):
    call = dict(call)
    config = call.pop("config", SMALL_DEPTH)
    count = call.get("num_images_per_prompt", 1)
    maps = 1e3 + 40 * randn(count, 9, 14)  # any size, any range
    assert error(*both(config, call | {"depth_map": maps}, count)) <= BOUND


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_map_that_the_estimator_makes():
    square = dict(image=drawing(48, 48), num_images_per_prompt=2)
    assert error(*both(AS_LARGE, square, 2)) <= BOUND


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
def test_a_map_that_the_estimator_makes_of_an_image_that_is_no_square(ops):
    """diffusers makes a square of it first; it is the same with the map that keeps the aspect."""
    made = small_model(AS_LARGE, ops).depth_map(drawing())
    assert made.shape == (1, 288, 384) and made.dtype == torch.float64
    ours, official = both(AS_LARGE, {}, theirs={"depth_map": made}, ops=ops)
    assert error(ours, official) <= BOUND
    if ops is TORCH:
        assert error(ours, both(AS_LARGE, {})[1]) > 1e-3


def test_the_defaults_are_those_of_diffusers():
    theirs = inspect.signature(StableDiffusionDepth2ImgPipeline.__call__).parameters
    assert (theirs["strength"].default, theirs["num_inference_steps"].default,
            theirs["guidance_scale"].default, theirs["eta"].default) == (0.8, 50, 7.5, 0.0)
    plan = Request(prompt="a", image=drawing()).plan(SMALL_DEPTH)
    assert (plan.strength, plan.num_inference_steps, plan.guidance_scale, plan.chosen.eta) == (
        0.8, 50, 7.5, 0.0)


# --- what may be given ----------------------------------------------------------------------------

LEVELS = np.arange(63, dtype=np.uint8).reshape(7, 9) * 3 % 101


def test_pil_arrays_and_tensors_are_the_same_map():
    sd, results = small_model(SMALL_DEPTH), []
    for given in (Image.fromarray(LEVELS), Image.fromarray(LEVELS.astype(np.uint16)), LEVELS,
                  Image.fromarray(LEVELS.astype(np.float32)), LEVELS[None], LEVELS[None, None],
                  torch.from_numpy(LEVELS), 0.01 * torch.from_numpy(LEVELS).double() - 3):
        results.append(sd("a", depth_map=given, seed=0, num_inference_steps=2, image=drawing(),
                          output_type="latent").images)
    assert max(error(result, results[0]) for result in results) <= BOUND


def test_one_map_for_all_images_one_for_each_prompt_or_one_for_each():
    sd, maps = small_model(SMALL_DEPTH), randn(4, 6, 6)
    call = dict(num_images_per_prompt=2, num_inference_steps=2, seed=3, output_type="latent",
                width=WIDTH, height=HEIGHT)

    def images(given):
        return sd(["a", "b"], depth_map=given, **call).images

    each = images(maps)
    for i, given in ((0, maps[:1]), (3, maps[3:])):
        assert error(images(given)[i], each[i]) <= BOUND
    assert error(images(maps[[0, 2]]), images(maps[[0, 0, 2, 2]])) == 0
    with pytest.raises(ValueError, match="there are 4 images but 3 depth maps"):
        images(maps[:3])


def test_a_map_alone_is_text_to_image_of_its_size():
    sd, maps = small_model(SMALL_DEPTH), randn(1, 21, 29)
    out = sd("a", depth_map=maps, seed=4, num_inference_steps=3)
    assert out.images[0].size == (28, 20) and out.settings[0]["strength"] is None
    noise = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(4))
    call = dict(depth_map=maps, num_inference_steps=3, output_type="latent")
    assert error(sd("a", latents=noise.double(), width=28, height=20, **call).images,
                 sd("a", seed=4, **call).images) == 0
    with pytest.raises(ValueError, match="^strength needs the image"):
        sd("a", depth_map=maps, strength=0.5)


# --- faults of diffusers that are not copied ------------------------------------------------------


def theirs(images, maps, count=1):
    return StableDiffusionDepth2ImgPipeline.prepare_depth_map(
        SimpleNamespace(vae_scale_factor=4), images, maps, count, False, torch.float64, "cpu")


def test_diffusers_swaps_width_and_height_of_arrays():
    pixels, maps = np.array(drawing()), randn(1, 9, 14)
    assert theirs([pixels], maps).shape == (1, 1, WIDTH // 4, HEIGHT // 4)
    assert theirs(drawing(), maps).shape == (1, 1, HEIGHT // 4, WIDTH // 4)
    # Ours takes images as PIL images and files; the maps of both sizes, also as arrays.
    ours, official = both(SMALL_DEPTH, {"depth_map": maps.numpy()}, theirs={"depth_map": maps})
    assert error(ours, official) <= BOUND


def test_diffusers_makes_nan_of_a_constant_map():
    flat = torch.zeros(1, 8, 8, dtype=torch.float64)
    assert theirs(drawing(), flat).isnan().all()


@pytest.mark.parametrize("shape", [(9, 14), (2, 1, 9, 14)])
def test_diffusers_takes_maps_of_three_dimensions_alone(shape):
    given = randn(*shape)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        theirs(drawing(), given, 2)
    call = dict(num_images_per_prompt=2, num_inference_steps=4)
    three = given.reshape(-1, 9, 14)
    assert error(*both(SMALL_DEPTH, call | {"depth_map": given}, 2,
                       {"depth_map": three.expand(2, -1, -1)})) <= BOUND


def test_diffusers_gives_the_maps_of_two_prompts_by_turns():
    """So a map meets the other prompt, where there are several images of each."""
    call = dict(prompt=["a", "b"], negative_prompt=["", ""], num_images_per_prompt=2,
                num_inference_steps=4)
    two = randn(2, 9, 14)
    ours, official = both(SMALL_DEPTH, call | {"depth_map": two}, 4)
    assert error(ours, official) > 1e-3
    assert error(*both(SMALL_DEPTH, call | {"depth_map": two}, 4,
                       {"depth_map": two.repeat_interleave(2, dim=0)})) <= BOUND
    assert error(ours[[0, 3]], official[[0, 3]]) <= BOUND


# --- what is refused, before any work -------------------------------------------------------------


@pytest.mark.parametrize("config, call, words", [
    (SMALL_DEPTH, {}, r"^this is a depth model: give it depth_map or image \(--depth-map, --image"),
    (WITHOUT, {}, "^this is a depth model without its depth estimator: give it depth_map"),
    (WITHOUT, dict(image=drawing()), "^this is a depth model without its depth estimator: give"),
    (SMALL_DEPTH, dict(depth_map=np.ones((5, 5))), "^the depth is the same everywhere in the lat"),
    (SMALL_DEPTH, dict(image=drawing(), depth_map=torch.zeros(1, 5, 5)), "same everywhere"),
    (SMALL_DEPTH, dict(depth_map=randn(5, 5), width=4, height=4), "latent's 1x1 cells"),
    (SMALL_DEPTH, dict(depth_map=randn(2, 5, 5)), "there are 1 images but 2 depth maps"),
    (SMALL_DEPTH, dict(depth_map=drawing()), "has colours: turn it grey first"),
    (SMALL_DEPTH, dict(depth_map=randn(5)), "a depth map has the shape"),
    (SMALL_DEPTH, dict(depth_map=randn(5, 5), mask_image=drawing()), "takes no mask_image"),
    (SMALL, dict(depth_map=randn(5, 5)), "^this is a text to image model, which takes no depth_ma"),
], ids=lambda value: getattr(value, "name", None))
def test_refusals(config, call, words, monkeypatch):
    sd = small_model(config)
    for part in sd.parts.values():
        monkeypatch.setattr(part, "forward", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=words):
        sd("a", **call)


def test_a_model_without_an_estimator_makes_no_map():
    sd = small_model(WITHOUT)
    assert sd.depth_estimator is None and list(sd.parts) == ["text_encoder", "unet", "vae"]
    with pytest.raises(ValueError, match="^this model has no depth estimator$"):
        sd.depth_map(drawing())
    assert sd("a", depth_map=randn(5, 5), image=drawing(), num_inference_steps=2).images


def test_a_half_estimator_that_overflows_says_so():
    sd = small_model(replace(SMALL_DEPTH, name="overflows"))
    bias = sd.depth_estimator.head["head"][4].bias
    before = bias.clone()
    bias.fill_(float("inf"))
    try:
        with pytest.raises(ArithmeticError, match="^the depth estimator gave values that are not "):
            sd("a", image=drawing())
    finally:
        bias.copy_(before)


# --- fused, coverage, dtypes, memory --------------------------------------------------------------


def test_fused_is_the_same():
    m = small_model(SMALL_DEPTH)
    fused = StableDiffusion(m.config, m.tokenizer, m.text_encoder, m.unet, m.vae,
                            Backend(TORCH, fused=True), m.depth_estimator)
    call = dict(num_inference_steps=3, seed=[3, 4], eta=0.5, output_type="latent", image=drawing())
    for given in ({}, {"depth_map": randn(2, 6, 6), "guidance_scale": 1.0}):
        assert error(fused(["a", "b"], **call, **given).images,
                     m(["a", "b"], **call, **given).images) <= 1e-11
    assert {call.took for call in fused.coverage()} == {"torch"}


def test_to_takes_the_estimator_with_it():
    sd = small_model(replace(SMALL_DEPTH, name="moved"))
    made = sd.depth_map(drawing())
    weights = {p.dtype for p in sd.to(dtype="float32").depth_estimator.parameters()}
    assert weights == {torch.float32}
    half = sd.depth_map(drawing())
    assert half.dtype == torch.float32 and error(half, made) < 1e-3 * made.std()


def test_memory_counts_the_estimator():
    def need(estimates=None, **options):
        return memory.activations(SD2_DEPTH, (1, 4, 8, 8), 1, True, 4, estimates=estimates,
                                  **options)

    # tests/long/peaks.py: python -m tests.long.peaks depth measured 236 and 911 MB.
    assert 0.9 < need((384, 384)) / 236e6 < 1.1 and 0.9 < need((384, 1536)) / 911e6 < 1.1
    assert need() < need((384, 384)) < need((384, 4096), stores_scores=True) / 10


def test_a_call_whose_map_does_not_fit_is_rejected(monkeypatch):
    sd, needs = small_model(SMALL_DEPTH), []
    really = memory.activations
    monkeypatch.setattr(memory, "activations", lambda *a: needs.append(really(*a)) or needs[-1])
    call = dict(image=drawing(), num_inference_steps=2, output_type="latent")
    sd("a", **call)
    sd("a", depth_map=randn(5, 5), **call)
    assert needs[0] > 3 * needs[1]
    monkeypatch.setattr(memory, "free", lambda device: needs[1])
    with pytest.raises(MemoryError):
        sd("a", **call)
    assert sd("a", depth_map=randn(5, 5), **call).images.shape == (1, 4, 10, 14)
