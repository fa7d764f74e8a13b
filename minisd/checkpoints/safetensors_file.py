"""One .safetensors file: its header, believed only when every number adds up, and its tensors.

A file is 8 bytes that give the header's length (little-endian), the header in JSON (name -> dtype,
shape, first and last byte), and the tensors' bytes one after the other. Source: the format's
description at https://github.com/huggingface/safetensors. This reader also rejects headers that two
readers could understand in two ways, and that library accepts some of them.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minisd.checkpoints.json_file import json_of
from minisd.errors import WeightError

MAX_HEADER = 100_000_000  # what the format allows; most of it can only be metadata: an image, say
MAX_ENTRIES = 3 * 2**20  # bytes of what is not; SD1 with all of its training state needs 0.3 MB
MAX_TENSORS = 10_000  # the same has 1,900
MAX_RANK = 8
MAX_DIMENSION = 2**32

ITEM_SIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

# What weights may be stored as. Integers and 8-bit floats need scales, which this format lacks.
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
          "F64": torch.float64}
CHUNK = 2**20  # bytes read at a time, few enough to stay in the cache

TO_CONVERT = (
    "minisd never opens pickles, which can run code; load it where you trust it and save it with "
    "safetensors: import torch, safetensors.torch; sd = torch.load(path, weights_only=True); "
    "safetensors.torch.save_file(sd.get('state_dict', sd), 'model.safetensors')"
)
# What else files of this name turn out to be, by their first bytes.
IMPOSTORS = (
    (rb"PK\x03\x04", "a PyTorch pickle in a zip: " + TO_CONVERT),
    (rb"\x80[\x02-\x05]", "a PyTorch pickle: " + TO_CONVERT),
    (rb"version https://git-lfs", "a Git LFS pointer, not the weights: run `git lfs pull`"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page, not the weights: download the file itself"),
    (rb"\x89PNG|\xff\xd8\xff", "an image, not the weights"),
    (rb"GGUF", "a GGUF file, whose quantised weights minisd does not read"),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes ``start`` to ``stop`` of ``path``, there called ``name``."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    transposed: bool = False  # whether ``shape`` is reversed, and the values are to be too

    def unstack(self, n: int) -> list["StoredTensor"]:
        """The n equal parts along the first axis; a tensor that has none is returned n times."""
        if n == 1 or not self.shape or self.shape[0] % n:
            return [self] * n
        size, shape = (self.stop - self.start) // n, (self.shape[0] // n, *self.shape[1:])
        starts = (self.start + i * size for i in range(n))
        return [replace(self, shape=shape, start=s, stop=s + size) for s in starts]

    def transpose(self) -> "StoredTensor":
        """The same matrix, to be read as its transpose."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, name -> place; their bytes are not read.

    WeightError for anything but a well-formed .safetensors file, of exactly the size it declares.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The same, and what the file says about itself."""
    size = path.stat().st_size
    if size < 8:
        raise WeightError(f"{path} has {size} bytes, too few to be weights: interrupted download?")
    with open(path, "rb") as file:
        head = file.read(512)
        length = int.from_bytes(head[:8], "little")
        if not (length <= min(size - 8, MAX_HEADER) and head[8:9] == b"{"):
            raise WeightError(f"{path}: {_what_else(head, length, size)}")
        file.seek(8)
        header, metadata = _parse_header(file.read(length), path)
    if len(header) > MAX_TENSORS:
        raise WeightError(f"{path} declares {len(header)} tensors; no Stable Diffusion has over "
                          f"{MAX_TENSORS}")
    tensors = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    _check_tiling(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def read_tensor(
    stored: StoredTensor, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor's values in ``dtype`` on ``device``, using at most a chunk of memory beside them.

    WeightError where a value is NaN or infinite, or where the file has ended meanwhile.
    """
    if stored.dtype not in DTYPES:
        raise WeightError(f"{stored.path}: {stored.name} is {stored.dtype}, not {list(DTYPES)}")
    source, device = DTYPES[stored.dtype], torch.device(device)
    shape = stored.shape[::-1] if stored.transposed else stored.shape
    tensor = torch.empty(shape, dtype=dtype, device=device)
    step = CHUNK // source.itemsize
    direct = dtype == source and device.type == "cpu"
    scratch = torch.empty(0 if direct else min(step, tensor.numel()), dtype=source, device="cpu")
    # Read, not mapped: a mapped file that somebody cuts short kills the process.
    with open(stored.path, "rb") as file:
        file.seek(stored.start)
        for target in tensor.view(-1).split(step):
            values = target if direct else scratch[: len(target)]
            raw = memoryview(values.view(torch.uint8).numpy().data)
            if file.readinto(raw) != len(raw):
                raise WeightError(f"{stored.path} ended within {stored.name} while it was read")
            if not direct:
                target.copy_(values)
    # Of the result: a float32 weight can be too large for float16.
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise WeightError(f"{stored.path}: {stored.name} has NaN or infinity, read as {dtype}")
    return tensor.mT.contiguous() if stored.transposed else tensor


def _parse_header(data: bytes, path: Path) -> tuple[dict, dict[str, str]]:
    """The entries of the tensors, and the metadata.

    The metadata are parsed first and cut out: they may be long, and the rest is parsed only if it
    is not. An entry has no field of this name, so a match inside one is rejected with it.
    """
    with json_of(path) as decoder:
        text, metadata = data.decode("utf-8"), None
        if found := re.search(r'"__metadata__"[ \t\n\r]*:[ \t\n\r]*', text):
            metadata, end = decoder.raw_decode(text, found.end())
            text = f"{text[:found.end()]}null{text[end:]}"
        if len(text) > MAX_ENTRIES:
            raise WeightError(f"{path}: the entries of its tensors take {len(text)} bytes; no "
                              f"Stable Diffusion's take over {MAX_ENTRIES}")
        header = decoder.decode(text)
    left = header.pop("__metadata__", None)  # what was cut out is null, as no metadata may be
    metadata = next((each for each in (left, metadata) if each is not None), {})
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise WeightError(f"{path}: its __metadata__ is not a table of strings")
    return header, metadata


def _what_else(head: bytes, length: int, size: int) -> str:
    # The length of a header can look like the begin of a pickle, but not with a "{" behind it.
    if head[8:9] != b"{" or length > MAX_HEADER:
        for start, what in IMPOSTORS:
            if re.match(start, head):
                return f"this is {what}"
    if length > MAX_HEADER:
        return (f"not a safetensors file (a header of {length} bytes; the format has at most "
                f"{MAX_HEADER})")
    if length > size - 8:
        need = f"the header alone ends at byte {8 + length}"
        return f"{need}, but the file has only {size}: interrupted download?"
    return "not a safetensors file (its header does not begin with '{')"


def _stored(path: Path, name: str, entry: object, data: int) -> StoredTensor:
    """One entry of the header; ``data`` is the byte where the tensors begin."""
    if not re.fullmatch(r"\w[^/\\]{0,511}", name) or not name.isprintable() or ".." in name:
        raise WeightError(f"{path}: {name[:80]!r} cannot be the name of a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightError(f"{path}: {name} needs a dtype, a shape and two offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise WeightError(f"{path}: {name} has the unknown dtype {repr(dtype)[:80]}")
    if not _whole_numbers(shape, MAX_DIMENSION):
        raise WeightError(f"{path}: {name} has an impossible shape")
    if len(shape) > MAX_RANK:
        raise WeightError(f"{path}: {name} has {len(shape)} dimensions; no weight has over "
                          f"{MAX_RANK}")
    if not _whole_numbers(offsets, 2**63) or len(offsets) != 2:
        raise WeightError(f"{path}: {name} has impossible offsets")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_SIZE[dtype]:
        raise WeightError(
            f"{path}: {name} is {shape} of {dtype}, which is not {stop - start} bytes"
        )
    return StoredTensor(path, name, dtype, tuple(shape), data + start, data + stop)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _whole_numbers(values: object, limit: int) -> bool:
    # type() and not isinstance(): True is an int to Python.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < limit for v in values)


def _check_tiling(path: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    """The tensors must fill the file after its header: no gap, no overlap, no byte left over."""
    end = data
    for tensor in sorted(tensors, key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise WeightError(f"{path}: {tensor.name} begins at byte {tensor.start}, not at {end}")
        end = tensor.stop
    if end != size:
        raise WeightError(f"{path} should have {end} bytes and has {size}: interrupted download?")
