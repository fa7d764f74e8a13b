"""All that the format allows is read; a file that is cut while it is read is an error."""

import json
import os
import random
import struct

import pytest
import torch
from files import as_single_file, framed, official_modules, random_modules, save
from reference_models import SMALL, small_model
from safetensors import SafetensorError, safe_open

import minisd
from minisd.checkpoints.checkpoint import fill, open_checkpoint
from minisd.checkpoints.safetensors_file import read_header, read_tensor
from minisd.errors import WeightError

CPU = torch.device("cpu")
ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
GOOD = framed(json.dumps({"a": ROW, "b": NEXT}).encode(), bytes(12))


def test_everything_that_the_format_allows_is_read(tmp_path):
    head = json.dumps({"__metadata__": {"format": "pt"}, "b": NEXT, "a": ROW, "c": {
        "dtype": "I64", "shape": [0, 5], "data_offsets": [12, 12]}}).encode() + b"   "
    path = tmp_path / "a"
    path.write_bytes(framed(head, struct.pack("<3f", 1, 2, 3)))
    tensors = read_header(path)
    assert {name: t.shape for name, t in tensors.items()} == {"b": (1,), "a": (2,), "c": (0, 5)}
    assert read_tensor(tensors["a"], torch.float32).tolist() == [1, 2]
    assert read_tensor(tensors["b"], torch.float64).tolist() == [3]


def test_mutated_headers_are_rejected_or_read_as_by_safetensors(tmp_path):
    assert mutate(tmp_path / "a", 1000) == {"rejected", "same"}


def mutate(path, times: int, seed: int = 0) -> set[str]:
    """Damage a good header at random places, many times; return the outcomes."""
    draw, outcomes = random.Random(seed), set()
    for _ in range(times):
        data = bytearray(GOOD)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data) - 12)
            piece = draw.choice([b'"', b"{", b"}", b"[", b"]", b",", b"0", b"9", b"-", b"a", b" ",
                                 b"\\", b"\0", b"\xff", bytes([draw.randrange(256)])])
            data[place : place + draw.randint(0, 2)] = piece
        path.write_bytes(data)
        outcomes.add(outcome(path))
    return outcomes


def outcome(path) -> str:
    try:
        ours = {name: (t.dtype, list(t.shape)) for name, t in read_header(path).items()}
        values = {n: read_tensor(t, torch.float32) for n, t in read_header(path).items()}
    except WeightError:
        return "rejected"
    try:
        with safe_open(path, "pt") as file:
            theirs = {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape())
                      for n in file.keys()}
            same = all(torch.equal(file.get_tensor(n).float(), values[n]) for n in theirs)
    except SafetensorError as error:
        return f"only ours reads it: {error}"
    return "same" if ours == theirs and same else "different"


# --- a whole file of a small model


@pytest.fixture
def tensors():
    return as_single_file(SMALL, random_modules(SMALL))


@pytest.fixture
def modules():
    with torch.device("meta"):
        return official_modules(SMALL)


def test_a_value_too_large_for_half_precision_is_read_in_float32(tensors, modules, tmp_path):
    """In float16 it is rejected: refusals/bad_tensors.py."""
    tensors["first_stage_model.quant_conv.bias"][-1] = 1e5
    found = open_checkpoint(save(tmp_path / "a.safetensors", tensors), config=SMALL)
    fill(found, "vae", modules["vae"], torch.float32, CPU)
    assert modules["vae"].quant_conv.bias[-1] == 1e5


def test_file_cut_short_after_it_was_checked(tensors, modules, tmp_path):
    path = save(tmp_path / "a.safetensors", tensors)
    found = open_checkpoint(path, config=SMALL)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightError, match="ended within"):
        for part, module in modules.items():
            fill(found, part, module, torch.float32, CPU)


def test_a_loaded_model_no_longer_needs_its_file(tmp_path):
    """If the file were mapped, cutting it would kill the process."""
    small_model(SMALL).save(tmp_path / "model")
    sd = minisd.load(tmp_path / "model", device="cpu")
    for path in (tmp_path / "model").glob("*/*.safetensors"):
        os.truncate(path, 0)
    assert sd("a", num_inference_steps=1, seed=0, height=8, width=8).images[0].size == (8, 8)
