"""The parts of the bench: times and rows, the files, the plot, settings."""

import contextlib
import csv
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.ops import launch

from bench import cases, harness, kernels, providers, timing
from bench.cases import Attention
from bench.timing import Budget, Memory, OutOfTime

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = Attention("SD1.5", 1, 2, 5, 7, 8, calls=3)
LIMITS = timing.Limits(flops=1e12, bytes=1e9, exponentials=math.inf)


# --- the times


def timed_rows() -> list[dict]:
    return kernels.time_rows(SMALL, torch.float16, {"minisd": [2e-6] * 4, "peer": [3e-6] * 4},
                             {"minisd": 0.25, "peer": 0.5}, "minisd", LIMITS)


def test_rows_are_in_the_units_they_name():
    cost = SMALL.cost(2)
    rows = {(row["provider"], row["metric"]): row for row in timed_rows()}
    assert rows["minisd", "time"]["p50"] == "2" and rows["minisd", "time"]["unit"] == "us"
    assert float(rows["peer", "rate"]["p50"]) == pytest.approx(cost.flops / 3e-6 / 1e12, rel=1e-3)
    share = rows["minisd", "share of the limit (bytes)"]
    assert float(share["p80"]) == pytest.approx(cost.bytes / 1e9 / 2e-6, rel=1e-3)
    assert rows["peer", "time over minisd's"]["p50"] == "1.5"
    assert ("minisd", "time over minisd's") not in rows
    assert rows["peer", "rate"]["max_err"] == "0.5"


def test_the_limit_is_what_takes_longest():
    limits = timing.Limits(flops=10.0, bytes=10.0, exponentials=10.0)
    assert limits.floor(launch.Cost(10, 20, 5)) == (2.0, "bytes")
    assert limits.floor(launch.Cost(10, 20, 50)) == (5.0, "exponentials")
    measured = timing.limits(CPU)
    assert min(measured[:2]) > 1e6 and measured.exponentials == math.inf


def test_providers_take_turns():
    order = []
    samples = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    assert timing.interleave(samples, 3) == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "abccbaabc"
    assert timing.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert timing.Spread.of([5.0]) == (5.0, 5.0, 5.0)
    assert harness.ratios({"a": [2.0, 4.0], "b": [3.0, 8.0]}, "a") == {"b": [1.5, 2.0]}
    assert harness.ratios({"b": [3.0]}, "a") == {}


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_sample_is_the_seconds_of_one_call(device, monkeypatch):
    """torch.cuda is a mock here: the lines run, and the arithmetic is right."""
    done, replays = [], []
    if device == GPU:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None,
                                elapsed_time=lambda end: 1e3 * 0.001 * len(replays))
        cuda = {
            "Stream": lambda: stream, "current_stream": lambda: stream, "synchronize": lambda: None,
            "stream": lambda s: contextlib.nullcontext(),
            "graph": lambda g: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(1)),
            "Event": lambda enable_timing: replays.clear() or event,
        }
        for name, mock in cuda.items():
            monkeypatch.setattr(f"torch.cuda.{name}", mock)
    found = timing.graph_sampler([lambda: done.append(0), lambda: done.append(1)], device)
    assert done == [0, 1] * (2 if device == GPU else 1)  # a warm-up and the capture; a first run
    seconds = found.sample()
    if device == GPU:
        assert len(done) == 4 and len(replays) == 4  # a replay of 1 ms: four make a sample
        assert seconds == pytest.approx(0.0005)
    else:
        assert 0 < seconds < 0.01


def test_inputs_outgrow_the_cache(monkeypatch):
    assert timing.input_sets(CPU, 10**9) == 2
    properties = SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    assert [timing.input_sets(GPU, size) for size in (10**9, 10**7, 10)] == [2, 15, 256]


def test_exponentials_are_counted_by_multiprocessor_and_clock(monkeypatch):
    """132 multiprocessors at 1.98 GHz: an H100's."""
    properties = {"sm_clock_rate": 1_980_000, "multiprocessor_count": 132}
    utils = SimpleNamespace(get_device_properties=lambda index: properties)
    active = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr("triton.runtime.driver", active)
    assert timing._exponentials(torch.device("cuda", 0)) == 16 * 132 * 1.98e9


# --- the files


def test_rows_are_appended_to_files(tmp_path):
    path = tmp_path / "results" / "a.csv"
    harness.append(path, ["x", "y"], [{"x": 1, "y": "two, three"}])
    before = path.read_text()
    harness.append(path, ["x", "y"], [{"x": 4}])
    assert path.read_text() == before + "4,\n"
    first = next(csv.DictReader(path.read_text().splitlines()))
    assert first == {"x": "1", "y": "two, three"}
    with pytest.raises(SystemExit, match="other columns: x, y"):
        harness.append(path, ["x", "z"], [{}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        harness.append(path, ["x", "y"], [{"w": 1}])


def test_two_trees_are_rejected(tmp_path, monkeypatch):
    harness.machine(CPU)
    monkeypatch.setattr(harness.minisd, "__file__", str(tmp_path / "minisd" / "__init__.py"))
    with pytest.raises(SystemExit, match="not from one tree but from"):
        harness.machine(CPU)


def test_a_row_says_which_machine(monkeypatch):
    here = harness.machine(CPU, "abc")
    assert list(here) == harness.MACHINE and here["commit"] == "abc"
    assert here["torch"] == torch.__version__ and here["driver"] == "none"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    there = harness.machine(GPU)
    assert (there["device"], there["capability"]) == ("NVIDIA H100", "9.0")
    assert harness._said("no-such-command") == "unknown"
    for name in harness.COLUMNS.keys() - {"launches"}:
        assert set(harness.MACHINE) < set(harness.COLUMNS[name])


def test_a_row_says_which_command_without_paths():
    line = ["/a/bench/image.py", "--quick", "--out", "/b c/d", "--minutes", "-", "--only", "fused",
            "--commit=abc", "--date", "2030", "--folder=/e"]
    assert harness._command(line) == "python -m bench.image --quick --only fused"
    assert harness._command(["/a/bench/kernels.py", "--minutes", "3", "--only", "geglu SD1"]) == (
        "python -m bench.kernels --minutes 3 --only 'geglu SD1'")


def test_rows_are_kept_and_written_with_the_machine(tmp_path):
    rows = harness.Rows(tmp_path, {"device": "d"})
    rows.add("image", {"model": "m"}, {"model": "n"})
    harness.Rows(None, {}).add("image", {"model": "m"})  # not written
    with (tmp_path / "image.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["model"], row["device"]) for row in written] == [("m", "d"), ("n", "d")]
    assert rows.all == [{"model": "m"}, {"model": "n"}]


def test_the_plot(tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert "brings matplotlib" in kernels.plot(timed_rows(), tmp_path, "d")
    assert not list(tmp_path.iterdir())
    pytest.importorskip("matplotlib")
    assert kernels.plot([], tmp_path, "d") == "no plot: nothing was timed"
    path = tmp_path / "attention.png"
    assert kernels.plot(timed_rows(), tmp_path, "d") == f"drawn: {path}"
    assert path.read_bytes()[1:4] == b"PNG"


# --- limits of time, and memory


def test_a_time_limit_is_not_caught_as_an_exception():
    budget = Budget(0.05, "up")
    with pytest.raises(OutOfTime, match="up"), budget:
        while True:
            try:
                time.sleep(1)
            except Exception:
                pass
    with pytest.raises(OutOfTime, match="up"), budget:  # it is spent
        raise AssertionError("must not begin")


def test_a_budget_is_of_all_that_is_done_inside():
    budget = Budget(5, "up")
    for _ in range(2):
        with budget:
            time.sleep(0.01)
    assert 4 < budget.left <= 4.98


def test_seconds_and_memory():
    calls = []
    found = timing.sampler(lambda: calls.append(time.sleep(0.001)), CPU)
    before = len(calls)
    assert found.sample() >= 0.001 and len(calls) > before
    memory = Memory(CPU)
    if not memory.base:
        pytest.skip("this system does not report the size of a process")
    kept = torch.ones(2**24)
    grown = memory.growth()["memory"]
    assert grown >= 0.9 * kept.nbytes
    memory.restart()
    assert memory.peaks()["memory"] >= 0.9 * kept.nbytes


# --- settings


def test_listed_settings_are_complete_and_new():
    for (kernel, size), settings in launch.CANDIDATES.items():
        today = launch.DEFAULT[kernel, size]
        assert len(settings) == len(set(settings)) and today not in settings, kernel
        assert {type(setting) for setting in settings} == {type(today)}
        assert all(setting.block_n == 128 for setting in settings if kernel == "one tile")


def test_a_setting_is_used_inside_and_forgotten_after():
    key, tile = ("attention", 32), launch.Tile(16, 16, 1, 1)
    before = launch.setting(CPU, *key)
    with providers.using(key, tile):
        assert launch.setting(CPU, *key) == tile
        assert launch.setting(CPU, "attention", 64) == launch.DEFAULT["attention", 64]
    assert launch.setting(CPU, *key) == before


def test_every_setting_of_half_precision_is_tuned():
    served = kernels.served(cases.full(), torch.float16)
    unused = {("attention", 16), ("one tile", 16), ("sliced", 4)}  # d up to 31; float32
    assert set(served) == launch.DEFAULT.keys() - unused == launch.CANDIDATES.keys()
    assert all(served.values())


def test_a_candidate_that_fails_is_recorded_and_skipped(monkeypatch, capsys):
    """Out of resources, a compiler's error, a wrong result: the others are still timed."""
    key, today = ("one tile", 16), launch.DEFAULT["one tile", 16]
    good, bad = (launch.Tile(*t) for t in ((64, 64, 8, 2), (128, 64, 4, 2)))
    monkeypatch.setitem(launch.CANDIDATES, key, [bad, good])
    tried = []

    def measure(case, device, dtype, rounds, checked, *rest):
        tried.append(list(checked))
        times = {str(today): "2", str(good): "1"}
        return [{"provider": name, "metric": "time", "p50": times[name]} if name in times else
                {"provider": name, "metric": "not timed", "note": "OutOfResources"}
                for name in checked]

    monkeypatch.setattr(kernels, "measure", measure)
    rows = harness.Rows(None, {"device": "a GPU"})
    some = [SMALL, Attention("VAE", 1, 2, 5, 7, 8, calls=3)]
    kernels.tune(some, CPU, torch.float16, 2, math.inf, rows)
    assert tried == [[str(today), str(bad), str(good)], [str(today), str(good)]]
    noted = {row["provider"]: (row.get("p50"), row.get("note", "")) for row in rows.all}
    assert noted == {  # 50 steps of three calls, and one decoding
        str(bad): (None, f"OutOfResources at {SMALL.label}"), str(today): ("306", ""),
        str(good): ("153", "")}
    assert (f"for launch.MEASURED: ('a GPU', 'one tile', 16): {good}, 0.500 of today's time"
            in capsys.readouterr().out)


def test_a_candidate_is_checked_and_its_fault_named():
    """On a CPU the kernel raises ValueError, and that is the reason."""
    rows = harness.Rows(None, {})
    kernels.tune([SMALL], CPU, torch.float16, 2, math.inf, rows)
    assert all(row["metric"] == "not timed" for row in rows.all)
    assert rows.all[0]["note"].startswith("ValueError: flash_attention: the tensors are on cpu")
    rows = harness.Rows(None, {})
    kernels.tune([SMALL], CPU, torch.float16, 2, 0.0, rows)
    assert rows.all[0]["note"] == harness.LATE
