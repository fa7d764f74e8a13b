"""bench.image: what it checks and writes."""

import csv
import sys

import pytest
import torch
from reference_models import SMALL

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from bench import harness, image, models
from bench.harness import COLUMNS
from bench.image import EAGER, FUSED, Contest, psnr
from minisd.models.ops import TORCH

CPU = torch.device("cpu")


def my_geglu(h):
    calls.append(h.shape)
    return TORCH.geglu(h)


calls: list = []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole command on a very small model: the rows of image.csv."""
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("results")
    small = models.full("small", SMALL, 2)
    patch.setattr(models, "standard", lambda quick: {"small": lambda: small})
    patch.setattr(harness, "GPU", False)
    patch.setattr(image.Contest.profile, "__defaults__", (1, 70))  # each call is profiled once
    options = ["--rounds", "2", "--batches", "2", "--batch-steps", "1", "--minutes", "5",
               "--provider", f"geglu={__name__}:my_geglu", "--profile"]
    with torch.no_grad():
        assert image.main([*options, "--out", str(out)]) == 0
    patch.undo()
    assert calls and f"small, {FUSED}, decode:" in (out / "profile.txt").read_text()
    with (out / "image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_call_has_a_time_and_an_error(run):
    assert list(run[0]) == COLUMNS["image"]
    for provider in ("minisd torch", FUSED, EAGER, f"{__name__}:my_geglu"):
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


def test_without_diffusers_its_rows_say_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    small = models.full("small", SMALL, 1)
    monkeypatch.setattr(models, "standard", lambda quick: {"small": lambda: small})
    assert image.main(["--only", "eager", "--out", str(tmp_path)]) == 0
    with (tmp_path / "image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["not run"] and "diffusers" in rows[0]["note"]


def my_failing_geglu(h):
    raise ValueError("no more")


def test_a_function_that_fails_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(models, "standard", lambda quick: {"s": lambda: models.full("s", SMALL, 1)})
    monkeypatch.setattr(harness, "GPU", False)
    line = ["--only", "nobody", "--provider", f"geglu={__name__}:my_failing_geglu"]
    assert image.main(line) == 1
    assert "not run               , note ValueError: no more" in capsys.readouterr().out


@pytest.mark.parametrize("line, words", [
    (["--models", "big"], "big is none of the models: tiny, quarter"),
    (["--only", "fused", "--profile"], "--profile needs --out"),
    (["--rounds", "0"], "0 is no number from 1 on"), (["--batches", "-1"], "--batches"),
    (["--only", "nobody"], "none of the providers has ['nobody'] in its name: minisd fused, diff"),
])
def test_what_cannot_be_measured_is_said_in_a_line(line, words, capsys, monkeypatch):
    monkeypatch.setattr(harness, "GPU", False)
    with pytest.raises(SystemExit) as caught:
        image.main(line)
    assert caught.value.code == 2 and words in capsys.readouterr().err
