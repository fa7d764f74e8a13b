"""Seconds of a call on a device, the memory that it takes, and what the device allows at best.

A sample is long enough for the clock, and providers take turns (`interleave`), so that a drift of
the clock rate affects all of them. Kernels are timed as the replay of a CUDA graph, by events: many
calls, one after another on different inputs, so that no call finds its inputs in the cache and no
launch waits for Python. Whole models are timed by the wall clock, which waits for the device before
and after, as a user does.
"""

import ctypes
import gc
import math
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from minisd_kernels.ops.launch import Cost

LEAST = {"cuda": 0.05, "cpu": 0.02}  # seconds of a sample: reading the clock takes far less
LEAST_OF_A_GRAPH = 0.004  # events are finer
EXPONENTIALS = 16  # per multiprocessor and clock (CUDA C++ Programming Guide, throughput, 5.x-9.0)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


# --- seconds --------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Percentiles."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        if len(samples) == 1:
            return cls(*3 * samples)
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable, device: torch.device, times: int = 1) -> tuple[float, object]:
    """Seconds of ``times`` calls by the wall clock, and what the last returned."""
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    wait(device)
    return time.perf_counter() - start, result


class Sampler(NamedTuple):
    """``sample()`` runs what is timed, often enough, and returns the seconds of one call;
    ``seconds`` is how long that takes."""

    sample: Callable[[], float]
    seconds: float


def sampler(call: Callable, device: torch.device) -> Sampler:
    """Of a call that is warm, by the wall clock."""
    once, _ = timed(call, device)
    times = max(1, math.ceil(LEAST[device.type] / once))
    return Sampler(lambda: timed(call, device, times)[0] / times, times * once)


def graph_sampler(calls: list[Callable], device: torch.device) -> Sampler:
    """Of calls that are compiled, one after another; on a GPU as a CUDA graph. Raises what they
    raise."""
    if device.type != "cuda":
        sample, seconds = sampler(lambda: [call() for call in calls], device)
        return Sampler(lambda: sample() / len(calls), seconds)
    replay = _graph(calls)
    repeat = max(1, math.ceil(LEAST_OF_A_GRAPH / _events(replay, 1)))
    return Sampler(lambda: _events(replay, repeat) / (repeat * len(calls)), LEAST_OF_A_GRAPH)


def _graph(calls: list[Callable]) -> Callable[[], None]:
    """All calls as one CUDA graph."""
    side = torch.cuda.Stream()  # as torch requires: the set-up of a first call is not captured
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # all kept, or every result would have the same address
    del kept
    graph.replay()  # the first replay uploads the graph
    return graph.replay


def _events(once: Callable, repeat: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(samples: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each, in turns; every second round in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in samples}
    for i in range(rounds):
        for name in list(samples)[:: -1 if i % 2 else 1]:
            times[name].append(samples[name]())
    return times


class OutOfTime(BaseException):
    """No subclass of Exception: torch.compile catches those and goes on."""


class Budget:
    """Seconds for all compiling inside ``with budget:``, together; then it raises OutOfTime. In the
    main thread only."""

    def __init__(self, seconds: float, why: str):
        self.left, self.why = seconds, why

    def _ring(self, *_) -> None:
        raise OutOfTime(self.why)

    def __enter__(self) -> None:
        if self.left <= 0:
            self._ring()
        self.start, self.before = time.monotonic(), signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self.left, 1)

    def __exit__(self, kind, *error) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
        self.left -= time.monotonic() - self.start
        if kind:  # workers that still compile would disturb what is timed
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()


# --- memory ---------------------------------------------------------------------------------------


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
    """Bytes of this process in memory now ("VmRSS"; "RssAnon" without mapped files) or at most so
    far ("VmHWM"); None where the system does not report them or cannot reset the peak."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() and CLEAR.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _known(size: int | None) -> dict[str, int]:
    return {} if size is None else {"memory": size}


# --- what the device allows -----------------------------------------------------------------------


class Limits(NamedTuple):
    """What the device can do in a second; ``exponentials`` is infinite if unknown."""

    flops: float
    bytes: float
    exponentials: float

    def floor(self, cost: Cost) -> tuple[float, str]:
        """The least seconds of any version of a call (roofline), and which limit sets them."""
        times = {name: getattr(cost, name) / getattr(self, name) for name in self._fields}
        slowest = max(times, key=times.get)
        return times[slowest], slowest


def limits(device: torch.device) -> Limits:
    """Measured: a large matrix product, a large copy. Computed: exponentials."""
    gpu = device.type == "cuda"
    side, elements = (8192, 2**31) if gpu else (1024, 2**25)
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(elements, device=device, dtype=dtype)
    y = torch.empty_like(x)
    # Not copy_: in a graph the copy engine does it, which is slower than a kernel.
    samplers = (graph_sampler([call], device)
                for call in (lambda: a @ b, lambda: torch.neg(x, out=y)))
    product, copy = (Spread.of([s.sample() for _ in range(10)]).p50 for s in samplers)
    exponentials = _exponentials(device) if gpu else math.inf
    return Limits(2 * side**3 / product, 2 * elements * dtype.itemsize / copy, exponentials)


def _exponentials(device: torch.device) -> float:
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    clock = properties["sm_clock_rate"] * 1e3  # given in kHz
    return EXPONENTIALS * properties["multiprocessor_count"] * clock


def input_sets(device: torch.device, size: int) -> int:
    """The number of input sets, of ``size`` bytes each, that fill the cache three times."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(math.ceil(3 * cache / size), 2), 256)
