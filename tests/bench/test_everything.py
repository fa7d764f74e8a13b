"""bench.everything without a GPU: a rehearsal, a stage that overruns."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from bench import cases, everything, image, kernels

ROOT = Path(__file__).parents[2]


def test_rehearsal(tmp_path):
    """Stages run in order; all rows have one date and one commit; no other files are written."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.everything", "--stages", "others", "equality", "--minutes",
         "4", "--out", tmp_path / "day", "--commit", "abc"], cwd=ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    assert {path.name for path in (tmp_path / "day").iterdir()} == {"log.txt", "image.csv"}
    rows = list(csv.DictReader((tmp_path / "day" / "image.csv").read_text().splitlines()))
    assert {row["provider"] for row in rows} == {"minisd torch", "minisd triton"}
    assert {row["commit"] for row in rows} == {"abc"} and len({row["date"] for row in rows}) == 1
    log = (tmp_path / "day" / "log.txt").read_text()
    assert log.index("equality] ended with 0") < log.index("others] ended with 0")
    assert done.stdout == log and "all right" in log


def test_a_stage_that_overruns_is_killed_with_its_children(monkeypatch):
    monkeypatch.setattr(everything, "GRACE", 0.2)
    said = []
    script = ("import subprocess, sys, time; sys.stdin.readline(); "
              "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)")
    stage = everything.Running("slow", [sys.executable, "-c", script],
                               lambda *line: said.append(line))
    stage.go(2.0)
    start = time.monotonic()
    assert not stage.wait()
    assert time.monotonic() - start < 20
    assert said[-1] == ("slow", "its time was up: killed")
    while alive(said[0][1]):  # the kernel ends a killed process a little later
        assert time.monotonic() - start < 20
        time.sleep(0.01)


def alive(pid: str) -> bool:
    try:
        return (Path("/proc") / pid / "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_that_ends_before_its_turn_reports_its_exit_code():
    said = []
    stage = everything.Running("short", [sys.executable, "-c", "raise SystemExit(3)"],
                               lambda *line: said.append(line))
    stage.process.wait()
    stage.go(5.0)
    assert not stage.wait() and said == [("short", "ended with 3")]


def test_the_two_halves_are_all_stages():
    first, second = (everything.parse(["--out", "x", *more]).stages for more in ([], ["--tune"]))
    assert [*first, *second] == list(everything.STAGES)


def test_every_stage_is_a_command_that_its_parser_takes():
    parsers = {"bench.kernels": kernels.parse, "bench.image": image.parse}
    for stage in everything.STAGES.values():
        name, *line = stage.command
        if name in parsers:
            args = parsers[name]([*line, "--minutes", "1", "--out", "x"])
            assert args.minutes == 1


def test_the_heaviest_kernels_are_those_of_the_fused_model():
    args = kernels.parse(list(everything.STAGES["kernels"].command[1:]))
    chosen = [case for case in cases.full()
              if any(text in f"{case.op} {case.label}" for text in args.only)]
    assert {case.op for case in chosen} == {"attention", "group_norm_silu", "layer_norm", "geglu"}
    assert chosen[0].label == "SD1.5 2x8x4096x4096x40 packed"
    assert all(case.packed or case.d > 256 for case in chosen if case.op == "attention")
    assert all(case.channels_last for case in chosen if case.op == "group_norm_silu")
