"""The x4 upscaler equals diffusers' pipeline, but for what that does wrong; and its tiles."""

import copy
from unittest.mock import patch

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from reference_models import SMALL, SMALL_X4, draw_noise_in_float32, error, randn, small_model
from upscalers import image, official_upscaler

import minisd
from minisd.backends import Backend
from minisd.models.ops import REFERENCE, TORCH
from minisd.pipeline import StableDiffusion
from minisd.request import Request

BOUND = 1e-10
WIDTH, HEIGHT = 20, 12  # multiples of 4, because diffusers resizes others
CALL = dict(prompt="a red heart", negative_prompt="blurry, two hearts", num_inference_steps=10,
            output_type="latent")


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    draw_noise_in_float32(monkeypatch)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def both(call=None, seeds=(7,), ops=(), theirs=None):
    """The results of minisd and diffusers; ``theirs`` are arguments of diffusers only."""
    sd = small_model(SMALL_X4, *ops)
    call = CALL | {"image": image(WIDTH, HEIGHT)} | (call or {})
    ours = sd(seed=list(seeds), **call).images
    official = official_upscaler(sd)(generator=generators(*seeds), **call | (theirs or {}))
    return ours, official.images


OPTIONS = {
    "default": {},
    "no guidance": dict(guidance_scale=1.0, negative_prompt=None),
    "no negative prompt": dict(negative_prompt=None),
    "no prompt": dict(prompt="", negative_prompt=None),
    "noise level 0": dict(noise_level=0),
    "the most noise": dict(noise_level=350),
    "the noise of DDPM": dict(eta=1.0),
    "the smallest image": dict(image=image(4, 4)),
    "prompts": dict(prompt=["a heart", "a boat"], negative_prompt=["a", "b"]),
    "pixels": dict(output_type="pt", num_inference_steps=2),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_parity(option):
    call, theirs = OPTIONS[option], {}
    if option == "prompts":  # diffusers takes an image for each
        theirs = dict(image=[image(WIDTH, HEIGHT)] * 2)
    assert error(*both(call, range(7, 8 + bool(theirs)), theirs=theirs)) <= BOUND


def test_parity_of_the_formulas():
    assert error(*both(ops=[REFERENCE])) <= BOUND


def test_latents_are_given():
    assert error(*both(dict(latents=randn(1, 4, HEIGHT, WIDTH)))) <= BOUND


def test_the_defaults_are_diffusers_own():
    r = Request(image=image(WIDTH, HEIGHT)).plan(SMALL_X4)
    assert (r.prompts, r.num_inference_steps, r.guidance_scale, r.noise_level) == ([""], 75, 9, 20)
    assert (r.width, r.height, r.chosen.sampler) == (4 * WIDTH, 4 * HEIGHT, "ddim")


# --- what diffusers does that is not copied ------------------------------------------------------


def test_any_size_is_taken_as_it_is():
    """diffusers shrinks images to multiples of 4."""
    odd, sd = image(13, 7), small_model(SMALL_X4)
    ours, shrunk = both(dict(image=odd))
    assert ours.shape == (1, 4, 7, 13) and shrunk.shape == (1, 4, 4, 12)
    with patch.object(official_upscaler(sd), "image_processor", VaeImageProcessor(do_resize=False)):
        assert error(*both(dict(image=odd))) <= BOUND


def test_several_images_each_with_its_own_noise():
    """diffusers gives all images of a prompt the same noisy image; here a seed is an image's own,
    however many are drawn with it. Of one image each they are equal, which `test_parity` shows."""
    call = dict(num_images_per_prompt=2, num_inference_steps=2)
    sd = small_model(SMALL_X4)
    ours, theirs = both(call, seeds=(7, 8))
    assert error(ours[:1], theirs[:1]) <= BOUND < 1e-3 < error(ours[1:], theirs[1:])
    alone = sd(seed=8, **CALL | {"image": image(WIDTH, HEIGHT), "num_inference_steps": 2}).images
    assert error(ours[1:], alone) <= BOUND


def test_several_prompts_and_images_of_diffusers_are_mixed_up():
    """It orders two images a, b, a, b, and two prompts a, a, b, b: of the first prompt's two images
    the second is made of the second prompt's. Here a call has one image."""
    sd, (a, b) = small_model(SMALL_X4), (image(8, 8), image(8, 8, seed=6))
    latents = randn(4, 4, 8, 8)
    call = CALL | dict(num_inference_steps=2, negative_prompt=None)
    theirs = official_upscaler(sd)(**call | dict(
        prompt=["a heart", "a boat"], image=[a, b], num_images_per_prompt=2, latents=latents,
        generator=generators(7, 8))).images

    def ours(small, seed):
        return sd(**call | dict(prompt="a heart", image=small, latents=latents[1:2]),
                  generator=generators(seed)).images

    assert error(theirs[1:2], ours(b, 8)) <= BOUND < 1e-3 < error(theirs[1:2], ours(a, 7))


# --- images, sizes and limits --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_any_mode_becomes_rgb(mode):
    """An alpha channel would be an eighth channel of the UNet's seven."""
    small = image(9, 5).convert(mode)
    call = dict(num_inference_steps=1, guidance_scale=1.0, seed=0, output_type="latent")
    sd = small_model(SMALL_X4)
    assert torch.equal(sd(image=small, **call).images,
                       sd(image=small.convert("RGB"), **call).images)


@pytest.mark.parametrize("size", [(1, 1), (9, 5), (8, 1)])
def test_any_size(size):
    out = small_model(SMALL_X4)(image=image(*size), num_inference_steps=1, seed=0)
    assert out.images[0].size == (4 * size[0], 4 * size[1])
    assert out.settings[0]["noise_level"] == 20


@pytest.mark.parametrize("call, words", [
    ({}, r"^this is an upscaling model: give it image \(--image\)$"),
    (dict(image=Image.new("RGB", (2049, 5))), r"^image of 2049x5 pixels: an upscaling model makes "
     "images 4 times as wide and high as the given one, and 8192 pixels a side at most$"),
    (dict(image=image(4, 4), noise_level=351), "^noise_level must be an integer from 0 to 350, "),
    (dict(image=image(4, 4), noise_level=-1), "^noise_level must be an integer from 0 to 350, "),
    (dict(image=image(4, 4), width=64), "^height and width must not be given: an upscaling "),
    (dict(image=image(4, 4), strength=0.5), r"takes no strength \(--strength\)"),
    (dict(image=image(4, 4), mask_image=image(4, 4)), r"takes no mask_image \(--mask\)"),
])
def test_what_is_rejected(call, words):
    with pytest.raises(ValueError, match=words):
        small_model(SMALL_X4)(**call)


# --- repacked, in tiles, in half precision -------------------------------------------------------


def again(config=SMALL_X4, **backend):
    """The small model, to be changed."""
    m = small_model(config)
    return StableDiffusion(config, m.tokenizer, m.text_encoder, m.unet, copy.copy(m.vae),
                           Backend(TORCH, **backend))


SOME = dict(image=image(13, 9), num_inference_steps=3, seed=0, eta=0.5, output_type="latent")


def test_the_repacked_model_is_the_same():
    exact = small_model(SMALL_X4)(**SOME | {"output_type": "pt"}).images
    assert error(again(fused=True)(**SOME | {"output_type": "pt"}).images, exact) <= BOUND


@pytest.mark.parametrize("fused", [False, True])
def test_coverage(fused):
    """Where only the prompt is read, both attentions of a block have its 77 keys."""
    calls = again(fused=fused).coverage()
    assert {call.took for call in calls} == {"torch"}
    keys = [call.sizes.split("x")[-1] for call in calls if call.function == "attention"]
    # Two levels of 2 + 3 blocks, and that at an eighth of the side and the middle.
    assert keys.count("77") == 2 * 10 + 6 and keys.count("4") == 6


def test_tiles_are_cut_from_one_latent():
    """Of a function of each cell alone, tiles make exactly the whole."""
    def cells(x, t, context, class_vector):
        seen.append(x.shape[2:])
        assert x.shape[1] == 7 and class_vector.tolist() == [20, 20] and t.shape == (2,)
        return x[:, :4] * 0.3 + x[:, 4:5].sin() + context.mean(dim=(1, 2))[:, None, None, None]

    sd, seen = again(), []
    sd.unet = cells
    whole = sd(**SOME).images
    assert set(seen) == {(9, 13)}
    seen.clear()
    sd.vae.tile = 8
    assert error(sd(**SOME).images, whole) <= 1e-12
    assert set(seen) == {(8, 8)} and len(seen) == 3 * 2 * 2


def test_larger_tiles_are_closer_and_none_is_exact():
    sd, whole, errors = again(), small_model(SMALL_X4)(**SOME).images, []
    for sd.vae.tile in (13, 12, 8):
        errors.append(error(sd(**SOME).images, whole))
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5 * whole.abs().max()


def test_tiles_of_the_repacked_model():
    sd, fused = again(), again(fused=True)
    sd.vae.tile = fused.vae.tile = 8
    call = SOME | dict(output_type="pt")
    assert error(fused(**call).images, sd(**call).images) <= BOUND


def test_other_models_are_drawn_whole():
    """A tile alone does not say what belongs there."""
    sd = again(SMALL)
    call = dict(prompt="a", num_inference_steps=1, seed=0, output_type="latent")
    sd.vae.tile = 2
    assert torch.equal(sd(**call).images, small_model(SMALL)(**call).images)


@pytest.mark.parametrize("dtype, fused", [("float16", True), ("bfloat16", False)])
def test_the_vae_stays_in_float32(dtype, fused, tmp_path):
    small_model(SMALL_X4).save(tmp_path / "x4")
    sd = minisd.load(tmp_path / "x4", dtype=dtype, device="cpu", fused=fused)
    call = dict(image=image(8, 8), num_inference_steps=2, seed=0, output_type="pt")
    loaded = sd(**call).images
    for model in (sd, copy.deepcopy(small_model(SMALL_X4)).to(dtype=dtype)):
        assert str(model.dtype) == f"torch.{dtype}"
        assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
        assert {p.dtype for p in model.text_encoder.parameters()} == {model.dtype}
        assert error(model(**call).images, loaded) <= 0.05
    assert {p.dtype for p in sd.to(dtype="float64").vae.parameters()} == {torch.float64}
