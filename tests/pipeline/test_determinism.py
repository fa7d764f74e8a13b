"""The same call gives the same image; what changes its last bits, and by how much."""

import copy

import pytest
import torch
from PIL import Image
from reference_models import SMALL, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import minisd
from minisd.conditioning.start import Noise
from minisd.models.vae import VAE

PROMPT = "a red heart on a blue background"
# Another order of float32 sums changes the last bits, and the guidance of each step amplifies that.
# Measured after 10 steps: 6e-6, where latents vary by 1.5; another seed changes them by over 1.4.
BOUND = 1e-4


@pytest.fixture(scope="module")
def sd():
    return minisd.load()


def test_the_same_seed_gives_the_same_bytes(sd):
    call = dict(num_inference_steps=5, eta=0.5)
    first = sd(PROMPT, seed=7, **call).images[0].tobytes()
    assert sd(PROMPT, seed=8, **call).images[0].tobytes() != first
    assert all(sd(PROMPT, seed=7, **call).images[0].tobytes() == first for _ in range(2))


def test_an_image_alone_and_in_a_batch(sd):
    call = dict(num_inference_steps=10, output_type="latent")
    batch = sd(PROMPT, seed=7, num_images_per_prompt=2, **call).images
    for i, of_batch in enumerate(batch):
        alone = sd(PROMPT, seed=7 + i, **call).images[0]
        assert (alone - of_batch).abs().max() <= BOUND
    assert (batch[0] - batch[1]).abs().max() > 1000 * BOUND


def test_one_thread_and_two(sd):
    call = dict(num_inference_steps=1, seed=7, width=32, height=32, output_type="latent")
    one, before = sd(PROMPT, **call).images, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = sd(PROMPT, **call).images
        assert torch.equal(sd(PROMPT, **call).images, two)
    finally:
        torch.set_num_threads(before)
    assert (one - two).abs().max() <= BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_noise_depends_on_neither_batch_nor_dtype(dtype):
    def draw(seeds, dtype=torch.float32):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = Noise(generators, torch.empty(1, 4, 6, 5, dtype=dtype))
        return torch.stack([noise.draw(), noise.draw()])

    batch = draw([5, 6, 7])
    assert torch.equal(batch[:, 1:2], draw([6]))
    assert torch.equal(draw([5, 6, 7], dtype), batch.to(dtype))


class Count(TorchDispatchMode):
    """Counts the reductions to one boolean."""

    def __init__(self):
        super().__init__()
        self.reductions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reductions += func is torch.ops.aten.all.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_finiteness_is_one_reduction_a_stage(steps, scale):
    """One for the contexts, one for the last latents, and one for each decoded image."""
    with Count() as count:
        small_model(SMALL)("a", num_inference_steps=steps, guidance_scale=scale, seed=0,
                           num_images_per_prompt=2)
    assert count.reductions == 4


@pytest.mark.parametrize("part, stage, more", [
    ("text_encoder.final_layer_norm", "text encoder", ""),
    ("unet.conv_out", "UNet", r" or a smaller guidance_scale \(--guidance\)"),
    ("vae.decoder.conv_out", "VAE", ""),
])
def test_an_overflow_in_the_weights_names_its_stage(part, stage, more):
    sd = copy.deepcopy(small_model(SMALL))
    name, path = part.split(".", 1)
    getattr(sd, name).get_submodule(path).bias[0] = float("inf")
    with pytest.raises(ArithmeticError, match=(
            rf"the {stage} gave values that are not finite: try dtype float32 \(--dtype\){more}$")):
        sd("a", num_inference_steps=1, seed=0)


def half_model(gain: float):
    """A small model in float16; the output of its VAE is of about ``gain`` squared."""
    sd = copy.deepcopy(small_model(SMALL))
    for layer in (sd.vae.decoder.conv_norm_out, sd.vae.decoder.conv_out):
        layer.weight *= gain
    for part in (sd.text_encoder, sd.unet, sd.vae):
        part.half()
    return sd


@pytest.mark.parametrize("gain, dtypes", [
    (1, [torch.float16]), (5000, [torch.float16, torch.float32]),
])
def test_a_vae_that_overflows_runs_again_in_float32(monkeypatch, gain, dtypes):
    seen, decode = [], VAE.decode

    def watched(vae, latent):
        seen.append(vae.decoder.conv_in.weight.dtype)
        return decode(vae, latent)

    monkeypatch.setattr(VAE, "decode", watched)
    sd = half_model(gain)
    images = sd("a", num_inference_steps=1, seed=0, output_type="pt").images
    assert images.isfinite().all() and seen == dtypes
    assert sd.vae.decoder.conv_in.weight.dtype == torch.float16


def test_a_vae_that_overflows_in_float32_too_is_an_error(monkeypatch):
    sd, seen = half_model(1), []
    monkeypatch.setattr(
        VAE, "decode", lambda vae, x: seen.append(vae.decoder.conv_in.weight.dtype) or x / 0)
    with pytest.raises(ArithmeticError, match="the VAE"):
        sd("a", num_inference_steps=1, seed=0)
    assert seen == [torch.float16, torch.float32]


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_parts_may_differ_in_dtype(part):
    """The remedy that people know for black images, `sd.vae.float()`, and its siblings."""
    sd = half_model(1)
    getattr(sd, part).float()
    image = Image.new("RGB", (16, 16), "red")
    latents = []
    out = sd("a", image=image, mask_image=image, num_inference_steps=2, seed=0, output_type="pt",
             callback_on_step_end=lambda sd, i, t, values: latents.append(values["latents"]))
    assert out.images.isfinite().all()
    for dtype in (torch.float16, torch.float64):
        x = latents[-1].to(dtype)
        assert sd.vae.decode(x).dtype == sd.vae.encode(sd.vae.decode(x)).dtype == dtype
        assert all(moment.dtype == dtype for moment in sd.vae.moments(sd.vae.decode(x)))
        context = sd.text_encoder(sd.tokenizer("a")).to(dtype)
        assert sd.unet(x, 7, context).dtype == dtype
        assert torch.equal(sd.unet(x, 7, context), sd.unet(x, torch.tensor([7]), context))
