"""Pictures in and out: what is converted, what is refused, and that a file is whole or absent."""

import io
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
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisd import image as pictures
from minisd.image import ImageError, mask_to_tensor, open_image, read_settings, save, to_tensor

SETTINGS = {
    "prompt": "a red heart", "negative_prompt": "", "seed": 7, "num_inference_steps": 20,
    "guidance_scale": 7.5, "width": 64, "height": 48, "eta": 0.0, "strength": None,
    "model": "folder/v1-5.safetensors",
}


def noise(width, height, bands=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


# Reading


@pytest.mark.parametrize("size", [(64, 48), (37, 91), (200, 120)], ids=["same", "up", "down"])
def test_pictures_become_the_tensors_of_diffusers(size):
    picture = noise(*size)
    theirs = VaeImageProcessor().preprocess(picture, height=48, width=64)
    ours = to_tensor(picture, 64, 48)
    assert ours.shape == (1, 3, 48, 64) and ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("size", [(64, 48), (37, 91), (200, 120)], ids=["same", "up", "down"])
def test_masks_become_the_tensors_of_diffusers(size, bands):
    mask = noise(*size, bands)
    processor = VaeImageProcessor(
        do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    ours = mask_to_tensor(mask, 64, 48)
    assert ours.shape == (1, 1, 48, 64)
    assert 0 < ours.mean() < 1
    assert torch.equal(ours, processor.preprocess(mask, height=48, width=64))


def test_a_mask_is_cut_between_127_and_128():
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert mask_to_tensor(mask, 4, 1).flatten().tolist() == [0, 0, 1, 1]


def test_a_mask_of_any_mode_is_read():
    white = Image.new("L", (8, 8), 255)
    for mode in ("1", "P", "LA", "RGBA", "CMYK"):
        assert mask_to_tensor(white.convert(mode), 8, 8).all(), mode


def half_clear():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    return picture


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "PA"])
def test_what_is_clear_turns_white(tmp_path, mode):
    path = tmp_path / "clear.png"
    if mode == "PA":  # PNG has no such mode
        picture = open_image(half_clear().convert("PA"))
    else:
        half_clear().convert(mode).save(path)
        picture = open_image(path)
    assert picture.mode == "RGB"
    assert picture.getpixel((1, 0)) == (255, 255, 255)
    assert picture.getpixel((0, 0)) != (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, mode):
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).convert(mode).save(path)
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_turns_rgb(tmp_path):
    path = tmp_path / "print.tiff"
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(path)
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_the_first_frame_is_taken(tmp_path):
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_photo_is_turned_upright(tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: shown turned by 90 degrees clockwise
    photo = Image.new("RGB", (16, 8), "white")
    photo.paste("black", (0, 0, 8, 8))
    photo.save(path, exif=exif)
    upright = open_image(path)
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] < 50 < 200 < upright.getpixel((4, 13))[0]


def test_the_given_picture_is_left_alone():
    picture = half_clear()
    before = picture.tobytes()
    open_image(picture)
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


# Refusing


def png_bytes(width=8, height=8):
    buffer = io.BytesIO()
    noise(width, height).save(buffer, "PNG")
    return buffer.getvalue()


BAD_FILES = {
    "empty": b"",
    "text": b"a red heart",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='8' height='8'/></svg>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "cut in the header": png_bytes()[:20],
    "cut in the pixels": png_bytes(64, 64)[:-2000],
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_sentence_with_its_name(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="bad.png") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [100, 40])  # Pillow warns above its limit, raises above twice
def test_too_many_pixels_are_refused_before_they_are_read(tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    noise(11, 10).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels read"))
    with pytest.raises(ImageError, match=f"bomb.png has more than {limit} pixels"):
        open_image(path)


def test_an_address_is_refused():
    for address in ("https://example.com/a.png", "file:///a.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ImageError, match="download"):
            open_image(address)


def test_what_is_no_picture_is_a_type_error():
    for source in (None, 3, b"a.png", np.zeros((8, 8, 3))):
        with pytest.raises(TypeError, match=type(source).__name__):
            open_image(source)


def test_pictures_without_pixels_or_range_are_refused():
    with pytest.raises(ImageError, match="no pixels"):
        open_image(Image.new("RGB", (0, 4)))
    with pytest.raises(ImageError, match="float"):
        open_image(Image.new("F", (4, 4)))


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.png")


def test_mutated_files_raise_nothing_but_image_error(tmp_path):
    draw = random.Random(0)
    save(noise(24, 24), tmp_path / "good.png", SETTINGS)
    good = (tmp_path / "good.png").read_bytes()
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path = tmp_path / "bad.png"
        path.write_bytes(bad[: draw.choice([len(bad), draw.randrange(len(bad))])])
        for read in (open_image, read_settings):
            try:
                read(path)
                outcomes[True] += 1
            except ImageError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 50


# Writing


def test_pixels_are_rounded():
    values = torch.tensor([0.0, 1 / 255, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0])
    pixels = values.reshape(1, 1, 1, 6).expand(2, 3, 1, 6)
    images = pictures.to_pil(pixels)
    assert len(images) == 2 and images[0].size == (6, 1)
    assert np.asarray(images[1])[0, :, 2].tolist() == [0, 1, 0, 1, 255, 255]


def test_eight_bits_survive_the_round_trip():
    picture = noise(16, 8)
    back = pictures.to_pil((to_tensor(picture, 16, 8) + 1) / 2)[0]
    assert back.tobytes() == picture.tobytes()


def test_a_saved_png_is_the_picture_and_nothing_is_left_over(tmp_path):
    path = tmp_path / "heart.png"
    picture = noise(64, 48)
    save(picture, path, SETTINGS)
    assert Image.open(path).tobytes() == picture.tobytes()
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


def test_the_parameters_are_what_other_programs_read(tmp_path):
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


def test_an_existing_file_is_refused_unless_overwritten(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="a.png"):
        save(noise(8, 8), path, SETTINGS)
    assert path.read_text() == "precious"
    save(noise(8, 8), path, SETTINGS, overwrite=True)
    assert read_settings(path) == SETTINGS
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_name_taken_during_the_save_is_refused(tmp_path, monkeypatch, links):
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


def test_settings_that_json_cannot_hold_are_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(TypeError):
        save(noise(8, 8), tmp_path / "a.png", SETTINGS | {"prompt": object()})
    assert os.listdir(tmp_path) == []


def test_unwritable_names_are_refused(tmp_path, monkeypatch):
    pictures.check_writable(tmp_path / "a.png")
    pictures.check_writable(tmp_path / "A.PNG")
    for name in ("a.jpg", "a", "a.png.webp"):
        with pytest.raises(ValueError, match="only PNG"):
            pictures.check_writable(tmp_path / name)
    with pytest.raises(NotADirectoryError, match="none"):
        pictures.check_writable(tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError):
        pictures.check_writable(tmp_path / "folder.png", overwrite=True)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        pictures.check_writable(tmp_path / "dangling.png")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="not writable"):
        pictures.check_writable(tmp_path / "a.png")


def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".minisd-{dead.pid}-ab.tmp").write_text("half a picture")
    kept = {f".minisd-{os.getppid()}-ab.tmp", ".minisd-notes-ab.tmp", ".minisd-9-ab.txt"}
    for name in kept:
        (tmp_path / name).write_text("")
    save(noise(8, 8), tmp_path / "a.png", SETTINGS)
    assert set(os.listdir(tmp_path)) == kept | {"a.png"}


KILLED = """
import itertools, sys
from PIL import Image
from minisd.image import save
picture = Image.effect_noise((256, 256), 99).convert("RGB")
for i in itertools.count():
    save(picture, f"{sys.argv[1]}/{i}.png", {"prompt": str(i)})
    print(i, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_kill_leaves_only_whole_pictures(tmp_path):
    draw = random.Random(0)
    root = str(Path(pictures.__file__).parents[1])
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


def test_settings_of_other_makers_are_an_image_error(tmp_path):
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
