"""Masks: what is transparent is not painted, and a mask that repaints nothing is told."""

import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from files import save_folder
from picture_bytes import chunk, png, tiff
from PIL import Image, ImageDraw, TiffImagePlugin
from small_models import DENOISER, SMALL, small_model

import minisd
from minisd import image_files
from minisd.app import cli
from minisd.images import mask_to_tensor, open_image, open_mask
from minisd.request import Request

# Light and opaque; dark and opaque; light and transparent; dark and transparent.
GREY = [(255, 255), (0, 255), (255, 0), (0, 0)]
LIGHT = [1, 0, 0, 0]


def row(mode, pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def drawn(mode, side=8):
    """The four pixels of GREY, each as a square: for encoders that blur."""
    small = row("LA", GREY).convert("RGBA").resize((4 * side, side), Image.Resampling.NEAREST)
    return small.convert(mode)


def light(mask, width=4):
    return mask_to_tensor(mask, width, 1).flatten().tolist()


def palette(**info):
    image = row("P", [0, 1, 2, 3])
    image.putpalette([255] * 3 + [0] * 3 + [255] * 3 + [0] * 3)
    image.info.update(info)
    return image


def palette_rgba():
    image = row("P", [0, 1, 2, 3])
    image.putpalette([255] * 4 + [0, 0, 0, 255] + [255] * 3 + [0] + [0] * 4, "RGBA")
    return image


def palette_with_alpha():
    image = Image.new("PA", (4, 1))
    image.putpalette([255] * 3 + [0] * 3)
    image.putdata([(0, 255), (1, 255), (0, 0), (1, 0)])
    return image


def keyed(mode, pixels, key):
    image = row(mode, pixels)
    image.info["transparency"] = key
    return image


IN_MEMORY = {
    "LA": row("LA", GREY),
    "La": row("LA", GREY).convert("La"),
    "RGBA": row("LA", GREY).convert("RGBA"),
    "RGBa": row("LA", GREY).convert("RGBA").convert("RGBa"),
    "PA": palette_with_alpha(),
    "P, an alpha for each": palette(transparency=bytes([255, 255, 0, 0])),
    "P, RGBA": palette_rgba(),
    "P, one key": palette(transparency=2),
    "L, a key": keyed("L", [200, 0, 255, 255], 255),
    "1, a key": keyed("1", [255, 0, 0, 0], 0),
    "RGB, a key": keyed("RGB", [(200, 200, 200), (0, 0, 0), (255, 255, 0), (255, 255, 0)],
                        (255, 255, 0)),
}


@pytest.mark.parametrize("mask", IN_MEMORY.values(), ids=IN_MEMORY)
def test_what_is_transparent_is_not_painted(mask):
    assert light(mask) == LIGHT
    assert light(open_mask(mask)) == LIGHT  # a second reading changes nothing


@pytest.mark.parametrize("value, alpha, painted", [
    (255, 128, 1), (255, 127, 0), (200, 200, 1), (200, 150, 0), (128, 255, 1), (127, 255, 0),
    (255, 1, 0), (130, 254, 1),
])
def test_light_times_alpha_decides(value, alpha, painted):
    assert light(row("LA", [(value, alpha)]), 1) == [painted]
    assert light(row("RGBA", [(value, value, value, alpha)]), 1) == [painted]


@pytest.mark.parametrize("image", IN_MEMORY.values(), ids=IN_MEMORY)
def test_pictures_stay_over_white(image):
    assert open_image(image).getpixel((2, 0)) == (255, 255, 255)


SAVED = {
    "a.png": ["LA", "RGBA", "P"], "a.webp": ["RGBA"], "a.gif": ["RGBA"], "a.tiff": ["LA", "RGBA"],
    "a.jp2": ["LA", "RGBA"], "a.avif": ["RGBA"],
}
CODECS = {"webp": "WEBP", "avif": "AVIF", "jp2": "JPEG2000"}
FILES = [pytest.param(name, mode, id=f"{mode} {name}") for name, modes in SAVED.items()
         for mode in modes]


@pytest.mark.parametrize("name, mode", FILES)
def test_files_with_alpha(tmp_path, name, mode):
    suffix = name.split(".")[1]
    if (needed := CODECS.get(suffix)) and needed not in image_files.readable():
        pytest.skip(f"this Pillow has no {needed}")
    options = {"webp": {"lossless": True, "exact": True}}.get(suffix, {})
    drawn(mode).save(tmp_path / name, **options)
    want = [value for value in LIGHT for _ in range(8)]
    with Image.open(tmp_path / name) as opened:
        for mask in (tmp_path / name, opened):
            assert mask_to_tensor(mask, 32, 8)[0, 0, 4].tolist() == want
    assert np.asarray(open_image(tmp_path / name))[4, 20].min() > 250


def key(*values):
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def words(*values):
    return [struct.pack(f">{len(values)}H", *values)]


# A PNG with one transparent colour, in all the depths that there are.
KEYED = {
    "grey 1": (png([b"\xa0"], 4, 1, 0, key(0)), [1, 0, 1, 0]),
    "grey 1, white": (png([b"\xa0"], 4, 1, 0, key(1)), [0, 0, 0, 0]),
    "grey 2": (png([b"\x8f"], 4, 2, 0, key(3)), [1, 0, 0, 0]),
    "grey 4": (png([b"\xc0\xff"], 4, 4, 0, key(15)), [1, 0, 0, 0]),
    "grey 8": (png([b"\xc8\0\xff\xff"], 4, 8, 0, key(255)), [1, 0, 0, 0]),
    "grey 16": (png(words(51400, 0, 65535, 65534), 4, 16, 0, key(65535)), [1, 0, 0, 1]),
    "RGB 8": (png([bytes([200, 200, 200, 0, 0, 0] + 6 * [255])], 4, 8, 2, key(255, 255, 255)),
              [1, 0, 0, 0]),
    "RGB 16": (png(words(*3 * [65535], *3 * [0], *6 * [51400]), 4, 16, 2, key(51400, 51400, 51400)),
               [1, 0, 0, 0]),
    "palette 1": (png([b"\xa0"], 4, 1, 3, chunk(b"PLTE", bytes(3) + 3 * b"\xff")
                      + chunk(b"tRNS", b"\xff\0")), [0, 0, 0, 0]),
    "palette 2": (png([b"\x1b"], 4, 2, 3, chunk(b"PLTE", 3 * b"\xff" + bytes(3) + 3 * b"\xff")
                      + chunk(b"tRNS", b"\xff\xff\0\xff")), [1, 0, 0, 0]),
}


@pytest.mark.parametrize("content, want", KEYED.values(), ids=KEYED)
def test_a_transparent_colour(tmp_path, content, want):
    path = tmp_path / "keyed.png"
    path.write_bytes(content)
    assert light(path) == want
    opened = Image.open(path)
    assert light(opened) == want and light(opened) == want


@pytest.mark.skipif((b"II", 1, (1,), 1, (8, 8), (1,)) not in TiffImagePlugin.OPEN_INFO,
                    reason="this Pillow does not read it")
def test_associated_alpha_of_a_tiff(tmp_path):
    path = tmp_path / "layer.tiff"  # premultiplied, mode La in Pillow
    path.write_bytes(tiff(bytes([255, 255, 0, 255, 0, 0, 100, 100]), 4, 1, (8, 8), 1,
                          ((338, 3, 1, b"\1\0"),)))
    assert light(path) == [1, 0, 0, 0]


def strokes():
    """White strokes on a transparent layer that is white too, as some programs save it."""
    layer = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    ImageDraw.Draw(layer).rectangle((16, 16, 47, 47), fill="white")
    return layer


def test_a_call_and_the_command_line_read_it_as_a_mask(tmp_path, monkeypatch):
    want = np.asarray(strokes())[..., 3:] * np.ones(3, np.uint8)
    plan = Request(prompt="a heart", image=Image.new("RGB", (64, 64)), mask_image=strokes())
    assert np.array_equal(np.asarray(plan.plan(SMALL).mask_image), want)
    seen = {}

    class Model:
        def __call__(self, prompt, **call):
            seen.update(call)
            raise ArithmeticError("enough")

    strokes().save(tmp_path / "layer.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    monkeypatch.setattr(minisd, "load", lambda *_, **__: Model())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["a heart", "--image", "photo.png", "--mask", "layer.png"]) == 2
    assert np.array_equal(np.asarray(seen["mask_image"]), want)


# A mask that repaints nothing


def lines(*boxes, mode="L", size=(64, 64), fill=255):
    mask = Image.new(mode, size)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(box, fill=fill)
    return mask


# A cell of these models is 4x4 pixels, of which the first is looked at.
NOTHING = {
    "three rows": lines((0, 29, 63, 31)),
    "three columns": lines((29, 0, 31, 63)),
    "hairs": lines((0, 30, 63, 30), (0, 50, 63, 50)),
    "a dot": lines((33, 33, 33, 33)),
    "dots": lines(*((x, x, x + 1, x + 1) for x in range(5, 60, 8))),
    "a line that was wider": lines((0, 292, 639, 318), size=(640, 640)),
    "all dark": lines(),
    "all grey": lines((0, 0, 63, 63), fill=127),
    "transparent": lines(mode="LA"),
    "white and transparent": Image.new("RGBA", (64, 64), (255, 255, 255, 0)),
    "0 and 1": lines((8, 8, 40, 40), fill=1),
}
SOMETHING = {
    "four rows": lines((0, 28, 63, 31)), "a cell": lines((32, 32, 35, 35)),
    "all": lines((0, 0, 63, 63)), "a pixel that is looked at": lines((32, 32, 32, 32)),
}
KINDS = {"blending": 4, "channels": 9}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def sd(request):
    return small_model(replace(SMALL, unet=replace(DENOISER, in_channels=request.param)))


def inpaint(sd, mask, **more):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    call = {"num_inference_steps": 2, "seed": 0, "progress": False, "output_type": "latent"}
    return sd("a heart", image=photo, mask_image=mask, **call | more).images


@pytest.mark.parametrize("mask", NOTHING.values(), ids=NOTHING)
def test_a_mask_that_repaints_nothing_is_told(sd, mask):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = inpaint(sd, mask)
    assert [(w.category, w.filename) for w in told] == [(UserWarning, __file__)]
    text = str(told[0].message)
    assert text.startswith("the mask repaints nothing: ") and "16x16" in text and "\n" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(made, inpaint(sd, mask))  # the value stays


@pytest.mark.parametrize("mask", SOMETHING.values(), ids=SOMETHING)
def test_any_other_mask_is_not(sd, mask):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inpaint(sd, mask)


def test_it_is_told_before_the_first_step(sd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="repaints nothing"):
            inpaint(sd, lines(), strength=0.5,
                    callback_on_step_end=lambda *_: pytest.fail("a step was made"))


def test_it_is_told_on_the_command_line(tmp_path, monkeypatch, capsys):
    save_folder(SMALL, tmp_path / "model")
    lines().save(tmp_path / "mask.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    line = ["a heart", "-m", "model", "--image", "photo.png", "--mask", "mask.png", "--steps", "1",
            "--count", "2", "--quiet"]
    assert cli.main(line) == 0
    assert capsys.readouterr().err.count("minisd: warning: the mask repaints nothing") == 1
