"""The watermark is the package's, to the last bit; and how little of it survives."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import fails, run
from PIL import Image
from watermarked import KEPT, drawing, pixels_hash

from minisd.app import watermark

WEIGHTS = Path(__file__).parents[2] / "weights"
DRAW = ["a red heart", "--seed", "0", "--steps", "1", "--quiet", "--size", "256x256"]
V1 = b"StableDiffusionV1"


@pytest.mark.parametrize("size, payload, pixels, left", KEPT)
def test_it_equals_the_package(size, payload, pixels, left):
    image = drawing(*size)
    before = image.tobytes()
    marked = watermark.embed(image, payload)
    assert pixels_hash(marked) == pixels
    assert watermark.read(marked, len(payload)) == left
    assert image.tobytes() == before


def test_any_bytes_come_back_where_nothing_is_lost():
    grey = Image.new("RGB", (700, 100), (128, 128, 128))
    for payload in (b"\0", b"\xff", "grüße".encode(), bytes(range(60))):
        assert watermark.read(watermark.embed(grey, payload), len(payload)) == payload


def test_half_of_the_votes_are_a_1():
    """As in the package: 127/255 of them are too few, and 1/2 is enough."""
    image = Image.new("RGB", (256, 256), (128, 128, 128))
    marked = watermark.embed(image, b"\x00\xff")  # read as one byte, each bit has both votes
    assert watermark.read(marked, 1) == b"\xff"


@pytest.mark.parametrize("size, length, words", [
    ((256, 255), 1, "at least 256x256 pixels"), ((256, 256), 0, "must not be empty"),
    ((256, 256), 129, "holds at most 128"), ((16384, 7), 1, "holds at most 0")])
def test_what_does_not_fit(size, length, words):
    image = Image.new("RGB", size)
    for use in (lambda: watermark.embed(image, bytes(length)),
                lambda: watermark.read(image, length)):
        with pytest.raises(ValueError, match=f"^watermark .*{words}"):
            use()


# --- how fragile it is: the docstring of minisd/app/watermark.py has these figures


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return Image.open(file)


def halved(image: Image.Image) -> Image.Image:
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.LANCZOS)


def right_bits(image: Image.Image) -> float:
    read, written = (np.unpackbits(np.frombuffer(each, np.uint8))
                     for each in (watermark.read(image, len(V1)), V1))
    return float((read == written).mean())


@pytest.mark.parametrize("image, shares", [
    ("drawing", (1.00, 0.51, 0.84)), ("gallery.png", (0.90, 0.57, 0.90)),
    ("heart.png", (0.50, 0.50, 0.50))])
def test_how_much_survives(image, shares):
    if image == "drawing":
        given = drawing(512, 512)
    else:
        given = Image.open(WEIGHTS / image).convert("RGB")
    if image == "heart.png":
        given = given.resize((512, 512), Image.Resampling.LANCZOS)
    marked = watermark.embed(given, V1)
    found = [right_bits(each) for each in (marked, jpeg(marked), halved(marked))]
    # An encoder of another version may differ in a few of the 136 bits.
    assert found == pytest.approx(shares, abs=0.06)
    row = f" {shares[0]:.2f}           {shares[1]:.2f}                 {shares[2]:.2f}\n"
    assert image in watermark.__doc__ and row in watermark.__doc__


# --- the command line


def test_it_is_drawn_told_and_recognised(tmp_path):
    out, plain = tmp_path / "heart.png", tmp_path / "plain.png"
    text = "grüße"
    assert run([*DRAW, "--watermark", text, "-o", str(out)])[0] == 0
    assert run([*DRAW, "-o", str(plain)])[0] == 0
    marked = watermark.embed(Image.open(plain), text.encode())
    assert Image.open(out).tobytes() == marked.tobytes() != Image.open(plain).tobytes()
    assert json.loads(run(["info", str(out)])[1])["watermark"] == text
    assert json.loads(run(["info", str(plain)])[1])["watermark"] is None
    assert "kept" in run([*DRAW, "--watermark", text, "-o", str(out)])[1]
    fails([*DRAW, "--watermark", "another", "-o", str(out)], 5, "exists")
    fails([*DRAW, "-o", str(out)], 5, "exists")
    fails([*DRAW, "--watermark", text, "-o", str(plain)], 5, "exists")


@pytest.mark.parametrize("options, words", [
    ([], ("at least 256x256 pixels", "--size", "64x64")),
    (["--size", "256x256", "--watermark", ""], ("must not be empty",)),
    (["--size", "256x256", "--watermark", 129 * "a"], ("129 bytes", "holds at most 128"))])
def test_what_does_not_fit_is_said_before_any_work(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("minisd.load", lambda *_, **__: pytest.fail("loads the model"))
    fails(["a heart", "--watermark", "X", *options, "-o", str(tmp_path / "a.png")], 2,
          "--watermark: ", *words)
    assert not [*tmp_path.iterdir()]
