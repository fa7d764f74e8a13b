"""The field's own words are found by a search, in the file where the thing happens."""

import re
from pathlib import Path

import pytest

MINISD = Path(__file__).parents[1] / "minisd"
WORDS = {
    "latent diffusion": "sd",
    "classifier-free guidance": "steps",
    "sinusoidal timestep embedding": "unet",
    "skip connection": "unet",
    "self-attention": "transformer",
    "cross-attention": "transformer",
    "GEGLU": "transformer",
    "alpha-bar": "ddim",
    "SDEdit": "latents",
    "blended latent diffusion": "latents",
    "variational autoencoder": "vae",
    "reparameterisation trick": "vae",
    "byte pair encoding": "tokenizer",
    "causal self-attention": "clip",
    "group normalization": "ops",
}
PAPERS = ("sd", "steps", "unet", "transformer", "ddim", "latents", "vae", "tokenizer", "clip",
          "ops")


@pytest.mark.parametrize("words", WORDS)
def test_a_search_finds_them(words):
    text = (MINISD / f"{WORDS[words]}.py").read_text().lower()
    assert words.lower() in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", PAPERS)
def test_a_file_that_computes_links_its_paper(name):
    assert "https://arxiv.org/abs/" in (MINISD / f"{name}.py").read_text()
