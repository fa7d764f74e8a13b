"""Good files, texts, images and numbers, damaged at random: the cases that fuzz.py counts.

Each function prepares what its cases share and returns a case, a function of a random generator
and a number. Its result is "rejected" (by the one error allowed), "same" (as an independent reader
reads it) or "different". The kinds of files are in damaged_files.py.
"""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from damaged_files import Case, rejected
from PIL import Image
from reference_models import SMALL, official_ids, official_tokenizer, small_model
from strings import KINDS as WRITING, string

from minisd.app.png import read_settings, save
from minisd.errors import ImageError
from minisd.images import open_image
from minisd.samplers import schedule
from minisd.text.tokenizer import Tokenizer


def prompts(folder: Path) -> Case:
    """Text of every script, compared with transformers; some has a lone surrogate."""
    ours, theirs = Tokenizer.clip(49407), official_tokenizer(49407)

    def case(draw: random.Random, number: int) -> str:
        text = string(draw.choice(list(WRITING)), draw)
        if draw.random() < 0.1:
            place = draw.randint(0, len(text))
            text = text[:place] + chr(draw.randrange(0xD800, 0xE000)) + text[place:]
            try:
                ours(text)
            except ValueError as error:
                return rejected(error, f"position {place}")
            return "different"
        return "same" if torch.equal(ours(text), official_ids(theirs, [text])) else "different"

    return case


def images(folder: Path) -> Case:
    """PNG, JPEG, WebP and GIF, still and moving, with a few bytes changed, lost or repeated."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    image, good = Image.fromarray(noise), []
    for form, modes in {"PNG": "1 L LA P RGB RGBA I;16", "GIF": "P RGB", "JPEG": "L RGB CMYK",
                        "WEBP": "RGB RGBA"}.items():
        for mode in modes.split():
            one = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
            more = {"save_all": True, "append_images": [one.rotate(90)]} if form != "JPEG" else {}
            for extra in ({}, more):
                one.save(buffer := io.BytesIO(), form, **extra)
                good.append((form, buffer.getvalue()))
    save(image, folder / "settings.png", {"prompt": "a red heart"})
    good.append(("PNG", (folder / "settings.png").read_bytes()))

    def case(draw: random.Random, number: int) -> str:
        form, data = draw.choice(good)
        for _ in range(draw.choice([1, 1, 2, 5])):
            place, size = draw.randrange(len(data)), draw.choice([0, 1, 1, 1, 4, 40])
            piece = draw.choice([b"", draw.randbytes(1), draw.randbytes(size), data[:size]])
            data = data[:place] + piece + data[place + draw.choice([len(piece), size]) :]
        if form == "PNG" and draw.random() < 0.7:
            data = _with_checksums(data)  # else the checks after the checksums would never run
        (folder / "a.png").write_bytes(data)
        try:
            read = open_image(folder / "a.png")
            if form == "PNG" and draw.random() < 0.5:
                read_settings(folder / "a.png")
        except ImageError as error:
            return rejected(error, "a.png")
        return "same" if read.mode == "RGB" and min(read.size) > 0 else "different"

    return case


def _with_checksums(data: bytes) -> bytes:
    """A PNG with the right checksum in each chunk, as far as the chunks can be followed."""
    out, rest = data[:8], data[8:]
    while (end := int.from_bytes(rest[:4], "big") + 12) <= len(rest):
        out += rest[: end - 4] + struct.pack(">I", zlib.crc32(rest[4 : end - 4]))
        rest = rest[end:]
    return out + rest


def steps(folder: Path) -> Case:
    """Each number of steps from 1 to 1000, and how often the loop runs the UNet."""
    sd, visited = small_model.__wrapped__(SMALL), []  # a new one: it is patched
    sd.unet.forward = lambda x, t, context: visited.append(int(t[0])) or x

    def case(draw: random.Random, number: int) -> str:
        count = number % 1000 + 1
        visited.clear()
        sd("a", num_inference_steps=count, guidance_scale=1, seed=0, height=8, width=8,
           output_type="latent", progress=False)
        falling = all(a > b for a, b in zip(visited, visited[1:], strict=False))
        right = falling and len(visited) == count and 0 <= visited[-1] <= visited[0] <= 999
        return "same" if right and visited == [
            level.t for level in schedule.leading(count, [0.5] * 1000)] else "different"

    return case


def metadata(folder: Path) -> Case:
    """Settings of any content, saved in a PNG and read back."""
    pixel = Image.new("RGB", (1, 1))

    def text(draw: random.Random) -> str:
        some = [string(draw.choice(list(WRITING)), draw), chr(draw.randrange(0x110000))]
        return "".join(draw.choices([*some, '"', "\\", "\n", "\0"], k=draw.randint(0, 4)))

    def value(draw: random.Random, depth: int = 0) -> object:
        how = draw.randrange(4 if depth > 2 else 6)
        if how < 4:
            return (text(draw), draw.choice([None, True, False, 0, -0.0, 1e308, 5e-324]),
                    draw.randrange(-(2**70), 2**70), draw.gauss(0, 1))[how]
        inner = [value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        return inner if how == 4 else {text(draw): each for each in inner}

    def case(draw: random.Random, number: int) -> str:
        made = {"prompt": text(draw), "negative_prompt": text(draw), "seed": value(draw, 3),
                "model": text(draw), text(draw): value(draw)}
        save(pixel, folder / "a.png", made, overwrite=True)
        # As text: True and 1 are equal, -0.0 and 0 too, but their texts differ.
        return "same" if repr(read_settings(folder / "a.png")) == repr(made) else "different"

    return case
