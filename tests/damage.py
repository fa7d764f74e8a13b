"""Good files, texts, images and numbers, damaged at random: the cases that fuzz.py counts.

Each function prepares what its cases share and returns a case, a function of a random generator
and a number. Its result is "rejected" (by the one error allowed), "same" (as an independent reader
reads it) or "different".
"""

import io
import json
import math
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from files import all_shapes, header, write
from PIL import Image
from reference_models import SMALL, official_tokenizer, small_model
from safetensors import safe_open
from test_tokenizer import KINDS as WRITING, _official_ids, _string
from yaml import safe_load

from minisd.app.png import read_settings, save
from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.ldm_yaml import PREDICTIONS, prediction_of, read_params
from minisd.checkpoints.safetensors_file import DTYPES, ITEM_SIZE, read_header, read_tensor
from minisd.config import SD1
from minisd.errors import ImageError, WeightError
from minisd.images import open_image
from minisd.models.clip import TextEncoder
from minisd.models.ops import TORCH
from minisd.models.unet import UNet
from minisd.models.vae import VAE
from minisd.samplers import schedule
from minisd.text.tokenizer import Tokenizer

Case = Callable[[random.Random, int], str]
NUMPY = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}
ODD = [0, 1, -1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.0, 0.5, True, None, "1",
       "F33", "f16", "", [], [0], {}, "a\0b", "../a", "\ud800", math.nan]  # fmt: skip
TOKENS = [*'"{}[],:0189-+. eE\\\n\0\xff', "null", "true", "NaN", "\\ud800", "1" * 400, "[" * 99]


def rejected(error: Exception, *words: str) -> str:
    """An error is right if it is one line with these words."""
    text = str(error)
    return "rejected" if "\n" not in text and all(word in text for word in words) else "different"


def headers(folder: Path) -> Case:
    """A good file of five tensors, with one to three damages of its header, length or end."""
    shapes = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (3, 2, 2), "b.bias": (3,), "c": ()}
    dtypes = ("F32", "F16", "BF16", "F16", "F32")
    data = np.random.default_rng(0).normal(size=200).astype(np.float16).tobytes()

    def case(draw: random.Random, number: int) -> str:
        rows, end = {"__metadata__": {"format": "pt"}} if draw.random() < 0.5 else {}, 0
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True):
            start, end = end, end + math.prod(shape) * ITEM_SIZE[dtype]
            rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        how = draw.random()
        for _ in range(draw.randint(1, 3) if how < 0.6 else 0):
            _damage_row(rows, draw)
        head = json.dumps(rows).encode()
        for _ in range(draw.randint(1, 3) if how > 0.5 else 0):
            place, token = draw.randrange(len(head)), draw.choice(TOKENS).encode("latin-1")
            head = head[:place] + token + head[place + draw.randint(0, 3) :]
        length = len(head) + (draw.choice([-9, -1, 1, 8, 2**20, 2**62]) if how > 0.97 else 0)
        whole = struct.pack("<Q", max(0, length)) + head + data[:end]
        cut = draw.randrange(len(whole)) if draw.random() < 0.02 else len(whole)
        path = folder / "a.safetensors"
        path.write_bytes(whole[:cut])
        return as_numpy_reads(path)

    return case


def _damage_row(rows: dict, draw: random.Random) -> None:
    """Swap a row with another, rename or reshape it, or replace a value in it."""
    name, other = draw.sample([name for name in rows if name != "__metadata__"], 2)
    how, field = draw.randrange(5), draw.choice([*rows[name], "shape", "x"])
    value = rows[name].get(field)
    if how == 0:
        rows[name], rows[other] = rows[other], rows[name]
    elif how == 1:
        rows[draw.choice(["x", "\xe9", "", "a/b", "__metadata__"])] = rows.pop(name)
    elif how == 2 and isinstance(value, list):
        rows[name][field] = draw.choice([value[::-1], [*value, 1], value[:-1]])
    elif how == 3 and isinstance(value, list) and value:
        value[draw.randrange(len(value))] = draw.choice(ODD)
    else:
        rows[name][field] = draw.choice([*ODD, *ITEM_SIZE])


def bodies(folder: Path) -> Case:
    """A good header with random data, and files that are cut after their header was read."""
    shapes = {"a": (700, 1000), "b": (37, 3), "c": (1,), "d": (0, 5)}  # a: more than one chunk

    def case(draw: random.Random, number: int) -> str:
        dtype = draw.choice(["F16", "F32"])
        path = write(folder / "a.safetensors", header(shapes, dtype))
        end = path.stat().st_size
        values = np.random.default_rng(number).normal(size=1000).astype(NUMPY[dtype]).tobytes()
        with open(path, "r+b") as file:
            for _ in range(9):
                file.seek(draw.randrange(end - 1_000_000, end - len(values)) & -8 | end & 7)
                file.write(values)
            for _ in range(draw.choice([0, 0, 1])):
                file.seek(draw.randrange(end - 1_000_000, end - 4))
                file.write(draw.choice([b"\xff\x7f", b"\0\x7c", draw.randbytes(4)]))
        return as_numpy_reads(path, draw.choice(list(DTYPES)), cut=draw.random() < 0.1)

    return case


def as_numpy_reads(path: Path, to: str = "F32", cut: bool = False) -> str:
    """Read a file's tensors, and compare their bits with those that NumPy reads at the offsets.

    ``cut``: the file loses its last byte once its header is read.
    """
    try:
        tensors = read_header(path)
    except WeightError as error:
        return rejected(error, path.name)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    rows = json.loads(whole[8 : 8 + length])
    rows.pop("__metadata__", None)
    with safe_open(path, "pt") as theirs:  # raises if safetensors cannot read it
        if not rows.keys() == tensors.keys() == set(theirs.keys()):
            return "different"
    if cut:
        path.write_bytes(whole[:-1])
    outcomes = set()
    for name, row in rows.items():
        start, stop = (8 + length + offset for offset in row["data_offsets"])
        lost = cut and start < stop == len(whole)
        want = None if lost else _by_numpy(whole[start:stop], row, DTYPES[to])
        try:
            got = read_tensor(tensors[name], DTYPES[to])
        except WeightError as error:
            outcomes.add(rejected(error, path.name, name) if want is None else "different")
        else:
            same = want is not None and _bits(got) == _bits(want)
            outcomes.add("same" if same else "different")
    return min(outcomes, default="same")  # in this order: different, rejected, same


def _by_numpy(data: bytes, row: dict, dtype: torch.dtype) -> torch.Tensor | None:
    """The values; None if NumPy lacks the dtype, or a value is not finite."""
    if row["dtype"] not in NUMPY:
        return None
    values = np.frombuffer(data, NUMPY[row["dtype"]]).reshape(row["shape"])
    if row["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    tensor = torch.tensor(values).to(dtype)
    return tensor if tensor.isfinite().all() else None


def _bits(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.flatten().view(torch.uint8).numpy().tobytes()


def tensors(folder: Path) -> Case:
    """SD1's list, with each tensor in turn dropped, renamed, reshaped and retyped."""
    official = all_shapes(SD1)
    used = [name for name in official if not name.endswith("position_ids")]
    with torch.device("meta"):
        models = {"text_encoder": TextEncoder(SD1.text, TORCH), "unet": UNet(SD1.unet, TORCH),
                  "vae": VAE(SD1.vae, TORCH)}  # fmt: skip

    def case(draw: random.Random, number: int) -> str:
        name, how = used[number // 4 % len(used)], number % 4
        shape, size = official[name], math.prod(official[name])
        head = header({n: s for n, s in official.items() if n != name})
        end = max(row["data_offsets"][1] for row in head.values())
        row = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * size]}
        if how == 1:  # renamed: the last letter is missing
            head[name[:-1]] = row
        elif how == 2:  # reshaped to as many values: only the shape differs
            head[name] = row | {"shape": [size] if len(shape) > 1 else [size, 1]}
        elif how == 3:
            dtype = draw.choice([dtype for dtype in ITEM_SIZE if dtype not in DTYPES])
            stop = end + size * ITEM_SIZE[dtype]
            head[name] = row | {"dtype": dtype, "data_offsets": [end, stop]}
        path = write(folder / "sd1.safetensors", head)
        try:
            found = open_checkpoint(path)
            for part, model in models.items():
                check(found, part, model)
        except WeightError as error:
            return rejected(error, path.name, name)
        return "different"

    return case


LDM = """\
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion  # the class
  params:
    parameterization: "v"
    linear_start: 0.00085
    timesteps: 1000
    first_stage_key: 'jpg'
    monitor: val/loss
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        attention_resolutions: [ 4, 2, 1 ]
        channel_mult:
        - 1
        - 2
    cond_stage_config: {target: "x.Y", params: {freeze: true, layer: penultimate}}
"""
FLOW = 'model: {target: x.Y, params: {timesteps: 1, parameterization: "v", a: [1, [b, {c: d}]]}}'
YAML = [*"?-:{}[],#'\"\\~\t\0\r\x85\ufeff\U0001f600", ": ", "- ", "? ", "&a ", "*a", "<<: ", "!x ",
        "!!str ", "--- ", "\n---\n", "...\n", "%YAML 1.1\n", "|\n", ">-\n", '"\\U00110000"',
        '"\\ud800"', "eps", "v", "x0", "null", "1e999", "params", "model:\n", "[" * 40,
        "parameterization: eps\n", "<!DOCTYPE html>"]  # fmt: skip


def yaml(folder: Path) -> Case:
    """LDM's config in block and in flow style, in UTF-8 and UTF-16, damaged in one to four places
    or not at all.
    """

    def case(draw: random.Random, number: int) -> str:
        text = draw.choice([LDM, LDM, FLOW, LDM.replace('"v"', draw.choice(["eps", "v", "x0"]))])
        for _ in range(draw.choice([0, 1, 1, 2, 4])):
            text = _damaged_text(text, draw)
        data = text.encode(draw.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"]), "replace")
        if draw.random() < 0.1:
            place = draw.randrange(len(data) + 1)
            data = draw.choice([data[:place], data[:place] + draw.randbytes(1) + data[place:]])
        (folder / "a.yaml").write_bytes(data)
        try:
            params = read_params(folder / "a.yaml")
            found = prediction_of(folder / "a.yaml", params)
        except WeightError as error:
            return rejected(error, "a.yaml")
        theirs = safe_load(data)["model"]["params"]
        same = PREDICTIONS[theirs.get("parameterization", "eps")] == found
        return "same" if same and _alike(params, theirs) else "different"

    return case


def _damaged_text(text: str, draw: random.Random) -> str:
    """A token put in or over a few characters, or a line lost, repeated or indented anew."""
    if draw.random() < 0.6:
        place = draw.randrange(len(text) + 1)
        return text[:place] + draw.choice(YAML) + text[place + draw.choice([0, 0, 1, 3]) :]
    lines = text.splitlines(keepends=True) or [""]
    row = draw.randrange(len(lines))
    lines[row : row + 1] = draw.choice([[], [lines[row]] * 2, [" " + lines[row]],
                                        [lines[row].lstrip()], [lines[row][:-1]]])  # fmt: skip
    return "".join(lines)


def _alike(ours: object, theirs: object) -> bool:
    """The same mappings, lists and texts; what is no text to others may be any text to us."""
    if isinstance(ours, (dict, list)):
        if type(ours) is not type(theirs) or len(ours) != len(theirs):
            return False
        pairs = [(ours, theirs)] if isinstance(ours, list) else [
            (list(ours), list(theirs)), (list(ours.values()), list(theirs.values()))]  # fmt: skip
        return all(_alike(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))
    return ours == theirs if isinstance(theirs, str) else not isinstance(theirs, (dict, list))


def prompts(folder: Path) -> Case:
    """Text of every script, compared with transformers; some has a lone surrogate."""
    ours, theirs = Tokenizer.clip(49407), official_tokenizer(49407)

    def case(draw: random.Random, number: int) -> str:
        text = _string(draw.choice(list(WRITING)), draw)
        if draw.random() < 0.1:
            place = draw.randint(0, len(text))
            text = text[:place] + chr(draw.randrange(0xD800, 0xE000)) + text[place:]
            try:
                ours(text)
            except ValueError as error:
                return rejected(error, f"position {place}")
            return "different"
        return "same" if torch.equal(ours(text), _official_ids(theirs, [text])) else "different"

    return case


def images(folder: Path) -> Case:
    """PNG, JPEG, WebP and GIF, still and moving, with a few bytes changed, lost or repeated."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    image, good = Image.fromarray(noise), []
    for form, modes in {"PNG": "1 L LA P RGB RGBA I;16", "GIF": "P RGB", "JPEG": "L RGB CMYK",
                        "WEBP": "RGB RGBA"}.items():  # fmt: skip
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
           output_type="latent", progress=False)  # fmt: skip
        falling = all(a > b for a, b in zip(visited, visited[1:], strict=False))
        right = falling and len(visited) == count and 0 <= visited[-1] <= visited[0] <= 999
        return "same" if right and visited == schedule.timesteps(count) else "different"

    return case


def metadata(folder: Path) -> Case:
    """Settings of any content, saved in a PNG and read back."""
    pixel = Image.new("RGB", (1, 1))

    def text(draw: random.Random) -> str:
        some = [_string(draw.choice(list(WRITING)), draw), chr(draw.randrange(0x110000))]
        return "".join(draw.choices([*some, '"', "\\", "\n", "\0"], k=draw.randint(0, 4)))

    def value(draw: random.Random, depth: int = 0) -> object:
        how = draw.randrange(4 if depth > 2 else 6)
        if how < 4:
            return (text(draw), draw.choice([None, True, False, 0, -0.0, 1e308, 5e-324]),
                    draw.randrange(-(2**70), 2**70), draw.gauss(0, 1))[how]  # fmt: skip
        inner = [value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        return inner if how == 4 else {text(draw): each for each in inner}

    def case(draw: random.Random, number: int) -> str:
        made = {"prompt": text(draw), "negative_prompt": text(draw), "seed": value(draw, 3),
                "model": text(draw), text(draw): value(draw)}  # fmt: skip
        save(pixel, folder / "a.png", made, overwrite=True)
        # As text: True and 1 are equal, -0.0 and 0 too, but their texts differ.
        return "same" if repr(read_settings(folder / "a.png")) == repr(made) else "different"

    return case
