"""bench.counts: what it counts, plans and writes."""

import csv
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.fused.unet import FusedUNet
from minisd_kernels.ops import launch
from minisd_kernels.ops.geglu import geglu
from minisd_kernels.ops.group_norm import group_norm_silu
from minisd_kernels.ops.layer_norm import layer_norm

from bench import counts
from bench.counts import AsOnGPU, Count, Step, counted, network, planned, rungs, table
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.unet import UNet

LAST = torch.channels_last
TINY = replace(SMALL, sample_size=8 * SMALL.vae.downscale)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16, device="meta")


A, B = meta(4, 8), meta(8, 3)
BY_HAND = {  # the operation, launches, elements moved, FLOPs
    "a product": (lambda: A @ B, 1, 32 + 24 + 12, 2 * 4 * 8 * 3),
    "views and allocations": (lambda: A.T[1:].chunk(2)[0].unsqueeze(1).new_empty(9), 0, 0, 0),
    "a view counts what it shows": (lambda: A[:, :2] * 2, 1, 8 + 8, 0),
    "what is expanded is read once": (lambda: A[:1].expand(4, 8) * 2, 1, 8 + 32, 0),
    "the same twice is read once": (lambda: A * A, 1, 32 + 32, 0),
    "in place, read and written": (lambda: A.add_(A.T.reshape(4, 8)), 2, 2 * 32 + 3 * 32, 0),
    "copied over, not read": (lambda: A.copy_(B[:1, :1]), 1, 1 + 32, 0),
    "written elsewhere": (lambda: torch.add(A, 1, out=meta(4, 8)), 1, 32 + 32, 0),
    "a product in place": (lambda: meta(4, 3).addmm_(A, B), 1, 12 + 32 + 24 + 12, 2 * 4 * 8 * 3),
    "a convolution": (lambda: F.conv2d(meta(1, 2, 5, 5), meta(3, 2, 3, 3), padding=1), 1,
                      50 + 54 + 75, 2 * 25 * 3 * 2 * 9),
    "geglu": (lambda: geglu(meta(4, 16)), 1, 3 * 32, 0),
    "layer norm": (lambda: layer_norm(A, B.T[0].contiguous(), meta(8), residual=meta(4, 8)), 2,
                   8 + 8 + 8 + 8 + 4 * 32, 0),
    "a small group norm": (lambda: group_norm_silu(meta(1, 8, 5, 5), meta(8), meta(8), 2), 1,
                           2 * 200 + 16, 0),
}


@pytest.mark.parametrize("call, count, elements, flops", BY_HAND.values(), ids=BY_HAND)
def test_by_hand(call, count, elements, flops):
    seen = counted(call)
    assert seen.total == Count(count, 2 * elements, flops), seen.names


def test_a_large_group_norm_is_three_launches_and_reads_twice():
    x, affine = meta(1, 8, 128, 128), (meta(8), meta(8))
    seen = counted(lambda: group_norm_silu(x, *affine, 2))
    assert seen.names == {"_moments_kernel": 1, "_join_kernel": 1, "_apply_kernel": 1}
    assert 3 * 2 * x.numel() <= seen.total.bytes <= 3 * 2 * x.numel() + 5000  # and the moments


def test_attention_counts_as_its_flash_form():
    q, k = meta(2, 3, 5, 8), meta(2, 3, 7, 8)
    seen = counted(lambda: F.scaled_dot_product_attention(q, k, k))
    assert seen.names == {"_scaled_dot_product_flash_attention": 1}
    assert seen.total.flops == 4 * 2 * 3 * 5 * 7 * 8


def test_tensors_with_memory_are_not_counted():
    call = launch.Call(None, (1,), (torch.zeros(1),), {}, 4)
    with pytest.raises(ValueError, match="meta"):
        counted(lambda: launch.run([call]))


MAP, TAPS = meta(1, 8, 6, 6), meta(8, 8, 4, 4)


@pytest.mark.parametrize("conv", [F.conv2d, F.conv_transpose2d])
@pytest.mark.parametrize("x, weight, last", [
    (MAP, TAPS, False),
    (MAP.to(memory_format=LAST), TAPS, True),
    (MAP, TAPS.to(memory_format=LAST), True),
    (meta(1, 16, 6, 6).to(memory_format=LAST)[:, :8], TAPS, True),  # with gaps between pixels
])
def test_a_convolution_has_the_layout_that_cudnn_chooses(x, weight, last, conv):
    with AsOnGPU():
        assert conv(x, weight).is_contiguous(memory_format=LAST) == last


def test_what_is_planned_is_what_would_be_launched():
    (call,) = planned([lambda: geglu(meta(4, 16)), lambda: A + A])
    assert call.kernel.__module__.endswith("geglu") and call.args[0].shape == (4, 16)


@pytest.fixture(scope="module")
def step():
    return Step(TINY)


def test_readable_step(step):
    unet = network(UNet, TINY.unet, TORCH)
    seen = counted(step.readable(unet))
    modules = [type(m).__name__ for m in unet.modules()]
    assert seen.names["convolution"] == modules.count("Conv2d")
    assert seen.names["native_group_norm"] == modules.count("GroupNorm")
    assert seen.names["_scaled_dot_product_flash_attention"] == modules.count("Attention")
    real = network(UNet, TINY.unet, REFERENCE).float().to_empty(device="cpu")
    with FlopCounterMode(display=False) as flops:
        real(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, step.context.shape[2]))
    assert seen.total.flops == flops.get_total_flops()


def test_what_is_made_once_is_not_counted(step):
    unet = FusedUNet(network(UNet, TINY.unet, TORCH), TORCH)
    every, once = counted(step.anew(unet)), counted(step.once(unet))
    for name in every.names | once.names:
        assert every.names[name] >= once.names[name], name
    assert every.names["mm"] - once.names["mm"] == len(unet.attentions)
    assert (every.names["cos"], once.names["cos"]) == (1, 0)
    around = counted(step.around(unet))
    times = step.steps(unet).times[0]
    assert around.names == {"copy_": 3, "clone": 1} and around.total.flops == 0
    assert around.total.bytes == 2 * (4 * step.x.nbytes + times.nbytes + 2 * 3 * 4)


def test_a_step_of_every_sampler_takes_as_many_launches(step):
    """1, 2 and 4 tensors are carried from call to call; a step is one product with its table."""
    unet, found = FusedUNet(network(UNet, TINY.unet, TORCH), TORCH), {}
    for sampler, carried in {"ddim": 1, "dpmpp_2m": 2, "unipc": 4}.items():
        seen = counted(Step(TINY, sampler=sampler).once(unet))
        found[carried] = seen.total.launches - 2  # without what makes the first state
    assert len(set(found.values())) == 1, found


def test_rungs():
    pytest.importorskip("diffusers")
    every = [*rungs(TINY)]
    found = {rung: count for of, rung, count in every if not of}
    decodings = {rung: count for of, rung, count in every if of}
    assert list(found)[:2] == ["diffusers eager", 'ops="reference"'] and len(found) == 8
    graph, once = found["one graph"], found["prompt and times made once"]
    assert graph.launches == 1 + 4 and graph.flops == once.flops and graph.bytes > once.bytes
    assert graph.launches < 30 < once.launches
    assert once.bytes < found['ops="reference"'].bytes
    assert len(decodings) == 5
    assert decodings["fused decoder, triton bodies"].flops < decodings['ops="torch"'].flops
    rows = [{"model": "small", "rung": rung, **count._asdict()} for rung, count in found.items()]
    assert len(table(rows).splitlines()) == 2 + len(found)


def test_rows_are_written(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(counts, "MODELS", {"small": TINY})
    monkeypatch.setattr(counts.harness, "RESULTS", tmp_path)
    counts.main([])
    assert not [*tmp_path.iterdir()]
    counts.main(["--write"])
    with (tmp_path / "launches.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {row["model"] for row in rows} == {"small", "small, decoding"} and len(rows) == 8 + 5
    assert all(row["commit"] and int(row["launches"]) > 0 for row in rows)
