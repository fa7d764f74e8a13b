"""bench.everything without a GPU: a rehearsal, a stage that overruns, the changes to try."""

import csv
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import SMALL, error, randn, randomise

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.fused import unet as fused_unet
from minisd_kernels.fused.unet import FusedUNet

from bench import everything, inside
from minisd.models.ops import TORCH
from minisd.models.unet import UNet

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


def test_a_stage_without_time_does_not_begin(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert everything.stage("tune", tmp_path, "abc", "") == 1
    assert "no time was left" in capsys.readouterr().out


def test_the_two_halves_are_all_stages():
    first, second = (everything.parse(["--out", "x", *more]).stages for more in ([], ["--tune"]))
    assert [*first, *second] == list(everything.STAGES)
    cases = everything.heaviest()
    assert {case.kernel for case in cases} == {
        "attention", "group_norm_silu", "layer_norm", "geglu"}
    assert cases[0].label == "SD1.5 2x8x4096x4096x40 packed"


@pytest.fixture(scope="module")
def fused():
    unet = randomise(UNet(SMALL.unet, TORCH))
    x, prompt = randn(1, 4, 8, 8), randn(2, 7, unet.config.cross_attention_dim)
    model = FusedUNet(unet, TORCH)
    return lambda: model(x, torch.tensor([981.0]), prompt)


def test_a_change_is_made_and_computes_the_same(fused):
    """And it ends with its context."""
    change = next(c for c in inside.CHANGES if c.label.startswith("doubled"))
    plain, before = fused(), fused_unet.Up.forward
    with change.made(None):
        changed = fused()
    assert fused_unet.Up.forward is before
    assert 0 < error(changed, plain) <= 1e-11 * plain.abs().max()


def test_changes_have_distinct_labels_and_valid_settings():
    """Changes of launch settings need no model."""
    for change in inside.CHANGES:
        if change.compiles:
            with change.made(None):
                pass
    assert len({change.label for change in inside.CHANGES}) == len(inside.CHANGES)
