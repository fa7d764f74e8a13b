"""Tests that need a GPU: compiled kernels, at full size too.

    python -m pytest -n 6 tests/kernels/test_gpu.py    # most of the time is compiling

Skipped without a GPU. The tests of interpreted_*.py run here again, with all tensors on the GPU;
`python -m bench.everything` leaves out those of the ladder, which no model uses.
"""

import importlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")
if not torch.cuda.is_available():
    pytest.skip("no GPU: the kernels are compiled and run on one here", allow_module_level=True)

from minisd_kernels.fused.decoder import FusedDecoder
from minisd_kernels.fused.steps import Steps
from minisd_kernels.fused.unet import FusedUNet
from minisd_kernels.ops import launch
from minisd_kernels.ops.attention import PRECISIONS, flash_attention
from minisd_kernels.ops.group_norm import group_norm_silu

import minisd
from bench import cases
from bench.harness import check, error, last_place
from minisd.backends import Backend, Call, kernels, watch
from minisd.config import SD1
from minisd.models.ops import REFERENCE, TORCH, Ops
from minisd.models.unet import UNet
from minisd.models.vae import VAE

DEVICE = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", launch.DTYPES, ids=lambda dtype: str(dtype)[6:])
# These count operations of the interpreter, or rely on its exact float32.
INTERPRETER_ALONE = ("cost_is", "corrections_of", "precisions", "_unets", "_decoder", "_readme")

with patch.object(launch, "interpreted", lambda kernel: True):  # those files require it
    for name in ("attention", "group_norm", "fused", "ladder"):
        for test, function in vars(importlib.import_module(f"interpreted_{name}")).items():
            if test.startswith("test_") and not any(word in test for word in INTERPRETER_ALONE):
                globals()[f"test_{name}_{test.removeprefix('test_')}"] = function


@pytest.fixture(autouse=True)
def _on_the_gpu():
    """New tensors are on the GPU, convolutions use float32 (by default TF32), and cuDNN is
    deterministic, which in float32 it is not by default."""
    with DEVICE, torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        yield
    torch.cuda.empty_cache()  # other processes test on the same GPU


@DTYPES
@pytest.mark.parametrize("case", cases.full(), ids=lambda case: f"{case.op} {case.label}")
def test_full_size(case, dtype):
    verdict = check(case, DEVICE, dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision):
    """TF32 keeps 10 bits of a factor; three TF32 products (tf32x3) recover most of the rest."""
    q, k, v = (torch.randn(2, 130, 80) for _ in range(3))
    exact = REFERENCE.attention(q.double(), k.double(), v.double(), 1)
    bounds = {"ieee": 1e-5, "tf32x3": 1e-4, "tf32": 2e-2}
    assert error(flash_attention(q, k, v, 1, precision=precision), exact) <= bounds[precision]


@pytest.mark.parametrize("case", [
    cases.SELF_ATTENTION[0], cases.CROSS_ATTENTION[0], cases.VAE_ATTENTION[0],
    cases.group_norms("SD1.5")[0], cases.group_norms("SD1.5")[-1],
], ids=lambda case: case.label)
def test_the_same_bits_fifty_times_and_in_a_graph(case):
    """A result that changes is a race condition."""
    inputs = case.inputs(DEVICE, torch.float16)
    ours = partial(case.call, getattr(kernels(), case.op), *inputs)
    first = ours()
    assert all(torch.equal(first, ours()) for _ in range(50))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours()
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(first, captured)


def test_items_more_than_two_to_the_31_elements_apart():
    """A 32-bit offset from item to item would overflow."""
    room = torch.empty(2**31 + 2**20, dtype=torch.float16)
    q = torch.randn(2, 64, 80, dtype=torch.float16)
    far = room.as_strided(q.shape, (2**31, 80, 1)).copy_(q)
    assert torch.equal(flash_attention(far, far, far, 2), flash_attention(q, q, q, 2))
    x, row = q.view(2, 64, 8, 10), torch.randn(64, dtype=torch.float16)
    far = far.view(2, 64, 8, 10)
    assert torch.equal(group_norm_silu(far, row, row, 4), group_norm_silu(x, row, row, 4))


def unet(ops: Ops, weights: dict[str, torch.Tensor]) -> UNet:
    """SD1's UNet with these weights."""
    with torch.device("meta"):
        model = UNet(SD1.unet, ops)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def draw(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights for SD1's UNet that keep the scale of activations."""
    with torch.device("meta"):
        empty = UNet(SD1.unet, REFERENCE).state_dict()
    weights = {}
    for name, p in empty.items():
        noise = torch.randn(p.shape)
        if p.dim() > 1:
            weights[name] = (noise / p[0].numel() ** 0.5).to(dtype)
        else:
            weights[name] = (0.3 * noise + ("norm" in name and name.endswith("weight"))).to(dtype)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_unet(dtype):
    """One forward of SD1 at 512x512 with guidance: every call takes a kernel."""
    weights = draw(dtype)
    x, t = torch.randn(2, 4, 64, 64).to(dtype), torch.tensor([981.0, 981.0])
    context = torch.randn(2, 77, 768).to(dtype)
    calls: list[Call] = []
    ours = unet(watch(Backend(kernels()), calls), weights)(x, t, context)
    torchs = unet(TORCH, weights)(x, t, context)
    doubled = {name: p.double() for name, p in weights.items()}
    exact = unet(REFERENCE, doubled)(x.double(), t, context.double())
    assert len(calls) == 93 + 4 * 16 and {call.took for call in calls} == {"triton"}
    bound = 2 * error(torchs, exact) + last_place(exact, dtype)
    assert error(ours, exact) <= bound < float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_fused_unet_in_a_graph(dtype):
    """SD1 at 512x512: one graph serves other timesteps, prompts and weights of x, uncond and cond,
    and always gives the same bits."""
    weights, x = draw(dtype), torch.randn(1, 4, 64, 64).to(dtype)
    prompts = torch.randn(2, 2, 77, 768).to(dtype)
    fused = FusedUNet(unet(TORCH, weights), kernels())
    rows = [[0.3, -1.0, 2.0], [0.7, -6.5, 7.5]]  # weights of x, uncond and cond
    table = torch.tensor(rows)[:, None]
    asked = [Steps(fused, prompt, [981, 1], table) for prompt in prompts]
    state = torch.stack([x.float(), x.float()])
    answers = {(p, i): asked[p](state, i)[0] for p, i in ((0, 0), (0, 1), (1, 1))}
    assert len(fused.graphs) == 1
    assert torch.equal(asked[0](state, 0)[0], answers[0, 0])

    def step(answer: torch.Tensor, i: int) -> torch.Tensor:
        terms = [x.double(), *answer.double().split(1)]
        return sum(w * y for w, y in zip(rows[i], terms, strict=True))

    readable, doubled = unet(TORCH, weights), {name: p.double() for name, p in weights.items()}
    for (p, i), ours in answers.items():
        twice = x.repeat(2, 1, 1, 1), torch.full((2,), (981, 1)[i])
        exact = unet(REFERENCE, doubled)(twice[0].double(), twice[1], prompts[p].double())
        exact = step(exact, i)
        bound = 2 * error(step(readable(*twice, prompts[p]), i), exact) + last_place(exact, dtype)
        assert error(ours, exact) <= bound < float("inf")
        if dtype == torch.float32:
            assert error(ours, exact) <= 3e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_fused_decoder(dtype):
    """SD1 at 512x512: the graph decodes other latents too."""
    with DEVICE:
        vae = VAE(SD1.vae, TORCH).to(dtype).requires_grad_(False)
    latent = torch.randn(1, 4, 64, 64).to(dtype)
    torchs = vae.decode(latent)
    doubled = VAE(SD1.vae, TORCH).double().requires_grad_(False)
    doubled.load_state_dict(vae.state_dict())
    exact = doubled.decode(latent.double())
    decoder = FusedDecoder(vae.decoder, kernels())
    bound = 2 * error(torchs, exact) + last_place(exact, dtype)
    other = vae.decode(latent.flip(0, 3), decoder)
    first, again = vae.decode(latent, decoder), vae.decode(latent, decoder)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert error(first, exact) <= bound and len(decoder.graphs) == 1


@pytest.mark.parametrize("ops", ["triton", "fused"])
def test_image_in_float16(ops):
    """Of the shipped model."""
    with torch.device("cpu"):  # where noise is drawn
        ask = dict(prompt="a red heart", seed=0, num_inference_steps=20, output_type="pt")
        exact = minisd.load(device="cuda", dtype="float32", ops="torch")(**ask).images
        ours = minisd.load(device="cuda", dtype="float16", ops=ops)
        first, again = (ours(**ask).images for _ in range(2))
    assert torch.equal(first, again)
    assert (first - exact).square().mean() <= 1e-4  # 40 dB


def test_a_graph_outlives_the_workspaces_of_others():
    """torch.compile frees the workspaces of cuBLAS; a graph must not write into one."""
    with torch.device("cpu"):
        ask = dict(prompt="a red heart", seed=0, num_inference_steps=4, output_type="pt")
        sd = minisd.load(device="cuda", dtype="float16", ops="fused")
        first = sd(**ask).images
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        room = torch.zeros(2**28, device="cuda")  # where the workspaces were
        again = sd(**ask).images
    assert torch.equal(first, again) and not room.any()


def test_threads_draw_their_own_images():
    with torch.device("cpu"):
        sd = minisd.load(device="cuda", dtype="float16", ops="fused")

        def draw(prompt: str) -> torch.Tensor:
            ask = dict(seed=0, num_inference_steps=10, output_type="pt", progress=False)
            return sd(prompt, **ask).images

        prompts = ["a red heart", "a pizza"] * 4
        alone = {prompt: draw(prompt) for prompt in prompts[:2]}
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(draw, prompts))
    assert all(torch.equal(images, alone[prompt]) for prompt, images in zip(prompts, together))
