"""The noise on an embedding of Stable unCLIP is diffusers'."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from reference_models import error, randn

from minisd.conditioning import unclip

# abar by level, to eight digits.
ABARS = {0: 0.99995872, 1: 0.99991258, 50: 0.99172469, 100: 0.97157568, 200: 0.89776291,
         400: 0.64598817, 500: 0.49228517, 700: 0.20186890, 998: 2.4288e-6}


def test_the_schedule():
    abar = unclip.alphas_cumprod()
    assert abar.shape == (1000,) and abar.dtype == torch.float64
    for level, value in ABARS.items():
        assert abar[level].item() == pytest.approx(value, abs=1e-10 if value < 1e-3 else 6e-9)
    official = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert error(abar, official) <= 1e-5  # theirs is in float32


@pytest.mark.parametrize("width", [768, 1024])
@pytest.mark.parametrize("level", [0, 1, 50, 999])
def test_a_noised_embedding(level, width):
    normalizer = StableUnCLIPImageNormalizer(width).double()
    normalizer.mean.data, normalizer.std.data = randn(1, width, seed=1), randn(1, width).exp()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.alphas_cumprod = unclip.alphas_cumprod()
    pipeline = SimpleNamespace(image_normalizer=normalizer, image_noising_scheduler=scheduler)
    embedding, noise = randn(2, width, seed=2), randn(2, width, seed=3)
    theirs = StableUnCLIPImg2ImgPipeline.noise_image_embeddings(pipeline, embedding, level, noise)
    ours = unclip.augmented(embedding, normalizer.mean, normalizer.std, level, noise)
    assert ours.shape == (2, 2 * width) and error(ours, theirs) <= 1e-10
    assert torch.equal(ours[:, width:], theirs[:, width:])


def test_it_stays_in_its_dtype():
    rows = [x.half() for x in (randn(3, 8), randn(1, 8), randn(1, 8).exp(), randn(3, 8, seed=1))]
    embedding, mean, std, noise = rows
    assert unclip.augmented(embedding, mean, std, 20, noise).dtype == torch.float16
