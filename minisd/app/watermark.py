"""A text hidden in the pixels of an image: the invisible watermark of the original scripts.

The scripts of Stable Diffusion 1 hide "StableDiffusionV1" in what they draw, those of 2 "SDV2", by
the package invisible-watermark (https://github.com/ShieldMnt/invisible-watermark) and its method
"dwtDct". ``embed`` makes the same pixels, to the last bit.

It is fragile. Chance alone reads half of the bits right; of the 136 bits of "StableDiffusionV1",
measured by tests/app/test_watermark.py with Pillow 13, whose JPEG halves the size of the colours:

    image                                   as PNG   as JPEG, quality 90   halved and doubled
    the test's drawing, 512x512              1.00           0.51                 0.84
    weights/gallery.png, by our model        0.90           0.57                 0.90
    weights/heart.png, scaled to 512x512     0.50           0.50                 0.50

A strong colour loses it even without compression: the marked colour is outside RGB, and is clipped.
What ``minisd info`` reads does not depend on the pixels, and says more.

The blue-difference channel U of the image is divided into cells of 8x8 pixels, and each cell holds
one bit: the largest of its Haar wavelet's 4x4 sums, the first left out, becomes a multiple of 36
plus a quarter of 36 for a 0, or plus three quarters for a 1. The bits repeat until the cells end.
In spite of the method's name there is no cosine transform.

    image = watermark.embed(image, b"SDV2")
    watermark.read(image, 4)               # b"SDV2", if nothing was lost: see ``read``
"""

import numpy as np
from PIL import Image

MIN_AREA = 256 * 256  # pixels; the package takes no smaller image
STEP = 36  # of a coefficient of the wavelet, in levels of U times 2
# The root of 1/2, which the package applies once for each axis. Its last bit matters, because U is
# truncated: 1 / 2**0.5 is 0.7071067811865475 and gives other pixels.
HAAR = 0.7071067811865476


def check(size: tuple[int, int], length: int) -> None:
    """ValueError if an image of (width, height) pixels cannot hold ``length`` bytes."""
    width, height = size
    room = (width // 8) * (height // 8) // 8
    if length < 1:
        raise ValueError("watermark must not be empty")
    if width * height < MIN_AREA:
        raise ValueError(f"watermark needs an image of at least 256x256 pixels in area (--size), "
                         f"and this one has {width}x{height}")
    if length > room:
        raise ValueError(f"watermark has {length} bytes, and an image of {width}x{height} pixels "
                         f"holds at most {room}")


def embed(image: Image.Image, payload: bytes) -> Image.Image:
    """A copy of an RGB image with the bytes in it; ValueError if ``check`` finds no room."""
    check(image.size, len(payload))
    y, u, v = _to_yuv(image)
    inside = _cut(u)  # a view: it is written below
    ll, ld, dl, dd = _haar_2d(inside)
    blocks = _blocks(ll)
    at = _largest(blocks)
    bits = np.resize(np.unpackbits(np.frombuffer(payload, np.uint8)), at[0].shape)
    # No coefficient is negative, because U is from 17 to 239 in any RGB image. A coefficient moves
    # by less than 27, and its four pixels by half of that, so U stays within 8 bits.
    blocks[at] = (blocks[at] // STEP + 0.25 + 0.5 * bits) * STEP
    # The package has ld and dl swapped here, which transposes each 2x2 pixels of U; and it
    # truncates U, as an assignment to integers does.
    inside[:] = _inverse_haar_2d(ll, dl, ld, dd)
    return _to_rgb(y, u, v)


def read(image: Image.Image, length: int) -> bytes:
    """The ``length`` bytes that are in an RGB image, each bit by the vote of its cells.

    Without a watermark they are arbitrary, and nothing says which is the case.
    ValueError if ``check`` finds no room for as many.
    """
    check(image.size, length)
    u = _to_yuv(image)[1]
    blocks = _blocks(_haar_2d(_cut(u))[0])
    votes = (blocks[_largest(blocks)] % STEP > STEP / 2).ravel()
    # Not 0.5 of the votes but 127/255, as in the package.
    bits = [255 * votes[i :: 8 * length].mean() > 127 for i in range(8 * length)]
    return np.packbits(bits).tobytes()


def _cut(x: np.ndarray) -> np.ndarray:
    """A view without the last rows and columns, down to multiples of 4."""
    return x[: len(x) // 4 * 4, : x.shape[1] // 4 * 4]


def _blocks(ll: np.ndarray) -> np.ndarray:
    """(h, w) -> a view of its whole blocks of 4x4, in rows and columns: (h/4, w/4, 4, 4)."""
    rows, columns = len(ll) // 4, ll.shape[1] // 4
    return _cut(ll).reshape(rows, 4, columns, 4).transpose(0, 2, 1, 3)


def _largest(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """The index of the largest value of each block, where the first one does not count."""
    place = blocks.reshape(*blocks.shape[:2], 16)[..., 1:].argmax(axis=-1) + 1
    return (*np.indices(place.shape), *divmod(place, 4))


# The Haar wavelet: l, the sums, and d, the differences, of neighbours; rows first, then columns


def _haar_2d(x: np.ndarray) -> list[np.ndarray]:
    """(h, w), both even -> ll, ld, dl, dd of (h/2, w/2) each."""
    return [half.T for rows in _haar(x) for half in _haar(rows.T)]


def _inverse_haar_2d(
    ll: np.ndarray, ld: np.ndarray, dl: np.ndarray, dd: np.ndarray
) -> np.ndarray:
    return _inverse_haar(_inverse_haar(ll.T, ld.T).T, _inverse_haar(dl.T, dd.T).T)


def _haar(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = HAAR * x[0::2], HAAR * x[1::2]
    return a + b, a - b


def _inverse_haar(sums: np.ndarray, differences: np.ndarray) -> np.ndarray:
    a, b = HAAR * sums, HAAR * differences
    return np.stack([a + b, a - b], axis=1).reshape(2 * len(a), -1)


# OpenCV's 8-bit YUV: factors in units of 2**-14, and half a unit to round; exact in integers


def _to_yuv(image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB -> y, u, v of (H, W) each, int32 in 0 to 255."""
    # The v of a pure red or cyan is beyond 8 bits and is clipped, so this colour is changed.
    r, g, b = np.moveaxis(np.asarray(image.convert("RGB"), np.int32), -1, 0)
    y = (4899 * r + 9617 * g + 1868 * b + 8192) >> 14
    u = (8061 * (b - y) + 8192 >> 14) + 128
    v = (14369 * (r - y) + 8192 >> 14) + 128
    return y, u, v.clip(0, 255)


def _to_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> Image.Image:
    u, v = u - 128, v - 128
    r = y + (18678 * v + 8192 >> 14)
    g = y + (-6472 * u - 9519 * v + 8192 >> 14)
    b = y + (33292 * u + 8192 >> 14)
    return Image.fromarray(np.stack([r, g, b], axis=-1).clip(0, 255).astype(np.uint8))
