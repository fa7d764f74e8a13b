"""Is a kernel right: its error against float64, compared with torch's own error.

The bound is that of flash-attention's tests: twice the error of torch's own call on the same
inputs in the same dtype, plus one unit in the last place of the largest number, because torch may
be exact by luck where two correct results round differently.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minisd.models.ops import merge_heads


class Verdict(NamedTuple):
    """The kernel's largest error, torch's own, and the bound of the kernel's."""

    ours: float
    torch: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.bound < float("inf")  # also False of NaN


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty is full of NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(result: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """The largest absolute difference; infinity if shapes differ or a value is not finite."""
    if not isinstance(exact, Tensor):
        return max(error(a, b) for a, b in zip(result, exact, strict=True))
    if result.dim() == 4 and exact.dim() == 3:
        result = merge_heads(result)  # the peers of attention leave the heads apart
    if result.shape != exact.shape or not result.isfinite().all():
        return float("inf")
    return (result.double() - exact).abs().max().item()


def last_place(exact: Tensor | Sequence[Tensor], dtype: torch.dtype) -> float:
    largest = max(x.abs().max().item() for x in ([exact] if isinstance(exact, Tensor) else exact))
    return torch.finfo(dtype).eps * largest


def verdict(case, inputs: tuple, exact: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Verdict:
    """Run the kernel and torch once. Raises what the kernel raises."""
    by_torch = error(case.yardstick(*inputs), exact)
    with poisoned():
        ours = case.ours(*inputs)
    return Verdict(error(ours, exact), by_torch, 2 * by_torch + last_place(exact, dtype))


def check(case, device: torch.device, dtype: torch.dtype) -> Verdict:
    """The verdict on new inputs."""
    inputs = case.inputs(device, dtype)
    return verdict(case, inputs, case.exact(*inputs), dtype)


def equality_row(case, device: torch.device, dtype: torch.dtype) -> dict:
    """One size in one dtype, as a row of equality.csv."""
    row = {"kernel": case.kernel, "shape": case.label, "dtype": str(dtype)[6:], "ok": False}
    try:
        found = check(case, device, dtype)
        row |= {"max_err": f"{found.ours:.3g}", "torch_err": f"{found.torch:.3g}",
                "bound": f"{found.bound:.3g}", "ok": found.ok}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes check on the same GPU
    except Exception as failure:
        row |= {"ok": False, "note": one_line(failure)}
    return row


def alive(device: torch.device) -> bool:
    """Whether the device still answers this process: after an illegal access it never does."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def to_check(cases: list, dtypes: Sequence[torch.dtype]) -> list[tuple]:
    """(case, dtype): every size in float16 first, then in the next dtype."""
    return [(case, dtype) for dtype in dtypes for case in cases]


def equality(cases: list, device: torch.device, dtypes: Sequence[torch.dtype],
             add: Callable[[dict], None], workers: int = 0, deadline: float = math.inf) -> bool:
    """Every size in every dtype, as rows of equality.csv; returns whether all were right. Checks
    that the deadline (of time.monotonic) cuts off count as wrong. ``workers`` is the number of
    processes: most of the time is compiling."""
    jobs = [(case, device, dtype) for case, dtype in to_check(cases, dtypes)]
    all_right, done = True, 0
    with spread(equality_row, jobs, workers, deadline) as rows:
        for row in rows:
            add(row)
            said = row.get("note") or f"error {row['max_err']}, torch's {row['torch_err']}"
            print("equal" if row["ok"] else "WRONG", *list(row.values())[:3], said, flush=True)
            all_right &= row["ok"]
            done += 1
    print(f"{done} of {len(jobs)} checked")
    return all_right and done == len(jobs)


@contextmanager
def spread(function: Callable, jobs: list[tuple], workers: int,
           deadline: float) -> Iterator[Iterator]:
    """The results of function(*job), as they come, until the deadline. ``workers`` is the number of
    processes, which end with the context; 0 runs the jobs in this process."""
    if not workers:
        yield (function(*job) for job in jobs if time.monotonic() < deadline)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with context.Pool(workers) as pool:  # leaving it ends the processes, busy or not
        yield _in_time(pool.imap_unordered(partial(_apply, function), jobs), deadline)


def _apply(function: Callable, job: tuple):
    return function(*job)


def _in_time(results, deadline: float) -> Iterator:
    while True:
        try:
            yield results.next(max(0.01, min(deadline - time.monotonic(), 1e6)))
        except (StopIteration, multiprocessing.TimeoutError):
            return


def one_line(failure: Exception, *more: str) -> str:
    """What went wrong, short enough for a row."""
    return f"{type(failure).__name__}: {' '.join('; '.join([str(failure), *more]).split())}"[:300]
