"""Pictures: faults that leave the pixels whole, ranges of values, and the formats that are read."""

import io
import struct
import zlib

import numpy as np
import pytest
from picture_bytes import chunk, entry, exif, png, riff, segment, short, tiff
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features
from process_state import unchanged

from minisd import image_files, images
from minisd.app.png import read_settings, save
from minisd.errors import ImageError
from minisd.images import open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PHOTO = Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)))
ROTATED = short(274, 6)  # an orientation: by 90 degrees
NONSENSE = b"nonsense" * 4


def encoded(form, image=PHOTO, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# A file is whole, but for its metadata


def as_png(before=b"", after=b"", **more):
    return png([row.tobytes() for row in PIXELS], 8, before=before, after=after, **more)


def bomb(name, keyword, head):
    """A text that is longer than Pillow allows once it is decompressed."""
    text = b"\0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)
    return chunk(name, keyword + head + zlib.compress(text))


WORKFLOW = bomb(b"zTXt", b"workflow", b"\0\0")
WORKFLOW_I = bomb(b"iTXt", b"workflow", b"\0\1\0\0\0")
MANY = b"".join(chunk(b"tEXt", b"a%d\0" % i + 33 * 2**20 * b"a") for i in range(2))
PNGS = {
    "eXIf": (chunk(b"eXIf", NONSENSE), b""),
    "eXIf, empty": (chunk(b"eXIf"), b""),
    "eXIf, no directory": (chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"), b""),
    "eXIf, wrong checksum": (chunk(b"eXIf", exif(ROTATED), right=False), b""),
    "eXIf after the pixels": (b"", chunk(b"eXIf", NONSENSE)),
    "EXIF as text": (chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nzz"), b""),
    "XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff<<"), b""),
    "iCCP": (chunk(b"iCCP", b"name\0\0nonsense"), b""),
    "iCCP, no name": (chunk(b"iCCP", b"name"), b""),
    "iCCP, unknown method": (chunk(b"iCCP", b"name\0\7" + NONSENSE), b""),
    "iCCP, too long": (bomb(b"iCCP", b"name", b"\0\0"), b""),
    "zTXt, too long": (WORKFLOW, b""),
    "zTXt, too long, at the end": (b"", WORKFLOW),
    "iTXt, too long": (WORKFLOW_I, b""),
    "iTXt, too long, at the end": (b"", WORKFLOW_I),
    "zTXt, unknown method": (chunk(b"zTXt", b"a\0\7a"), b""),
    "zTXt, nonsense": (chunk(b"zTXt", b"a\0\0" + NONSENSE), b""),
    "tEXt, wrong checksum": (chunk(b"tEXt", b"a\0b", right=False), b""),
    "tEXt, too many": (MANY, b""),
    "unknown, wrong checksum": (chunk(b"prVt", NONSENSE, right=False), b""),
    "pHYs": (chunk(b"pHYs", b"\0"), b""),
    "tIME": (chunk(b"tIME", b"\xff" * 3), b""),
    "tIME, wrong checksum": (chunk(b"tIME", b"\xff" * 7, right=False), b""),
    "gAMA": (chunk(b"gAMA", b"\0"), b""),
    "gAMA 0": (chunk(b"gAMA", bytes(4)), b""),
    "cHRM": (chunk(b"cHRM", bytes(9)), b""),
    "sRGB": (chunk(b"sRGB"), b""),
    "an animation without frames": (chunk(b"acTL", bytes(8)), b""),
    "an animation, cut": (chunk(b"acTL", b"\0\0"), b""),
    "a frame of no animation": (chunk(b"fcTL", bytes(26)), b""),
    "a text named transparency": (chunk(b"tEXt", b"transparency\0of glass"), b""),
    "a text named transparency, behind": (b"", chunk(b"tEXt", b"transparency\0of glass")),
    "a text named interlace": (chunk(b"tEXt", b"interlace\0none"), b""),
    "a text named bbox": (chunk(b"tEXt", b"bbox\0no box"), b""),
    "a chunk cut short at the end": (b"", chunk(b"tEXt", 9 * NONSENSE)[:-80]),
}
JPEG = encoded("JPEG", quality=90)
XRES = exif(entry(282, 2, 2, b"6"), short(296, 3))


def as_jpeg(*segments):
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def mpf(*entries):
    return segment(0xE2, b"MPF\0" + exif(*entries))


JPEGS = {
    "EXIF": [segment(0xE1, b"Exif\0\0" + NONSENSE)],
    "EXIF, empty": [segment(0xE1, b"Exif\0\0")],
    "EXIF, a resolution in letters": [segment(0xE1, b"Exif\0\0" + XRES)],
    "XMP": [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff<<")],
    "ICC, cut": [segment(0xE2, b"ICC_PROFILE\0")],
    "ICC, a part is missing": [segment(0xE2, b"ICC_PROFILE\0\1\3nonsense")],
    "JFIF, cut": [segment(0xE0, b"JFIF")],
    "Adobe, cut": [segment(0xEE, b"Adobe")],
    "Photoshop, cut": [segment(0xED, b"Photoshop 3.0\x008BIM\3\xed")],
    "pictures of a phone": [segment(0xE2, b"MPF\0" + NONSENSE)],
    "pictures of a phone, where": [mpf(entry(0xB001, 4, 1, b"\2"), entry(0xB002, 7, 4, b"abcd"))],
    "a comment": [segment(0xFE, bytes(range(256)))],
}
WEBPS = {f"WebP {name}": encoded("WEBP", **options)
         for name, options in {"lossy": {"quality": 90}, "lossless": {"lossless": True}}.items()}


def as_webp(plain, flags=0x2C, more=b"", profile=b"", cut=0):
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in PHOTO.size)
    chunks = riff(b"VP8X", bytes([flags, 0, 0, 0]) + sides) + profile + plain[12:] + more
    return riff(b"RIFF", b"WEBP" + chunks)[: -cut or None]


WEBP_FAULTS = {
    "EXIF": {"more": riff(b"EXIF", NONSENSE)},
    "EXIF, short": {"more": riff(b"EXIF", b"M")},
    "EXIF, no directory": {"more": riff(b"EXIF", b"Exif\0\0II*\0\xff\xff\xff\x7f")},
    "EXIF, cut": {"more": riff(b"EXIF", NONSENSE), "cut": 20},
    "XMP": {"more": riff(b"XMP ", b"\xff<<")},
    "XMP, cut": {"more": riff(b"XMP ", 9 * NONSENSE), "cut": 40},
    "XMP, cut in its head": {"more": riff(b"XMP ", NONSENSE), "cut": 34},
    "ICC": {"profile": riff(b"ICCP", NONSENSE)},
    "what is announced is missing": {},
    "what is there is not announced": {"flags": 0, "more": riff(b"EXIF", NONSENSE)},
}
TIFFS = {
    "EXIF elsewhere": [(34665, 4, 1, b"\xff\xff\xff\x7f")],
    "EXIF in letters": [(34665, 2, 4, b"abc\0")],
    "XMP of numbers": [(700, 4, 1, b"\4\0\0\0")],
    "XMP of short numbers": [(700, 3, 16, NONSENSE)],
    "XMP in letters": [(700, 2, 32, NONSENSE)],
    "a resolution in letters": [(282, 2, 4, b"abc\0"), (283, 2, 4, b"abc\0"), (296, 3, 1, b"\3\0")],
    "ICC beyond the end": [(34675, 7, 10**6, b"\xff\xff\xff\x7f")],
    "IPTC beyond the end": [(33723, 4, 10**6, b"\xff\xff\xff\x7f")],
    "an unknown type": [(40000, 99, 3, b"abcd")],
}
GIF = encoded("GIF", PHOTO.quantize())
AT = 13 + (3 * 2 << (GIF[10] & 7))  # behind the palette
GIFS = {
    "a comment": b"!\xfe\xff" + bytes(range(255)) + b"\0",
    "a comment, empty": b"!\xfe\0",
    "a repetition, empty": b"!\xff\x0bNETSCAPE2.0\0",
    "a repetition, short": b"!\xff\x0bNETSCAPE2.0\1\1\0",
    "XMP": b"!\xff\x0bXMP DataXMP<x\1" + bytes(range(255, -1, -1)) + b"\0",
    "unknown": b"!\x77\2ab\0",
    "a text": b"!\1\x0c" + bytes(12) + b"\2ab\0",
}
WHOLE = {
    **{f"PNG {name}": (as_png(*chunks), as_png()) for name, chunks in PNGS.items()},
    **{f"JPEG {name}": (as_jpeg(*segments), JPEG) for name, segments in JPEGS.items()},
    **{f"{kind} {name}": (as_webp(plain, **fault), plain)
       for name, fault in WEBP_FAULTS.items() for kind, plain in WEBPS.items()},
    **{f"{'Big' * big}TIFF {name}": (tiff(PIXELS.tobytes(), 8, 6, more=tags, big=big), as_png())
       for name, tags in TIFFS.items() for big in (False, True)},
    **{f"GIF {name}": (GIF[:AT] + block + GIF[AT:], GIF) for name, block in GIFS.items()},
}


def plainly(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("content, good", WHOLE.values(), ids=WHOLE)
def test_whole_pixels_are_read(tmp_path, content, good):
    path = tmp_path / "a.file"
    path.write_bytes(content)
    open_image(path)  # imports what reads the format
    with unchanged():
        image = open_image(path)
    assert np.array_equal(np.asarray(image), plainly(good))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("content, good", [pytest.param(*WHOLE[name], id=name) for name in WHOLE
                                           if "at the end" in name or "XMP" in name])
def test_whole_pixels_of_what_a_caller_has_opened(tmp_path, content, good):
    """Pillow opens it, and finds the fault when the pixels are wanted."""
    (tmp_path / "a.file").write_bytes(content)
    try:
        opened = Image.open(tmp_path / "a.file")
    except OSError:  # an XMP that is cut: not even this
        return
    with opened:
        assert np.array_equal(np.asarray(open_image(opened)), plainly(good))


@pytest.mark.skipif("AVIF" not in image_files.readable(), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("bad", [b"\0\0\0\0", b"nons", b"II**", b"MM\0\0", b"\xff" * 4])
def test_avif_with_an_exif_that_is_none(tmp_path, bad):
    block = Image.Exif()
    block[0x0131] = "software"
    good = encoded("AVIF", exif=block)
    (tmp_path / "a.avif").write_bytes(good.replace(b"MM\0*", bad).replace(b"II*\0", bad))
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.avif")), plainly(good))


# The orientation is kept where the EXIF can be read, whatever else is wrong.
TURNED = {
    "PNG": as_png(chunk(b"eXIf", exif(ROTATED)) + WORKFLOW),
    "PNG, the EXIF at the end": as_png(WORKFLOW, chunk(b"eXIf", exif(ROTATED))),
    "JPEG": as_jpeg(segment(0xE2, b"ICC_PROFILE\0"), segment(0xE1, b"Exif\0\0" + exif(ROTATED))),
    "JPEG, the fault is in the EXIF": as_jpeg(
        segment(0xE1, b"Exif\0\0" + exif(ROTATED, entry(282, 2, 2, b"6"), short(296, 3)))),
    "WebP": as_webp(WEBPS["WebP lossless"],
                    more=riff(b"EXIF", exif(ROTATED)) + riff(b"XMP ", 9 * NONSENSE), cut=40),
    "TIFF": tiff(PIXELS.tobytes(), 8, 6, more=((274, 3, 1, b"\6\0"), (700, 4, 1, b"\4\0\0\0"))),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("content", TURNED.values(), ids=TURNED)
def test_the_orientation_is_kept(tmp_path, content):
    (tmp_path / "a.file").write_bytes(content)
    image = open_image(tmp_path / "a.file")
    assert image.height > image.width
    if not content.startswith(b"\xff\xd8"):
        turned = np.rot90(np.asarray(image))
        assert np.array_equal(turned[:: len(turned) // 6, :: turned.shape[1] // 8], PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_as_pillow_turns_them(tmp_path, orientation):
    from PIL import ImageOps

    (tmp_path / "a.png").write_bytes(as_png(chunk(b"eXIf", exif(short(274, orientation)))))
    with Image.open(tmp_path / "a.png") as image:
        want = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), want)


# Damage of the pixels is still an error, with the faulty metadata and without.
DATA = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PIXELS))
HEAD = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 8, 2, 0, 0, 0))
MAGIC = b"\x89PNG\r\n\x1a\n"
DAMAGED = {
    "PNG, header": MAGIC + chunk(b"IHDR", HEAD[8:-4], right=False) + WORKFLOW
    + chunk(b"IDAT", DATA) + chunk(b"IEND"),
    "PNG, pixels missing": MAGIC + HEAD + WORKFLOW + chunk(b"IEND"),
    "PNG, pixels cut": MAGIC + HEAD + WORKFLOW + chunk(b"IDAT", DATA[:40]) + chunk(b"IEND"),
    "PNG, file cut": (MAGIC + HEAD + WORKFLOW + chunk(b"IDAT", DATA))[:-60],
    "PNG, pixels changed": MAGIC + HEAD + WORKFLOW
    + chunk(b"IDAT", DATA[:30] + b"\0" * 20 + DATA[50:]) + chunk(b"IEND"),
    "PNG, palette": png([b"\0\1"], 2, 8, 3, WORKFLOW + chunk(b"PLTE", bytes(6), right=False)),
    "PNG, transparency": as_png(chunk(b"tRNS", b"\0") + WORKFLOW),
    "PNG, transparency, checksum": as_png(chunk(b"tRNS", bytes(6), right=False)),
    "PNG, name of the transparency": as_png(
        chunk(b"tRNS", bytes(6)).replace(b"tRNS", b"tRNs") + WORKFLOW),
    **{f"PNG, {name} for PLTE": png(
        [b"\0\1"], 2, 8, 3, chunk(b"PLTE", bytes(6)).replace(b"PLTE", name))
       for name in (b"P\xbfTE", b"pLTE", b"plte", b"PLTe")},
    "PNG, length of a text": as_png(b"\x7f\xff\xff\xff" + chunk(b"tEXt", b"a\0b")[4:]),
    "JPEG, cut": as_jpeg(segment(0xE2, b"ICC_PROFILE\0"))[:-300],
    "JPEG, cut in its head": as_jpeg(segment(0xE2, b"ICC_PROFILE\0"))[:60],
    "WebP, cut": as_webp(WEBPS["WebP lossy"], cut=100),
    "WebP, a part of the pixels lost": (lambda whole: whole[:150] + whole[190:])(
        as_webp(WEBPS["WebP lossy"], more=riff(b"EXIF", NONSENSE))),
    "TIFF, cut": tiff(PIXELS.tobytes()[:-50], 8, 6, more=((700, 4, 1, b"\4\0\0\0"),))[:120],
    "GIF, cut": GIF[:AT] + GIFS["a repetition, empty"] + GIF[AT : AT + 30],
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_pixels_are_an_error(tmp_path, content):
    (tmp_path / "bad.file").write_bytes(content)
    with pytest.raises(ImageError, match="bad.file.*damaged") as caught:
        open_image(tmp_path / "bad.file")
    assert "\n" not in str(caught.value)


def test_a_good_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_only_pixels", lambda file: pytest.fail("read again"))
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        (tmp_path / "a.file").write_bytes(encoded(form))
        assert open_image(tmp_path / "a.file").size == PHOTO.size


def test_a_file_without_metadata_is_not_decoded_again(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(as_png()[:-40])
    used = []
    decoded = image_files.decoded
    monkeypatch.setattr(images, "decoded", lambda image: used.append(0) or decoded(image))
    with pytest.raises(ImageError):
        open_image(tmp_path / "a.png")
    assert len(used) == 1


def test_a_file_of_another_kind_is_not_read_whole(tmp_path):
    """A checkpoint given as an image can have many gigabytes."""
    (tmp_path / "a.safetensors").write_bytes(bytes(2**20))
    with open(tmp_path / "a.safetensors", "rb") as file:
        with pytest.raises(UnidentifiedImageError):
            image_files.read(file, image_files.decoded)
        assert file.tell() <= 16


@pytest.mark.parametrize("content", [as_png(WORKFLOW), as_jpeg(segment(0xE0, b"JFIF"))])
def test_the_limit_of_pixels_holds_for_what_is_read_again(tmp_path, monkeypatch, content):
    (tmp_path / "bomb.file").write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels read"))
    with pytest.raises(ImageError, match="bomb.file has more than 40 pixels"):
        open_image(tmp_path / "bomb.file")


FRAMES = [PHOTO, PHOTO.transpose(Image.Transpose.ROTATE_180)]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF"])
def test_an_animation_gives_its_first_frame(tmp_path, form):
    options = {"lossless": True} if form == "WEBP" else {}
    frames = [frame.quantize() for frame in FRAMES] if form == "GIF" else FRAMES
    content = encoded(form, frames[0], save_all=True, append_images=frames[1:], **options)
    faulty = {
        "PNG": content[:33] + WORKFLOW + content[33:],
        "WEBP": riff(b"RIFF", content[8:20] + b"\x0a" + content[21:]
                     + riff(b"EXIF", NONSENSE))[:-9],
        "GIF": content[: 13 + (3 * 2 << (content[10] & 7))] + GIFS["a repetition, empty"]
        + content[13 + (3 * 2 << (content[10] & 7)) :],
        "TIFF": content,
    }[form]
    for each in (content, faulty):
        (tmp_path / "a.file").write_bytes(each)
        image = open_image(tmp_path / "a.file")
        assert np.array_equal(np.asarray(image), np.asarray(frames[0].convert("RGB")))


def test_settings_are_read_beside_faulty_metadata(tmp_path):
    save(PHOTO, tmp_path / "a.png", {"prompt": "a heart"})
    good = (tmp_path / "a.png").read_bytes()
    for bad in (WORKFLOW, WORKFLOW_I, chunk(b"pHYs", b"\0"), chunk(b"tEXt", b"a\0b", right=False),
                chunk(b"iCCP", b"name"), chunk(b"acTL", b"\0")):
        (tmp_path / "b.png").write_bytes(good[:33] + bad + good[33:])
        assert read_settings(tmp_path / "b.png") == {"prompt": "a heart"}
    (tmp_path / "b.png").write_bytes(as_png(WORKFLOW))
    with pytest.raises(ImageError, match="no settings"):
        read_settings(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes(good[:33] + WORKFLOW + good[33:].replace(b"heart", b"tiger"))
    with pytest.raises(ImageError, match="no settings"):  # its checksum is wrong
        read_settings(tmp_path / "b.png")


# The range of the values is known, or there is a sentence

RAMP = np.array([[0, 25700, 65535]], np.uint16)
RIGHT = [0, 100, 255]
MODES = {
    "1": (0, 255), "L": (0, 255), "P": (0, 255), "PA": ((0, 255), (255, 255)),
    "LA": ((0, 255), (255, 255)), "La": ((0, 255), (255, 255)),
    "RGB": ((0, 0, 0), (255, 255, 255)), "RGBX": ((0, 0, 0, 0), (255, 255, 255, 0)),
    "RGBA": ((0, 0, 0, 255), (255, 255, 255, 255)),
    "RGBa": ((0, 0, 0, 255), (255, 255, 255, 255)),
    "CMYK": ((0, 0, 0, 255), (0, 0, 0, 0)), "YCbCr": ((0, 128, 128), (255, 128, 128)),
    "HSV": ((0, 0, 0), (0, 0, 255)), "LAB": ((0, 128, 128), (255, 128, 128)),
    "I;16": (0, 65535), "I;16B": (0, 65535), "I;16L": (0, 65535), "I;16N": (0, 65535),
}


def grey_palette(image):
    if image.mode in ("P", "PA"):
        image.putpalette([value for value in range(256) for _ in range(3)])
    return image


@pytest.mark.parametrize("mode", MODES)
def test_black_and_white_in_every_mode(mode):
    for colour, want in zip(MODES[mode], (0, 255)):
        image = grey_palette(Image.new(mode, (3, 2), colour))
        got = np.asarray(open_image(image)).astype(int)
        assert got.shape == (2, 3, 3) and abs(got - want).max() <= (mode == "LAB")


def test_lab_without_its_library_is_a_sentence(monkeypatch):
    monkeypatch.setattr("PIL.ImageCms.buildTransform", None)
    with pytest.raises(ImageError, match="mode LAB.*convert it first"):
        open_image(Image.new("LAB", (2, 2)))


DEPTHS = {
    "I;16": Image.fromarray(RAMP),
    "I;16L": Image.frombytes("I;16L", (3, 1), RAMP.astype("<u2").tobytes()),
    "I;16B": Image.frombytes("I;16B", (3, 1), RAMP.astype(">u2").tobytes()),
    "I;16N": Image.frombytes("I;16N", (3, 1), RAMP.tobytes()),
}


@pytest.mark.parametrize("image", DEPTHS.values(), ids=DEPTHS)
def test_all_byte_orders_of_16_bits(image):
    assert np.asarray(open_image(image))[0, :, 0].tolist() == RIGHT


DEEP = {
    "PNG": png([RAMP.astype(">u2").tobytes()], 3, 16, 0),
    "TIFF": tiff(RAMP.tobytes(), 3, 1, (16,), 1),
    "TIFF, white is 0": tiff((65535 - RAMP).tobytes(), 3, 1, (16,), 0),
    "TIFF, 12 bits": tiff(bytes([0x00, 0x06, 0x46, 0xFF, 0xF0]), 3, 1, (12,), 1),
    "PGM": b"P5 3 1 65535\n" + RAMP.astype(">u2").tobytes(),
    "PGM, 1000 levels": b"P5 3 1 1000\n" + np.array([0, 392, 1000], ">u2").tobytes(),
    "PGM, in letters": b"P2 3 1 65535\n0 25700 65535\n",
    "JPEG2000": None,
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_files_of_16_bits(tmp_path, content):
    if content is None:
        content = encoded("JPEG2000", Image.fromarray(RAMP))
    (tmp_path / "deep").write_bytes(content)
    assert np.asarray(open_image(tmp_path / "deep"))[0, :, 0].tolist() == RIGHT
    with Image.open(tmp_path / "deep") as opened:
        assert np.asarray(open_image(opened))[0, :, 0].tolist() == RIGHT


def test_a_compressed_tiff_of_16_bits(tmp_path):
    for form in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        Image.fromarray(RAMP).save(tmp_path / "a.tiff", compression=form)
        assert np.asarray(open_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == RIGHT


def test_a_16_bit_png_in_the_mode_of_older_pillows():
    image = Image.fromarray(RAMP.astype(np.int32))
    image.format = "PNG"
    assert image.mode == "I" and np.asarray(open_image(image))[0, :, 0].tolist() == RIGHT


UNKNOWN = {
    "0 to 255": Image.fromarray(np.arange(256, dtype=np.int32)[None]),
    "0 and 1": Image.fromarray(np.eye(4, dtype=np.int32)),
    "16 bits": Image.fromarray(RAMP).convert("I"),
    "L as I": Image.new("L", (4, 4), 200).convert("I"),
    "negative": Image.fromarray(np.full((2, 2), -1, np.int32)),
    "float": Image.fromarray(np.full((2, 2), 0.5, np.float32)),
    "float to 255": Image.new("L", (4, 4), 200).convert("F"),
}


@pytest.mark.parametrize("image", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_range_is_a_sentence(tmp_path, image):
    image.save(tmp_path / "a.tiff")
    for read, name in ((open_image, "the image"), (images.open_mask, "the mask")):
        for source, named in ((image, name), (tmp_path / "a.tiff", "a.tiff")):
            with pytest.raises(ImageError, match=f"{named} has .* of unknown range: scale"):
                read(source)


@pytest.mark.parametrize("bits, form", [((16,), 2), ((32,), 1), ((32,), 2), ((32,), 3)])
def test_a_tiff_of_signed_and_of_32_bit_values_is_a_sentence(tmp_path, bits, form):
    content = tiff(bytes(8), 2, 1, bits, 1, ((339, 3, 1, struct.pack("<H", form)),))
    (tmp_path / "a.tiff").write_bytes(content)
    with pytest.raises(ImageError, match="a.tiff has .* of unknown range"):
        open_image(tmp_path / "a.tiff")


def test_a_float_map_is_a_sentence(tmp_path):
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + np.ones(2, "<f4").tobytes())
    with pytest.raises(ImageError, match="float"):
        open_image(tmp_path / "a.pfm")


# Formats

ALSO = {"AVIF": {}, "JPEG2000": {"irreversible": False}, "PPM": {}, "MPO": {}, "BMP": {}}


@pytest.mark.parametrize("form", ALSO)
def test_more_formats_are_read(tmp_path, form):
    if form not in [*image_files.readable(), "MPO"]:
        pytest.skip(f"this Pillow has no {form}")
    more = {"save_all": True, "append_images": FRAMES[1:]} if form == "MPO" else {}
    content = encoded(form, **ALSO[form], **more)
    (tmp_path / "a.file").write_bytes(content)
    got = np.asarray(open_image(tmp_path / "a.file"))
    assert np.array_equal(got, plainly(content))
    assert abs(got.astype(int) - np.asarray(PHOTO)).mean() < 20


@pytest.mark.parametrize("content", [
    b"P6 2 1 255\n\xff\0\0\0\0\xff", b"P3 2 1 255\n255 0 0 0 0 255\n", b"P5 2 1 255\n\xff\0",
    b"P2\n# a comment\n2 1 9\n9 0\n", b"P4 2 1\n\x40", b"P1 2 1\n0 1\n",
])
def test_portable_pixmaps(tmp_path, content):
    (tmp_path / "a.ppm").write_bytes(content)
    image = open_image(tmp_path / "a.ppm")
    assert image.size == (2, 1) and image.getpixel((0, 0))[0] == 255
    assert image.getpixel((1, 0))[0] == 0


@pytest.mark.parametrize("lost", ["AVIF", "WEBP", "JPEG2000"])
def test_a_format_that_this_pillow_lacks_is_a_sentence(tmp_path, monkeypatch, lost):
    path = tmp_path / "a.file"
    path.write_bytes(b"\0\0\0\x20ftypavif" + bytes(20))
    check = features.check
    library = image_files.LIBRARIES[lost]
    for setting in ((features, "check", lambda name: name != library and check(name)),
                    (Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != lost})):
        with monkeypatch.context() as patch:
            patch.setattr(*setting)
            with pytest.raises(ImageError, match="a.file is not an image in PNG, JPEG") as caught:
                open_image(path)
            assert lost not in str(caught.value)
            (tmp_path / "good.png").write_bytes(as_png())
            assert np.array_equal(np.asarray(open_image(tmp_path / "good.png")), PIXELS)


def test_the_sentence_names_what_is_read(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "a.heic")
    assert all(form in str(caught.value) for form in image_files.readable())


@pytest.mark.parametrize("content", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"%PDF-1.4\n",
    b"\xd7\xcd\xc6\x9a" + bytes(40), b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(40),
    encoded("ICO"), encoded("TGA"), b"8BPS\0\1" + bytes(40),
], ids=["EPS", "PDF", "WMF", "EMF", "ICO", "TGA", "PSD"])
def test_what_is_not_read(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match="not an image in PNG"):
        open_image(tmp_path / "a.png")
    assert not set(image_files.FORMATS) & {"EPS", "PDF", "WMF", "PSD", "ICO", "FPX", "MIC"}
