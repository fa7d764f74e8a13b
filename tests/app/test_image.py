"""Reading images: conversions, and files that are rejected with one sentence."""

import io
import random

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from minisd.app.png import read_settings, save
from minisd.images import ImageError, mask_to_tensor, open_image, to_tensor

SETTINGS = {
    "prompt": "a red heart", "negative_prompt": "", "seed": 7, "num_inference_steps": 20,
    "guidance_scale": 7.5, "width": 64, "height": 48, "eta": 0.0, "strength": None,
    "model": "folder/v1-5.safetensors",
}


def noise(width, height, bands=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


@pytest.mark.parametrize("size", [(64, 48), (37, 91), (200, 120)], ids=["same", "up", "down"])
def test_images_become_the_tensors_of_diffusers(size):
    image = noise(*size)
    theirs = VaeImageProcessor().preprocess(image, height=48, width=64)
    ours = to_tensor(image, 64, 48)
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


def test_the_threshold_of_a_mask_is_between_127_and_128():
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert mask_to_tensor(mask, 4, 1).flatten().tolist() == [0, 0, 1, 1]


def test_a_mask_of_any_mode_is_read():
    white = Image.new("L", (8, 8), 255)
    for mode in ("1", "P", "LA", "RGBA", "CMYK"):
        assert mask_to_tensor(white.convert(mode), 8, 8).all(), mode


def half_transparent():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "PA"])
def test_transparent_pixels_become_white(tmp_path, mode):
    path = tmp_path / "clear.png"
    if mode == "PA":  # PNG has no such mode
        image = open_image(half_transparent().convert("PA"))
    else:
        half_transparent().convert(mode).save(path)
        image = open_image(path)
    assert image.mode == "RGB"
    assert image.getpixel((1, 0)) == (255, 255, 255)
    assert image.getpixel((0, 0)) != (255, 255, 255)


@pytest.mark.parametrize("name", ["deep.tiff", "deep.png"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "print.tiff"
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(path)
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_the_first_frame_is_taken(tmp_path):
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_the_orientation_of_a_photo_is_applied(tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    photo = Image.new("RGB", (16, 8), "white")
    photo.paste("black", (0, 0, 8, 8))
    photo.save(path, exif=exif)
    upright = open_image(path)
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] < 50 < 200 < upright.getpixel((4, 13))[0]


def test_the_given_image_is_unchanged():
    image = half_transparent()
    before = image.tobytes()
    open_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


# Rejected


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
def test_too_many_pixels_are_rejected_before_they_are_read(tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    noise(11, 10).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels read"))
    with pytest.raises(ImageError, match=f"bomb.png has more than {limit} pixels"):
        open_image(path)


def test_an_address_is_rejected():
    for address in ("https://example.com/a.png", "file:///a.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ImageError, match="download"):
            open_image(address)


def test_other_types_are_a_type_error():
    for source in (None, 3, b"a.png", np.zeros((8, 8, 3))):
        with pytest.raises(TypeError, match=type(source).__name__):
            open_image(source)


def test_images_without_pixels_and_of_floats_are_rejected():
    with pytest.raises(ImageError, match="no pixels"):
        open_image(Image.new("RGB", (0, 4)))
    with pytest.raises(ImageError, match="float"):
        open_image(Image.new("F", (4, 4)))


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.png")


def test_mutated_files_raise_only_image_error(tmp_path):
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
