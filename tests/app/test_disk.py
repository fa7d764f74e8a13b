"""Leftovers of killed runs, and disks that are full or read-only."""

import os
import subprocess
from pathlib import Path

import pytest
from command_line import fails
from PIL import Image

from minisd.app.cli import main
from minisd.app.png import read_settings, save

pytestmark = pytest.mark.skipif(os.name != "posix", reason="mount")


def test_leftovers_are_removed_at_the_start_even_of_a_complete_run(model, capsys):
    line = ["x", "-o", "a.png", "--seed", "1"]
    assert main(line) == 0
    dead = subprocess.Popen(["true"])
    dead.wait()
    Path(f".minisd-{dead.pid}-ab.tmp").write_text("half an image")
    assert main(line) == 0
    assert "kept" in capsys.readouterr().out and os.listdir() == ["a.png"]


def test_leftovers_without_permission_to_remove_are_left(tmp_path, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".minisd-{dead.pid}-ab.tmp").write_text("another user's, in a sticky folder")
    unlink = Path.unlink

    def forbidden(path, missing_ok=False):
        if f"-{dead.pid}-" in path.name:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", forbidden)
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png", {})
    assert read_settings(tmp_path / "a.png") == {}


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no permission to mount a small disk: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A folder to mount a small disk on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], capture_output=True)


def test_a_disk_that_fills_up_keeps_finished_images(model, disk, capsys, monkeypatch):
    mount(disk, "size=64k")
    noise = Image.effect_noise((64, 64), 99).convert("RGB")
    monkeypatch.setattr(Image, "new", lambda *_, **__: noise)  # what the mock model draws
    line = ["x", "-o", f"{disk}/", "--seed", "1", "--count", "99"]
    assert main(line) == 5
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "No space left on device" in err and str(disk) in err
    names = [Path(each.split("  ")[0]).name for each in out.splitlines()]
    assert 2 <= len(names) and sorted(os.listdir(disk)) == names
    for name in names:
        Image.open(disk / name).load()
        assert read_settings(disk / name)["prompt"] == "x"


def test_a_full_disk_is_rejected_before_the_model_is_loaded(model, disk):
    mount(disk, "size=64k")
    with open(disk / "full", "wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(4096)):
            pass
    fails(["x", "-o", f"{disk}/a.png"], 5, "a.png: No space left on device")
    assert model.loaded == [] and os.listdir(disk) == ["full"]


def test_a_read_only_disk_is_rejected_before_the_model_is_loaded(model, disk):
    mount(disk, "ro")
    fails(["x", "-o", f"{disk}/a.png"], 5, "is not writable")
    assert model.loaded == [] and os.listdir(disk) == []
