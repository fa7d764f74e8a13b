"""Stable unCLIP, from an image and a prompt to latents: equal to diffusers, but for its faults.

Every case runs both with the same weights and seeds, in float64.
"""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from reference_models import (
    SMALL,
    SMALL_UNCLIP,
    draw_noise_in_float32,
    error,
    official_unclip,
    randn,
    small_model,
)

from minisd import images
from minisd.backends import Backend
from minisd.errors import ImageError
from minisd.models.ops import TORCH
from minisd.request import Request

BOUND = 1e-10
WIDTH, HEIGHT = 40, 24
CALL = dict(num_inference_steps=10, width=WIDTH, height=HEIGHT, output_type="latent")
EMBEDS = randn(2, 16, seed=6)
PICTURE = Image.fromarray((255 * randn(31, 47, 3, seed=5).sigmoid()).byte().numpy())
SEEN = images.to_clip(PICTURE, SMALL_UNCLIP.vision.image_size)


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    draw_noise_in_float32(monkeypatch)


def sd():
    return small_model(SMALL_UNCLIP)


def theirs(seeds=(7,), **call):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return official_unclip(sd())(
        generator=generators if len(seeds) > 1 else generators[0], **CALL | call).images


@pytest.mark.parametrize("call", [
    dict(),
    dict(prompt="in the style of a woodcut", negative_prompt="blurry"),
    dict(prompt="a heart", noise_level=50, guidance_scale=1.0),
    dict(prompt="a heart", negative_prompt="two hearts", noise_level=999, guidance_scale=3.5),
    dict(noise_level=999, eta=1.0),
], ids=str)
def test_an_image_and_its_embedding(call):
    """diffusers is given the pixels that CLIP sees, because its own are of float32."""
    official = theirs(image=SEEN, **{"noise_level": 0} | call)
    assert error(sd()(image=PICTURE, seed=7, **CALL | call).images, official) <= BOUND
    embeds = sd().vision(PICTURE)
    assert error(sd()(image_embeds=embeds[0], seed=7, **CALL | call).images, official) <= BOUND
    assert error(theirs(image_embeds=embeds, **call), official) <= BOUND


def test_from_the_picture_itself():
    """Its preprocessing differs in the last bits of float32."""
    call = dict(prompt="a heart", noise_level=20)
    ours = sd()(image=PICTURE, seed=7, **CALL | call).images
    assert error(ours, theirs(image=PICTURE, **call)) <= 1e-4


def test_prompts_and_embeddings_in_batches():
    call = dict(prompt=["a heart", "a boat"], negative_prompt=["a", "b"], image_embeds=EMBEDS,
                noise_level=100, eta=0.5)
    assert error(sd()(seed=7, **CALL | call).images, theirs((7, 8), **call)) <= BOUND


def test_a_mixture_of_images():
    a, b = sd().vision([PICTURE, PICTURE.rotate(90)])
    ours = sd()(image_embeds=0.7 * a + 0.3 * b, seed=7, **CALL).images
    official = theirs(image_embeds=(0.7 * a + 0.3 * b)[None])
    assert error(ours, official) <= BOUND


def test_the_default_call_is_that_of_diffusers():
    plan = Request(image_embeds=EMBEDS[0]).plan(SMALL_UNCLIP)
    assert (plan.num_inference_steps, plan.guidance_scale, plan.noise_level) == (20, 10.0, 0)
    assert (plan.prompts, plan.width, plan.height) == ([""], 64, 64)  # whatever the image's size


@pytest.mark.parametrize("call, count", [
    (dict(image_embeds=EMBEDS), 2), (dict(image_embeds=EMBEDS, num_images_per_prompt=2), 4),
    (dict(image_embeds=EMBEDS, prompt=["a", "b"]), 2), (dict(image=PICTURE), 1),
    (dict(image_embeds=EMBEDS, prompt="a", num_images_per_prompt=2), 2),
    (dict(image_embeds=EMBEDS[:1], prompt=["a", "b"], num_images_per_prompt=2), 4),
    (dict(image_embeds=EMBEDS[0], prompt_embeds=randn(3, 77, 20)), 3),
], ids=lambda value: str(value)[:60])
def test_how_many_images_there_are(call, count):
    plan = Request(**call).plan(SMALL_UNCLIP)
    assert plan.shape[0] == count
    if plan.image_embeds is not None:
        assert len(plan.image_embeds) in (1, count)


def test_each_row_goes_with_its_prompt():
    plan = Request(image_embeds=EMBEDS, num_images_per_prompt=2).plan(SMALL_UNCLIP)
    assert torch.equal(plan.image_embeds, EMBEDS[[0, 0, 1, 1]])


def test_seeds_make_the_same_image_alone_and_in_a_batch():
    call = dict(image=PICTURE, noise_level=500, eta=1.0)
    together = sd()(seed=7, num_images_per_prompt=2, **CALL | call).images
    for i in range(2):
        assert error(sd()(seed=7 + i, **CALL | call).images[0], together[i]) <= BOUND
    assert error(together[:1], theirs(**call | {"image": SEEN})) <= BOUND


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_fused_model_draws_the_same(scale):
    """And the class vectors, which differ from row to row, go with their images."""
    pytest.importorskip("triton")
    fused = copy.copy(sd())
    fused.backend = Backend(TORCH, fused=True, asked=(TORCH, True))
    assert fused._fused() is not None
    call = dict(image_embeds=EMBEDS, num_images_per_prompt=2, noise_level=300, eta=0.5,
                guidance_scale=scale, seed=7)
    assert error(fused(**CALL | call).images, sd()(**CALL | call).images) <= BOUND
    assert {call.took for call in fused.coverage()} == {"torch"}


# --- what diffusers does otherwise


def told(**call):
    """The class vectors that its UNet is told, without guidance."""
    pipeline, seen = official_unclip(sd()), []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    try:
        pipeline(guidance_scale=1.0, noise_level=500, **CALL | {"num_inference_steps": 1} | call)
    finally:
        hook.remove()
    return seen[0]


def test_its_images_share_one_noised_embedding():
    """So all variations of a high noise level are alike; here each draws its own."""
    a, b = told(image=SEEN, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a, b)


def test_its_list_of_generators_leaves_all_but_the_first_out():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pair = told(image=SEEN, num_images_per_prompt=2, generator=generators)
    one = told(image=SEEN, generator=torch.Generator().manual_seed(0))
    assert error(pair, one.expand(2, -1)) <= BOUND


@pytest.mark.parametrize("seeds, call", [
    ((7, 8), dict(prompt=["a", "b"], image_embeds=EMBEDS[:1])), ((7,), dict(image_embeds=EMBEDS)),
], ids=["one for two prompts", "two without a prompt"])
def test_its_embeddings_must_be_as_many_as_the_prompts(seeds, call):
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(seeds, **call)
    assert len(sd()(seed=7, **CALL | call | {"num_inference_steps": 1}).images) == 2


# --- what is rejected


@pytest.mark.parametrize("call, words", [
    (dict(), r"^this is an image variation model: give it image or image_embeds \(--image\)$"),
    (dict(image=PICTURE, image_embeds=EMBEDS), "^give either image or image_embeds, not both$"),
    (dict(image=PICTURE, strength=0.5), r"^this is an image variation.*no strength \(--strength\)"),
    (dict(image=PICTURE, mask_image=PICTURE), "takes no mask_image"),
    (dict(image=PICTURE, noise_level=1000), "^noise_level must be an integer from 0 to 999"),
    (dict(image_embeds=EMBEDS[:, :5]), r"^image_embeds must be \(images, 16\), not \(2, 5\)$"),
    (dict(image_embeds=EMBEDS[:0]), "^image_embeds must be"),
    (dict(image_embeds=EMBEDS[None]), "^image_embeds must be"),
    (dict(image_embeds=EMBEDS / 0), "^image_embeds holds values that are not finite$"),
    (dict(image_embeds=EMBEDS, prompt=["a", "b", "c"]), "^there are 3 images but 2 image_em"),
])
def test_what_is_rejected(call, words):
    with pytest.raises(ValueError, match=words):
        sd()(**call)


def test_rows_of_embeddings_divide_the_images_but_are_not_one_each():
    with pytest.raises(ValueError, match="^there are 6 images but 2 image_embeds: give one for "):
        sd()(["a", "b", "c"], num_images_per_prompt=2, image_embeds=EMBEDS)


def test_an_image_does_not_say_how_large():
    assert sd()(image=PICTURE, **CALL | {"height": None, "width": None}).images.shape[2:] == (
        small_model(SMALL_UNCLIP).config.sample_size // 4,) * 2


def test_a_model_whose_statistics_were_taken_away():
    bare = copy.copy(sd())
    bare.image_normalizer = None
    with pytest.raises(ValueError, match="^the model's image_normalizer was taken away$"):
        bare.stream(image_embeds=EMBEDS[:1], noise_level=5)


def test_there_is_no_image():
    with pytest.raises(ValueError, match="^there is no image to look at$"):
        sd().vision([])


def test_an_absurdly_long_image_is_rejected_before_any_work(monkeypatch):
    monkeypatch.setattr(sd().text_encoder, "forward", lambda *_: pytest.fail("a model was run"))
    with pytest.raises(ImageError, match="2049x1 pixels is too long for CLIP"):
        sd()("a", image=Image.new("L", (2049, 1)))


@pytest.mark.parametrize("value", [EMBEDS.numpy(), EMBEDS.long(), 3, [EMBEDS]])
def test_what_are_no_embeddings(value):
    with pytest.raises(TypeError, match="^image_embeds must be a floating-point tensor$"):
        sd()(image_embeds=value)


def test_another_model_takes_and_gives_no_embeddings():
    other = small_model(SMALL)
    with pytest.raises(ValueError, match="text to image model, which takes no image_embeds$"):
        other("a", image_embeds=EMBEDS)
    with pytest.raises(ValueError, match="has no image encoder"):
        other.vision(PICTURE)


# --- sd.vision


def test_vision_takes_what_images_are_given_as(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    pixels = np.array(PICTURE, np.float64)[None] / 255
    want = sd().vision(PICTURE)
    assert want.shape == (1, 16) and want.dtype == torch.float64
    assert abs(want.norm().item() - 1) > 0.01  # it is as the tower gives it
    for given in (tmp_path / "a.png", pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2)):
        assert torch.equal(sd().vision(given), want)
    assert torch.equal(sd().vision([PICTURE, str(tmp_path / "a.png")]), want.expand(2, -1))
    seen = official_unclip(sd()).image_encoder(SEEN.double()).image_embeds
    assert error(want, seen) <= BOUND
