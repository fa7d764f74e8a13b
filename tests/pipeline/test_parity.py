"""From prompt to latents and pixels, minisd equals diffusers' pipelines.

Every case runs both with the same weights, prompts and seeds, in float64.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from reference_models import (
    SMALL,
    SMALL_V,
    SMALL_ZERO,
    draw_noise_in_float32,
    error,
    official_pipeline,
    randn,
    small_model,
)

from minisd.models.ops import REFERENCE, TORCH

INPAINT = replace(SMALL, unet=replace(SMALL.unet, in_channels=9))
INPAINT_V = replace(SMALL_V, unet=replace(SMALL_V.unet, in_channels=9))
NAMES = {SMALL: "eps", SMALL_V: "v", SMALL_ZERO: "zero SNR"}
WIDTH, HEIGHT = 56, 40
CALL = dict(
    prompt="a red heart on a blue background", negative_prompt="blurry, two hearts",
    num_inference_steps=10, guidance_scale=7.5,
)
BOUND = 1e-10


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    draw_noise_in_float32(monkeypatch)


def image() -> Image.Image:
    pixels = 255 * randn(HEIGHT, WIDTH, 3, seed=5).sigmoid()
    return Image.fromarray(pixels.byte().numpy())


def mask() -> Image.Image:
    """Greys on both sides of the threshold, 127.5, and next to it."""
    levels = np.linspace(0, 255, WIDTH).round().astype(np.uint8)
    levels[:4] = 127, 128, 127, 128
    return Image.fromarray(np.tile(levels, (HEIGHT, 1)))


def both(kind, config, call, count=1, output_type="latent", ops=TORCH, ours=None, theirs=None):
    """The results of minisd and diffusers; ``ours`` and ``theirs`` are arguments of one only."""
    sd, call = small_model(config, ops), CALL | {"output_type": output_type} | call
    out = sd(seed=7, **call | (ours or {}))
    seeds = [7 + i for i in range(count)]
    assert out.seeds == ([None] * count if "latents" in call else seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    official = official_pipeline(kind, sd)(generator=generators, **call | (theirs or {}))
    return out.images, official.images


def text_to_image(config, call=None, **options):
    call = {"width": WIDTH, "height": HEIGHT} | (call or {})
    return both(StableDiffusionPipeline, config, call, **options)


@pytest.mark.parametrize("config", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
def test_text_to_image(config, ops):
    assert error(*text_to_image(config, ops=ops)) <= BOUND


OPTIONS = {
    "no guidance": dict(guidance_scale=1.0),  # uncond is not computed
    "no negative prompt": dict(negative_prompt=None),
    "one step": dict(num_inference_steps=1),
    "steps that do not divide 1000": dict(num_inference_steps=7),
    "half the noise of DDPM": dict(eta=0.5),
    "all the noise of DDPM": dict(eta=1.0),
    "default size": dict(width=None, height=None),
    "more than 77 tokens": dict(prompt="a very long prompt " * 40),
}


@pytest.mark.parametrize("config, option", [
    *((SMALL, option) for option in OPTIONS), (SMALL_V, "half the noise of DDPM"),
    (SMALL_ZERO, "one step"), (SMALL_ZERO, "steps that do not divide 1000"),
], ids=NAMES.get)
@pytest.mark.filterwarnings("ignore:the prompt is")
def test_options(config, option):
    """The models differ in a step alone: one of them has the options that no step sees."""
    call = {"num_inference_steps": 4, **OPTIONS[option]}
    # diffusers steps to t - 1000 // S: with trailing spacing that is the next timestep only where S
    # divides 1000.
    gaps = config is SMALL_ZERO and 1000 % call["num_inference_steps"]
    assert (error(*text_to_image(config, call)) <= BOUND) != bool(gaps)


def test_prompts_in_batches():
    """All images of the first prompt, then of the second; a generator for each image."""
    call = dict(
        prompt=["a heart", "two stars", "a boat at night"], negative_prompt=["a", "b", "c"],
        num_images_per_prompt=2, eta=0.3, num_inference_steps=4,
    )
    ours, official = text_to_image(SMALL_V, call, count=6)
    assert ours.shape == (6, 4, HEIGHT // 4, WIDTH // 4)
    assert error(ours, official) <= BOUND


def test_latents_are_given():
    latents = randn(2, 4, HEIGHT // 4, WIDTH // 4, seed=3)
    call = dict(num_images_per_prompt=2, latents=latents, eta=1.0, num_inference_steps=4)
    assert error(*text_to_image(SMALL, call, count=2)) <= BOUND


def test_contexts_instead_of_text():
    call = dict(
        prompt=None, negative_prompt=None,
        prompt_embeds=randn(1, 77, 20), negative_prompt_embeds=randn(1, 77, 20, seed=1),
    )
    assert error(*text_to_image(SMALL, call)) <= BOUND


def test_pixels():
    ours, official = text_to_image(SMALL, output_type="pt")
    assert ours.shape == (1, 3, HEIGHT, WIDTH)
    assert 0 < ours.mean() < 1 and ours.std() > 0.01
    assert error(ours, official) <= BOUND
    ours, official = text_to_image(SMALL, output_type="pil")
    assert np.array_equal(np.array(ours[0]), np.array(official[0]))


@pytest.mark.parametrize("config, strength, eta", [
    (SMALL, 0.85, 0.0), (SMALL_V, 0.55, 0.5), (SMALL_ZERO, 0.85, 0.0), (SMALL_ZERO, 1.0, 0.0),
    (SMALL, 0.1, 0.0),
], ids=NAMES.get)
def test_image_to_image(config, strength, eta):
    call = dict(image=image(), strength=strength, eta=eta, num_images_per_prompt=2)
    assert error(*both(
        StableDiffusionImg2ImgPipeline, config, call, count=2,
        ours=dict(width=WIDTH, height=HEIGHT),  # diffusers takes the size of the image
    )) <= BOUND


@pytest.mark.parametrize("strength, eta", [(1.0, 0.0), (0.75, 0.5)])
@pytest.mark.parametrize("config", [INPAINT, INPAINT_V, SMALL, SMALL_V], ids=[
    "9 channels eps", "9 channels v", "4 channels eps", "4 channels v"
])
def test_inpainting(config, strength, eta):
    call = dict(
        image=image(), mask_image=mask(), strength=strength, eta=eta, num_images_per_prompt=2,
        width=WIDTH, height=HEIGHT,
    )
    assert error(*both(
        StableDiffusionInpaintPipeline, config, call, count=2,
        # diffusers encodes as many images as it is given, minisd one for each seed.
        theirs=dict(image=[image()] * 2, mask_image=[mask()] * 2),
    )) <= BOUND
