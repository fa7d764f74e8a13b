"""proven.json: its rows, and that a row proves only the kernels that were measured."""

import inspect
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels import proof  # noqa: E402
from minisd_kernels.ops import (  # noqa: E402
    attention as flash_attention,
    group_norm as group_norm_silu,
    launch,
    layer_norm,
)

ROW = dict(kernels="0" * 64, device="NVIDIA H100", torch="2.13.0", triton="3.9.0",
           commit="78a0595", date="2026-11-30", checks=400)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A temporary file in place of the shipped one."""
    monkeypatch.setattr(proof, "FILE", tmp_path / "proven.json")
    return proof.FILE


def test_the_shipped_file():
    """Every row is complete, and the file is in the wheel."""
    rows = json.loads(proof.FILE.read_text())
    for capability, row in rows.items():
        major, minor = map(int, capability.split("."))
        assert capability == f"{major}.{minor}"
        assert set(proof.FIELDS) <= set(row) and row["checks"] > 0
        assert len(bytes.fromhex(row["kernels"])) == 32
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]["minisd_kernels"]
    assert data == [proof.FILE.name]


def test_a_row_proves_the_kernels_that_were_measured(file):
    file.write_text("{}")
    sentence = "the kernels have not been measured on compute capability 9.0"
    here = ROW | {"kernels": proof.fingerprint(), "triton": triton.__version__}
    assert proof.proven((9, 0), "NVIDIA H100") == sentence
    proof.record(file, "9.0", ROW)
    assert proof.proven((9, 0), "NVIDIA H100") == (
        "the kernels have changed since they were measured on compute capability 9.0")
    proof.record(file, "9.0", here)
    assert proof.proven((9, 0), "NVIDIA H100") == proof.proven((9, 0), "NVIDIA GH200") == ""
    assert proof.proven((10, 0), "NVIDIA B200") == sentence.replace("9.0", "10.0")
    assert proof.proven((9, 0), "NVIDIA H200") == (
        "the kernels were measured on NVIDIA H100 with other settings than NVIDIA H200 has")
    proof.record(file, "9.0", here | {"triton": "3.0.0"})
    assert proof.proven((9, 0), "NVIDIA H100") == (
        f"the kernels were measured with Triton 3.0.0, not {triton.__version__}")


def test_record_adds_or_replaces_one_row(file):
    for capability, checks in (("9.0", 1), ("8.0", 2), ("9.0", 3)):
        proof.record(str(file), capability, ROW | {"checks": checks})
    rows = {"8.0": ROW | {"checks": 2}, "9.0": ROW | {"checks": 3}}
    assert file.read_text() == json.dumps(rows, indent=1, sort_keys=True) + "\n"
    assert [*file.parent.iterdir()] == [file]


def test_record_writes_all_or_nothing(file, monkeypatch):
    proof.record(file, "9.0", ROW)
    kept = file.read_text()
    with pytest.raises(ValueError, match=r"the row of 8\.0 lacks torch, checks"):
        proof.record(file, "8.0", {k: v for k, v in ROW.items() if k not in ("torch", "checks")})
    with pytest.raises(TypeError):
        proof.record(file, "8.0", ROW | {"checks": object()})
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("written early"))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        proof.record(file, "8.0", ROW)
    assert file.read_text() == kept


def full(path, text):
    with path.open("w") as half:
        half.write(text[: len(text) // 2])
    raise OSError("no space left on device")


def edited(monkeypatch, old: str, new: str) -> str:
    """The fingerprint with one text in the kernels' sources replaced by another."""
    plain, found = inspect.getsource, []

    def getsource(function):
        found.append(old in plain(function))
        return plain(function).replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(inspect, "getsource", getsource)
        after = proof.fingerprint()
    assert any(found), "no kernel has that text"
    return after


def test_comments_and_docstrings_are_no_part_of_the_fingerprint(monkeypatch):
    before = proof.fingerprint()
    for old, new in [
        ('"""The count, mean and sum of centred squares of two parts together."""', '"""Joins."""'),
        ('    """One tile of keys."""\n', ""),
        ("    # Dao 2023, Algorithm 1: acc = alpha acc + p v\n", ""),
        ("tl.exp2(s * qk_scale - m_new[:, None])", "(tl.exp2(\n  s*qk_scale - m_new[:, None]))"),
    ]:
        assert edited(monkeypatch, old, new) == before


def test_a_changed_line_of_a_kernel_changes_the_fingerprint(monkeypatch):
    before = proof.fingerprint()
    for old, new in [
        ("delta * delta * (n_a * n_b / n)", "delta * delta * (n_a / n)"),
        ("s = tl.dot(q1, tl.trans(k1))", "s = tl.dot(q1, k1)"),
        ("@triton.jit\n", "@triton.jit(noinline=True)\n"),
        ("one = max(16,", "one = max(32,"),  # which pieces cover a head
        ("enable_fp_fusion=True", "enable_fp_fusion=False"),
        ("MEASURED.get(row, DEFAULT[kernel, size])", "DEFAULT[kernel, size]"),
    ]:
        assert edited(monkeypatch, old, new) != before


def test_moving_a_kernel_to_another_file_does_not_change_the_fingerprint(monkeypatch):
    before = proof.fingerprint()
    monkeypatch.setattr(layer_norm, "_join", group_norm_silu._join, raising=False)  # imported there
    assert proof.fingerprint() == before
    monkeypatch.delattr(group_norm_silu, "_join")  # and now gone from here
    assert proof.fingerprint() == before
    monkeypatch.delattr(layer_norm, "_join")
    assert proof.fingerprint() != before


def test_a_setting_of_a_launch_changes_the_fingerprint(monkeypatch):
    seen = {proof.fingerprint()}
    for change in [
        lambda: monkeypatch.setitem(launch.DEFAULT, ("geglu", 0), launch.Norm(1024, 1, 4)),
        lambda: monkeypatch.setitem(launch.MEASURED, ("a GPU", "geglu", 0), launch.Norm(64, 1, 4)),
        *(lambda family=family, name=name: monkeypatch.setattr(family, name, 1)
          for family, names in proof.CONSTANTS.items() for name in names),
    ]:
        change()
        seen.add(proof.fingerprint())
    assert len(seen) == 3 + sum(map(len, proof.CONSTANTS.values())) == 9


def test_every_kernel_is_found():
    """As many as the files decorate; but no model uses those of the ladder."""
    for family in proof.FAMILIES:
        assert len(proof.jitted(family)) == inspect.getsource(family).count("\n@triton.jit")
    found = {path for path in proof.FILE.parent.rglob("*.py")
             if path.parent.name != "ladder" and "\n@triton.jit" in path.read_text()}
    assert found == {Path(family.__file__) for family in proof.FAMILIES}


def test_interpreted_kernels_have_the_same_fingerprint():
    print_it = "from minisd_kernels import proof; print(proof.fingerprint())"
    done = subprocess.run([sys.executable, "-c", print_it], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    assert done.stdout.strip() == proof.fingerprint()
    assert len(bytes.fromhex(proof.fingerprint())) == 32
    assert flash_attention._kernel in proof.jitted(flash_attention)
