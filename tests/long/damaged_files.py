"""Good safetensors files, damaged at random: three of the kinds of cases that fuzz.py counts."""

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from files import all_shapes, header, write
from safetensors import safe_open
from yaml import safe_load

from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.ldm_yaml import PREDICTIONS, prediction_of, read_params
from minisd.checkpoints.safetensors_file import DTYPES, ITEM_SIZE, read_header, read_tensor
from minisd.config import SD1
from minisd.errors import WeightError
from minisd.models.clip import TextEncoder
from minisd.models.ops import TORCH
from minisd.models.unet import UNet
from minisd.models.vae import VAE

Case = Callable[[random.Random, int], str]
NUMPY = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}
ODD = [0, 1, -1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.0, 0.5, True, None, "1",
       "F33", "f16", "", [], [0], {}, "a\0b", "../a", "\ud800", math.nan]
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
                  "vae": VAE(SD1.vae, TORCH)}

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
        "parameterization: eps\n", "<!DOCTYPE html>"]


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
                                        [lines[row].lstrip()], [lines[row][:-1]]])
    return "".join(lines)


def _alike(ours: object, theirs: object) -> bool:
    """The same mappings, lists and texts; what is no text to others may be any text to us."""
    if isinstance(ours, (dict, list)):
        if type(ours) is not type(theirs) or len(ours) != len(theirs):
            return False
        pairs = [(ours, theirs)] if isinstance(ours, list) else [
            (list(ours), list(theirs)), (list(ours.values()), list(theirs.values()))]
        return all(_alike(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))
    return ours == theirs if isinstance(theirs, str) else not isinstance(theirs, (dict, list))
