"""bench.kernels without a GPU: the command in Triton's interpreter, its sizes, its check."""

import csv
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.ops import launch

from bench import cases, counts, harness, kernels, providers, timing
from bench.cases import Attention, Case, Geglu, GroupNorm, LayerNorm
from bench.harness import Verdict, check, equality, error, poisoned
from minisd import backends
from minisd.backends import Backend, Call, coverage, watch
from minisd.config import SD1, SD2_V
from minisd.models.ops import TORCH
from minisd.models.vae import VAE

ROOT = Path(__file__).parents[2]
CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = Attention("SD1.5", 1, 2, 5, 7, 8, calls=3)
NORM = GroupNorm("SD1.5", 1, 8, 3, True, calls=2, groups=2)
LIMITS = timing.Limits(1e9, 1e9, 1e9)


@pytest.fixture(autouse=True)
def _limits(monkeypatch):
    """The command measures them; here that is left to the runs in the interpreter."""
    monkeypatch.setattr(timing, "limits", lambda device: LIMITS)


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the command


INTERPRETED = """
import sys
sys.path.insert(0, "tests/kernels")
import interpreter  # it makes Triton's faster
from bench.kernels import main
for line in ([], ["--tune", "--only", "tiny 1x6x5x5"]):
    assert main(["--rounds", "2", "--out", sys.argv[1], *line]) == 0
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Run it in both ways, in a process with the flag: the folder of their files."""
    folder = tmp_path_factory.mktemp("interpreted")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, folder], cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_size_is_checked(interpreted):
    rows = read(interpreted / "equality.csv")
    assert [row["shape"] for row in rows] == 2 * [case.label for case in cases.tiny()]
    assert {row["dtype"] for row in rows} == {"float16", "float32"}
    assert {(row["ok"], row["capability"]) for row in rows} == {("True", "none")}
    assert all(0 < float(row["max_err"]) <= float(row["bound"]) for row in rows)
    assert all("interpreter" in row["device"] for row in rows)


def test_every_provider_has_a_row_or_a_reason(interpreted):
    rows = read(interpreted / "kernels.csv")
    for case in cases.tiny():
        mine = [row for row in rows if row["shape"] == case.label]
        peers = {"reference", "torch"} | ({
            "sdpa default", "sdpa FLASH_ATTENTION", "sdpa CUDNN_ATTENTION",
            "sdpa EFFICIENT_ATTENTION", "minisd padded"} if case.op == "attention" else
            {"eager", "compiled"} | ({"liger"} if case.op == "group_norm_silu" else set()))
        peers |= set(providers.LADDER[case.op] if case.label in providers.LADDER_CASES else ())
        assert {row["provider"] for row in mine} == {"minisd", *peers}
        for row in mine:
            if row["metric"] == "not timed":
                assert row["provider"] != "minisd" and row["note"] and not row["p50"]
            else:
                assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
                assert float(row["max_err"]) < 0.01
    assert "CUDNN" not in {row["provider"] for row in rows if row["metric"] == "time"}


def test_the_rungs_of_the_ladder_are_timed_at_some_sizes(interpreted):
    rows = read(interpreted / "kernels.csv")
    timed = {(row["kernel"], row["provider"]) for row in rows if row["metric"] == "time"
             and row["provider"].startswith("ladder") and float(row["max_err"]) < 0.002}
    assert timed == {(op, name) for op, rungs in providers.LADDER.items() for name in rungs}
    labels = {case.label for case in cases.full() + cases.tiny()}
    assert providers.LADDER_CASES <= labels


def test_scores_that_do_not_fit_leave_a_row(monkeypatch):
    def too_large(*args):
        raise torch.OutOfMemoryError("1 GiB")

    rows = kernels.measure(SMALL, CPU, torch.float32, 2, {"torch": TORCH.attention},
                           {"ladder 1 naive": too_large}, timing.Budget(0, ""), LIMITS)
    lost, = (row for row in rows if row["provider"] == "ladder 1 naive")
    assert lost["metric"] == "not timed" and lost["note"] == "OutOfMemoryError: 1 GiB"


def test_the_padded_variant_is_the_same_function(interpreted):
    """It is timed as a peer, so it must be right: one piece, at least d wide."""
    rows = read(interpreted / "kernels.csv")
    padded = [r for r in rows if r["provider"] == "minisd padded" and r["metric"] == "time"]
    assert len(padded) == 2 and all(float(row["max_err"]) < 0.002 for row in padded)


def test_tuning_measures_every_setting(interpreted):
    rows = read(interpreted / "tune.csv")
    tried = {row["provider"] for row in rows if row["kernel"] == "group norm 0"}
    first = launch.DEFAULT["group norm", 0]
    assert tried == {str(first), *map(str, launch.CANDIDATES["group norm", 0])}
    assert all(float(row["p50"]) > 0 for row in rows)
    assert rows[0]["provider"] == str(first)  # the report takes the first for the present one


def test_without_a_gpu_it_says_so_and_times_the_ops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "GPU", False)
    monkeypatch.setattr(kernels, "RUNS", False)
    line = ["--only", "64x77x160", "--rounds", "2", "--out", str(tmp_path)]
    assert kernels.main(line) == 0
    assert "there is no GPU here" in capsys.readouterr().out
    rows = read(tmp_path / "kernels.csv")
    assert {"torch", "reference"} <= {row["provider"] for row in rows if row["metric"] == "time"}
    ours = [row for row in rows if row["provider"] == "minisd"]
    assert ours and all("run on a GPU" in row["note"] for row in ours)
    assert not (tmp_path / "equality.csv").exists()
    with pytest.raises(SystemExit, match="nothing to tune"):
        kernels.main([*line, "--tune"])
    assert kernels.main([*line, "--minutes", "-1"]) == 0
    assert {row["note"] for row in read(tmp_path / "kernels.csv")[len(rows):]} == {
        "TimeoutError: the time was up (--minutes)"}
    monkeypatch.setattr(kernels, "measure", lambda *args: torch.empty(2)[3])  # fails
    assert kernels.main(line) == 0  # on a CPU no kernel was expected
    lost = read(tmp_path / "kernels.csv")[-1]
    assert lost["provider"] == "minisd" and lost["note"].startswith("IndexError")
    with pytest.raises(SystemExit, match=r"no size has any of \['no such size'\] in its name"):
        kernels.main(["--only", "no such size"])


# --- a function of the caller's own


def doubled_geglu(h):
    """Wrong."""
    return 2 * TORCH.geglu(h)


def only_64_rows(h):
    if h.shape[1] != 64:
        raise ValueError("only 64 rows")
    return TORCH.geglu(h)


def own(function: str, *line: str) -> int:
    return kernels.main(["--provider", f"geglu={__name__}:{function}", "--rounds", "2", *line])


def test_a_function_of_ones_own_is_checked_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "GPU", False)
    monkeypatch.setattr(kernels, "RUNS", False)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    assert own("only_64_rows", "--only", "64x5120") == 0
    said = capsys.readouterr().out
    # In three dtypes.
    assert said.count(f"right {__name__}:only_64_rows geglu SD1.5 2x64x5120") == 3
    assert not (tmp_path / "results").exists()  # the rows of a part
    assert own("only_64_rows", "--only", "64x5120", "--out", str(tmp_path)) == 0
    rows = {(row["provider"], row["metric"]) for row in read(tmp_path / "kernels.csv")}
    name = f"{__name__}:only_64_rows"
    assert {(name, "time"), ("eager", "time"), ("torch", f"time over {name}'s")} <= rows
    assert ("minisd", "not timed") in rows and not (tmp_path / "equality.csv").exists()


@pytest.mark.parametrize("function, note", [("doubled_geglu", "wrong by"),
                                            ("only_64_rows", "only 64 rows")])
def test_one_that_is_wrong_is_not_timed(function, note, monkeypatch, capsys):
    monkeypatch.setattr(harness, "GPU", False)
    monkeypatch.setattr(kernels, "RUNS", False)
    assert own(function) == 1
    said = capsys.readouterr().out
    assert f"WRONG {__name__}:{function} geglu SD1.5 2x256x5120 float16" in said
    assert f"{__name__}:{function}" in said and note in said


def in_place(h):
    value, gate = h.chunk(2, -1)
    return value.mul_(torch.nn.functional.gelu(gate))


def in_place_and_raises(h):
    h.zero_()
    raise ValueError("no more")


@pytest.mark.parametrize("function, why", [
    (in_place, "changed its arguments"), (in_place_and_raises, "no more"),
    (lambda h: TORCH.geglu(h)[0], r"returned float16 \(3, 8\), not float16 \(2, 3, 8\)"),
    (lambda h: TORCH.geglu(h.float()), r"returned float32 \(2, 3, 8\), not float16"),
    (lambda h: (TORCH.geglu(h),), r"returned \(float16 \(2, 3, 8\)\), not"),
    (lambda h: None, "returned NoneType, not")])
def test_a_function_breaks_its_contract_and_spoils_nothing(function, why):
    case = Geglu("SD1.5", 2, 3, 8, 1)
    inputs = case.inputs(CPU, torch.float16)
    kept = inputs[0].clone()
    with pytest.raises((TypeError, ValueError), match=why):
        harness.verdict(case, function, inputs, case.exact(*inputs))
    assert torch.equal(inputs[0], kept)


def test_heads_apart_are_a_peers_right_alone():
    apart = providers.PEERS["attention"]["sdpa default"]
    inputs = SMALL.inputs(CPU, torch.float32)
    assert error(SMALL.call(apart, *inputs), SMALL.exact(*inputs)) < 1e-5
    with pytest.raises(TypeError, match="returned float32 .1, 2, 5, 8., not float32 .1, 5, 16."):
        check(SMALL, CPU, torch.float32, apart)


@pytest.mark.parametrize("text, why", [
    ("geglu", "'geglu' is not OP=MODULE:FUNCTION"), ("gelu=a:b", "with an OP of attention, "),
    ("geglu=.relative:f", "cannot be imported: the 'package' argument is required"),
    ("geglu=no_such_module:f", "no_such_module:f cannot be imported: No module named"),
    ("geglu=math:no_such", "cannot be imported: module 'math' has no attribute 'no_such'")])
def test_one_that_cannot_be_found_is_said_in_a_line(text, why, capsys):
    with pytest.raises(SystemExit) as caught:
        kernels.main(["--provider", text])
    assert caught.value.code == 2 and why in capsys.readouterr().err


# --- the sizes


def counted(calls: list[Call]) -> Counter:
    return Counter((call.function, call.sizes) for call in calls)


def as_calls(rows: list[Case]) -> Counter:
    """The calls in the table."""
    found = Counter()
    for case in rows:
        if case.op == "attention":
            sizes = f"{case.heads} heads of {case.d}, {case.queries}x{case.keys}"
        else:
            sizes = f"{case.channels} at {case.side}x{case.side}" + ", SiLU" * case.silu
        found[case.op, sizes] += case.calls
    return found


@pytest.mark.parametrize("model, config", [("SD1.5", SD1), ("SD2.1", SD2_V)])
def test_sizes_are_those_of_the_unet(model, config):
    side = cases.SIDES[model]
    calls = coverage(config.unet, Backend(TORCH), side, side, torch.float16)
    attention = [case for case in cases.SELF_ATTENTION + cases.CROSS_ATTENTION
                 if case.model == model]
    norms = cases.group_norms(model)
    assert {case.batch for case in attention + norms} == {2}
    calls = [call for call in calls if call.function in ("attention", "group_norm_silu")]
    assert as_calls(attention + norms) == counted(calls) and len(calls) == 93


@pytest.mark.parametrize("model, config", [("SD1.5", SD1), ("SD2.1", SD2_V)])
def test_rows_are_those_of_the_fused_unet(model, config):
    """Before the first cross-attention uncond and cond are equal: the batch is 1 there only."""
    norms, geglus = Counter(), Counter()
    for call in counts.planned(counts.fused(config, backends.kernels())[:1]):
        kernel, x = call.kernel.__module__.rpartition(".")[2], call.args[0]
        if kernel == "layer_norm":
            norms[x.shape[1:], call.constants["HAS_RESIDUAL"]] += 1
        elif kernel == "geglu":
            geglus[*x.shape[1:-1], x.shape[-1] // 2] += 1
    rows = [case for case in cases.LAYER_NORMS + cases.GEGLUS if case.model == model]
    assert {case.batch for case in rows} == {2}
    assert norms == {((c.length, c.channels), c.residual): c.calls for c in rows
                     if c.op == "layer_norm"}
    assert geglus == {(c.length, c.channels): c.calls for c in rows if c.op == "geglu"}


def test_sizes_are_those_of_the_vae():
    calls: list[Call] = []
    with META:
        VAE(SD1.vae, watch(Backend(TORCH), calls)).decode(torch.empty(1, 4, 64, 64))
    assert as_calls(cases.VAE_ATTENTION + cases.group_norms("VAE")) == counted(calls)


def test_full_has_every_size_once_in_every_layout():
    labels = [case.label for case in cases.full()]
    assert len(labels) == len(set(labels))
    assert sum("packed" in label for label in labels) == 16
    assert sum("nchw" in label for label in labels) == sum("_last" in label for label in labels)


@pytest.mark.parametrize("case", [
    SMALL, replace(SMALL, packed=True), replace(SMALL, packed=True, keys=5), NORM,
    replace(NORM, channels_last=True, silu=False), LayerNorm("SD1.5", 1, 5, 8, 1, False),
    LayerNorm("SD1.5", 2, 5, 8, 1, True), Geglu("SD1.5", 2, 3, 8, 1),
], ids=lambda case: case.label)
def test_torch_is_right_and_every_peer_agrees(case):
    inputs = case.inputs(CPU, torch.float32)
    exact = case.exact(*inputs)
    for name, function in providers.peers(case, CPU).items():
        if name in ("torch", "reference", "sdpa default", "sdpa FLASH_ATTENTION", "eager"):
            assert error(case.call(function, *inputs), exact) < 1e-5
    if case.op == "attention":
        assert all(x.storage_offset() > 0 for x in inputs[2:]) == case.packed
    if case.op == "group_norm_silu":
        assert (inputs[0].stride(1) == 1) == case.channels_last


def test_compiling_stops_when_its_budget_is_spent():
    rows = kernels.measure(NORM, CPU, torch.float32, 2, {"torch": TORCH.group_norm_silu},
                           providers.PEERS[NORM.op], timing.Budget(0, "spent"), LIMITS)
    notes = {row["provider"]: row["note"] for row in rows if row["metric"] == "not timed"}
    assert notes["compiled"] == notes["compiled max-autotune"] == "OutOfTime: spent"
    assert "eager" not in notes and "liger_kernel" in notes["liger"]


# --- the check


def test_unwritten_elements_are_nan():
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2, 2).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()

    verdict = check(SMALL, CPU, torch.float32, lambda q, k, v, heads: torch.empty_like(q))
    assert verdict.error == math.inf and not verdict.ok


def test_nan_and_infinity_never_pass():
    assert error(torch.tensor([1.0, math.nan]), torch.ones(2).double()) == math.inf
    assert error(torch.ones(3), torch.ones(2).double()) == math.inf
    assert Verdict(1.0, 0.5, 1.0).ok
    for verdict in (Verdict(1.1, 0.5, 1.0), Verdict(math.inf, math.inf, math.inf),
                    Verdict(math.nan, 0.5, 1.0), Verdict(1.0, math.nan, math.nan)):
        assert not verdict.ok


def test_equality_in_processes_ends_with_its_time():
    """Every size is a row, from any process; checks that are cut off count as wrong."""
    rows, some = [], [SMALL, NORM, replace(SMALL, keys=5)]
    jobs = [(case, CPU, torch.float32) for case in some]
    assert not equality(jobs, rows.append, workers=2)  # no GPU: ValueError
    assert sorted(row["shape"] for row in rows) == sorted(case.label for case in some)
    assert all("run on a GPU" in row["note"] and row["ok"] is False for row in rows)
    for workers in (0, 1):
        assert not equality(jobs, rows.append, workers, deadline=0.0)
    assert len(rows) == 3
