"""Files and folders that are written whole or not at all, and that replace nothing unasked."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# A scheme has two letters at least: C:/ is a drive. pathlib writes the two slashes as one.
ADDRESS = re.compile(r"(?i)data:|[a-z][a-z0-9+.-]+:/")


def is_address(path: object) -> bool:
    """Whether this is an address (https://...), which is no path: nothing here opens one."""
    return ADDRESS.match(str(path)) is not None


def check_writable(path: str | os.PathLike, overwrite: bool = False, size: int = 1) -> None:
    """Raise now the OSError that writing ``size`` bytes to ``path`` would raise after the work."""
    path = Path(path)
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent} is not a folder: create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} is not writable: choose another folder")
    disk = shutil.disk_usage(path.parent)
    if disk.free < size and disk.total > 0:  # some network drives say 0 of 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: choose another name")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or overwrite it (--overwrite)")


@contextmanager
def written_whole(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write a file or a folder to; it is then renamed.

    If the block raises, nothing is left. An OSError names ``path``.
    """
    path = Path(path)
    remove_leftovers(path.parent)
    temporary = path.with_name(f".minisd-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _publish(temporary, path, overwrite)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        _remove(temporary)


@contextmanager
def new_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, as `written_whole` has it; it is on the disk before it gets its name."""
    with written_whole(path, overwrite) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a finished file its name; without ``overwrite``, only a name that is free."""
    if overwrite:
        os.replace(temporary, path)
        return
    if temporary.is_dir():
        path.mkdir()  # claims the name; a folder then replaces an empty one
        try:
            os.replace(temporary, path)
        except BaseException:
            path.rmdir()
            raise
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # exFAT and some network drives have no links: claim the name, then fill it
        open(path, "xb").close()
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they saved."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) may end the process it asks about
        return
    for leftover in folder.glob(".minisd-*-*.tmp"):
        with suppress(ValueError, OverflowError, OSError):  # not ours, or another user's
            try:
                os.kill(int(leftover.name.split("-")[1]), 0)
            except ProcessLookupError:
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
