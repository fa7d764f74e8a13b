"""How long a call takes, and the least time that the device allows.

On a GPU a sample is the replay of a CUDA graph, timed by events: many calls, one after another on
different inputs, so that no call finds its inputs in the cache and no launch waits for Python.
Providers take turns, so that a drift of the GPU's clock affects all of them.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from minisd_kernels.ops.launch import Cost

SAMPLE = {"cuda": 0.004, "cpu": 0.01}  # seconds: reading the clock takes far less
EXPONENTIALS = 16  # per multiprocessor and clock (CUDA C++ Programming Guide, throughput, 5.x-9.0)


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


class Spread(NamedTuple):
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7])


def input_sets(device: torch.device, size: int) -> int:
    """The number of input sets, of ``size`` bytes each, that fill the cache three times."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(math.ceil(3 * cache / size), 2), 256)


def sampler(calls: list[Callable], device: torch.device) -> Callable[[], float]:
    """A function that runs all calls, often enough, and returns the seconds of one.

    The calls must be warm: compiled. Raises what they raise.
    """
    once = _graph(calls) if device.type == "cuda" else lambda: [call() for call in calls]
    clock = _events if device.type == "cuda" else _wall
    repeat = max(1, math.ceil(SAMPLE[device.type] / clock(once, 1)))
    return lambda: clock(once, repeat) / (repeat * len(calls))


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


def _wall(once: Callable, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        once()
    return time.perf_counter() - start


def interleave(samplers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each, in turns; every second round in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for i in range(rounds):
        for name in list(samplers)[:: -1 if i % 2 else 1]:
            times[name].append(samplers[name]())
    return times


def limits(device: torch.device) -> Limits:
    """Measured: a large matrix product, a large copy. Computed: exponentials."""
    gpu = device.type == "cuda"
    side, elements = (8192, 2**31) if gpu else (1024, 2**25)
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(elements, device=device, dtype=dtype)
    y = torch.empty_like(x)
    product, copy = (
        Spread.of([sample() for _ in range(10)]).p50
        # Not copy_: in a graph the copy engine does it, which is slower than a kernel.
        for sample in (sampler([lambda: a @ b], device),
                       sampler([lambda: torch.neg(x, out=y)], device))
    )
    exponentials = _exponentials(device) if gpu else math.inf
    return Limits(2 * side**3 / product, 2 * elements * dtype.itemsize / copy, exponentials)


def _exponentials(device: torch.device) -> float:
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    clock = properties["sm_clock_rate"] * 1e3  # given in kHz
    return EXPONENTIALS * properties["multiprocessor_count"] * clock
