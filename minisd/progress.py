"""A progress bar on a terminal, which leaves nothing behind in the process."""

import sys
import threading
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm


class Bar(tqdm):
    """tqdm without what its first bar leaves in the process: a thread, which looks after bars that
    skip steps, and a lock between processes, which settles the start method of multiprocessing.
    """

    monitor_interval = 0


Bar.set_lock(threading.RLock())


def counted(calls: range, progress: bool | None) -> Iterable[int]:
    """The calls, with a bar on stderr if one is to be drawn."""
    return Bar(calls, miniters=1) if _shows(sys.stderr, progress) else calls


def _shows(stream: TextIO | None, progress: bool | None) -> bool:
    """Whether to draw a bar there: None, where it is a terminal; never where there is no stream."""
    if stream is None or getattr(stream, "closed", False):
        return False
    return getattr(stream, "isatty", bool)() if progress is None else progress
