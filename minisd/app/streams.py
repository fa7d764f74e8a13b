"""Standard output and error: missing, closed, full, of any encoding, or a pipe nobody reads."""

import io
import os
from contextlib import suppress
from typing import TextIO


def say(text: str, stream: TextIO | None) -> None:
    """Write a text at once. Where nobody can read it, it is dropped, and the work goes on.

    A stream that is there and cannot take it, as on a full disk, is an OSError that names it.
    """
    if stream is None:  # print() would take the other stream
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # a file name must not end the run
            coding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(coding, "backslashreplace").decode(coding))
        getattr(stream, "flush", int)()
    except BrokenPipeError:  # `minisd words | head`: the reader has seen enough
        _silence(stream)
    except ValueError:  # closed
        return
    except OSError as error:
        _silence(stream)
        error.filename = getattr(stream, "name", "the output")
        raise


class Tolerant(io.TextIOBase):
    """A stream, or none, that never fails: for messages, warnings and the bars of libraries."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            say(text, self._stream)
        return len(text)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """A bar is of blocks where this is a Unicode one."""
        return getattr(self._stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        closed = self._stream is None or getattr(self._stream, "closed", False)
        return not closed and getattr(self._stream, "isatty", bool)()

    def fileno(self) -> int:
        """Of the terminal, whose width a bar asks for."""
        if not self.isatty() or self._stream is None:
            raise io.UnsupportedOperation("no terminal")
        return self._stream.fileno()


def open_missing() -> None:
    """Open the null device for each of the descriptors 0 to 2 that was closed at the start.

    Otherwise the next file that is opened gets that number, and error messages of C code are
    written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _silence(stream: TextIO) -> None:
    """Send what is left in the stream's buffer, and all that follows, nowhere."""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
        target = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, target)
        finally:
            os.close(nowhere)
