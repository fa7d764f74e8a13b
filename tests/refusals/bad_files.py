"""Files that are no safetensors file, or damaged ones: their bytes, and words of the error."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from files import framed, write
from row import Make, wrong_model

from minisd.checkpoints.safetensors_file import MAX_HEADER
from minisd.errors import WeightError

ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


def rows(**tensors) -> bytes:
    return framed(json.dumps(tensors).encode(), bytes(12))


def zipped() -> bytes:
    """A pickle as torch.save writes it."""
    torch.save({"a": torch.zeros(2)}, buffer := io.BytesIO())
    assert zipfile.is_zipfile(buffer)
    return buffer.getvalue()


GOOD = rows(a=ROW, b=NEXT)
PICKLED = pickle.dumps({"state_dict": 1})
HTML = b"\n<!DOCTYPE html><html><body>Sign in to download</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"

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
    "zip of torch.save": (zipped(), "pickle in a zip: .*save_file"),
    "zip": (b"PK\x03\x04" + bytes(99), "pickle in a zip: .*save_file"),
    "GGUF": (b"GGUF" + bytes(99), "GGUF"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "an image, not the weights"),
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
}


def file(content: bytes | dict) -> Make:
    """A file with that content, or with zeros under that header."""
    def make(here: Path, good: Path) -> Path:
        path = here / "a.safetensors"
        return write(path, content) if isinstance(content, dict) else written(path, content)

    return make


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def huge(here: Path, good: Path) -> Path:
    """A sparse file, whose header would be half a terabyte long: reading it would not end."""
    path = write(here / "big.safetensors", b"{", 2**40)
    with open(path, "r+b") as opened:
        opened.write(struct.pack("<Q", 2**39))
    return path


ROWS = [wrong_model(case, file(content), words, WeightError)
        for case, (content, words) in BAD.items()]
ROWS += [wrong_model("huge header of a huge file", huge, "header of 549755813888 bytes",
                     WeightError)]
