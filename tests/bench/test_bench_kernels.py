"""bench.kernels without a GPU: the command in Triton's interpreter, its sizes, its check."""

import csv
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.ops import launch

from bench import kernels, measure, shapes, tune, variants
from bench.attention import Attention
from bench.check import Verdict, check, equality, error, poisoned
from bench.group_norm import Compiler, GroupNorm
from bench.transformer import Geglu, LayerNorm
from minisd.backends import Backend, Call, coverage, watch
from minisd.config import SD1, SD2_V
from minisd.models.ops import TORCH
from minisd.models.vae import VAE

ROOT = Path(__file__).parents[2]
CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = Attention("SD1.5", 1, 2, 5, 7, 8, calls=3)
NORM = GroupNorm("SD1.5", 1, 8, 3, True, calls=2, groups=2)


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the command


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Run it in both ways at once, each in a process with the flag: their files and output."""
    ways = {"bench": ["--compile-minutes", "0"],
            "tune": ["--tune", "--only", "tiny 1x6x5x5"]}
    folders = {way: tmp_path_factory.mktemp(way) for way in ways}
    children = {way: subprocess.Popen(
        [sys.executable, "-m", "bench.kernels", "--rounds", "2", "--out", folders[way], *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for way, arguments in ways.items()}
    said = {way: child.communicate()[0] for way, child in children.items()}
    for way, child in children.items():
        assert child.returncode == 0, said[way]
    return folders, said


def test_every_size_is_checked(interpreted):
    rows = read(interpreted[0]["bench"] / "equality.csv")
    assert [row["shape"] for row in rows] == 2 * [case.label for case in shapes.tiny()]
    assert {row["dtype"] for row in rows} == {"float16", "float32"}
    assert {(row["ok"], row["capability"]) for row in rows} == {("True", "none")}
    assert all(0 < float(row["max_err"]) <= float(row["bound"]) for row in rows)
    assert all("interpreter" in row["device"] for row in rows)


def test_every_provider_has_a_row_or_a_reason(interpreted):
    rows = read(interpreted[0]["bench"] / "kernels.csv")
    for case in shapes.tiny():
        mine = [row for row in rows if row["shape"] == case.label]
        peers = ({"reference", "torch"}
                 | ({"sdpa default", "sdpa FLASH_ATTENTION", "sdpa CUDNN_ATTENTION",
                     "sdpa EFFICIENT_ATTENTION", "minisd padded"} if case.kernel == "attention"
                    else {"eager", "compiled", "liger"}))
        if case.kernel in ("layer_norm", "geglu"):
            peers = {"eager", "compiled"}
        assert {row["provider"] for row in mine} == {"minisd", *peers}
        for row in mine:
            if row["metric"] == "not timed":
                assert row["provider"] != "minisd" and row["note"] and not row["p50"]
            else:
                assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
                assert float(row["max_err"]) < 0.01
    assert "CUDNN" not in {row["provider"] for row in rows if row["metric"] == "time"}


def test_the_padded_variant_is_the_same_function(interpreted):
    """It is timed as a peer, so it must be right: one piece, at least d wide."""
    rows = read(interpreted[0]["bench"] / "kernels.csv")
    padded = [r for r in rows if r["provider"] == "minisd padded" and r["metric"] == "time"]
    assert len(padded) == 2 and all(float(row["max_err"]) < 0.002 for row in padded)


def test_tuning_measures_every_setting(interpreted):
    rows = read(interpreted[0]["tune"] / "tune.csv")
    tried = {row["provider"] for row in rows if row["kernel"] == "group norm 0"}
    first = launch.DEFAULT["group norm", 0]
    assert tried >= {str(first), *map(str, tune.SETTINGS["group norm 0"])}
    assert all(float(row["p50"]) > 0 for row in rows)
    assert "for launch.MEASURED" in interpreted[1]["tune"] or "no setting" in interpreted[1]["tune"]


def test_without_a_gpu_it_says_so_and_times_the_ops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = ["kernels", "--only", "64x77x160", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", line)
    assert kernels.main() == 0
    assert "there is no GPU here" in capsys.readouterr().out
    rows = read(tmp_path / "kernels.csv")
    assert {"torch", "reference"} <= {row["provider"] for row in rows if row["metric"] == "time"}
    ours = [row for row in rows if row["provider"] == "minisd"]
    assert ours and all("run on a GPU" in row["note"] for row in ours)
    assert not (tmp_path / "equality.csv").exists()
    monkeypatch.setattr("sys.argv", [*line, "--tune"])
    assert kernels.main() == 1
    assert "nothing to tune: the tensors are on cpu" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*line, "--minutes", "-1"])
    assert kernels.main() == 0
    assert {row["note"] for row in read(tmp_path / "kernels.csv")[len(rows):]} == {
        "TimeoutError: the time was up (--minutes)"}
    monkeypatch.setattr(kernels, "measure", lambda *args: torch.empty(2)[3])  # fails
    monkeypatch.setattr("sys.argv", line)
    assert kernels.main() == 0  # on a CPU no kernel was expected
    lost = read(tmp_path / "kernels.csv")[-1]
    assert lost["provider"] == "minisd" and lost["note"].startswith("IndexError")
    monkeypatch.setattr("sys.argv", ["kernels", "--only", "no such size"])
    with pytest.raises(SystemExit, match="no size has 'no such size' in its name"):
        kernels.main()


# --- the sizes


def counted(calls: list[Call]) -> Counter:
    return Counter((call.function, call.sizes) for call in calls)


def as_calls(cases: list) -> Counter:
    """The calls in the table."""
    found = Counter()
    for case in cases:
        if case.kernel == "attention":
            sizes = f"{case.heads} heads of {case.d}, {case.queries}x{case.keys}"
        else:
            sizes = f"{case.channels} at {case.side}x{case.side}" + ", SiLU" * case.silu
        found[case.kernel, sizes] += case.calls
    return found


@pytest.mark.parametrize("model, config", [("SD1.5", SD1), ("SD2.1", SD2_V)])
def test_sizes_are_those_of_the_unet(model, config):
    side = shapes.SIDES[model]
    calls = coverage(config.unet, Backend(TORCH), side, side, torch.float16)
    attention = [case for case in shapes.SELF_ATTENTION + shapes.CROSS_ATTENTION
                 if case.model == model]
    norms = shapes.group_norms(model)
    assert {case.batch for case in attention + norms} == {2}
    calls = [call for call in calls if call.function in ("attention", "group_norm_silu")]
    assert as_calls(attention + norms) == counted(calls) and len(calls) == 93


@pytest.mark.parametrize("model, config", [("SD1.5", SD1), ("SD2.1", SD2_V)])
def test_rows_are_those_of_the_fused_unet(model, config, monkeypatch):
    """Before the first cross-attention uncond and cond are equal: the batch is 1 there only."""
    norms, geglus = Counter(), Counter()
    monkeypatch.setattr(launch, "run", lambda calls: [count(call) for call in calls])

    def count(call):
        kernel, x = call.kernel.__module__.rpartition(".")[2], call.args[0]
        if kernel == "layer_norm":
            norms[x.shape[1:], call.constants["HAS_RESIDUAL"]] += 1
        elif kernel == "geglu":
            geglus[*x.shape[1:-1], x.shape[-1] // 2] += 1

    variants.fused_step(config, shapes.SIDES[model])
    cases = [case for case in shapes.LAYER_NORMS + shapes.GEGLUS if case.model == model]
    assert {case.batch for case in cases} == {2}
    assert norms == {((c.length, c.channels), c.residual): c.calls for c in cases
                     if c.kernel == "layer_norm"}
    assert geglus == {(c.length, c.channels): c.calls for c in cases if c.kernel == "geglu"}


def test_sizes_are_those_of_the_vae():
    calls: list[Call] = []
    with META:
        VAE(SD1.vae, watch(Backend(TORCH), calls)).decode(torch.empty(1, 4, 64, 64))
    assert as_calls(shapes.VAE_ATTENTION + shapes.group_norms("VAE")) == counted(calls)


def test_full_has_every_size_once_in_every_layout():
    labels = [case.label for case in shapes.full()]
    assert len(labels) == len(set(labels))
    assert sum("packed" in label for label in labels) == 16
    assert sum("nchw" in label for label in labels) == sum("_last" in label for label in labels)


@pytest.mark.parametrize("case", [
    SMALL, SMALL._replace(packed=True), SMALL._replace(packed=True, keys=5), NORM,
    NORM._replace(channels_last=True, silu=False), LayerNorm("SD1.5", 1, 5, 8, 1, False),
    LayerNorm("SD1.5", 2, 5, 8, 1, True), Geglu("SD1.5", 2, 3, 8, 1),
], ids=lambda case: case.label)
def test_torch_is_right_and_every_peer_agrees(case):
    inputs = case.inputs(CPU, torch.float32)
    exact = case.exact(*inputs)
    assert error(case.by_torch(*inputs), exact) < 1e-5
    if hasattr(case, "by_reference"):
        assert error(case.by_reference(*inputs), exact) < 1e-5
    for name in ("sdpa default", "sdpa FLASH_ATTENTION", "eager"):
        if call := case.peers(CPU, Compiler(0)).get(name):
            assert error(call(*inputs), exact) < 1e-5
    if case.kernel == "attention":
        assert all(x.storage_offset() > 0 for x in inputs[2:]) == case.packed
    if case.kernel == "group_norm_silu":
        assert (inputs[0].stride(1) == 1) == case.channels_last


def test_compiling_stops_when_its_budget_is_spent():
    with pytest.raises(RuntimeError, match="budget for compiling"):
        NORM.peers(CPU, Compiler(0))["compiled"](*NORM.inputs(CPU, torch.float32))


# --- the check


def test_unwritten_elements_are_nan():
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2, 2).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()

    class Lazy(Attention):
        def ours(self, q, k, v):
            return torch.empty_like(q)

    verdict = check(Lazy(*SMALL), CPU, torch.float32)
    assert verdict.ours == math.inf and not verdict.ok


def test_nan_and_infinity_never_pass():
    assert error(torch.tensor([1.0, math.nan]), torch.ones(2).double()) == math.inf
    assert error(torch.ones(3), torch.ones(2).double()) == math.inf
    assert Verdict(1.0, 0.5, 1.0).ok
    for verdict in (Verdict(1.1, 0.5, 1.0), Verdict(math.inf, math.inf, math.inf),
                    Verdict(math.nan, 0.5, 1.0), Verdict(1.0, math.nan, math.nan)):
        assert not verdict.ok


def test_equality_in_processes_ends_with_its_time():
    """Every size is a row, from any process; checks that are cut off count as wrong."""
    rows, cases = [], [SMALL, NORM, SMALL._replace(keys=5)]
    assert not equality(cases, CPU, [torch.float32], rows.append, workers=2)  # no GPU: ValueError
    assert sorted(row["shape"] for row in rows) == sorted(case.label for case in cases)
    assert all("run on a GPU" in row["note"] and row["ok"] is False for row in rows)
    for workers in (0, 1):
        assert not equality(cases, CPU, [torch.float32], rows.append, workers, deadline=0.0)
    assert len(rows) == 3


def test_a_wrong_kernel_is_not_timed():
    class Wrong(Attention):
        def ours(self, q, k, v):
            return 1.1 * self.by_torch(q, k, v)

    measured = measure.measure(Wrong(*SMALL), CPU, torch.float32, Compiler(0), 2)
    assert "wrong by" in measured.reasons["minisd"] and "minisd" not in measured.times
    assert {"torch", "reference"} <= set(measured.times)
