"""layer_norm, geglu and the fused UNet made of kernels, interpreted, against torch in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from interpreter import DTYPES, compare, embed, table, take  # noqa: F401, a fixture
from minisd_kernels.fused.decoder import FusedDecoder
from minisd_kernels.fused.unet import FusedUNet
from minisd_kernels.ops import geglu as geglu_file, launch, layer_norm as layer_norm_file
from minisd_kernels.ops.geglu import geglu
from minisd_kernels.ops.layer_norm import layer_norm
from small_models import AUTOENCODER, DENOISER, error, randn, randomise

from minisd.backends import kernels
from minisd.models.ops import TORCH
from minisd.models.unet import UNet
from minisd.models.vae import Decoder

NAN = float("nan")
LAYER_NORM = [  # rows, C: why
    (1, 1),  # a single element
    (3, 8),  # fewer rows than a tile
    (70, 320),  # SD1's first width, no power of two; ragged rows
    (5, 640),
    (9, 1280),
    (2, 4096),  # one row fills a tile
    (3, 5000),  # or more than one
]
GEGLU = [(1, 1), (3, 8), (17, 320), (9, 1280), (5, 257)]  # rows, C: below, at and past a tile


@DTYPES
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("n, channels", LAYER_NORM)
def test_layer_norm(n, channels, shifted, residual, dtype):
    x = (-2.3 + 0.5 * torch.randn(n, channels)).to(dtype)
    added = torch.randn(n, channels).to(dtype) if residual else None
    weight, bias = (1 + torch.randn(channels)).to(dtype), torch.randn(channels).to(dtype)
    shift = torch.randn(channels).to(dtype) if shifted else None
    (x, _), (weight, _), (bias, _) = (
        embed(t, margins, NAN) for t, margins in ((x, (1, 0)), (weight, (8,)), (bias, (8,))))
    out, whole = embed(torch.full_like(x, NAN), (1, 0), 7.0)
    total, whole_total = embed(torch.full_like(x, NAN), (1, 0), 7.0)
    s = x.float() + (shift if shifted else 0) + (added if residual else 0)  # rounded once
    s = s.to(dtype)
    launch.run([layer_norm_file.plan(x, added, weight, bias, total, out, 1e-5, shift)])
    exact = F.layer_norm(s.double(), (channels,), weight.double(), bias.double())
    compare("layer_norm", take(out, whole), F.layer_norm(s, (channels,), weight, bias), exact)
    if residual or shifted:
        assert torch.equal(take(total, whole_total), s)
    first, again = (layer_norm(x, weight, bias, 1e-5, added, shift) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], s)


@DTYPES
@pytest.mark.parametrize("n, channels", GEGLU)
def test_geglu(n, channels, dtype):
    h, _ = embed((-0.3 + 3 * torch.randn(n, 2 * channels)).to(dtype), (1, 0), NAN)
    out, whole = embed(torch.full((n, channels), NAN, dtype=dtype), (1, 0), 7.0)
    launch.run([geglu_file.plan(h, out)])
    value, gate = h.chunk(2, dim=-1)
    exact = value.double() * F.gelu(gate.double())
    compare("geglu", take(out, whole), value * F.gelu(gate), exact)
    assert torch.equal(geglu(h), geglu(h))


def test_geglu_is_the_exact_gelu():
    h = torch.cat([torch.ones(1, 99), torch.linspace(-8, 8, 99)[None]], dim=-1)
    assert error(geglu(h), F.gelu(h[:, 99:])) <= 1e-6
    assert error(geglu(h), F.gelu(h[:, 99:], approximate="tanh")) > 1e-4


REJECTED = {
    "layer_norm: x is (..., C) with 1 to 8192 channels, not (2, 8200)":
        lambda: layer_norm(torch.ones(2, 8200), torch.ones(8200), torch.ones(8200)),
    "layer_norm: x is not contiguous":
        lambda: layer_norm(torch.ones(8, 2).T, torch.ones(8), torch.ones(8)),
    "layer_norm: weight (7,) and bias (8,) are not both (8,)":
        lambda: layer_norm(torch.ones(2, 8), torch.ones(7), torch.ones(8)),
    "layer_norm: shift is (7,), not (8,)":
        lambda: layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8), shift=torch.ones(7)),
    "layer_norm: residual is (1, 8) torch.float32, x (2, 8) torch.float32":
        lambda: layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8), 1e-5, torch.ones(1, 8)),
    "layer_norm: x is torch.float64, not float16, bfloat16 or float32":
        lambda: layer_norm(torch.ones(2, 8).double(), torch.ones(8), torch.ones(8)),
    "geglu: h is (..., 2C) with something in it, not (2, 7)": lambda: geglu(torch.ones(2, 7)),
    "geglu: h is not contiguous": lambda: geglu(torch.ones(8, 2).T),
    "geglu: h requires a gradient, and the kernels have no backward":
        lambda: geglu(torch.ones(2, 8, requires_grad=True)),
}


@pytest.mark.parametrize("sentence", REJECTED)
def test_rejected_arguments(sentence):
    with pytest.raises(ValueError) as caught, torch.enable_grad():
        REJECTED[sentence]()
    assert str(caught.value) == sentence


@torch.no_grad()
def test_unets():
    """The whole UNet in float32, by ops="triton" and fused, at an odd size and with guidance."""
    config = replace(DENOISER, layers_per_block=1, block_out_channels=(16, 24),
                     has_attention=(True, False), num_heads=(2, 3))
    plain = randomise(UNet(config, TORCH)).float()
    by_kernels = UNet(config, kernels())
    by_kernels.load_state_dict(plain.state_dict())
    x, t, context = randn(1, 4, 5, 4).float(), torch.tensor([981]), randn(2, 7, 20, seed=1).float()
    twice = x.repeat(2, 1, 1, 1), t.repeat(2), context
    exact = plain(*twice)
    assert error(by_kernels(*twice), exact) <= 1e-5 * exact.abs().max()
    fused = FusedUNet(plain, kernels())
    ours = fused(x, t, context)
    assert error(ours, exact) <= 1e-5 * exact.abs().max()
    assert torch.equal(ours, fused(x, t, context))


@torch.no_grad()
def test_decoder():
    config = replace(AUTOENCODER, block_out_channels=(8, 16))
    plain = randomise(Decoder(config, TORCH)).float()
    latent = randn(1, config.latent_channels, 3, 4).float()
    exact = plain(latent)
    ours = FusedDecoder(plain, kernels())
    assert error(ours(latent), exact) <= 1e-5 * exact.abs().max()
    assert torch.equal(ours(latent), ours(latent))
