"""What all commands of the bench share: check, then time in turns, then write rows.

A kernel is right if its error against float64 is within the bound of flash-attention's tests: twice
the error of torch's own call on the same inputs in the same dtype, plus one unit in the last place
of the largest number, because torch may be exact by luck where two correct results round
differently.

A row says what was measured, on which device, with which versions, of which commit, by which
command. Rows are only ever added to files.
"""

import argparse
import csv
import math
import multiprocessing
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import minisd_kernels.proof
import torch
import triton
from minisd_kernels.ops import launch
from minisd_kernels.ops.attention import _kernel
from torch import Tensor

import minisd
from bench.cases import Case
from bench.timing import Spread
from minisd.backends import kernels
from minisd.models.ops import TORCH, merge_heads

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
INTERPRETED = launch.interpreted(_kernel)  # with TRITON_INTERPRET=1, which is for tests
GPU = torch.cuda.is_available() and not INTERPRETED
SHARE = "share of the limit"
LATE = "the time was up (--minutes)"

MACHINE = ["device", "capability", "driver", "torch", "triton", "commit", "date", "command"]
TIMES = ["p20", "p50", "p80"]
KERNELS = ["kernel", "provider", "metric", "unit", "shape", "dtype", *TIMES, "max_err", *MACHINE,
           "note"]
MODELS = ["model", "provider", "what", "unit", "batch", "steps", "dtype", *TIMES, "max_err", "psnr",
          *MACHINE, "note"]
COLUMNS = {  # of each file
    "equality": ["kernel", "shape", "dtype", "max_err", "torch_err", "bound", "ok", *MACHINE,
                 "note"],
    "kernels": KERNELS, "tune": KERNELS, "image": MODELS, "load": MODELS,
    "launches": ["model", "rung", "launches", "bytes", "flops", "torch", "triton", "commit",
                 "date"],
}


# --- rows -----------------------------------------------------------------------------------------


class Rows:
    """The rows of one run of a command, kept, and added to files of ``folder`` if there is one."""

    def __init__(self, folder: Path | None, machine: dict[str, str]):
        self.folder, self.machine = folder, machine
        self.all: list[dict] = []

    def add(self, name: str, *rows: dict) -> None:
        """Rows of the file ``name``."""
        self.all += rows
        if self.folder:
            machine = {key: self.machine[key] for key in COLUMNS[name] if key in self.machine}
            append(self.folder / f"{name}.csv", COLUMNS[name], [machine | row for row in rows])


def append(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Append rows to a CSV file. Raises SystemExit if its columns are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        old = next(csv.reader(file), None)
        if old not in (None, columns):
            raise SystemExit(f"{path} has other columns: {', '.join(old)}")
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if old is None:
            writer.writeheader()
        writer.writerows(rows)


def percentiles(values: list[float]) -> dict[str, str]:
    """The columns of TIMES."""
    return {name: f"{value:.5g}" for name, value in Spread.of(values)._asdict().items()}


def ratios(times: dict[str, list[float]], base: str) -> dict[str, list[float]]:
    """Every other provider's time over that of ``base``, round by round, so that a drift of the
    clock rate cancels."""
    return {name: [t / ours for t, ours in zip(samples, times[base])]
            for name, samples in times.items() if base in times and name != base}


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every command that measures."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the files (default: bench/results)")
    add("--minutes", type=minutes, help="then nothing new starts; - reads them from stdin")
    add("--commit", default="", help="what is measured, for where there is no git")
    add("--date", default="", help=argparse.SUPPRESS)  # of the run that this command is a part of
    return parser


def minutes(text: str) -> float:
    """A command that waits for its turn has imported everything before it reads its minutes."""
    return float(sys.stdin.readline() or 0 if text == "-" else text)


def positive(text: str) -> int:
    """For numbers of things, of which there must be one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def device() -> torch.device:
    """That of every measurement."""
    return torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")


def machine(device: torch.device, commit: str = "", date: str = "") -> dict[str, str]:
    """The columns of MACHINE. A CPU has no compute capability and no driver. Rows of one ``date``
    are of one run, even if several processes wrote them.

    Exits unless bench, minisd and minisd_kernels are of one tree: else the rows would name another
    commit than the one measured.
    """
    files = (__file__, minisd.__file__, minisd_kernels.proof.__file__)
    trees = {str(Path(file).resolve().parents[1]) for file in files}
    if len(trees) > 1:
        raise SystemExit("bench, minisd and minisd_kernels are not from one tree but from "
                         f"{', '.join(sorted(trees))}; install with: pip install -e .")
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _said(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    else:
        name, driver, capability = _processor(), "none", "none"
    return {
        "device": name + " (Triton's interpreter)" * INTERPRETED,
        "capability": capability,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _said("git", "describe", "--always", "--dirty", "--abbrev=10"),
        "date": date or now(),
        "command": _command(sys.argv),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command(argv: list[str]) -> str:
    """As it was typed, without what the other columns say and without paths of this machine."""
    words = shlex.join(argv[1:])
    for hidden in (r"--(out|commit|date|folder)[ =]('[^']*'|\S+)", r"--minutes -(?!\S)"):
        words = re.sub(hidden, "", words)
    return " ".join(["python -m", f"bench.{Path(argv[0]).stem}", *words.split()])


def _processor() -> str:
    """The name of the CPU, where Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _said(*command: str) -> str:
    """The first line that a command prints; "unknown" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def one_line(failure: BaseException, *more: str) -> str:
    """What went wrong, short enough for a row."""
    return f"{type(failure).__name__}: {' '.join('; '.join([str(failure), *more]).split())}"[:300]


# --- checks ---------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The largest error of a function, torch's own, and the bound of the former."""

    error: float
    torch: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound < math.inf  # also False of NaN


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
        result = merge_heads(result)  # some peers of attention leave the heads apart
    if result.shape != exact.shape or not result.isfinite().all():
        return math.inf
    return (result.double() - exact).abs().max().item()


def last_place(exact: Tensor | Sequence[Tensor], dtype: torch.dtype) -> float:
    largest = max(x.abs().max().item() for x in ([exact] if isinstance(exact, Tensor) else exact))
    return torch.finfo(dtype).eps * largest


def form(result: object) -> str:
    """The dtype and shape of a tensor, or of several."""
    if isinstance(result, (tuple, list)):
        return f"({', '.join(map(form, result))})"
    if not isinstance(result, Tensor):
        return type(result).__name__
    return f"{str(result.dtype).removeprefix('torch.')} {tuple(result.shape)}"


def verdict(case: Case, function: Callable, inputs: tuple, exact) -> Verdict:
    """Run the function and torch's once. Raises what the function raises, TypeError for a result of
    another form than torch's, and ValueError if it changes its arguments, which are restored."""
    expected, before = case.call(getattr(TORCH, case.op), *inputs), [x.clone() for x in inputs]
    try:
        with poisoned():
            result = case.call(function, *inputs)
        if form(result) != form(expected):
            raise TypeError(f"returned {form(result)}, not {form(expected)}")
        worst, by_torch = error(result, exact), error(expected, exact)
    finally:
        changed = not all(map(torch.equal, inputs, before))
        for x, old in zip(inputs, before):
            x.copy_(old)
    if changed:
        raise ValueError("changed its arguments")
    return Verdict(worst, by_torch, 2 * by_torch + last_place(exact, inputs[0].dtype))


def check(case: Case, device: torch.device, dtype: torch.dtype,
          function: Callable | None = None) -> Verdict:
    """The verdict on new inputs, by default of our kernel."""
    inputs = case.inputs(device, dtype)
    function = function or getattr(kernels(), case.op)
    return verdict(case, function, inputs, case.exact(*inputs))


def equality_row(case: Case, device: torch.device, dtype: torch.dtype,
                 function: Callable | None = None) -> dict:
    """One size in one dtype, as a row of equality.csv."""
    row = {"kernel": case.op, "shape": case.label, "dtype": str(dtype)[6:], "ok": False}
    try:
        found = check(case, device, dtype, function)
        row |= {"max_err": f"{found.error:.3g}", "torch_err": f"{found.torch:.3g}",
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


def equality(jobs: list[tuple], add: Callable[[dict], None], workers: int = 0,
             deadline: float = math.inf) -> bool:
    """The `equality_row` of each job's arguments; returns whether all were right. Checks that the
    deadline (of time.monotonic) cuts off count as wrong. ``workers`` is the number of processes:
    most of the time is compiling."""
    all_right, done = True, 0
    with _rows(jobs, workers, deadline) as rows:
        for row in rows:
            add(row)
            all_right &= row["ok"]
            done += 1
    print(f"{done} of {len(jobs)} checked")
    return all_right and done == len(jobs)


@contextmanager
def _rows(jobs: list[tuple], workers: int, deadline: float) -> Iterator[Iterator[dict]]:
    """The rows of the jobs, as they come, until the deadline. ``workers`` is the number of
    processes, which end with the context; 0 runs the jobs in this process."""
    if not workers:
        yield (_one(job) for job in jobs if time.monotonic() < deadline)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with context.Pool(workers) as pool:  # leaving it ends the processes, busy or not
        yield _in_time(pool.imap_unordered(_one, jobs), deadline)


def _one(job: tuple) -> dict:
    return equality_row(*job)


def _in_time(results, deadline: float) -> Iterator:
    while True:
        try:
            yield results.next(max(0.01, min(deadline - time.monotonic(), 1e6)))
        except (StopIteration, multiprocessing.TimeoutError):
            return
