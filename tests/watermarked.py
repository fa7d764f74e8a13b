"""A picture to be watermarked."""

import numpy as np
from PIL import Image


def drawing(width: int, height: int) -> Image.Image:
    """The same in every version of NumPy: whole numbers only. Colour waves, squares of one colour,
    and noise.
    """
    y, x = np.indices((height, width))
    waves = np.stack([x * x // 97 + y, 2 * y + x * y // 61, 5 * x - y * y // 83], axis=-1) % 511
    rgb = np.abs(waves - 255)
    rgb[(x // 32 + y // 32) % 3 == 0] = 20, 40, 250
    noisy = (x // 48 + 2 * y // 48) % 5 == 1
    rgb[noisy] += (y * y * 7919 + x * x * 104729 + x * y * 31)[noisy, None] // 64 % 97 - 48
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
