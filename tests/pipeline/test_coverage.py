"""coverage() of a loaded model is right, and the kernels take every call of every model."""

from dataclasses import replace

import pytest
import torch
from torch.nn import GroupNorm, LayerNorm

import minisd
from minisd import config as configs
from minisd.backends import Backend, coverage, kernels, watch
from minisd.checkpoints import checkpoint
from minisd.config import SD1, Config
from minisd.models.clip import TextEncoder
from minisd.models.clip_vision import VisionTower
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.transformer import GEGLU, Attention
from minisd.models.vae import VAE

META = torch.device("meta")  # the kernels check a call as on a GPU, and launch nothing
# Every model that minisd names, and the one that it ships.
MODELS = {c.name: c for c in vars(configs).values() if isinstance(c, Config)}
MODELS["shipped"] = checkpoint.open_checkpoint(None).config
EVERY_MODEL = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def test_coverage_reports_the_ops_of_every_call_and_why():
    sd = minisd.load()
    calls = sd.coverage()
    functions = {GroupNorm: "group_norm_silu", Attention: "attention", LayerNorm: "layer_norm",
                 GEGLU: "geglu"}
    modules = [functions[type(m)] for m in sd.unet.modules() if type(m) in functions]
    assert sorted(call.function for call in calls) == sorted(modules)
    assert {call.took for call in calls} == {"torch"}
    assert all(call.why == sd.backend.why for call in calls)
    assert len(sd.coverage(height=128)) == len(calls)
    with pytest.raises(ValueError, match="height"):
        sd.coverage(height=3)


def test_coverage_of_ops_that_were_chosen_by_name():
    calls = coverage(SD1.unet, Backend(REFERENCE), 8, 8, torch.float32)
    assert {(call.took, call.why) for call in calls} == {
        ("reference", "the kernels were not asked for")}
    assert sum(call.function == "attention" for call in calls) == 32
    assert sum(call.function == "group_norm_silu" for call in calls) == 61
    assert sum(call.sizes.endswith("SiLU") for call in calls) == 45
    assert sum(call.function == "layer_norm" for call in calls) == 48
    assert sum(call.function == "geglu" for call in calls) == 16
    assert calls[1].sizes == "320 at 8x8, SiLU" and {"640 in 128 rows"} & {
        call.sizes for call in calls if call.function == "layer_norm"} == set()


def my_attention(q, k, v, heads, causal=False):
    return TORCH.attention(q, k, v, heads, causal)


class MyNorm:
    """A function may be any callable; this one runs on no meta tensor."""

    def __call__(self, x, weight, bias, groups, eps, silu, **more):
        assert x.device.type != "meta"
        return TORCH.group_norm_silu(x, weight, bias, groups, eps, silu, **more)


@pytest.mark.parametrize("fused", [False, True])
def test_functions_of_the_callers_own_are_reported_as_what_they_are(fused):
    if fused:
        pytest.importorskip("triton")
    ops = replace(TORCH, attention=my_attention, group_norm_silu=MyNorm())
    sd = minisd.load(ops=ops, fused=fused, device="cpu")
    took = {call.function: call.took for call in sd.coverage()}
    assert took == {"attention": f"{__name__}.my_attention", "layer_norm": "torch",
                    "group_norm_silu": f"{__name__}.MyNorm", "geglu": "torch"}


@EVERY_MODEL
@torch.no_grad()
def test_the_kernels_take_every_call_of_every_model(config):
    pytest.importorskip("triton")
    calls, backend, side = [], Backend(kernels()), config.sample_size
    latent = side // config.vae.downscale
    with META:
        text = TextEncoder(config.text, watch(backend, calls)).half()
        vae = VAE(config.vae, watch(backend, calls)).half()
        context = text(torch.zeros(2, config.text.max_position_embeddings, dtype=torch.long))
        vae.decode(vae.encode(torch.empty(1, 3, side, side, dtype=torch.float16)))
        if config.vision is not None:
            tower = VisionTower(config.vision, watch(backend, [])).half()
            tower(torch.empty(1, 3, 224, 224, dtype=torch.float16))
    assert context.shape[1:] == (77, config.unet.cross_attention_dim)
    heads = {call.sizes.partition(",")[0] for call in calls if call.function == "attention"}
    assert len(heads) == 2  # of the text encoder, and of the autoencoder
    calls += coverage(config.unet, backend, latent, latent, torch.float16)
    assert {(call.took, call.why) for call in calls} == {("triton", "")}


@EVERY_MODEL
def test_the_kernels_take_every_model_repacked(config):
    """They raise ValueError for a call that they do not take."""
    pytest.importorskip("triton")
    from bench.counts import fused, planned

    families = {call.kernel.__module__.rpartition(".")[2]
                for call in planned(fused(config, kernels()))}
    assert families == {"attention", "group_norm", "layer_norm", "geglu"}
