"""Writing images: rounded, complete or absent, and with the settings that made them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings as effort, strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_image import SETTINGS, noise

from minisd.app.png import check_writable, read_settings, save
from minisd.errors import ImageError
from minisd.images import to_pil, to_tensor


def test_pixels_are_rounded():
    values = torch.tensor([0.0, 1 / 255, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0])
    pixels = values.reshape(1, 1, 1, 6).expand(2, 3, 1, 6)
    images = to_pil(pixels)
    assert len(images) == 2 and images[0].size == (6, 1)
    assert np.asarray(images[1])[0, :, 2].tolist() == [0, 1, 0, 1, 255, 255]


def test_eight_bits_survive_the_round_trip():
    image = noise(16, 8)
    back = to_pil((to_tensor(image, 16, 8) + 1) / 2)[0]
    assert back.tobytes() == image.tobytes()


def test_a_saved_png_is_the_image_and_no_other_file_is_left(tmp_path):
    path = tmp_path / "heart.png"
    image = noise(64, 48)
    save(image, path, SETTINGS)
    assert Image.open(path).tobytes() == image.tobytes()
    assert read_settings(path) == SETTINGS
    assert os.listdir(tmp_path) == ["heart.png"]


@effort(max_examples=100, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=[])), negative=st.text())
def test_any_prompt_comes_back(tmp_path_factory, prompt, negative):
    path = tmp_path_factory.getbasetemp() / "prompt.png"
    settings = SETTINGS | {"prompt": prompt, "negative_prompt": negative}
    save(Image.new("RGB", (1, 1)), path, settings, overwrite=True)
    assert read_settings(path) == settings


@pytest.mark.parametrize("prompt", [
    'a "red"\nheart\\', "ein rotes Herz äöü", "愛 ❤️ \u202eright", "\ud800 nul \0 tab \t",
    "x" * 3_000_000,
], ids=["quotes", "latin", "unicode", "odd", "long"])
def test_odd_prompts_come_back(tmp_path, prompt):
    save(Image.new("RGB", (1, 1)), tmp_path / "a.png", SETTINGS | {"prompt": prompt})
    assert read_settings(tmp_path / "a.png")["prompt"] == prompt


def parameters(path, **changes):
    save(Image.new("RGB", (1, 1)), path, SETTINGS | changes)
    return Image.open(path).text["parameters"]


def test_the_parameters_are_in_the_format_of_other_programs(tmp_path):
    assert parameters(tmp_path / "a.png") == (
        "a red heart\n"
        "Steps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 64x48, Model: v1-5,"
        " Eta DDIM: 0.0"
    )
    changes = {"negative_prompt": "blür", "strength": 0.75, "model": "a, b"}
    assert parameters(tmp_path / "b.png", **changes) == (
        "a red heart\nNegative prompt: blür\n"
        'Steps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 64x48, Model: "a, b",'
        " Denoising strength: 0.75, Eta DDIM: 0.0"
    )


def test_an_existing_file_is_rejected_unless_overwritten(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="a.png"):
        save(noise(8, 8), path, SETTINGS)
    assert path.read_text() == "precious"
    save(noise(8, 8), path, SETTINGS, overwrite=True)
    assert read_settings(path) == SETTINGS
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_name_taken_during_the_save_is_rejected(tmp_path, monkeypatch, links):
    path = tmp_path / "a.png"
    link = os.link

    def other_process_was_first(source, target):
        path.write_text("precious")
        if not links:
            raise PermissionError(1, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", other_process_was_first)
    with pytest.raises(FileExistsError, match="a.png"):
        save(noise(8, 8), path, SETTINGS)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_disk_without_links_is_written_to(tmp_path, monkeypatch):
    def no_links(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save(noise(8, 8), tmp_path / "a.png", SETTINGS)
    assert read_settings(tmp_path / "a.png") == SETTINGS
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)) as caught:
        save(noise(8, 8), tmp_path / "a.png", SETTINGS)
    assert os.listdir(tmp_path) == []
    if isinstance(error, OSError):
        assert caught.value.errno == 28 and "a.png" in str(caught.value)


def test_settings_that_json_cannot_hold_are_rejected_before_a_file_is_made(tmp_path):
    with pytest.raises(TypeError):
        save(noise(8, 8), tmp_path / "a.png", SETTINGS | {"prompt": object()})
    assert os.listdir(tmp_path) == []


def test_unwritable_names_are_rejected(tmp_path, monkeypatch):
    check_writable(tmp_path / "a.png")
    check_writable(tmp_path / "A.PNG")
    for name in ("a.jpg", "a", "a.png.webp"):
        with pytest.raises(ValueError, match="only PNG"):
            check_writable(tmp_path / name)
    with pytest.raises(NotADirectoryError, match="none"):
        check_writable(tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path / "folder.png", overwrite=True)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        check_writable(tmp_path / "dangling.png")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="not writable"):
        check_writable(tmp_path / "a.png")


def test_leftovers_of_dead_processes_are_removed_and_of_running_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".minisd-{dead.pid}-ab.tmp").write_text("half an image")
    kept = {f".minisd-{os.getppid()}-ab.tmp", ".minisd-notes-ab.tmp", ".minisd-9-ab.txt"}
    for name in kept:
        (tmp_path / name).write_text("")
    save(noise(8, 8), tmp_path / "a.png", SETTINGS)
    assert set(os.listdir(tmp_path)) == kept | {"a.png"}


KILLED = """
import itertools, sys
from PIL import Image
from minisd.app.png import save
image = Image.effect_noise((256, 256), 99).convert("RGB")
for i in itertools.count():
    save(image, f"{sys.argv[1]}/{i}.png", {"prompt": str(i)})
    print(i, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_kill_leaves_only_complete_images(tmp_path):
    draw = random.Random(0)
    root = str(Path(__file__).parents[2])
    whole = 0
    for i in range(5):
        folder = tmp_path / str(i)
        folder.mkdir()
        child = subprocess.Popen([sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE,
                                 env={**os.environ, "PYTHONPATH": root})
        child.stdout.readline()
        time.sleep(draw.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for path in folder.glob("*.png"):
            Image.open(path).load()
            assert read_settings(path) == {"prompt": path.stem}
            whole += 1
    assert whole >= 5


def test_settings_of_other_programs_are_an_image_error(tmp_path):
    for i, text in enumerate([None, "not json", "[1]", "[" * 100_000]):
        chunks = PngInfo()
        if text is not None:
            chunks.add_text("minisd", text)
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (1, 1)).save(path, pnginfo=chunks)
        with pytest.raises(ImageError, match=path.name):
            read_settings(path)


def test_the_json_is_plain_json(tmp_path):
    save(noise(8, 8), tmp_path / "a.png", SETTINGS)
    assert json.loads(Image.open(tmp_path / "a.png").text["minisd"]) == SETTINGS
