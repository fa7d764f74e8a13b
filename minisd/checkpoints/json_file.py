"""The fields of a JSON file: each checked against what minisd computes, and named where it differs.

A value may be spelled in more than one way: 1000.0 is 1000, and a list that repeats one value for
every level is that value.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from minisd.errors import WeightError

MAX_BYTES = 2**20  # a network's config has 2 kB, the list of SD1's shards 0.1 MB
MAX_LEVELS = 8
MAX_WIDTH = 2**14


class JsonFields:
    """The fields of a JSON object; every error names the file and the field."""

    def __init__(self, path: Path, fields: dict):
        self.path, self.fields = path, fields

    def fault(self, name: str, want: str) -> WeightError:
        shown = repr(self.fields.get(name))[:80]
        return WeightError(f"{self.path}: {name} is {shown}; minisd computes only {want}")

    def whole(self, name: str, default: int, low: int, high: int, levels: int = 0) -> int:
        """A whole number; with ``levels``, or a list that repeats it so often."""
        value = self.fields.get(name, default)
        if _is_list(value, levels) and all(each == value[0] for each in value):
            value = value[0]
        same = ", the same for every level" if levels else ""
        return int(self.within(name, plain(value), low, high, (int,), same))

    def real(self, name: str, default: float, low: float, high: float) -> float:
        value = self.fields.get(name, default)
        return float(self.within(name, value, low, high, (int, float)))

    def choice(self, name: str, default, choices: Iterable):
        value = self.fields.get(name, default)
        if value not in list(choices):  # a list: what JSON holds need not be hashable
            raise self.fault(name, " or ".join(map(repr, choices)))
        return value

    def widths(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One width per level."""
        values = tuple(map(plain, self._levels(name, default)))
        if not all(map(is_width, values)):
            raise self.fault(name, f"1 to {MAX_WIDTH}")
        return values

    def names(self, name: str, default: tuple[str, ...], choices: Mapping) -> tuple:
        """One name per level, as what ``choices`` maps it to."""
        values = self._levels(name, default)
        if not all(value in list(choices) for value in values):
            raise self.fault(name, f"{list(choices)}")
        return tuple(choices[value] for value in values)

    def fixed(self, table: Mapping[str, tuple], levels: int = 0) -> None:
        """Reject any field that has none of its row's values, which all mean what the first does.

        An absent field has the first. With ``levels``, a field may be a list of so many values.
        """
        for name, same in table.items():
            value = self.fields.get(name, same[0])
            values = value if _is_list(value, levels) else [value]
            if not all(each in list(same) for each in values):
                several = levels > 0 and isinstance(value, list)
                which = f" for each of {levels} levels" if several else ""
                raise self.fault(name, f"{same[0]!r}{which}")

    def within(self, name: str, value, low: float, high: float, types: tuple[type, ...],
               which: str = ""):
        """The value, if it is a number in that range and no truth value."""
        if type(value) not in types or not low <= value <= high:  # type(): True is an int to Python
            raise self.fault(name, f"{low} to {high}{which}")
        return value

    def _levels(self, name: str, default: tuple) -> list | tuple:
        values = self.fields.get(name, default)
        if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= MAX_LEVELS:
            raise self.fault(name, f"lists of 1 to {MAX_LEVELS} levels")
        return values


class JsonFile(JsonFields):
    """The fields of one JSON file."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES):
        if not path.is_file():
            raise WeightError(f"{path} is missing")
        if path.stat().st_size > max_bytes:
            raise WeightError(f"{path} is too large (over {max_bytes} bytes)")
        super().__init__(path, parse_json(path.read_bytes(), path))


def parse_json(data: bytes, path: Path) -> dict:
    """A JSON object, each of whose keys is there once; WeightError for anything else."""
    with json_of(path) as decoder:
        result = decoder.decode(data.decode("utf-8"))
    if not isinstance(result, dict):
        raise WeightError(f"{path}: the JSON in it is not an object")
    return result


@contextmanager
def json_of(path: Path) -> Iterator[json.JSONDecoder]:
    """A decoder that takes each key once; what goes wrong with it is a WeightError."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise WeightError(f"{path} has {twice[:80]!r} twice")
        return result

    def whole(digits: str) -> int | float:
        return -0.0 if digits == "-0" else int(digits)  # to safetensors -0 is no integer

    try:
        yield json.JSONDecoder(object_pairs_hook=once, parse_int=whole)
    except WeightError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{path} is not readable JSON where it should be: {error}") from None


def plain(value):
    """A float that is a whole number as that number, anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def is_width(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_WIDTH


def _is_list(value: object, levels: int) -> bool:
    return isinstance(value, list) and len(value) == levels > 0
