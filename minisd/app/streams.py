"""Standard output and error: missing, closed, of any encoding, or a pipe that nobody reads."""

import os
from contextlib import suppress
from typing import TextIO


def say(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Write a line at once. Where nobody can read it, it is dropped, and the work goes on.

    A stream that is there and cannot take it, as on a full disk, is an OSError that names it.
    """
    if stream is None:  # print() would take the other stream
        return
    try:
        try:
            stream.write(text + end)
        except UnicodeEncodeError:  # a file name must not end the run
            coding = getattr(stream, "encoding", None) or "ascii"
            stream.write((text + end).encode(coding, "backslashreplace").decode(coding))
        getattr(stream, "flush", int)()
    except BrokenPipeError:  # `minisd words | head`: the reader has seen enough
        _silence(stream)
    except ValueError:  # closed
        return
    except OSError as error:
        _silence(stream)
        error.filename = getattr(stream, "name", "standard output")
        raise


def open_missing() -> None:
    """Give descriptors 0 to 2 that were closed at the start a place that takes all and has none.

    Otherwise the next file that is opened gets such a number, and what C code says about an error
    is written into it.
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
