"""CUDA graphs of calls that are made again and again with the same sizes.

A step of SD1.5 is some four hundred launches of a few microseconds each, and a decoding a hundred,
and Python cannot issue them as fast as a GPU runs them. A CUDA graph records them once for a size
and replays them as one; what changes is copied into buffers that the recorded launches read.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

MOST = 8  # graphs kept; each holds what its call needs in between
# What torch.cuda.graph_pool_handle gives: two numbers, to which torch gives a type of its own.
Pool: TypeAlias = "torch.cuda._POOL_HANDLE"


class Graph:
    """A recorded call, with input buffers of its own."""

    def __init__(self, function: Callable[..., Tensor], changing: Sequence[Tensor | None],
                 fixed: Sequence[Tensor | None], pool: Pool):
        """``function(*changing, *fixed)``: what every call changes, and what many calls share."""
        self.changing, self.fixed = (
            [None if x is None else x.clone() for x in given] for given in (changing, fixed))
        self.holds = fixed
        # Streams and graphs are of the current device, which need not be that of the tensors.
        with torch.cuda.device_of(self.changing[0]):
            self._record(function, pool)

    def _record(self, function: Callable[..., Tensor], pool: Pool) -> None:
        # Once outside the graph: the first call compiles kernels and lets libraries choose theirs.
        function(*self.changing, *self.fixed)
        self.graph = torch.cuda.CUDAGraph()
        # On a stream where nothing ran before (torch has 32), so that cuBLAS has no workspace for
        # it yet and takes one from the graph's own memory: others are freed whenever somebody asks,
        # as torch.compile does, and a graph that writes there is an illegal access. Not torch's
        # stream for captures, which is of the device that was the first to need it.
        with torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.Stream()):
            self.out = function(*self.changing, *self.fixed)

    def replay(self, changing: Sequence[Tensor | None], fixed: Sequence[Tensor | None]) -> Tensor:
        new = [*zip(self.changing, changing)]
        if fixed is not self.holds:
            new += zip(self.fixed, fixed)
            self.holds = fixed
        for mine, given in new:
            if given is not None:
                assert mine is not None  # the key tells calls with other Nones apart
                mine.copy_(given)
        with torch.cuda.device_of(self.out):
            self.graph.replay()
        return self.out.clone()  # the next replay overwrites it


class Graphs:
    """The graphs of a model, the least recently used of more than MOST forgotten.

    They share the memory for what lies between their launches, since none runs beside another: a
    lock lets threads take turns. A cache: a copy and a pickle of it are empty.
    """

    def __init__(self):
        self._made: dict[Hashable, Graph] = {}
        self._lock = threading.Lock()
        self._pool: Pool | None = None

    def __call__(self, key: Hashable, function: Callable[..., Tensor],
                 changing: Sequence[Tensor | None], fixed: Sequence[Tensor | None] = ()) -> Tensor:
        """``function(*changing, *fixed)`` by the graph of that key, recorded if there is none."""
        # Buffers outlive the call, whatever mode it is made in.
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
        """Forget all, and give back what they hold."""
        self._made.clear()

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return Graphs()

    def __reduce__(self) -> tuple:
        return Graphs, ()
