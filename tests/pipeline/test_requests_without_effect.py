"""What is asked for and will not be seen is told in one warning; a seed is told only where it
makes the image again."""

import warnings
from dataclasses import replace

import pytest
import torch
from reference_models import SMALL, small_model

CALL = dict(prompt="a", num_inference_steps=2, height=8, width=8, progress=False)
TURBO = replace(SMALL, schedule=replace(SMALL.schedule, timestep_spacing="trailing"))


def told(config, **call) -> list[str]:
    sd = small_model(config)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sd(**CALL | call)
    assert all(w.filename == __file__ for w in seen)  # the line of the caller
    return [str(w.message) for w in seen]


@pytest.mark.parametrize("call, words", [
    (dict(num_inference_steps=1), "1 step is for models that are made for few"),
    (dict(guidance_scale=0.5), "with guidance 0.5 the image follows the prompt less"),
    (dict(guidance_scale=-2), "with guidance -2 the image"),
    (dict(guidance_scale=1, negative_prompt="b"), "the negative prompt has no effect"),
    (dict(guidance_scale=1, negative_prompt=["b"]), "the negative prompt has no effect"),
    (dict(guidance_scale=1, prompt=None, prompt_embeds=torch.zeros(1, 77, 20),
          negative_prompt_embeds=torch.ones(1, 77, 20)), "the negative prompt has no effect"),
])
def test_what_has_no_effect_is_told(call, words):
    said, = told(SMALL, **call)
    assert words in said


@pytest.mark.parametrize("config, call", [
    (SMALL, {}), (SMALL, dict(guidance_scale=1)), (SMALL, dict(guidance_scale=1, eta=1)),
    (SMALL, dict(guidance_scale=1, negative_prompt="")),
    (SMALL, dict(guidance_scale=1, negative_prompt=[""])),
    (TURBO, dict(num_inference_steps=1)), (SMALL, dict(negative_prompt="b")),
])
def test_all_else_is_silent(config, call):
    assert told(config, **call) == []


def drawn(*seeds: int, numbers: int = 0) -> list[torch.Generator]:
    """Generators that have drawn so many numbers."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:
        torch.randn(numbers, generator=generator)
    return generators


@pytest.mark.parametrize("call, seeds", [
    (dict(seed=5), [5, 6]),
    (dict(seed=[9, 3]), [9, 3]),
    (dict(generator=drawn(5, 8)), [5, 8]),
    (dict(generator=drawn(5, 8, numbers=1)), [None, None]),
    (dict(generator=drawn(5, 5)), [5, 5]),
    (dict(generator=drawn(5)[0]), [5, None]),
    (dict(generator=drawn(2**40, 1)), [None, 1]),  # seed= takes no such number
    (dict(generator=[torch.Generator(), *drawn(3)]), [None, 3]),  # torch's own first seed
    (dict(seed=5, latents=torch.zeros(2, 4, 2, 2)), [None, None]),
], ids=["a seed", "seeds", "fresh", "used", "the same twice", "one for both", "too large",
        "torch's own", "latents"])
def test_a_seed_is_told_only_where_it_makes_the_image_again(call, seeds):
    sd = small_model(SMALL)
    call = CALL | {"num_images_per_prompt": 2, "output_type": "pt"} | call
    out = sd(**call)
    assert out.seeds == seeds == [settings["seed"] for settings in out.settings]
    for image, seed in zip(out.images, seeds):
        if seed is not None:
            again = sd(**CALL, output_type="pt", seed=seed).images[0]
            assert torch.allclose(again, image, atol=1e-9)
