"""Images to tensors and back: PIL images and files in, RGB; PIL images out.

An image is read once; one that cannot be read is rejected with one sentence.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import ExifTags, Image

from minisd.config import CLIP_MEAN, CLIP_STD
from minisd.errors import ImageError
from minisd.files import is_address
from minisd.image_files import decoded, decoding, given, read

if TYPE_CHECKING:
    from torch import Tensor

Source = str | os.PathLike | Image.Image
T = TypeVar("T")
MAX_RATIO = 2048  # a longer image would take gigabytes when it is resized for CLIP
# The EXIF orientations from 2 on, and what turns them upright.
TURNS: dict[object, Image.Transpose] = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), start=2))


def open_image(source: Source) -> Image.Image:
    """A path or a PIL image -> a PIL image in RGB: the first frame, turned upright, over white.

    Raises ImageError for what is no image, is damaged, or has too many pixels (Pillow's limit,
    ``PIL.Image.MAX_IMAGE_PIXELS``); FileNotFoundError for no file; TypeError for anything else.
    """
    return _open(source, "the image", partial(_to_rgb, backdrop="white"))


def open_mask(source: Source) -> Image.Image:
    """The same over black: light is painted, and what is transparent is not, whatever its colour.
    """
    return _open(source, "the mask", partial(_to_rgb, backdrop="black"))


def open_grey(source: Source, what: str) -> np.ndarray:
    """The same in grey, (H, W), with the numbers that it holds: of 8 or 16 bits, integer or float.

    Raises ImageError for colours too.
    """
    return _open(source, what, _grey)


def _open(source: Source, what: str, use: Callable[[Image.Image, str | os.PathLike], T]) -> T:
    if isinstance(source, Image.Image):
        with decoding(what):
            return use(given(source), what)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"an image is a path or a PIL image, not {type(source).__name__}")
    if is_address(source):
        raise ImageError(f"{str(source)[:80]} is an address: download the image, pass its path")
    with open(source, "rb") as file, decoding(source):
        return use(read(file, decoded), source)


def _to_rgb(image: Image.Image, name: str | os.PathLike, backdrop: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels")
    turn = _turn(image)
    if image.mode.startswith(("I", "F")):
        image = _from_16_bits(image, name)
    try:
        if image.mode == "La":  # of which Pillow makes nothing else
            image = image.convert("LA")
        if image.has_transparency_data:
            behind = Image.new("RGBA", image.size, backdrop)
            image = Image.alpha_composite(behind, image.convert("RGBA"))
        image = image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"{name} has mode {image.mode}, which does not turn into RGB ({error}): "
                         "convert it first") from error
    return image if turn is None else image.transpose(turn)


def _grey(image: Image.Image, name: str | os.PathLike) -> np.ndarray:
    if image.mode.startswith(("I", "F")) and 0 not in image.size:
        turn = _turn(image)
        return np.asarray(image if turn is None else image.transpose(turn))
    levels = np.asarray(_to_rgb(image, name, "black"))
    if (levels != levels[:, :, :1]).any():
        raise ImageError(f"{name} has colours: turn it grey first")
    return levels[:, :, 0]


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright; None also if its EXIF cannot be read: the pixels are whole."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as many types as of the decoders
        return None


def _from_16_bits(image: Image.Image, name: str | os.PathLike) -> Image.Image:
    """Grey of 16 bits -> L, or LA; Pillow clips it to 8 instead, which turns a grey image white.

    Mode I holds them where Pillow reads these formats (PNG before Pillow 11). Any other I, and F,
    has no known range: pixels of 0 to 255 would be black as 16 bits.
    """
    if not image.mode.startswith("I;16") and (image.mode, image.format) not in (
            ("I", "PNG"), ("I", "PPM")):
        kind = "float" if image.mode == "F" else "integer"
        raise ImageError(f"{name} has {kind} pixels, of unknown range: scale them to 0 to 255 and "
                         "convert them to 8 bits, mode L")
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # a TIFF's
    white = 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    levels = (values.clip(0, white) / (white / 255)).round().astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation: white is 0, which Pillow leaves
        levels = 255 - levels
    grey, key = Image.fromarray(levels), image.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.uint8(255) * (values != key)))
    return grey


def to_tensor(source: Source, width: int, height: int) -> "Tensor":
    """What ``open_image`` takes -> (1, 3, height, width) float32 in [-1, 1], by Lanczos."""
    return 2 * _grid(open_image(source), "RGB", width, height) - 1


def mask_to_tensor(source: Source, width: int, height: int) -> "Tensor":
    """What ``open_mask`` takes -> (1, 1, height, width) float32: 1, repaint, where it is light."""
    return (_grid(open_mask(source), "L", width, height) >= 0.5).float()


def _grid(image: Image.Image, mode: str, width: int, height: int) -> "Tensor":
    """(1, C, height, width) in [0, 1]; resized before it is turned grey, as in diffusers."""
    import torch  # not above: `minisd info` need not wait for it

    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.array(resized.convert(mode))
    grid = torch.from_numpy(pixels).float() / 255
    return grid.reshape(1, height, width, -1).permute(0, 3, 1, 2).contiguous()


def check_for_clip(image: Image.Image) -> Image.Image:
    """The image; ImageError for one that ``to_clip`` does not take, for its length."""
    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"an image of {width}x{height} pixels is too long for CLIP: cut it first")
    return image


def to_clip(source: Source, side: int = 224) -> "Tensor":
    """What ``open_image`` takes -> (1, 3, side, side) float32 as CLIP's image tower reads it.

    The shorter side is resized to ``side`` by PIL's bicubic filter, the centre is cut out and each
    channel normalised, as CLIPImageProcessor does it. ImageError for an absurdly long image.
    """
    import torch

    image = check_for_clip(open_image(source))
    width, height = image.size
    short = min(width, height)
    width, height = int(side * width / short), int(side * height / short)  # not rounded
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + side, top + side))
    grid = np.asarray(image, np.float32) / 255
    grid = (grid - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(grid).permute(2, 0, 1)[None].contiguous()


def open_images(images: "Source | Sequence[Source] | Tensor | np.ndarray") -> list[Image.Image]:
    """What ``open_image`` takes, one or a list, or pixels in [0, 1], a (B, 3, H, W) tensor or a
    (B, H, W, 3) array -> PIL images in RGB, of 8 bits.

    Raises what ``open_image`` does; TypeError also for pixels that are no floats, and ImageError
    for those of another shape or range.
    """
    import torch

    if isinstance(images, (torch.Tensor, np.ndarray)):
        return to_pil(_checked(images))
    several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    return [open_image(image) for image in several]


def _checked(pixels: "Tensor | np.ndarray") -> "Tensor":
    """(B, 3, H, W), or (B, H, W, 3) of an array, if all of it is from 0 to 1 -> (B, 3, H, W)."""
    import torch

    shape = tuple(pixels.shape)
    if isinstance(pixels, np.ndarray):
        if pixels.dtype.kind != "f":
            raise TypeError(f"pixels must be floats from 0 to 1, not {pixels.dtype}")
        own = torch.from_numpy(pixels.astype(np.float64))
        pixels = own.movedim(-1, 1 if len(shape) == 4 else -1)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in shape:
        raise ImageError("pixels must be a tensor (B, 3, H, W) or an array (B, H, W, 3), "
                         f"not of shape {shape}")
    if not pixels.is_floating_point():
        raise TypeError(f"pixels must be floats from 0 to 1, not {pixels.dtype}")
    if not ((pixels >= 0) & (pixels <= 1)).all():  # NaN is neither
        raise ImageError("pixels must be from 0 to 1, and some are not")
    return pixels


def to_pil(pixels: "Tensor") -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> a list of B PIL images, each channel rounded to 8 bits."""
    levels = pixels.detach().float().mul(255).round().byte()
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]
