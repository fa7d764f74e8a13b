"""Image files to PIL images: which formats are read, and what is read of a file with a fault.

A file's pixels can be whole while its EXIF, a text or its colour profile is not, and Pillow then
refuses all of it. Such a file is read once more, from a copy that holds only what makes the pixels.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TypeVar

from PIL import Image, UnidentifiedImageError, features

from minisd.errors import ImageError

# Listed, because otherwise Pillow tries all the formats it knows, and for EPS it runs Ghostscript.
# JPEG is also the MPO of phones. ICO is not here: Pillow sees the real size too late for a limit.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# A Pillow can be built without these, or be older than one of them.
LIBRARIES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
T = TypeVar("T")


def readable(formats: tuple[str, ...] = FORMATS) -> list[str]:
    """Those of the formats that this Pillow reads."""
    Image.init()
    return [name for name in formats if name in Image.OPEN
            and (name not in LIBRARIES or features.check(LIBRARIES[name]))]


@contextmanager
def decoding(name: str | os.PathLike, formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into one ImageError that names it."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ImageError(f"{name} has more than {limit}: make it smaller first") from None
    except UnidentifiedImageError:
        kinds = ", ".join(readable(formats))
        raise ImageError(f"{name} is not an image in {kinds}, or its first bytes are damaged: "
                         "convert it first") from None
    except Exception as error:  # Pillow's decoders raise a dozen types, down to struct.error
        raise ImageError(f"{name} is damaged or cut short ({error})") from error


def read(
    file: BinaryIO, use: Callable[[Image.Image], T], formats: tuple[str, ...] = FORMATS
) -> T:
    """``use`` of the image in a file, or if that fails of a copy that holds only its pixels."""
    try:
        return use(_opened(file, formats))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise
    except Exception:
        copy, exif = _only_pixels(file)
        if copy is None:
            raise
    image = _opened(io.BytesIO(copy), formats)
    if exif:
        image.info["exif"] = exif
    return use(image)


def _opened(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """What Pillow opens; DecompressionBombError for too many pixels, which are not read."""
    image = Image.open(file, formats=readable(formats))
    # Pillow raises only above twice its limit. Its warning could be made an error, and the others
    # be silenced, but the filters are the whole process's: another thread would notice.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    return image


def decoded(image: Image.Image) -> Image.Image:
    """What Pillow has opened, with its pixels; an animation's first frame."""
    if image.format == "PNG":
        _match_key(image)
    image.load()
    if isinstance(image.info.get("transparency"), str):  # a PNG's texts are in the same dict
        raise ValueError("a text named transparency hides it")
    return image


def _match_key(image: Image.Image) -> None:
    """Turn a PNG's transparent colour into 8 bits, as its pixels will be: Pillow forgets to."""
    key, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    depth = tiles[0][3] if tiles else ""  # there are no tiles once the pixels are read
    scale = {"1": 255, "L;2": 85, "L;4": 17}.get(depth)
    if scale and isinstance(key, int):
        image.info["transparency"] = min(scale * key, 255)  # newer Pillows do give 255 for 1 bit
    elif depth == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def given(image: Image.Image) -> Image.Image:
    """A caller's image with its pixels, which Pillow may have opened without reading them."""
    try:
        return decoded(image)
    except Exception:
        file = getattr(image, "fp", None)
        if file is not None and image.tell() == 0:
            with suppress(Exception):
                file.seek(0)
                return read(file, decoded)
        raise


# What makes the pixels, of each format


def _only_pixels(file: BinaryIO) -> tuple[bytes | None, bytes]:
    """A file without its metadata, or None if it has none, and its EXIF as it stands there."""
    file.seek(0)
    head = file.read(12)
    for start, strip in STRIP.items():
        if re.match(start, head, re.DOTALL):
            data = head + file.read()
            with suppress(IndexError, struct.error):  # cut short before the pixels
                copy, exif = strip(data)
                return (None if copy == data else copy), exif
    return None, b""


def _png(data: bytes) -> tuple[bytes, bytes]:
    """All but the ancillary chunks; kept are the transparency and the settings (app/png.py)."""
    out, exif, at, name = bytearray(data[:8]), b"", 8, b""
    while at < len(data) and name != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, content, crc = data[at + 4 : at + 8], data[at + 8 : end - 4], data[end - 4 : end]
        ancillary = name.isalpha() and name[:1].islower() and name != b"tRNS"
        # The checksum shows whether the name itself was damaged, and it is needed after all.
        if not ancillary or crc in (_crc(b"tRNS", content), _crc(b"PLTE", content)):
            out += data[at:end]
        elif crc == _crc(name, content) and name == b"eXIf":
            exif = b"Exif\0\0" + content
        elif crc == _crc(name, content) and data.startswith(b"iTXtminisd\0\0", at + 4):
            out += data[at:end]  # the second \0: not compressed
        at = end
    return bytes(out), exif


def _crc(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))


def _jpeg(data: bytes) -> tuple[bytes, bytes]:
    """All but the application segments and comments; JFIF and Adobe say what the colours are."""
    out, exif, at = bytearray(data[:2]), b"", 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:  # the start of the scan
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        marker, body = data[at + 1], data[at + 4 : end]
        spared = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not spared or len(body) >= 12 and body.startswith((b"JFIF\0", b"Adobe")):
            out += data[at:end]
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:] if exif else body
        at = end
    return bytes(out + data[at:]), exif


def _webp(data: bytes) -> tuple[bytes, bytes]:
    """All but the profile, EXIF and XMP, of which the last can be cut short."""
    out, exif, at, whole = bytearray(data[:12]), b"", 12, int.from_bytes(data[4:8], "little")
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if data[at : at + 4] in (b"ICCP", b"EXIF", b"XMP "):
            whole -= end - at  # what the file says: if more is missing, it is of the pixels
        else:
            out += data[at:end]
        if data[at : at + 4] == b"EXIF":
            exif = data[at + 8 : end]
        at = end
    out[4:8] = max(whole, 0).to_bytes(4, "little")
    return bytes(out), exif


def _gif(data: bytes) -> tuple[bytes, bytes]:
    """Of what stands before the first frame only its own control, which has the transparency."""
    at = 13 + (3 * 2 << (data[10] & 7) if data[10] & 0x80 else 0)  # the global palette
    out = bytearray(data[:at])
    while data[at] == 0x21:
        end = at + 2
        while data[end]:
            end += 1 + data[end]
        if data[at + 1] == 0xF9:
            out += data[at : end + 1]
        at = end + 1
    return bytes(out + data[at:]), b""


def _tiff(data: bytes) -> tuple[bytes, bytes]:
    """The first directory without what is no pixels: resolutions, and all from XMP (700) on."""
    order, big = "<>"[data[:1] == b"M"], 43 in (data[2], data[3])
    offset, number, size = ("Q", "Q", 20) if big else ("I", "H", 12)
    start = struct.unpack_from(order + offset, data, 8 if big else 4)[0]
    count = struct.unpack_from(order + number, data, start)[0]
    first = start + struct.calcsize(order + number)
    entries = [data[at : at + size] for at in range(first, first + size * min(count, 999), size)]
    kept = [entry for entry in entries
            if (tag := struct.unpack_from(order + "H", entry)[0]) < 600 and tag not in (282, 283)]
    directory = struct.pack(order + number, len(kept)) + b"".join(kept)
    directory += bytes(struct.calcsize(order + offset))  # no next one
    return data[:start] + directory + data[start + len(directory) :], b""


def _avif(data: bytes) -> tuple[bytes, bytes]:
    """The EXIF gets a name that says nothing; how the image is turned stands elsewhere."""
    return re.sub(rb"(infe.{8,10})Exif", rb"\1skip", data, flags=re.DOTALL), b""


STRIP = {
    rb"\x89PNG": _png, rb"\xff\xd8": _jpeg, rb"RIFF....WEBP": _webp, rb"GIF8": _gif,
    rb"II|MM": _tiff, rb"....ftyp": _avif,
}
