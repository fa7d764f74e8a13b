"""Seconds of a call on a device, the memory that it takes, and a time limit."""

import ctypes
import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

LEAST = {"cuda": 0.05, "cpu": 0.02}  # seconds of a sample: reading the clock takes far less
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Wall time; waits for the device before and after, as a user does."""

    def __init__(self, device: torch.device):
        self.least = LEAST[device.type]
        gpu = device.type == "cuda"
        self.wait = partial(torch.cuda.synchronize, device) if gpu else lambda: None

    def of(self, call: Callable, times: int = 1) -> tuple[float, object]:
        """Seconds of ``times`` calls, and what the last returned."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            result = call()
        self.wait()
        return time.perf_counter() - start, result

    def sampler(self, call: Callable) -> tuple[Callable[[], float], float]:
        """For a call that is warm: a function that calls often enough and returns the seconds of
        one call; and how long such a sample takes."""
        seconds, _ = self.of(call)
        times = max(1, math.ceil(self.least / seconds))
        return lambda: self.of(call, times)[0] / times, times * seconds


class Memory:
    """How much the memory of a device's allocator, or of a process on a CPU, grows from here on."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.base = self.held()
        self.restart()

    def held(self) -> dict[str, int]:
        """Bytes held now, without caches."""
        gc.collect()
        if not self.gpu:
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # glibc hands freed memory back only when asked
            return _known(resident("VmRSS"))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"memory": torch.cuda.memory_reserved(),
                "memory allocated": torch.cuda.memory_allocated()}

    def growth(self) -> dict[str, int]:
        """Bytes held now beyond those at the beginning."""
        return {what: size - self.base[what] for what, size in self.held().items()}

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.gpu:
            self.held()
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            CLEAR.write_text("5")  # proc(5): resets the peak to what is resident now

    def peaks(self) -> dict[str, int]:
        """The most bytes held since `restart`, beyond those at the beginning. The private memory of
        a CUDA graph is reserved but not allocated, so both are given."""
        if not self.gpu:
            now = _known(resident("VmHWM"))
        else:
            now = {"memory": torch.cuda.max_memory_reserved(),
                   "memory allocated": torch.cuda.max_memory_allocated()}
        return {what: size - self.base[what] for what, size in now.items()}


def resident(field: str) -> int | None:
    """Bytes of this process in memory now ("VmRSS") or at most so far ("VmHWM"); None where the
    system does not report them or cannot reset the peak."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() and CLEAR.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _known(size: int | None) -> dict[str, int]:
    return {} if size is None else {"memory": size}


class OutOfTime(BaseException):
    """No subclass of Exception: torch.compile catches those and goes on."""


@contextmanager
def limited(seconds: float, why: str) -> Iterator[None]:
    """Raises OutOfTime(why) inside after so many seconds. In the main thread only."""
    def ring(*_):
        raise OutOfTime(why)

    if seconds <= 0:
        ring()
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
