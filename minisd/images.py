"""Images to tensors and back: PIL images and files in, RGB; PIL images out.

An image is read once; one that cannot be read is rejected with one sentence.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minisd.errors import ImageError
from minisd.files import is_address

if TYPE_CHECKING:
    from torch import Tensor

Source = str | os.PathLike | Image.Image
# Listed, because otherwise Pillow tries all the formats it knows, and for EPS it runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def open_image(source: Source) -> Image.Image:
    """A path or a PIL image -> a PIL image in RGB: the first frame, turned upright, over white.

    Raises ImageError for what is no image, is damaged, or has too many pixels (Pillow's limit,
    ``PIL.Image.MAX_IMAGE_PIXELS``); FileNotFoundError for no file; TypeError for anything else.
    """
    if isinstance(source, Image.Image):
        with decoding("the image", FORMATS):
            return _to_rgb(source, "the image")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"an image is a path or a PIL image, not {type(source).__name__}")
    if is_address(source):
        raise ImageError(f"{str(source)[:80]} is an address: download the image, pass its path")
    with open(source, "rb") as file, decoding(source, FORMATS):
        return _to_rgb(opened(file, FORMATS), source)


def opened(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """What Pillow opens; DecompressionBombError for too many pixels, which are not read."""
    image = Image.open(file, formats=formats)
    # Pillow raises only above twice its limit. Its warning could be made an error, and the others
    # be silenced, but the filters are the whole process's: another thread would notice.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    return image


@contextmanager
def decoding(name: str | os.PathLike, formats: tuple[str, ...]) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into one ImageError that names it."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ImageError(f"{name} has more than {limit}: make it smaller first") from None
    except UnidentifiedImageError:
        kinds = " or ".join(formats)
        raise ImageError(f"{name} is not an image in {kinds}: convert it first") from None
    except Exception as error:  # Pillow's decoders raise a dozen types, down to struct.error
        raise ImageError(f"{name} is damaged or cut short ({error})") from error


def _to_rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError(f"{name} has float pixels, of unknown range: save it with 8 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits to 8, which turns a grey image white.
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_tensor(source: Source, width: int, height: int) -> "Tensor":
    """What ``open_image`` takes -> (1, 3, height, width) float32 in [-1, 1], by Lanczos."""
    return 2 * _grid(source, "RGB", width, height) - 1


def mask_to_tensor(source: Source, width: int, height: int) -> "Tensor":
    """What ``open_image`` takes -> (1, 1, height, width) float32: 1, repaint, where it is light."""
    return (_grid(source, "L", width, height) >= 0.5).float()


def _grid(source: Source, mode: str, width: int, height: int) -> "Tensor":
    """(1, C, height, width) in [0, 1]; resized before it is turned grey, as in diffusers."""
    import torch  # not above: `minisd info` need not wait for it

    resized = open_image(source).resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.array(resized.convert(mode))
    grid = torch.from_numpy(pixels).float() / 255
    return grid.reshape(1, height, width, -1).permute(0, 3, 1, 2).contiguous()


def to_pil(pixels: "Tensor") -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> a list of B PIL images, each channel rounded to 8 bits."""
    levels = pixels.detach().float().mul(255).round().byte()
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]
