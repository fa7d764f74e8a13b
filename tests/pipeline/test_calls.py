"""What a call does with its arguments; bad ones are in refusals."""

import copy
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference_models import SMALL, small_model

from minisd import checks, request
from minisd.pipeline import StableDiffusion
from minisd.samplers import schedule

NAN, INF = float("nan"), float("inf")
IMAGE = Image.new("RGB", (64, 64))
SHAPE = (1, 4, 16, 16)


def test_the_signature_of_a_call_is_that_of_a_request():
    """Names, order, defaults and types: help() and editors show what is checked."""
    called = [*inspect.signature(StableDiffusion.__call__).parameters.values()][1:]
    asked = [*inspect.signature(request.Request).parameters.values()]
    for a, b in zip(called, asked, strict=True):
        assert (a.name, a.default, a.annotation) == (b.name, b.default, b.annotation)
        assert a.kind == inspect.Parameter.KEYWORD_ONLY or a.name == "prompt"


def test_an_unknown_argument_is_a_type_error():
    for call in (lambda **more: small_model(SMALL)("a", **more), request.Request):
        with pytest.raises(TypeError, match="unexpected keyword argument 'scheduler'"):
            call(scheduler="ddim")


@pytest.mark.parametrize("scale", [0.0, -3.0, 1.0, 1e3])
def test_any_finite_guidance_scale_follows_the_formula(scale):
    sd = small_model(SMALL)
    x = torch.randn(SHAPE, dtype=torch.float64)
    call = dict(latents=x, num_inference_steps=1, seed=0, output_type="latent")
    c, u = (sd.text_encoder(sd.tokenizer([text])) for text in ("a", ""))
    t = torch.tensor([1])
    e_c, e_u = sd.unet(x, t, c), sd.unet(x, t, u)
    last, a = schedule.alphas_cumprod(sd.config.schedule)[:2].tolist()
    e = e_u + scale * (e_c - e_u)
    x0 = (x - (1 - a) ** 0.5 * e) / a**0.5
    want = last**0.5 * x0 + (1 - last) ** 0.5 * e
    got = sd("a", guidance_scale=scale, **call).images
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_exactly_as_many_unet_calls_as_steps(monkeypatch):
    sd, calls = small_model(SMALL), []
    monkeypatch.setattr(sd.unet, "forward", lambda x, t, c: calls.append(int(t[0])) or x)
    for steps in (1, 2, 3, 7, 999, 1000):
        calls.clear()
        sd("a", num_inference_steps=steps, seed=0, output_type="latent")
        assert len(calls) == len(set(calls)) == steps
        assert calls == sorted(calls, reverse=True) and 0 <= calls[-1] <= calls[0] <= 999


def test_without_a_seed_one_is_drawn_and_reported():
    sd = small_model(SMALL)
    call = dict(num_inference_steps=1, output_type="latent")
    first, second = sd("a", **call), sd("a", **call)
    assert first.seeds != second.seeds
    assert torch.equal(sd("a", seed=first.seeds[0], **call).images, first.images)


def test_seeds_and_order_of_a_batch():
    sd = small_model(SMALL)
    call = dict(num_inference_steps=2, output_type="latent", eta=1.0)
    batch = sd(["a", "b"], num_images_per_prompt=2, seed=5, **call)
    assert batch.seeds == [5, 6, 7, 8]
    assert [s["prompt"] for s in batch.settings] == ["a", "a", "b", "b"]
    for i, prompt in enumerate("aabb"):
        alone = sd(prompt, seed=5 + i, **call).images
        torch.testing.assert_close(batch.images[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_the_last_seed_and_the_timesteps_of_a_strength():
    plan = request.Request(prompt=["a", "b"], seed=2**32 - 2, image=IMAGE, strength=0.79,
                           num_inference_steps=10).plan(SMALL)
    assert [g.initial_seed() for g in plan.generators] == [2**32 - 2, 2**32 - 1]
    assert [level.t for level in plan.ladder.levels] == [601, 501, 401, 301, 201, 101, 1, None]


@pytest.mark.parametrize("cudas, mps, chosen", [
    (2, True, "cuda:0"), (0, True, "mps:0"), (0, False, "cpu"),
])
def test_auto_takes_the_best_available_device(cudas, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cudas)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert checks.device("auto") == torch.device(chosen)


def test_callbacks_see_and_change_the_latents():
    sd, seen = small_model(SMALL), []

    def callback(model, step, t, values):
        assert model is sd
        seen.append((step, t))
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else None

    out = sd("a", num_inference_steps=2, seed=0, output_type="latent",
             callback_on_step_end=callback)
    assert seen == [(0, 501), (1, 1)]
    assert out.images.abs().max() == 0


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()])
def test_an_error_of_a_callback_is_raised_and_the_model_unchanged(error):
    sd, call = small_model(SMALL), dict(num_inference_steps=2, seed=0, output_type="latent")
    before = sd("a", **call).images

    def callback(*_):
        raise error

    with pytest.raises(type(error)) as caught:
        sd("a", callback_on_step_end=callback, **call)
    assert caught.value is error
    assert torch.equal(sd("a", **call).images, before)


def test_a_tokenizer_too_large_for_the_text_encoder():
    sd = small_model(SMALL)
    few = replace(sd.config, text=replace(sd.config.text, vocab_size=1000))
    other = StableDiffusion(few, sd.tokenizer, sd.text_encoder, sd.unet, sd.vae)
    with pytest.raises(ValueError, match=r"has \(tokens, length\) \(49408, 77\).* \(1000, 77\)"):
        other("a", num_inference_steps=1)


def test_noise_is_drawn_in_float32_with_any_default_dtype():
    sd = small_model(SMALL)
    call = dict(num_inference_steps=1, seed=0, output_type="latent")
    first = sd("a", **call).images
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sd("a", **call).images, first)
    finally:
        torch.set_default_dtype(torch.float32)


def test_output_types_agree():
    sd = small_model(SMALL)
    pt, array, pil, latent = (
        sd("a", num_inference_steps=1, seed=0, output_type=kind).images
        for kind in ("pt", "np", "pil", "latent")
    )
    assert pt.shape == (1, 3, 64, 64) and 0 <= pt.min() and pt.max() <= 1
    assert array.shape == (1, 64, 64, 3) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    rounded = pt.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.asarray(pil[0]), rounded[0])
    assert latent.shape == SHAPE


def test_inpainting_keeps_unmasked_pixels():
    sd = small_model(SMALL)
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    out = sd("a", image=image, mask_image=mask, num_inference_steps=3, seed=0).images[0]
    given, got = np.asarray(image), np.asarray(out)
    assert np.array_equal(got[:, 32:], given[:, 32:])
    assert not np.array_equal(got[:, :32], given[:, :32])


def test_an_overflow_names_its_stage(monkeypatch):
    sd = small_model(SMALL)
    for part, stage in ((sd.unet, "UNet"), (sd.vae, "VAE")):
        with monkeypatch.context() as patched:
            method = "decode" if part is sd.vae else "forward"
            patched.setattr(part, method, lambda x, *_: torch.full_like(x, NAN))
            with pytest.raises(ArithmeticError, match=stage):
                sd("a", num_inference_steps=1, seed=0)


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32():
    small = small_model(SMALL)
    parts = (copy.deepcopy(part).half() for part in (small.text_encoder, small.unet, small.vae))
    sd = StableDiffusion(SMALL, small.tokenizer, *parts)
    sd.vae.decoder.conv_norm_out.weight.fill_(60_000)  # past float16's largest, 65504
    call = dict(num_inference_steps=1, seed=0)
    latent = sd("a", output_type="latent", **call).images
    assert latent.isfinite().all() and not sd.vae.decode(latent.half()).isfinite().all()
    whole = copy.deepcopy(sd.vae).float().decode(latent)
    assert torch.equal(sd("a", output_type="pt", **call).images, ((whole + 1) / 2).clamp(0, 1))
    assert {p.dtype for p in sd.vae.parameters()} == {torch.float16}
    sd.vae.decoder.conv_norm_out.weight.fill_(NAN)
    with pytest.raises(ArithmeticError, match="VAE gave values that are not finite, in float32 t"):
        sd("a", **call)
