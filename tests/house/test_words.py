"""The field's own words are found by a search, in the file where the thing happens."""

import re
from pathlib import Path

import pytest

MINISD = Path(__file__).parents[2] / "minisd"
WORDS = {
    "latent diffusion": "pipeline",
    "classifier-free guidance": "steps",
    "sinusoidal timestep embedding": "models/unet",
    "skip connection": "models/unet",
    "self-attention": "models/transformer",
    "cross-attention": "models/transformer",
    "GEGLU": "models/transformer",
    "alpha-bar": "samplers/schedule",
    "SDEdit": "conditioning/start",
    "blended latent diffusion": "conditioning/inpaint",
    "variational autoencoder": "models/vae",
    "reparameterisation trick": "models/vae",
    "byte pair encoding": "text/bpe",
    "causal self-attention": "models/clip",
    "group normalization": "models/ops",
    "relative inverse depth": "models/dpt",
    "weight standardization": "models/bit",
}
PAPERS = sorted({*WORDS.values(), "samplers/ddim"})


@pytest.mark.parametrize("words", WORDS)
def test_a_search_finds_them(words):
    text = (MINISD / f"{WORDS[words]}.py").read_text().lower()
    assert words.lower() in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", PAPERS)
def test_a_file_that_computes_links_its_paper(name):
    assert "https://arxiv.org/abs/" in (MINISD / f"{name}.py").read_text()
