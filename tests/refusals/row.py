"""One refusal: what is wrong, the error in Python, and the command line that says the same."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Make = Callable[[Path, Path], str | Path]


def whole(here: Path, good: Path) -> Path:
    """The model as it is, for a row where something else is wrong."""
    return good


@dataclass(frozen=True, kw_only=True)
class Row:
    """Loading or calling raises ``kind`` in Python, and a command line ends with ``code``."""

    what: str                           # the id of the test
    kind: type[Exception] | None = None  # exactly; None: this is wrong only on the command line
    words: str = ""                     # a pattern in the message
    make: Make = whole                  # makes the model: of a folder to write in, and a good one
    load: dict = field(default_factory=dict)  # arguments of minisd.load
    call: dict | None = None            # arguments of a call; None: loading is an error
    line: list[str] | None = None       # of the command; None: it has no such option
    code: int = 2                       # 2 usage, images; 3 weights, missing paths; 5 folder
    said: str = ""                      # a pattern in what the command prints, if it is not words
    late: bool = False                  # found in a weight's value, or in what a callback returns


def wrong_model(what: str, make: Make, words: str, kind: type[Exception], **more) -> Row:
    """A path, file or folder that is no model; both ways say so in the same words."""
    return Row(what=what, make=make, words=words, kind=kind, **{"line": ["x"], "code": 3} | more)


def everything(folder: Path) -> list[tuple[Path, int, int]]:
    """Each file below a folder, with its size and modification time."""
    paths = [Path(place, name) for place, folders, files in os.walk(folder)
             for name in (*folders, *files)]
    return [(path, path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(paths)]
