"""What bounds a header: the entries of its tensors, not its metadata; and in true sentences."""

import json
import struct
import tracemalloc

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minisd.checkpoints.safetensors_file import (
    MAX_ENTRIES,
    MAX_HEADER,
    MAX_TENSORS,
    read_header_and_metadata,
)
from minisd.errors import WeightError

ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE = json.dumps({"a": ROW})[1:-1]


def framed(head: str | bytes, data: bytes = bytes(8)) -> bytes:
    head = head.encode() if isinstance(head, str) else head
    return struct.pack("<Q", len(head)) + head + data


def theirs(path) -> tuple[set, dict]:
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata() or {}


def thumbnail(size: int) -> str:
    return json.dumps({"modelspec.thumbnail": "data:image/jpeg;base64," + "A" * size, "b": "c"})


def told(metadata: dict, **options) -> str:
    return '{"__metadata__":' + json.dumps(metadata, **options) + ",<row>}"


def filled(head: str) -> str:
    """A header with the entry of a tensor, and an image of 4 MB, in their places."""
    return head.replace("<row>", ONE).replace("<image>", thumbnail(4 * 10**6))


# Headers that safetensors reads, and so do we: with the same tensors and metadata.
READ = {
    "no metadata": "{<row>}",
    "null": '{"__metadata__":null,<row>}',
    "null, at the end": '{<row>,"__metadata__":null}',
    "empty": '{"__metadata__":{},<row>}',
    "an image": '{"__metadata__":<image>,<row>}',
    "the same at the end": '{<row>,"__metadata__":<image>}',
    "the same, spaced": '{ <row> ,\n\t"__metadata__" \r\n:\t <image> \n}  ',
    "100,000 keys": told({f"key {i}": "value" for i in range(100_000)}),
    "escapes": told({"q\"\\\n\u00e9": "\U0001f600" * 9**5}),
    "not ASCII": told({"title": "\u732b" * 10**6}, ensure_ascii=False),
    "its own name inside": '{"__metadata__":{"__metadata__":"{\\"__metadata__\\":1}"},<row>}',
    "its name as text": '{"__metadata__":{"a":"\\"__metadata__\\": {"},<row>}',
    "the name in escapes": '{"\\u005f_metadata__":{"a":"b"},<row>}',
}


@pytest.mark.parametrize("head", READ.values(), ids=READ)
def test_what_the_format_allows_is_read(head, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(filled(head)))
    tensors, metadata = read_header_and_metadata(path)
    assert (set(tensors), metadata) == theirs(path)


# Headers that are rejected: content, words of the error.
REJECTED = {
    "twice": ('{"__metadata__":{},"__metadata__":{},<row>}', "has '__metadata__' twice"),
    "null and not": ('{"__metadata__":null,<row>,"__metadata__":{"a":"b"}}', "twice"),
    "twice, in escapes": ('{"__metadata__":{},"\\u005f_metadata__":{},<row>}', "twice"),
    "a key twice": ('{"__metadata__":{"a":"b","a":"c"},<row>}', "has 'a' twice"),
    "a number in it": ('{"__metadata__":{"a":1},<row>}', "not a table of strings"),
    "a table in it": ('{"__metadata__":{"a":{}},<row>}', "not a table of strings"),
    "null in it": ('{"__metadata__":{"a":null},<row>}', "not a table of strings"),
    "a list": ('{"__metadata__":[],<row>}', "not a table of strings"),
    "false": ('{"__metadata__":false,<row>}', "not a table of strings"),
    "0": ('{"__metadata__":0,<row>}', "not a table of strings"),
    "text": ('{"__metadata__":"","a":{}}', "not a table of strings"),
    "a number, in escapes": ('{"\\u005f_metadata__":7,<row>}', "not a table of strings"),
    "in an entry": ('{"a":{"__metadata__":{}}}', "a needs a dtype"),
    "in an entry with all else": (
        json.dumps({"a": {"__metadata__": {}} | ROW}), "a needs a dtype"),
    "at the end of a name": ('{"x\\"__metadata__":{},<row>}', "needs a dtype"),
    "cut": ('{"__metadata__":{"a":"b"', "not readable JSON"),
    "cut before its value": ('{"__metadata__":', "not readable JSON"),
    "deep": ('{"__metadata__":' + "[" * 10**5, "not readable JSON"),
    "no comma": ('{"__metadata__":{}<row>}', "not readable JSON"),
    "half a surrogate": ('{"__metadata__":{"a":"\\ud800"},<row>}', "not a table of strings"),
    "4 MB of entries": ("{" + ",".join(f'"{i:0400d}":{{}}' for i in range(10_000)) + "}",
                        rf"entries of its tensors take \d{{7}} bytes.*{MAX_ENTRIES}"),
    "4 MB in one name": ('{"' + "a" * 4 * 10**6 + '":{}}', "entries of its tensors take 400000"),
    "4 MB of spaces": ("{<row>}" + " " * 4 * 10**6, "entries of its tensors take 40000"),
    "metadata by another name": ('{"__meta__":<image>,<row>}', "entries of its tensors"),
    "one tensor too many": (
        "{" + ",".join(f'"{i}":{{}}' for i in range(MAX_TENSORS + 1)) + "}",
        rf"declares {MAX_TENSORS + 1} tensors; no Stable Diffusion has over {MAX_TENSORS}"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_not_read_is_told_in_a_true_sentence(case, tmp_path):
    head, message = REJECTED[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(filled(head)))
    with pytest.raises(WeightError, match=message) as caught:
        read_header_and_metadata(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and len(text) < 600 and "\n" not in text


def test_as_long_as_the_format_allows_and_no_longer(tmp_path):
    path = tmp_path / "a.safetensors"
    head = filled('{"__metadata__":{"a":"<text>"},<row>}')
    room = MAX_HEADER - len(head.replace("<text>", ""))
    path.write_bytes(framed(head.replace("<text>", "x" * room)))
    tensors, metadata = read_header_and_metadata(path)
    assert set(tensors) == {"a"} and len(metadata["a"]) == room and theirs(path)[0] == {"a"}
    path.write_bytes(framed(head.replace("<text>", "x" * (room + 1))))
    with pytest.raises(WeightError, match=f"a header of {MAX_HEADER + 1} bytes.*{MAX_HEADER}"):
        read_header_and_metadata(path)
    with pytest.raises(SafetensorError):
        theirs(path)


def test_the_memory_of_a_header_is_a_few_times_its_size(tmp_path):
    """Millions of entries are counted in bytes before any becomes an object."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed("{" + ",".join(f'"{i}":{{}}' for i in range(500_000)) + "}"))
    tracemalloc.start()
    try:
        with pytest.raises(WeightError, match="entries of its tensors"):
            read_header_and_metadata(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x10280])
def test_a_cut_file_whose_length_begins_like_a_pickle(length, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(f"{{{ONE}}}".ljust(length))[:300])
    with pytest.raises(WeightError, match=f"ends at byte {8 + length}.*only 300: interrupted"):
        read_header_and_metadata(path)


def test_a_file_that_safetensors_wrote_with_an_image_in_it(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path, {"modelspec.thumbnail": "A" * 5 * 10**6})
    tensors, metadata = read_header_and_metadata(path)
    assert (set(tensors), metadata) == theirs(path)
