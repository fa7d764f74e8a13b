"""Models of few steps: latent consistency models, and those made like SD-Turbo; and the call as a
generator of its steps. Equality with diffusers in float64."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)
from reference_models import (
    SMALL,
    SMALL_V,
    SMALL_ZERO,
    draw_noise_in_float32,
    error,
    official_pipeline,
    small_model,
)

import minisd
from minisd.backends import Backend
from minisd.checkpoints.checkpoint import open_checkpoint
from minisd.checkpoints.recognise import resolve
from minisd.checkpoints.scheduler_config import CLASSES
from minisd.config import SD1, SD2
from minisd.models.ops import TORCH
from minisd.pipeline import StableDiffusion

LCM = replace(
    SMALL, unet=replace(SMALL.unet, time_cond_proj_dim=12), num_inference_steps=4,
    guidance_scale=8.5,
    schedule=replace(SMALL.schedule, sampler="lcm", timestep_spacing="lcm"))
TURBO = replace(SMALL, num_inference_steps=1, guidance_scale=1.0, schedule=replace(
    SMALL.schedule, sampler="euler", timestep_spacing="trailing"))
SIZE = dict(width=24, height=16)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    draw_noise_in_float32(monkeypatch, LCMScheduler.step.__globals__,
                          LatentConsistencyModelPipeline.prepare_latents.__globals__)


def fused(sd: StableDiffusion) -> StableDiffusion:
    return StableDiffusion(sd.config, sd.tokenizer, sd.text_encoder, sd.unet, sd.vae,
                           Backend(TORCH, fused=True))


@pytest.mark.parametrize("steps, scale", [(4, 8.5), (1, 8.5), (8, 1.0)])
def test_latent_consistency_models(steps, scale):
    """diffusers' boundary weights are float32: 5e-6 of the largest value."""
    sd = small_model(LCM)
    pipeline = LatentConsistencyModelPipeline(
        scheduler=LCMScheduler(**BETAS), requires_safety_checker=False,
        **{name: part for name, part in official_pipeline(
            StableDiffusionPipeline, sd).components.items()
           if name not in ("scheduler", "image_encoder")})
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline("a heart", num_inference_steps=steps, guidance_scale=scale,
                      generator=torch.Generator().manual_seed(7), output_type="latent",
                      **SIZE).images
    for model in (sd, fused(sd)):
        ours = model("a heart", num_inference_steps=steps, guidance_scale=scale, seed=7,
                     output_type="latent", **SIZE).images
        assert error(ours, theirs) <= 5e-6 * theirs.abs().max()


def test_a_latent_consistency_model_is_saved_and_loaded(tmp_path):
    sd = small_model(LCM)
    sd.save(tmp_path / "model")
    again = minisd.load(tmp_path / "model", device="cpu", dtype="float64")
    assert (again.config.num_inference_steps, again.config.guidance_scale) == (4, 8.5)
    assert again.config.schedule.sampler == "lcm" and again.config.unet == LCM.unet
    calls = [model("a", seed=1, output_type="latent", **SIZE) for model in (sd, again)]
    assert error(*(call.images for call in calls)) <= 1e-12
    assert calls[0].settings[0]["sampler"] == "lcm"
    sd.save(tmp_path / "model.safetensors")
    single = minisd.load(tmp_path / "model.safetensors", config=tmp_path / "model", device="cpu",
                         dtype="float64")
    assert error(single("a", seed=1, output_type="latent", **SIZE).images,
                 calls[0].images) <= 1e-12


def test_it_is_told_the_scale_and_needs_no_negative_prompt():
    sd = small_model(LCM)
    images = [sd("a", seed=1, output_type="latent", guidance_scale=scale, **SIZE).images
              for scale in (1.0, 8.5)]
    assert error(*images) > 1e-3
    with pytest.warns(UserWarning, match="negative prompt has no effect: this model is told"):
        other = sd("a", negative_prompt="b", seed=1, output_type="latent", **SIZE).images
    assert torch.equal(other, images[1])


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo(steps):
    """Euler, trailing, without guidance: diffusers takes any scale up to 1 for that."""
    sd = small_model(TURBO)
    pipeline = official_pipeline(StableDiffusionPipeline, sd)
    before = pipeline.scheduler
    pipeline.scheduler = EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS)
    try:
        generator = torch.Generator().manual_seed(7)
        start = torch.randn(1, 4, 4, 6, generator=generator).double()
        theirs = pipeline("a heart", num_inference_steps=steps, guidance_scale=0.0,
                          latents=start, output_type="latent", **SIZE).images
    finally:
        pipeline.scheduler = before
    # Its x begins at sigma noise, not at noise: SPACINGS that begin at 999 leave a trace of x_0.
    first = sd("a heart", num_inference_steps=steps, output_type="latent",
               latents=start * (1 - 0.0046601) ** 0.5, **SIZE).images
    assert error(first, theirs) <= 1e-4


def test_turbo_by_its_scheduler(tmp_path):
    """It has the sizes of Stable Diffusion 2; another model with that scheduler is none."""
    turbo = resolve(SD2, TURBO.schedule)
    assert (turbo.name, turbo.num_inference_steps, turbo.guidance_scale) == ("SD-Turbo", 1, 1.0)
    small_model(TURBO).save(tmp_path / "model")
    config = open_checkpoint(tmp_path / "model").config
    assert config.schedule == TURBO.schedule and config.num_inference_steps == 50
    assert resolve(SD1, TURBO.schedule).num_inference_steps == 50


SAVED = {"ddim": "leading", "plms": "leading", "euler": "linspace", "euler_a": "trailing",
         "dpmpp_2m": "karras", "dpmpp_2m_sde": "exponential", "unipc": "karras", "heun": "linspace",
         "lms": "karras", "dpm2": "linspace", "ddpm": "leading", "lcm": "lcm", "tcd": "lcm"}


@pytest.mark.parametrize("sampler", SAVED)
def test_the_sampler_of_a_saved_folder(sampler, tmp_path):
    """Read again here, and by diffusers under the class of that sampler."""
    config = replace(SMALL, schedule=replace(
        SMALL.schedule, sampler=sampler, timestep_spacing=SAVED[sampler]))
    m = small_model(SMALL)
    StableDiffusion(config, m.tokenizer, m.text_encoder, m.unet, m.vae).save(tmp_path / "model")
    again = open_checkpoint(tmp_path / "model").config.schedule
    assert again == config.schedule
    if sampler == "lms":  # which needs scipy there
        return
    theirs = StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", requires_safety_checker=False, text_encoder=None, tokenizer=None,
        unet=None, vae=None).scheduler
    assert CLASSES[type(theirs).__name__][0] == sampler.removesuffix("_sde")
    theirs.set_timesteps(4)


@pytest.mark.parametrize("fields, words", [
    ({"_class_name": "ScoreSdeVeScheduler"}, "a sampler that minisd does not have; it takes ddim"),
    ({"_class_name": ["DDIMScheduler"]}, "a sampler that minisd does not have; it takes ddim")])
def test_a_sampler_that_minisd_does_not_have(fields, words, tmp_path):
    small_model(SMALL).save(tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.warns(UserWarning, match=words):
        assert open_checkpoint(tmp_path / "model").config.schedule.sampler == "ddim"


# --- guidance rescale ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, SMALL_V], ids=["eps", "v"])
def test_guidance_rescale(config):
    sd = small_model(config)
    call = dict(prompt=["a heart", "b"], num_inference_steps=3, guidance_rescale=0.7,
                output_type="latent", **SIZE)
    theirs = official_pipeline(StableDiffusionPipeline, sd)(
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **call).images
    assert error(sd(seed=[3, 4], **call).images, theirs) <= 1e-10
    plain = sd(seed=[3, 4], **call | dict(guidance_rescale=0.0)).images
    assert error(plain, theirs) > 1e-3


# --- the call as a generator ---------------------------------------------------------------------


def test_a_stream_is_the_call():
    sd = small_model(SMALL)
    call = dict(num_inference_steps=4, seed=0, output_type="latent", sampler="heun", **SIZE)
    steps = list(sd.stream("a", **call))
    assert [step.i for step in steps] == list(range(7))
    assert [step.t for step in steps] == [999, 666, 666, 333, 333, 0, 0]
    out = sd("a", **call)
    assert torch.equal(steps[-1].latents, out.images) and torch.equal(
        steps[-1].output().images, out.images)
    assert torch.equal(steps[2].output().images, steps[2].x0)
    assert steps[-1].output().settings == out.settings


def test_a_stream_checks_at_once_and_may_be_left(monkeypatch):
    sd, calls = small_model(SMALL), []
    forward = sd.unet.forward
    with pytest.raises(ValueError, match="num_inference_steps"):
        sd.stream("a", num_inference_steps=0)
    with pytest.raises(TypeError):
        sd.stream("a", steps=3)
    monkeypatch.setattr(sd.unet, "forward", lambda *args: calls.append(1) or forward(*args))
    with torch.enable_grad():
        for step in sd.stream("a", num_inference_steps=9, seed=0, **SIZE):
            assert torch.is_grad_enabled() and not step.latents.requires_grad
            if step.i == 1:
                break
    assert len(calls) == 2


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (dict(sampler="DPM"), "sampler must be one of ddim, euler"), (dict(sampler=3), "sampler must"),
    (dict(spacing="even"), "spacing must be one of leading"), (dict(eta=2), "eta must be"),
    (dict(guidance_rescale=1.5), "guidance_rescale must be"),
    (dict(spacing="lcm", num_inference_steps=51), "at most 50 with spacing 'lcm'")])
def test_what_is_rejected(call, words):
    with pytest.raises(ValueError, match=words):
        small_model(SMALL)("a", **call)


def test_noise_alone_has_its_samplers():
    sd = small_model(SMALL_ZERO)
    call = dict(num_inference_steps=3, seed=0, output_type="latent", **SIZE)
    for name in ("heun", "lms", "plms", "dpm2", "dpmpp_2s"):
        with pytest.raises(ValueError, match="cannot begin at noise alone"):
            sd("a", sampler=name, **call)
        sd("a", sampler=name, spacing="karras", **call)
    # A model of trailing timesteps keeps them whatever the sampler.
    assert sd("a", sampler="unipc", **call).settings[0]["spacing"] == "trailing"


def test_guidance_rescale_where_it_has_no_effect():
    with pytest.warns(UserWarning, match="guidance_rescale has no effect"):
        small_model(SMALL)("a", guidance_scale=1.0, guidance_rescale=0.7, num_inference_steps=2,
                           seed=0, **SIZE)


def test_eta_where_it_has_no_effect():
    with pytest.warns(UserWarning, match="eta has no effect with the sampler heun"):
        small_model(SMALL)("a", sampler="heun", eta=1.0, num_inference_steps=2, seed=0, **SIZE)
