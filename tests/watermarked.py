"""What the package invisible-watermark makes of one drawing.

Kept, because the package brings OpenCV and torch. By invisible-watermark 0.2.0 with PyWavelets
1.9.0 and NumPy 2.4.6, and to the same bits with opencv-python-headless 4.14.0 and 5.0.0:

    bgr = np.asarray(drawing(width, height))[:, :, ::-1].copy()
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", payload)
    marked = encoder.encode(bgr, "dwtDct")
    hashlib.sha256(marked[:, :, ::-1].tobytes()).hexdigest()[:16]
    WatermarkDecoder("bytes", 8 * len(payload)).decode(marked, "dwtDct")
"""

import hashlib

import numpy as np
from PIL import Image

KEPT = [  # the size, the payload, the hash of the pixels, and what is read from them
    ((256, 256), b"StableDiffusionV1", "197be7520edfa64b", b"Sta\xe2neDiffusi\x7fnV3"),
    ((256, 256), b"SDV2", "4b257f5c744c1ca4", b"SDV2"),
    ((512, 520), b"StableDiffusionV1", "c4fe15a621810787", b"StableDiffusionV1"),
    ((512, 520), b"SDV2", "f2fab30601b0f4a8", b"SDV2"),
    ((300, 270), b"StableDiffusionV1", "e525a876526eab3d", b"StableDinfusyonW1"),
    ((300, 270), b"SDV2", "7784402a5c023b3a", b"SDV2"),
]


def drawing(width: int, height: int) -> Image.Image:
    """Waves of colour, squares of one colour, and noise: whole numbers, the same everywhere."""
    y, x = np.indices((height, width), dtype=np.int64)
    waves = np.stack([x * x // 97 + y, 2 * y + x * y // 61, 5 * x - y * y // 83], axis=-1) % 511
    rgb = np.abs(waves - 255)
    rgb[(x // 32 + y // 32) % 3 == 0] = 20, 40, 250
    noisy = (x // 48 + 2 * y // 48) % 5 == 1
    rgb[noisy] += (y * y * 7919 + x * x * 104729 + x * y * 31)[noisy, None] // 64 % 97 - 48
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def pixels_hash(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]
