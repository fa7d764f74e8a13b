"""bench.launches and bench.image: what they count, check and write."""

import csv
import time

import pytest
import torch
import torch.nn.functional as F
from reference_models import SMALL
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.fused.unet import FusedUNet
from minisd_kernels.ops.geglu import geglu
from minisd_kernels.ops.group_norm import group_norm_silu
from minisd_kernels.ops.layer_norm import layer_norm

from bench import image, launches, models
from bench.clock import Clock, Memory, OutOfTime, limited
from bench.contest import FUSED, Contest, psnr
from bench.launches import Count, Launches, Step
from minisd.models.ops import REFERENCE, TORCH

CPU = torch.device("cpu")


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
    with Launches() as seen:
        call()
    assert seen.total == Count(count, 2 * elements, flops), seen.names


def test_a_large_group_norm_is_three_launches_and_reads_twice():
    x, affine = meta(1, 8, 128, 128), (meta(8), meta(8))
    with Launches() as seen:
        group_norm_silu(x, *affine, 2)
    assert seen.names == {"_moments_kernel": 1, "_join_kernel": 1, "_apply_kernel": 1}
    assert 3 * 2 * x.numel() <= seen.total.bytes <= 3 * 2 * x.numel() + 5000  # and the moments


def test_attention_counts_as_its_flash_form():
    q, k = meta(2, 3, 5, 8), meta(2, 3, 7, 8)
    with Launches() as seen:
        F.scaled_dot_product_attention(q, k, k)
    assert seen.names == {"_scaled_dot_product_flash_attention": 1}
    assert seen.total.flops == 4 * 2 * 3 * 5 * 7 * 8


def test_tensors_with_memory_are_not_counted():
    from minisd_kernels.ops.launch import Call

    with Launches() as seen, pytest.raises(ValueError, match="meta"):
        seen._run([Call(None, (1,), (torch.zeros(1),), {}, 4)])


@pytest.fixture(scope="module")
def step():
    return Step(SMALL, 8)


def test_readable_step(step):
    unet = step.unet(TORCH)
    seen = step.count(step.readable(unet))
    modules = [type(m).__name__ for m in unet.modules()]
    assert seen.names["convolution"] == modules.count("Conv2d")
    assert seen.names["native_group_norm"] == modules.count("GroupNorm")
    assert seen.names["_scaled_dot_product_flash_attention"] == modules.count("Attention")
    real = step.unet(REFERENCE).float().to_empty(device=CPU)
    with FlopCounterMode(display=False) as flops:
        real(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, step.context.shape[2]))
    assert seen.total.flops == flops.get_total_flops()


def test_what_is_made_once_is_not_counted(step):
    fused = FusedUNet(step.unet(TORCH), TORCH)
    every, once = step.count(step.anew(fused)), step.count(step.once(fused))
    for name in every.names | once.names:
        assert every.names[name] >= once.names[name], name
    assert every.names["mm"] - once.names["mm"] == len(fused.attentions)
    assert (every.names["cos"], once.names["cos"]) == (1, 0)
    around, graph = step.replay(fused)
    around = step.count(around).total
    assert graph.launches == 1 and graph.bytes == once.total.bytes and around.launches == 4
    assert graph.flops == once.total.flops


def test_rungs():
    found = dict(launches.rungs(SMALL, 8))
    assert list(found)[:2] == ["diffusers eager", 'ops="reference"'] and len(found) == 8
    assert found["one graph"].launches < 30 < found["prompt and times made once"].launches
    assert found["prompt and times made once"].bytes < found['ops="reference"'].bytes
    rows = [{"model": "small", "rung": rung, **count._asdict()} for rung, count in found.items()]
    assert len(launches.table(rows).splitlines()) == 2 + len(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole command on a very small model: the rows of image.csv."""
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("results")
    small = models.full("small", SMALL, 2)
    patch.setattr(models, "standard", lambda quick: {"small": lambda: small})
    patch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--rounds", "2", "--batches", "2", "--batch-steps", "1", "--minutes", "5"]
    with torch.no_grad():
        assert image.main([*options, "--out", str(out)]) == 0
    patch.undo()
    with (out / "image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_call_has_a_time_and_an_error(run):
    assert list(run[0]) == image.COLUMNS
    for provider in ("minisd torch", FUSED, "diffusers eager"):
        mine = {(r["what"], r["batch"]): r for r in run if r["provider"] == provider}
        for what in ("step", "decode", "picture"):
            row = mine[what, "1"]
            assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
            assert float(row["max_err"]) < 1e-4
            assert what == "step" or float(row["psnr"]) > 90
            assert provider == FUSED or float(mine[f"{what} over fused", "1"]["p50"]) > 0
        assert {"load", "first picture", "pictures/s"} <= {what for what, _ in mine}
        assert mine["pictures/s", "2"]["steps"] == "1"


def test_providers_that_cannot_run_have_a_reason(run):
    reasons = {r["provider"]: r["note"] for r in run if r["what"] == "not run"}
    assert "GPU" in reasons["minisd triton"] and "--compile" in reasons["diffusers compiled"]


def test_a_wrong_image_shows():
    contest = Contest(models.full("small", SMALL, 1), CPU, torch.float32, lambda row: None)
    near = contest.errors("picture", contest.exact["picture"] + 0.1)
    assert near == {"max_err": "0.1", "psnr": "20.0"}
    assert contest.errors("step", 1.5 * contest.exact["step"]) == {"max_err": "0.5"}
    nan = contest.errors("picture", contest.exact["picture"] * float("nan"))
    assert nan == {"max_err": "nan", "psnr": "nan"}
    assert psnr(near_one := torch.ones(2), near_one) == float("inf")


def test_a_failure_becomes_a_row():
    rows = []
    contest = Contest(models.full("small", SMALL, 1), CPU, torch.float32, rows.append)

    def broken():
        raise RuntimeError("no\nluck")

    contest.enter("broken", broken)
    contest.race(2, 0)
    assert [(r["provider"], r["what"], r["note"]) for r in rows] == [
        ("broken", "not run", "RuntimeError: no luck")]


def test_a_time_limit_is_not_caught_as_an_exception():
    with pytest.raises(OutOfTime, match="up"), limited(0.05, "up"):
        while True:
            try:
                time.sleep(1)
            except Exception:
                pass
    with pytest.raises(OutOfTime, match="up"), limited(0, "up"):
        raise AssertionError("must not begin")


def test_clock_and_memory():
    calls = []
    sample, _ = Clock(CPU).sampler(lambda: calls.append(time.sleep(0.001)))
    before = len(calls)
    assert sample() >= 0.001 and len(calls) > before
    memory = Memory(CPU)
    if not memory.base:
        pytest.skip("this system does not report the size of a process")
    kept = torch.ones(2**24)
    grown = memory.growth()["memory"]
    assert grown >= 0.9 * kept.nbytes
    memory.restart()
    assert memory.peaks()["memory"] >= 0.9 * kept.nbytes
