"""CUDA graphs of calls that repeat with the same sizes.

A step of SD1.5 is about four hundred launches of a few microseconds each, a decoding a hundred, and
Python cannot issue them as fast as a GPU runs them. A CUDA graph records them once per size and
replays them as one; inputs are copied into buffers that the recorded launches read.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

MOST = 8  # graphs kept; each holds the intermediate tensors of its call
# The result of torch.cuda.graph_pool_handle: two numbers, for which torch has a type of its own.
Pool: TypeAlias = "torch.cuda._POOL_HANDLE"


def records(x: Tensor) -> bool:
    """Whether a call on such tensors is recorded: on a CUDA device, while nobody else records."""
    return x.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Graph:
    """A recorded call, with input buffers of its own."""

    def __init__(self, function: Callable[..., Tensor], changing: Sequence[Tensor | None],
                 fixed: Sequence[Tensor | None], pool: Pool):
        """Every call of ``function(*changing, *fixed)`` has its own ``changing``; ``fixed`` is that
        of many calls."""
        self.changing, self.fixed = (
            [None if x is None else x.clone() for x in given] for given in (changing, fixed))
        self.holds = fixed
        # Streams and graphs belong to the current device, which may not be that of the tensors.
        with torch.cuda.device_of(self.changing[0]):
            self._record(function, pool)

    def _record(self, function: Callable[..., Tensor], pool: Pool) -> None:
        # The first call runs outside the graph: it compiles kernels, and libraries choose theirs.
        function(*self.changing, *self.fixed)
        self.graph = torch.cuda.CUDAGraph()
        # The stream is one where nothing ran before (torch has 32), so cuBLAS has no workspace for
        # it yet and takes one from the graph's own memory. Another workspace may be freed at any
        # time (torch.compile does so), and a graph that writes there is an illegal access. torch's
        # stream for captures belongs to the first device that needed one, so it does not serve.
        with torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.Stream()):
            self.out = function(*self.changing, *self.fixed)

    def replay(self, changing: Sequence[Tensor | None], fixed: Sequence[Tensor | None]) -> Tensor:
        new = [*zip(self.changing, changing)]
        if fixed is not self.holds:
            new += zip(self.fixed, fixed)
        for mine, given in new:
            if given is not None:
                assert mine is not None  # the key tells calls with other Nones apart
                mine.copy_(given)
        self.holds = fixed  # last, so that a copy that failed is made again
        with torch.cuda.device_of(self.out):
            self.graph.replay()
        return self.out.clone()  # the next replay overwrites it


class Graphs:
    """The graphs of a model: the MOST most recently used.

    They share the memory of their intermediate tensors, since no two run at once: threads take
    turns by a lock. This is a cache: a copy and a pickle of it are empty.
    """

    def __init__(self):
        self._made: dict[Hashable, Graph] = {}
        self._lock = threading.Lock()
        self._pool: Pool | None = None

    def __call__(self, key: Hashable, function: Callable[..., Tensor],
                 changing: Sequence[Tensor | None], fixed: Sequence[Tensor | None] = ()) -> Tensor:
        """``function(*changing, *fixed)`` by the graph of that key, recorded if there is none."""
        # The buffers outlive the call, whatever its mode.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            graph = self._made.pop(key, None)
            if graph is None:
                if self._pool is None or not self._made:
                    self._pool = torch.cuda.graph_pool_handle()
                graph = Graph(function, changing, fixed, self._pool)
            self._made[key] = graph
            if len(self._made) > MOST:
                del self._made[next(iter(self._made))]
            return graph.replay(changing, fixed)

    def __len__(self) -> int:
        return len(self._made)

    def clear(self) -> None:
        """Forget all graphs and free their memory."""
        self._made.clear()

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return Graphs()

    def __reduce__(self) -> tuple:
        return Graphs, ()
