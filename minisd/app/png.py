"""PNG files that hold the settings of their image, written whole or not at all; and the settings
in the images of other programs.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisd import files
from minisd.app import comfyui, infotext
from minisd.errors import ImageError
from minisd.image_files import decoding, read

# What an image may be to be read, by the end of its name.
READABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
EXIF, USER_COMMENT = 0x8769, 0x9286


def check_writable(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise now what ``save`` would raise after the work: ValueError or an OSError."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: only PNG is written, so the name must end in .png")
    files.check_writable(path, overwrite)


def save(
    image: Image.Image, path: str | os.PathLike, settings: dict, overwrite: bool = False
) -> None:
    """Write a PIL image as a PNG that carries ``settings``, whole or not at all.

    ``settings`` is a dict that JSON can hold. An existing file is a FileExistsError unless
    ``overwrite``; a full disk or a forbidden folder is the OSError that names ``path``.
    """
    check_writable(path, overwrite)
    chunks = PngInfo()
    chunks.add_text("parameters", infotext.write(settings))
    # ASCII with \u escapes: the only form that also keeps lone surrogates, as in odd file names.
    chunks.add_itxt("minisd", json.dumps(settings))
    with files.new_file(path, overwrite) as file:
        image.save(file, "PNG", pnginfo=chunks)


def read_settings(path: str | os.PathLike) -> dict:
    """The settings dict that ``save`` put into a PNG; ImageError if there is none."""
    try:
        return _ours(_texts(path, ("PNG",)).get("minisd", ""))
    except ValueError as error:
        raise ImageError(f"{path} {error}") from None


def read_any_settings(path: str | os.PathLike) -> dict:
    """The same of a PNG, JPEG or WebP, or what another program says in it of how it was made.

    "program" names the other program. ImageError if there is nothing that can be read.
    """
    if files.is_address(path):
        raise ImageError(f"{str(path)[:80]} is an address: download the image, pass its path")
    texts, faults = _texts(path, tuple(dict.fromkeys(READABLE.values()))), []
    for name, reader in READERS.items():
        try:
            if name in texts:
                return reader(texts[name])
        except ValueError as error:
            faults.append(str(error))
    nothing = "carries no settings of minisd, AUTOMATIC1111's web UI or ComfyUI"
    raise ImageError(f"{path}: {faults[0]}" if faults else f"{path} {nothing}")


def _ours(text: str) -> dict:
    try:
        settings = json.loads(text or "null")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("carries no settings of minisd")
    return settings


# Where an image may have its settings, ours first.
READERS: dict[str, Callable[[str], dict]] = {
    "minisd": _ours,
    "parameters": infotext.read,
    "prompt": comfyui.read_prompt,
    "workflow": comfyui.read_workflow,
}


def _texts(path: str | os.PathLike, formats: tuple[str, ...]) -> dict[str, str]:
    """The texts of an image by the names in ``READERS``; a JPEG and a WebP can have one."""
    with open(path, "rb") as file, decoding(path, formats):
        return read(file, _texts_of, formats)


def _texts_of(image: Image.Image) -> dict[str, str]:
    if image.format != "PNG":
        return _comment(image.getexif().get_ifd(EXIF).get(USER_COMMENT))
    if not image.info.keys() & READERS.keys():
        image.load()  # the texts may also stand behind the pixels
    texts = ((name, image.info.get(name)) for name in READERS)
    return {name: text for name, text in texts if isinstance(text, str) and text.strip()}


def _comment(value: object) -> dict[str, str]:
    """EXIF's user comment, as AUTOMATIC1111's web UI writes it: a coding's name, then the text."""
    if not isinstance(value, bytes) or not value.startswith(b"UNICODE\0"):
        return {}
    return {"parameters": value[8:].decode("utf-16-be", "replace")}
