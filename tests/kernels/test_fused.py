"""The fused UNet and decoder equal the readable ones, in float64, for every config and size."""

import gc
from dataclasses import replace
from itertools import product
from types import FunctionType, ModuleType

import pytest
import torch
from minisd_kernels.fused.decoder import FusedDecoder
from minisd_kernels.fused.steps import Steps, weights
from minisd_kernels.fused.unet import FusedUNet
from reference_models import (
    AUTOENCODER,
    DENOISER,
    SMALL,
    SMALL_V,
    ddim_step,
    error,
    randn,
    randomise,
    small_model,
)

import minisd
from minisd.backends import Backend
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.unet import UNet, Upsample
from minisd.models.vae import VAE
from minisd.pipeline import StableDiffusion
from minisd.samplers import SAMPLERS, schedule
from minisd.samplers.ddim import ddim
from minisd.samplers.sampler import coefficients as sampler_coefficients, draws
from minisd.samplers.schedule import Ladder, Level

BOUND = 1e-12  # rounding of float64: the same function
CONFIGS = {
    "SD1": SMALL.unet,
    "SD2": SMALL_V.unet,  # linear projections, other heads
    "inpainting": replace(DENOISER, in_channels=9),
    "classes": replace(DENOISER, num_class_embeds=9),
    "class vectors": replace(DENOISER, projection_class_embeddings_input_dim=10),
    "cross-attention first": replace(DENOISER, only_cross_attention=(True, False, True)),
    "late attention": replace(DENOISER, has_attention=(False, False, True)),  # a long shared prefix
    "no attention but the middle's": replace(DENOISER, has_attention=(False,) * 3),
    "one level": replace(DENOISER, block_out_channels=(16,), has_attention=(True,), num_heads=(2,)),
}
SIZES = [(8, 12), (9, 7), (5, 6), (1, 1)]  # even, odd at every level, odd at one, the smallest


@pytest.fixture(params=CONFIGS)
def unet(request):
    return randomise(UNet(CONFIGS[request.param], REFERENCE))


def inputs(unet, size, contexts, batch=3):
    x = -0.3 + randn(batch, unet.config.in_channels, *size)
    context = 0.2 + randn(contexts * batch, 7, unet.config.cross_attention_dim, seed=1)
    return x, torch.tensor([999, 1, 500])[:batch], context


def classes(unet, count):
    """Classes of so many contexts, if the UNet is told any."""
    n = unet.config.projection_class_embeddings_input_dim
    if unet.class_embedding is None:
        return None
    return torch.arange(count) if n is None else randn(count, n, seed=2)


def test_fused_unet(unet):
    """Alone and with guidance."""
    weights = {name: p.clone() for name, p in unet.named_parameters()}
    fused = FusedUNet(unet, TORCH)
    for size, contexts in [*product(SIZES, [2]), (SIZES[1], 1)]:
        x, t, context = inputs(unet, size, contexts)
        told = classes(unet, len(context))
        kept = x.clone(), t.clone(), context.clone()
        ours = fused(x, t, context, told)
        exact = unet(x.repeat(contexts, 1, 1, 1), t.repeat(contexts), context, told)
        assert ours.shape == exact.shape and error(ours, exact) <= BOUND, (size, contexts)
        assert torch.equal(ours, fused(x, t, context, told))
        assert all(torch.equal(a, b) for a, b in zip(kept, (x, t, context)))
    assert all(torch.equal(p, weights[name]) for name, p in unet.named_parameters())


def test_precomputed_tensors_serve_every_step(unet):
    x, _, context = inputs(unet, (6, 8), 2)
    # Two steps: weights of x, uncond and cond.
    each = torch.tensor([[[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]])
    latents, extra = x[:, :4], x[:, 4:] if x.shape[1] == 9 else None
    told = classes(unet, 6)
    steps = Steps(FusedUNet(unet, TORCH), context, [981, 1], each, extra, class_vector=told)
    for i, t in enumerate((981, 1)):
        exact = unet(x.repeat(2, 1, 1, 1), torch.full((6,), t), context, told)
        assert error(steps(torch.stack([latents, latents]), i)[0], exact.chunk(2)[i]) <= BOUND


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_step_is_a_weighted_sum(kind, eta, scale):
    ladder = Ladder([Level(9, 0.02), Level(5, 0.4), Level(1, 0.9991)], [])
    coefficients = sampler_coefficients(ddim(ladder, eta), kind)
    assert draws(coefficients) == [eta > 0] * 2
    x, uncond, cond, noise = (randn(2, 4, 3, 3, seed=seed) for seed in range(4))
    guided = uncond + scale * (cond - uncond)
    for i, (row, x0_row) in enumerate(weights(coefficients, scale)):
        terms = [x, cond] if scale == 1.0 else [x, uncond, cond]
        terms += [noise] if eta > 0 else []
        a, after = ladder[i].abar, ladder[i + 1].abar
        exact = ddim_step(x, guided, a, after, kind, eta, noise)
        x0, _ = schedule.predicted_x0_eps(x, guided, a, kind)
        for weights_of, want in ((row, exact), (x0_row, x0)):
            assert error(sum(w * y for w, y in zip(weights_of, terms, strict=True)), want) <= BOUND


@pytest.mark.parametrize("unet, oneDNN", [*((name, True) for name in CONFIGS), ("SD1", False)],
                         indirect=["unet"])
def test_packed_weights_in_float32(unet, oneDNN, monkeypatch):
    """They are packed for one size, but right for others too; and also without oneDNN."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", oneDNN)
    unet = unet.float()
    fused = FusedUNet(unet, TORCH)
    for size in (SIZES[0], SIZES[1], SIZES[3], SIZES[0]):
        for batch in (1, 2):
            x, t, context = (y.float() for y in inputs(unet, size, 2, batch))
            told = classes(unet, 2 * batch)
            exact = unet(x.repeat(2, 1, 1, 1), t.repeat(2), context, told)
            ours = fused(x, t, context, told)
            assert error(ours, exact) <= 1e-5 * exact.abs().max()
            assert torch.equal(ours, fused(x, t, context, told))


@pytest.mark.parametrize("config", [
    AUTOENCODER, replace(AUTOENCODER, block_out_channels=(8,)),
    replace(AUTOENCODER, layers_per_block=2)], ids=["small", "one level", "deep"])
@pytest.mark.parametrize("size", [(8, 12), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, BOUND), (torch.float32, 1e-5)])
def test_fused_decoder(config, size, dtype, bound):
    vae = randomise(VAE(config, REFERENCE)).to(dtype)
    latent = randn(2, config.latent_channels, *size).to(dtype)
    exact = vae.decode(latent)
    decoder = FusedDecoder(vae.decoder, TORCH)
    ours = vae.decode(latent, decoder)
    assert error(ours, exact) <= bound * exact.abs().max()
    assert torch.equal(ours, vae.decode(latent, decoder))
    assert error(vae.decode(latent), exact) <= bound * exact.abs().max()  # readable as before


def reachable(thing) -> list[torch.Tensor]:
    """Every tensor that ``thing`` keeps alive."""
    seen, left, tensors = set(), [thing], []
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(one))
        tensors += [one] if isinstance(one, torch.Tensor) else []
        left += gc.get_referents(one)
    return tensors


def test_no_weight_is_kept_twice(unet):
    """By the readable UNet and the repacked one together, except the doubling convolutions, which
    have 4x4 taps here and 3x3 there."""
    doubling = sum(m.conv.weight.numel() for m in unet.modules() if isinstance(m, Upsample))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.itemsize
                for x in reachable((unet, FusedUNet(unet, TORCH)))}
    allowed = sum(p.numel() for p in unet.parameters()) + 16 / 9 * doubling
    assert allowed * 0.99 <= sum(storages.values()) <= allowed * 1.02


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, unet=replace(DENOISER, in_channels=9))],
                         ids=["4 channels", "9 channels"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_images(config, guidance):
    """The whole loop, repacked or not: text to image, and inpainting."""
    from PIL import Image

    m = small_model(config)
    fused = StableDiffusion(config, m.tokenizer, m.text_encoder, m.unet, m.vae,
                            Backend(TORCH, fused=True))
    size = dict(width=24, height=16)
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    inpaint = dict(image=image, mask_image=image)
    for task in ([inpaint] if config.unet.in_channels == 9 else [{}, inpaint]):
        call = dict(num_inference_steps=3, guidance_scale=guidance, seed=[3, 4], eta=0.5,
                    output_type="latent", **size, **task)
        assert error(fused(["a", "b"], **call).images, m(["a", "b"], **call).images) <= 1e-11


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config, rescale", [(SMALL, 0.7), (SMALL_V, 0.0)], ids=["eps", "v"])
def test_every_sampler(sampler, config, rescale):
    """The fused steps of all samplers are the readable ones: the same loop, another object."""
    m = small_model(config)
    fused = StableDiffusion(config, m.tokenizer, m.text_encoder, m.unet, m.vae,
                            Backend(TORCH, fused=True))
    call = dict(num_inference_steps=5, seed=[3, 4], sampler=sampler, guidance_rescale=rescale,
                output_type="latent", width=24, height=16)
    runs = [model.stream(["a", "b"], **call) for model in (fused, m)]
    for ours, exact in zip(*runs, strict=True):
        bound = 1e-11 * max(1, exact.latents.abs().max().item())
        assert error(ours.latents, exact.latents) <= bound
        assert error(ours.x0, exact.x0) <= 100 * bound
        assert (ours.i, ours.t) == (exact.i, exact.t)


def test_fused_by_name_on_a_cpu():
    sd, fused = minisd.load(), minisd.load(ops="fused")
    assert fused.backend.fused and not sd.backend.fused
    assert sd.unet.state_dict().keys() == fused.unet.state_dict().keys()
    images = [x("a red heart", seed=0, num_inference_steps=3, output_type="pt").images
                for x in (sd, fused)]
    assert error(*images) <= 1e-4
    assert {call.took for call in fused.coverage()} == {"torch"}
    assert all("run on a GPU" in call.why or "triton" in call.why for call in fused.coverage())


def test_an_image_in_float16():
    """20 steps of the shipped model; measured: 69 dB."""
    ask = dict(prompt="a red heart", seed=0, num_inference_steps=20, output_type="pt")
    exact = minisd.load()(**ask).images
    half = minisd.load(ops="fused", dtype="float16")(**ask).images
    assert (half - exact).square().mean() <= 1e-4  # 40 dB
