"""bench.report: the page that it makes from the other commands' rows, and what it calls proven."""

import json
import math
import shutil
import subprocess

import pytest
import torch
import triton

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels import proof
from minisd_kernels.ops import launch
from small_models import SMALL

from bench import cases, harness, image, kernels, models, report, timing
from bench.image import COMPILED, FUSED, Contest
from minisd import backends
from minisd.models.ops import TORCH

CPU = torch.device("cpu")
MACHINE = {"device": "a GPU", "capability": "9.0", "driver": "1", "torch": "2", "triton": "3",
           "commit": "c1", "date": "2030-01-01T10:00:00+00:00", "command": "python -m bench.one"}
OLD = MACHINE | {"commit": "c0", "date": "2029-01-01T10:00:00+00:00"}


def write(folder, name: str, rows: list[dict], machine=MACHINE) -> None:
    harness.Rows(folder, machine).add(name, *rows)


def line(text: str, start: str) -> list[str]:
    """The cells of the table's line that starts so."""
    found, = (each for each in text.splitlines() if each.startswith(f"| {start} |"))
    return [each.strip() for each in found.split("|")[2:-1]]


@pytest.fixture(scope="module")
def drawn() -> list[dict]:
    """A contest's rows: two races, and batches."""
    rows = []
    with torch.no_grad():
        contest = Contest(models.full("small", SMALL, 1), CPU, torch.float32, rows.append)
        makers = image.makers(image.parse([]), contest)
        for name in (FUSED, "minisd torch", "minisd triton"):
            contest.enter(name, makers[name])
        contest.race(2, 0)
        contest.entered[COMPILED] = contest.entered.pop("minisd torch")
        contest.race(2, 0)
        del contest.entered[COMPILED]
        contest.batches([2], 1, 2, math.inf)
    return rows


def test_a_model_is_a_table_a_line_a_provider(drawn, tmp_path):
    write(tmp_path, "image", drawn)
    text = report.page([tmp_path])
    assert (f"## a GPU, 2030-01-01 ({tmp_path.name})\n\n`python -m bench.one`; driver 1, "
            "torch 2, triton 3, commit c1.\n") in text
    assert line(text, FUSED)[1] == line(text, FUSED)[4] == ""
    last = {(row["provider"], row["what"]): row for row in drawn if row.get("p50")}
    for provider in ("minisd torch", COMPILED):
        cells = line(text, provider)
        for at, what in ((1, "picture over fused"), (4, "step over fused")):
            assert float(cells[at]) == pytest.approx(float(last[provider, what]["p50"]), rel=0.03)
    # Fused raced twice, and held memory in batches too: its last race and one image's memory show.
    assert line(text, FUSED)[3].startswith(report.middle(last[FUSED, "step"]))
    held, = (row for row in drawn if (row["provider"], row["what"], row.get("batch")) ==
             (FUSED, "memory", 1))
    assert line(text, FUSED)[8] == report.whole(held)
    assert "small, not run: minisd triton (ValueError:" in text
    assert len(line(text, f"{FUSED}, 1 steps")) == 1


def test_kernels_stand_beside_their_peers(tmp_path):
    case, limits = cases.GEGLUS[0], timing.Limits(1e30, 1e12, 1e30)
    least = 1e6 * case.cost(2).bytes / 1e12
    rows = kernels.time_rows(
        case, torch.float16, {"minisd": 2 * [4e-4], "eager": [3e-4, 9e-4]},
        {"minisd": 1e-3, "eager": 2e-3}, "minisd", limits)
    lost = {"kernel": "geglu", "metric": "not timed"}
    rows += [lost | {"shape": case.label, "provider": "compiled", "note": "no budget"},
             lost | {"shape": "another", "note": "late"}]
    write(tmp_path, "kernels", rows)
    text = report.page([tmp_path])
    assert line(text, f"{case.label} float16") == [
        f"{report.number(str(least))} (bytes)", "400 (400-400)", f"{least / 400:.0%}",
        "0.001", "600, 1.50x, 0.002"]
    assert "geglu, not timed: compiled (no budget); everyone (late)." in text


def test_the_group_norms_of_a_forward_are_summed(tmp_path):
    """Weighted by their calls; only of providers that were timed at every size of one run."""
    limits = timing.Limits(1e30, 1e12, 1e30)
    norms = [norm for norm in cases.layouts(cases.group_norms("VAE")) if norm.channels_last]
    for i, norm in enumerate(norms):
        times = {"minisd": 2 * [1e-6 * 2**i], "eager": 2 * [3e-6 * 2**i], "compiled": 2 * [1e-6]}
        times = times if i else {name: times[name] for name in ("minisd", "eager")}
        rows = kernels.time_rows(norm, torch.float16, times, dict.fromkeys(times, 1e-3 * i),
                                 "minisd", limits)
        for folder, machine in (("one", MACHINE), ("two", MACHINE if i else OLD)):
            write(tmp_path / folder, "kernels", rows, machine)
    ours = sum(norm.calls * 2**i for i, norm in enumerate(norms))
    least = sum(1e-6 * norm.calls * norm.cost(2).bytes for norm in norms)
    assert line(report.page([tmp_path / "one"]), "VAE sum of 30 channels_last float16") == [
        f"{report.number(str(least))} (bytes)", f"{ours} ({ours}-{ours})",
        f"{least / ours:.0%}", "0.006", f"{3 * ours}, 3.00x, 0.006", ""]
    assert "VAE sum of" not in report.page([tmp_path / "two"])


def test_kernels_that_do_not_run_leave_their_peers(tmp_path):
    """A real run, on the CPU."""
    case, = (case for case in cases.tiny() if case.label == "tiny 1x7x40")
    ours = getattr(backends.kernels(), case.op)
    rows = kernels.measure(
        case, CPU, torch.float32, 2, {"minisd": ours}, {"eager": TORCH.layer_norm},
        timing.Budget(0, ""), timing.Limits(1e9, 1e9, 1e9))
    write(tmp_path, "kernels", rows)
    cells = line(report.page([tmp_path]), f"{case.label} float32")
    assert cells[1:4] == ["", "", ""] and "x" not in cells[4]


def test_settings_are_sorted_and_the_present_one_is_bold(tmp_path):
    times = {str(launch.Norm(2048, 1, 4)): "12345", str(launch.Norm(64, 1, 4)): "900"}
    rows = [{"kernel": "geglu 0", "provider": "Norm(groups=9)", "metric": "not timed", "note": "w"}]
    rows += [{"kernel": "geglu 0", "provider": setting, "p50": time, "unit": "us"}
             for setting, time in times.items()]
    write(tmp_path, "tune", rows)
    text = report.page([tmp_path])
    assert line(text, "geglu 0") == ["Norm(64, 1, 4) 900, **Norm(2048, 1, 4) 12345**"]
    assert "Settings not timed: geglu 0 Norm(9) (w)." in text


def test_the_newest_folder_comes_first_and_counts_last(drawn, tmp_path):
    write(tmp_path / "a", "image", drawn, OLD)
    write(tmp_path / "b", "image", drawn)
    write(tmp_path / "b", "kernels", [])
    shutil.copy(report.ROOT / "bench" / "results" / "launches.csv", tmp_path / "a")
    folders = [tmp_path / name for name in ("a", "b", "none")]
    text = report.page(folders)
    assert text.index("commit c1") < text.index("commit c0") < text.index("## Counted")
    assert "| one graph |" in text
    assert not [each for each in text.splitlines() if each.startswith("|") and each[-1] != "|"]
    with pytest.raises(SystemExit, match="no results"):
        report.page(folders[2:])


def test_a_section_names_its_commands(drawn, tmp_path):
    write(tmp_path, "image", drawn)
    write(tmp_path, "equality", checks(), MACHINE | {"command": "python -m bench.two"})
    assert "`python -m bench.one` and `python -m bench.two`; " in report.page([tmp_path])


def test_loads_are_a_line_a_provider(tmp_path):
    row = {"model": "SD1.5 in float32", "dtype": "float16", "p20": "1", "p50": "2", "p80": "3"}
    write(tmp_path, "load", [
        row | {"provider": "minisd", "what": "load a file"},
        row | {"provider": "peer", "what": "load over minisd's", "p50": "0.5"},
        row | {"provider": "peer", "what": "memory over the weights", "p50": "1.01"}])
    text = report.page([tmp_path])
    assert line(text, "minisd SD1.5 in float32 to float16") == ["2 (1-3)", "", ""]
    assert line(text, "peer SD1.5 in float32 to float16") == ["", "0.50", "1.01"]


def test_of_the_results_themselves_the_latest_run_is_shown(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    write(tmp_path, "image", drawn, OLD)
    write(tmp_path, "image", drawn)
    write(tmp_path, "image", drawn, OLD | {"device": "another"})
    text = report.page([tmp_path])
    assert text.count("commit c1") == text.count("commit c0") == 1
    assert text.count("\n## ") == 2 == text.count("**small**")
    (tmp_path / "out").mkdir()
    assert report.main(["--out", str(tmp_path / "page.md")]) == 0  # and the folders inside
    assert (tmp_path / "page.md").read_text() == text


def checks(**changed) -> list[dict]:
    """The rows of equality.csv when all is right, with the first one changed."""
    rows = [{"kernel": case.op, "shape": case.label, "dtype": str(dtype)[6:], "max_err": "0.5",
             "torch_err": "0.4", "bound": "1", "ok": True}
            for dtype in launch.DTYPES for case in cases.full()]
    return [rows[0] | changed, *rows[1:]]


def test_correctness_is_a_line(tmp_path):
    write(tmp_path, "equality", checks())
    assert "429 checks against float64: all within the bound. Largest error as a share of its " \
        "bound: attention 0.5, " in report.page([tmp_path])
    wrong = checks(max_err="3", ok=False)
    write(tmp_path, "equality", wrong[:1], MACHINE | {"date": "2031"})
    text = report.page([tmp_path])
    assert "429 checks against float64: 1 not within the bound." in text
    first = " ".join(wrong[0][key] for key in ("kernel", "shape", "dtype"))
    assert f"Wrong: {first} (error 3, 1 allowed)." in text


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with one kernel and no proof: its commit, and a command that proves."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root, kernel = tmp_path / "tree", tmp_path / "tree" / "kernels" / "ops" / "launch.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("1\n")
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=root, check=True,
                            capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(proof, "FILE", root / "kernels" / "proven.json")
    return root, MACHINE | {"commit": commit}


def prove(tree, *options: str) -> int:
    return report.main([str(tree[0] / "r"), "--out", str(tree[0] / "page.md"), *options])


def test_a_run_without_a_fault_proves(tree, capsys, monkeypatch):
    write(tree[0] / "r", "equality", checks(ok=False), OLD)
    write(tree[0] / "r", "equality", checks(), tree[1])
    assert prove(tree) == 0 and not proof.FILE.exists()
    assert f"9.0, {MACHINE['date']}: proven by 429 checks" in capsys.readouterr().out
    for _ in range(2):  # writing the file does not change the kernels
        assert prove(tree, "--prove") == 0
    row = {key: tree[1][key] for key in ("device", "torch", "triton", "commit", "date")}
    assert json.loads(proof.FILE.read_text()) == {
        "9.0": row | {"kernels": proof.fingerprint(), "checks": 429}}
    monkeypatch.setattr(triton, "__version__", row["triton"])
    assert proof.proven((9, 0), "a GPU") == ""


@pytest.mark.parametrize("rows, why", [
    (checks(ok=False), "1 of 429 checks went wrong"),
    (checks()[1:], "1 of 429 checks are missing"),
    (checks(shape="tiny"), "1 of 429 checks are missing"),
])
def test_one_fault_proves_nothing(tree, capsys, rows, why):
    proof.FILE.write_text('{"9.0": "an older one"}')
    write(tree[0] / "r", "equality", checks(), OLD | {"commit": "HEAD"})
    write(tree[0] / "r", "equality", rows, tree[1])
    assert prove(tree) == 0 and prove(tree, "--prove") == 1
    assert f"not proven: {why}\n" in capsys.readouterr().out
    assert proof.FILE.read_text() == '{"9.0": "an older one"}'


@pytest.mark.parametrize("commit", [None, "unknown", "0123456789"])
def test_other_kernels_are_not_proven(tree, capsys, commit):
    write(tree[0] / "r", "equality", checks(),
          tree[1] | ({"commit": commit} if commit else {}))
    if commit is None:
        assert report.unproven(report.read(tree[0] / "r" / "equality.csv")) == ""
        (tree[0] / "kernels" / "ops" / "launch.py").write_text("2\n")
    assert prove(tree, "--prove") == 1 and not proof.FILE.exists()
    said = capsys.readouterr().out
    assert f"the kernels have changed since commit {commit or tree[1]['commit']}" in said


def test_a_tree_with_changes_proves_nothing(tree, capsys):
    """Whatever the changes were: no commit has them."""
    write(tree[0] / "r", "equality", checks(),
          tree[1] | {"commit": tree[1]["commit"] + "-dirty"})
    assert prove(tree, "--prove") == 1
    assert "had changes that are in no commit" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [{"capability": "none"},
                                     {"device": "a GPU (Triton's interpreter)"}])
def test_only_a_gpu_is_proven(tree, changed):
    write(tree[0] / "r", "equality", checks(ok=False), tree[1] | changed)
    assert prove(tree, "--prove") == 1 and not proof.FILE.exists()


def test_the_page_is_of_the_results_at_hand():
    """To add results, run the command again."""
    folders = [report.RESULTS, *sorted(report.RESULTS.glob("*/"))]
    assert report.page(folders) == (report.ROOT / "bench" / "RESULTS.md").read_text()
