"""PNG files that hold the settings of their image; written whole or not at all."""

import json
import os
from pathlib import Path, PurePath

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisd import files
from minisd.errors import ImageError
from minisd.image_files import decoding, read


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
    chunks.add_text("parameters", _parameters(settings))
    # ASCII with \u escapes: the only form that also keeps lone surrogates, as in odd file names.
    chunks.add_itxt("minisd", json.dumps(settings))
    with files.written_whole(path, overwrite) as temporary, open(temporary, "xb") as file:
        image.save(file, "PNG", pnginfo=chunks)
        file.flush()
        os.fsync(file.fileno())


def _parameters(settings: dict) -> str:
    """The text that AUTOMATIC1111's web UI began and other Stable Diffusion programs read."""
    fields = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": "DDIM",
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": f"{settings.get('width')}x{settings.get('height')}",
        "Model": PurePath(settings.get("model") or "").name.removesuffix(".safetensors"),
        "Denoising strength": settings.get("strength"),
        "Eta DDIM": settings.get("eta"),
    }
    lines = [settings.get("prompt") or ""]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v not in (None, "")))
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def read_settings(path: str | os.PathLike) -> dict:
    """The settings dict that ``save`` put into a PNG; ImageError if there is none."""
    with open(path, "rb") as file, decoding(path, ("PNG",)):
        text = read(file, lambda image: image.info.get("minisd"), ("PNG",))
    try:
        settings = json.loads(text or "null")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ImageError(f"{path} carries no settings of minisd")
    return settings
