"""A bad file raises one WeightError with its name and the reason, before any weight is read."""

import json
import pickle
import random
import struct
import zipfile

import pytest
import torch
from files import write
from safetensors import SafetensorError, safe_open

from minisd.checkpoints.checkpoint import open_checkpoint
from minisd.checkpoints.safetensors_file import MAX_HEADER, read_header, read_tensor
from minisd.errors import WeightError

ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


def framed(head: bytes, data: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(head)) + head + data


def rows(**tensors) -> bytes:
    return framed(json.dumps(tensors).encode(), bytes(12))


GOOD = rows(a=ROW, b=NEXT)
PICKLED = pickle.dumps({"state_dict": 1})
HTML = b"\n<!DOCTYPE html><html><body>Sign in to download</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"

# First bytes and headers: file content, words of the error.
BAD = {
    "empty": (b"", "0 bytes.*interrupted download"),
    "7 bytes": (bytes(7), "7 bytes.*interrupted download"),
    "header cut": (GOOD[:40], r"ends at byte \d+.*has only 40: interrupted"),
    "data cut": (GOOD[:-1], r"should have \d+ bytes and has \d+: interrupted"),
    "trailing byte": (GOOD + b"x", r"should have \d+ bytes and has \d+: interrupted"),
    "LFS pointer": (LFS, "Git LFS pointer.*git lfs pull"),
    "web page": (HTML, "a web page"),
    "pickle": (PICKLED, "a PyTorch pickle: .*save_file"),
    "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99), "a PyTorch pickle: "),
    "zip": (b"PK\x03\x04" + bytes(99), "pickle in a zip: .*save_file"),
    "GGUF": (b"GGUF" + bytes(99), "GGUF"),
    "length 2^63": (struct.pack("<Q", 2**63) + GOOD[8:], "header of 9223372036854775808 bytes"),
    "length 2^64 - 1": (b"\xff" * 8 + GOOD[8:], "header of 18446744073709551615 bytes"),
    "length over the limit": (struct.pack("<Q", MAX_HEADER + 1) + b"{", "at most"),
    "length 0": (framed(b""), "not a safetensors file"),
    "not UTF-8": (framed(b'{"\xff": 1}'), "not readable JSON"),
    "not JSON": (framed(b"{'a': 1}"), "not readable JSON"),
    "JSON cut": (framed(b'{"a": '), "not readable JSON"),
    "two JSONs": (framed(b"{}{}", b""), "not readable JSON"),
    "deep nesting": (framed(b'{"a":' * 100_000), "not readable JSON"),
    "long number": (framed(b'{"a": ' + b"9" * 9999 + b"}"), "not readable JSON"),
    "an array": (framed(b"[1]"), "not begin with '{'"),
    "leading space": (framed(b' {"a": 1}'), "not begin with '{'"),
    "name twice": (framed(b'{"a": 1, "b": 2, "a": 1}'), "has 'a' twice"),
    "field twice": (framed(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "has 'dtype' twice"),
    "NUL in a name": (rows(**{"a\0b": ROW}), r"'a\\x00b' cannot be the name"),
    "surrogate in a name": (rows(**{"\ud800": ROW}), "cannot be the name"),
    "surrogate in metadata": (rows(__metadata__={"a": "\ud800"}, a=ROW, b=NEXT), "__metadata__"),
    "-0": (framed(json.dumps({"a": ROW}).replace("[0,", "[-0,").encode()), "impossible offsets"),
    "../ in a name": (rows(**{"../a": ROW}), "'../a' cannot be the name"),
    "name without an end": (rows(**{"a" * 10**5: ROW}), "'a{80}' cannot be the name"),
    "no name": (rows(**{"": ROW}), "'' cannot be the name"),
    "/ in a name": (rows(**{"a/b": ROW}), "'a/b' cannot be the name"),
    "row of another type": (rows(a=[1]), "a needs a dtype, a shape and two offsets"),
    "field missing": (rows(a={"dtype": "F32", "shape": [2]}), "a needs a dtype"),
    "field too many": (rows(a=ROW | {"x": 1}), "a needs a dtype"),
    "unknown dtype": (rows(a=ROW | {"dtype": "F33"}), "unknown dtype 'F33'"),
    "dtype of another type": (rows(a=ROW | {"dtype": ["F32"]}), "unknown dtype"),
    "shape [0, 2^63-1]": (rows(a=ROW | {"shape": [0, 2**63 - 1]}), "impossible shape"),
    "negative size": (rows(a=ROW | {"shape": [-2]}), "impossible shape"),
    "fraction": (rows(a=ROW | {"shape": [2.0]}), "impossible shape"),
    "truth value": (rows(a=ROW | {"shape": [True, 2]}), "impossible shape"),
    "rank 100": (rows(a=ROW | {"shape": [2] + [1] * 99}), "100 dimensions; no weight has over 8"),
    "one offset": (rows(a=ROW | {"data_offsets": [0]}), "impossible offsets"),
    "negative offset": (rows(a=ROW | {"data_offsets": [-8, 0]}), "impossible offsets"),
    "offset 2^64": (rows(a=ROW | {"data_offsets": [2**64, 2**64 + 8]}), "impossible offsets"),
    "size and shape": (rows(a=ROW | {"shape": [3]}), "which is not 8 bytes"),
    "backwards": (rows(a=ROW | {"data_offsets": [8, 0]}), "which is not -8 bytes"),
    "overlap": (rows(a=ROW, b=NEXT | {"data_offsets": [4, 8]}), "b begins at byte"),
    "gap": (rows(a=ROW, b=NEXT | {"data_offsets": [9, 13]}), "b begins at byte"),
    "beyond the end": (rows(a=ROW, b=ROW | {"data_offsets": [8, 16]}), "should have"),
    "100,000 tensors": (
        framed(json.dumps({f"{i:x}": 0 for i in range(100_000)}).encode()), "100000 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damaged_and_foreign_files(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_zipped_pickle_of_torch_is_never_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(WeightError, match="pickle in a zip"):
        open_checkpoint(path)


def test_absurd_header_length_of_a_huge_file_is_not_read(tmp_path):
    path = write(tmp_path / "big.safetensors", b"{", 2**40)  # sparse; reading it would not end
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 2**39))
    with pytest.raises(WeightError, match="header of 549755813888 bytes"):
        read_header(path)


def test_everything_that_the_format_allows_is_read(tmp_path):
    head = json.dumps({"__metadata__": {"format": "pt"}, "b": NEXT, "a": ROW, "c": {
        "dtype": "I64", "shape": [0, 5], "data_offsets": [12, 12]}}).encode() + b"   "  # fmt: skip
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
                                 b"\\", b"\0", b"\xff", bytes([draw.randrange(256)])])  # fmt: skip
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
                      for n in file.keys()}  # fmt: skip
            same = all(torch.equal(file.get_tensor(n).float(), values[n]) for n in theirs)
    except SafetensorError as error:
        return f"only ours reads it: {error}"
    return "same" if ours == theirs and same else "different"
