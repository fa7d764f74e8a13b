"""Whole calls with every kind of sampler equal diffusers' pipelines in float64, to 1e-10: text to
image, image to image and inpainting, on levels that both sides have under one name."""

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from official_samplers import default, official
from reference_models import SMALL, SMALL_V, draw_noise_in_float32, error, official_pipeline
from small_models import small_model
from test_parity import HEIGHT, INPAINT, WIDTH, image, mask

# Our sampler, the spacing, diffusers' scheduler. Those with leading spacing begin at noise of
# variance 1 in both; so do the solvers that keep x itself.
PEERS = {
    "euler": ("leading", "EulerDiscreteScheduler"),
    "euler_a": ("leading", "EulerAncestralDiscreteScheduler"),
    "heun": ("leading", "HeunDiscreteScheduler"),
    "dpmpp_2m": ("trailing", "DPMSolverMultistepScheduler"),
    "unipc": ("trailing", "UniPCMultistepScheduler"),
}
KINDS = {
    "text to image": (StableDiffusionPipeline, {}),
    "image to image": (StableDiffusionImg2ImgPipeline, dict(image=image(), strength=0.6)),
    "inpainting": (StableDiffusionInpaintPipeline,
                   dict(image=image(), mask_image=mask(), strength=0.8)),
}
CALL = dict(prompt="a red heart", negative_prompt="two", num_inference_steps=6,
            guidance_scale=7.5, output_type="latent")


# The task decides where a call begins and what the UNet sees, v what it says: one task has it.
CASES = [*(pytest.param(SMALL, task, id=f"eps {task}") for task in KINDS),
         pytest.param(SMALL_V, "image to image", id="v image to image"),
         pytest.param(INPAINT, "inpainting", id="9 channels inpainting")]


@pytest.mark.parametrize("config, task", CASES)
@pytest.mark.parametrize("name", PEERS)
def test_whole_calls(name, config, task, monkeypatch):
    spacing, scheduler = PEERS[name]
    kind, call = KINDS[task]
    sd = small_model(config)
    size = {} if task == "image to image" else dict(width=WIDTH, height=HEIGHT)
    ours = sd(seed=7, sampler=name, spacing=spacing, width=WIDTH, height=HEIGHT, **CALL | call)
    pipeline = official_pipeline(kind, sd)
    before, theirs = pipeline.scheduler, official(
        scheduler, 6, timestep_spacing=spacing, prediction_type=config.schedule.prediction_type)
    draw_noise_in_float32(monkeypatch, type(theirs).step.__globals__)
    pipeline.scheduler = theirs
    try:
        with default(torch.float64):
            want = pipeline(generator=torch.Generator().manual_seed(7), **CALL | call, **size)
    finally:
        pipeline.scheduler = before
    assert error(ours.images, want.images) <= 1e-10 * max(1, want.images.abs().max().item())
