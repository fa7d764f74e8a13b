"""The parts of bench.kernels: times and rows, the files, the plot, tuning."""

import contextlib
import csv
import math
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.ops import launch

from bench import measure, plot, record, shapes, timing, tune
from bench.attention import Attention
from bench.measure import Measured

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = Attention("SD1.5", 1, 2, 5, 7, 8, calls=3)
LIMITS = timing.Limits(flops=1e12, bytes=1e9, exponentials=math.inf)


# --- the times


def test_rows_are_in_the_units_they_name():
    measured = Measured(SMALL, torch.float16, {"minisd": [2e-6] * 4, "peer": [3e-6] * 4},
                        {"minisd": 0.25, "peer": 0.5}, {"other": "no such thing"})
    cost = SMALL.cost(2)
    rows = {(row["provider"], row["metric"]): row for row in measure.rows(measured, LIMITS)}
    assert rows["minisd", "time"]["p50"] == "2" and rows["minisd", "time"]["unit"] == "us"
    assert float(rows["peer", "rate"]["p50"]) == pytest.approx(cost.flops / 3e-6 / 1e12, rel=1e-3)
    share = rows["minisd", "share of the limit (bytes)"]
    assert float(share["p80"]) == pytest.approx(cost.bytes / 1e9 / 2e-6, rel=1e-3)
    assert rows["peer", "time over minisd's"]["p50"] == "1.5"
    assert ("minisd", "time over minisd's") not in rows
    assert rows["peer", "rate"]["max_err"] == "0.5"
    assert rows["other", "not timed"]["note"] == "no such thing"


def test_the_limit_is_what_takes_longest():
    limits = timing.Limits(flops=10.0, bytes=10.0, exponentials=10.0)
    assert limits.floor(launch.Cost(10, 20, 5)) == (2.0, "bytes")
    assert limits.floor(launch.Cost(10, 20, 50)) == (5.0, "exponentials")
    measured = timing.limits(CPU)
    assert min(measured[:2]) > 1e6 and measured.exponentials == math.inf


def test_providers_take_turns():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    assert timing.interleave(samplers, 3) == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "abccbaabc"
    assert timing.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


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
    sample = timing.sampler([lambda: done.append(0), lambda: done.append(1)], device)
    assert done == [0, 1] * (2 if device == GPU else 1)  # a warm-up and the capture; a first run
    seconds = sample()
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
    record.append(path, ["x", "y"], [{"x": 1, "y": "two, three"}])
    before = path.read_text()
    record.append(path, ["x", "y"], [{"x": 4}])
    assert path.read_text() == before + "4,\n"
    first = next(csv.DictReader(path.read_text().splitlines()))
    assert first == {"x": "1", "y": "two, three"}
    with pytest.raises(SystemExit, match="other columns: x, y"):
        record.append(path, ["x", "z"], [{}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        record.append(path, ["x", "y"], [{"w": 1}])


def test_two_trees_are_rejected(tmp_path, monkeypatch):
    record.refuse_two_trees()
    monkeypatch.setattr(record.minisd, "__file__", str(tmp_path / "minisd" / "__init__.py"))
    with pytest.raises(SystemExit, match="not from one tree but from"):
        record.refuse_two_trees()


def test_a_row_says_which_machine(monkeypatch):
    here = record.machine(CPU, False, "abc")
    assert list(here) == record.MACHINE and here["commit"] == "abc"
    assert here["torch"] == torch.__version__ and here["driver"] == "none"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    there = record.machine(GPU, False)
    assert (there["device"], there["capability"]) == ("NVIDIA H100", "9.0")
    assert record._said("no-such-command") == "unknown"
    assert set(record.MACHINE) < set(record.COLUMNS) and set(record.MACHINE) < set(record.EQUALITY)


def test_the_plot(tmp_path, monkeypatch):
    measured = Measured(SMALL, torch.float16, {"minisd": [2e-6] * 4, "peer": [3e-6] * 4},
                        {"minisd": 0.25, "peer": 0.5}, {})
    rows = measure.rows(measured, LIMITS)
    machine = {"date": "2026-01-02T03:04:05+00:00", "device": "d"}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert "brings matplotlib" in plot.plot(rows, tmp_path, machine)
    assert not list(tmp_path.iterdir())
    pytest.importorskip("matplotlib")
    assert plot.plot([], tmp_path, machine) == "no plot: nothing was timed"
    path = tmp_path / "attention-2026-01-02T030405Z.png"
    assert plot.plot(rows, tmp_path, machine) == f"drawn: {path}"
    assert path.read_bytes()[1:4] == b"PNG"


# --- tuning


def test_listed_settings_are_complete_and_new():
    for name, settings in tune.SETTINGS.items():
        kernel, size = name.rsplit(" ", 1)
        today = launch.DEFAULT[kernel, int(size)]
        assert len(settings) == len(set(settings)) and today not in settings, name
        assert {type(setting) for setting in settings} == {type(today)}
        assert all(setting.block_n == 128 for setting in settings if kernel == "one tile")


def test_a_setting_is_used_inside_and_forgotten_after():
    key, tile = ("attention", 32), launch.Tile(16, 16, 1, 1)
    before = launch.setting(CPU, *key)
    with tune.using(key, tile):
        assert launch.setting(CPU, *key) == tile
        assert launch.setting(CPU, "attention", 64) == launch.DEFAULT["attention", 64]
    assert launch.setting(CPU, *key) == before


def test_every_setting_of_half_precision_is_tuned():
    served = tune.served(shapes.full(), torch.float16)
    unused = {("attention", 16), ("one tile", 16), ("sliced", 4)}  # d up to 31; float32
    assert set(served) == launch.DEFAULT.keys() - unused
    assert all(served.values())
    assert {" ".join(map(str, key)) for key in served} == set(tune.SETTINGS)


def test_a_candidate_that_fails_is_recorded_and_skipped(monkeypatch, capsys):
    """Out of resources, a compiler's error, a wrong result: the others are still timed."""
    first, good, bad = (launch.Tile(*t) for t in ((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 4, 2)))
    monkeypatch.setattr(tune, "candidates", lambda key, device: [first, bad, good])
    monkeypatch.setattr(tune, "wrong", lambda key, setting, cases, setup: (
        key, setting, "OutOfResources" if setting == bad else ""))
    monkeypatch.setattr(tune, "compare", lambda key, settings, cases, setup: {
        s: {first: 1.0, good: 0.5}[s] for s in settings})
    monkeypatch.setattr(launch, "refusal", lambda kernel, **tensors: None)
    rows = []
    assert tune.tune([SMALL], tune.Setup(CPU, torch.float16, 2), math.inf, 0, rows.append) == 0
    noted = {row["provider"]: (row.get("p50"), row["note"]) for row in rows}
    assert noted == {str(bad): (None, "OutOfResources"), str(first): ("1e+06", ""),
                     str(good): ("5e+05", "")}
    line = capsys.readouterr().out.splitlines()[-1]
    assert eval("{" + line + "\n}", {"Tile": launch.Tile}) == {
        ("interpreter", "one tile", 16): good}
    assert tune.paste(("one tile", 16), {first: 1.0, good: 0.995}, "any") == ""


def test_why_a_candidate_is_wrong():
    """On a CPU the kernel raises ValueError, and that is the reason."""
    setup = tune.Setup(CPU, torch.float16, 2)
    *_, why = tune.wrong(("one tile", 16), launch.Tile(16, 16, 1, 1), [SMALL], setup)
    assert why.startswith("ValueError: flash_attention: the tensors are on cpu")
