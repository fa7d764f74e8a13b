"""The autoencoder equals diffusers' AutoencoderKL: encoder, posterior and decoder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference_models import (
    AUTOENCODER,
    error,
    errors_by_module,
    official_vae,
    randn,
    randomise,
    with_weights,
)

from minisd.config import SD1
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.tiles import starts
from minisd.models.vae import VAE, ResBlock

PAIR = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
DTYPES = pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])


def pair(config=AUTOENCODER, ops=TORCH, dtype=torch.float64):
    ours = randomise(VAE(config, ops)).to(dtype)
    return ours, with_weights(official_vae(config), ours)


def image(h=24, w=20, dtype=torch.float64):
    return randn(3, 3, h, w, seed=1, dtype=dtype).tanh()


@PAIR
@DTYPES
def test_every_module_of_the_encoder(ops, dtype, bound):
    ours, official = pair(ops=ops, dtype=dtype)
    errors = errors_by_module(ours.encoder, official.encoder, image(dtype=dtype))
    assert len(errors) > 30 and "conv_out" in errors
    assert max(errors.values()) <= bound, max(errors, key=errors.get)


@PAIR
@DTYPES
def test_every_module_of_the_decoder(ops, dtype, bound):
    ours, official = pair(ops=ops, dtype=dtype)
    latent = randn(3, 4, 6, 5, dtype=dtype)
    errors = errors_by_module(ours.decoder, official.decoder, latent)
    assert len(errors) > 40 and "conv_out" in errors
    assert max(errors.values()) <= bound, max(errors, key=errors.get)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_encode_and_decode(levels):
    config = replace(AUTOENCODER, block_out_channels=(8, 12, 16, 20)[:levels], layers_per_block=1)
    ours, official = pair(config)
    f = config.downscale
    assert f == 2 ** (levels - 1)
    x, noise = image(3 * f, 5 * f), randn(3, 4, 3, 5, seed=2)
    posterior, scale = official.encode(x).latent_dist, official.config.scaling_factor
    mean, logvar = ours.moments(x)
    assert error(mean, posterior.mean) <= 1e-10
    assert error(logvar, posterior.logvar) <= 1e-10
    assert error(ours.encode(x), scale * posterior.mode()) <= 1e-10
    sample = scale * (posterior.mean + posterior.std * noise)
    assert error(ours.encode(x, noise), sample) <= 1e-10
    assert error(ours.decode(noise), official.decode(noise / scale).sample) <= 1e-10


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_log_variance_is_clamped_as_officially(shift):
    ours, official = pair()
    for model in (ours, official):
        model.quant_conv.bias[4:] += shift
    posterior = official.encode(image()).latent_dist
    mean, logvar = ours.moments(image())
    assert logvar.unique().numel() == 1
    assert error(logvar, posterior.logvar) <= 1e-10
    noise = randn(*mean.shape, seed=2)
    sample = 0.18215 * (posterior.mean + posterior.std * noise)
    assert error(ours.encode(image(), noise), sample) <= 1e-10 * max(1, posterior.std.max())


def test_a_res_block_of_the_official_width():
    from diffusers.models.resnet import ResnetBlock2D

    ours = randomise(ResBlock(128, 256, 32, TORCH)).float()
    official = with_weights(
        ResnetBlock2D(in_channels=128, out_channels=256, temb_channels=None, eps=1e-6), ours
    )
    x = randn(1, 128, 5, 3, dtype=torch.float32)
    assert error(ours(x), official(x, None)) <= 1e-5


def test_names_and_shapes_of_the_official_model():
    with torch.device("meta"):
        ours, official = VAE(SD1.vae, TORCH), official_vae(SD1.vae)
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in official.state_dict().items()}
    assert len(shapes) == 248
    assert sum(shape.numel() for shape in shapes.values()) == 83_653_863


class Doubling(torch.nn.Module):
    """A mock decoder: the mean of the channels, eight times as large."""

    def forward(self, z):
        return F.interpolate(z.mean(1, keepdim=True).repeat(1, 3, 1, 1), scale_factor=8)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (5, 31), (20, 1), (17, 17)], ids=str)
@pytest.mark.parametrize("side", [1, 4, 8])
def test_tiles_cover_the_image_evenly(size, side):
    vae = randomise(VAE(AUTOENCODER, TORCH))
    vae.decoder = Doubling()
    vae.config = replace(vae.config, block_out_channels=(1,) * 4)  # doubles three times
    latent = randn(2, vae.config.latent_channels, *size)
    whole = vae.decode(latent)
    vae.tile = side
    assert error(vae.decode(latent), whole) <= 1e-12
    for length in size:
        begins = starts(length, side)
        assert begins[0] == 0 and length - side <= begins[-1] <= max(0, length - side)
        assert all(0 < 4 * (b - a) <= 3 * side + 3 for a, b in zip(begins, begins[1:]))


def test_decoding_in_tiles():
    """With one tile it is equal; with more, the error falls with the size of the tile."""
    vae, errors = randomise(VAE(AUTOENCODER, TORCH)), []
    latent = randn(1, AUTOENCODER.latent_channels, 24, 10)
    whole = vae.decode(latent)
    for vae.tile in (24, 20, 10):
        errors.append(error(vae.decode(latent), whole))
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5 * whole.abs().max()
