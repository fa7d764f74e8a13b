"""The Triton kernels at every size of Stable Diffusion: checked, then timed beside their peers.

    python -m bench.kernels                      # everything, on the GPU if there is one
    python -m bench.kernels --only "SD1.5 2x8"   # the rows whose name has this in it
    python -m bench.kernels --tune --workers 14  # every listed launch setting (bench/tune.py)

Prints a table, and appends rows to three files in bench/results: equality.csv, every size in
float16, bfloat16 and float32 against float64; kernels.csv, the times; tune.csv. If matplotlib is
installed, plots the share of the limit that every provider reaches.

Without a GPU a few small sizes are timed on the CPU, where the kernels do not run and the rows say
why. With TRITON_INTERPRET=1 they run, on tiny sizes, to test this command: those rows are no
measurements, and are kept only with --out. Exit code 1 if a kernel was wrong. Needs triton.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from minisd_kernels.ops import launch
from minisd_kernels.ops.attention import _kernel

from bench import record, shapes, timing, tune
from bench.check import alive, equality, one_line
from bench.group_norm import Compiler
from bench.measure import OURS, measure, rows, show
from bench.plot import plot

DTYPES = ("float16", "bfloat16", "float32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", default="", help='rows with this in their name, as in "attention SD1.5"')
    add("--dtype", choices=DTYPES, help="of the times (default: float16; float32 on a CPU)")
    add("--rounds", type=int, default=15, help="samples of each provider (default: %(default)s)")
    add("--minutes", type=float, default=6.0,
        help="in all; checking takes at most a third of them (default: %(default)s)")
    add("--compile-minutes", type=float, help="for torch.compile (default: 2; 0 on a CPU)")
    add("--tune", action="store_true", help="time every listed launch setting instead")
    add("--workers", type=int, default=0, help="processes that compile and check")
    add("--out", type=Path, help="folder of the files (default: bench/results)")
    add("--commit", default="", help="what is measured, for where there is no git")
    return parser.parse_args()


def dtypes() -> list[torch.dtype]:
    """The dtypes to check: the interpreter multiplies the bits of bfloat16 as integers."""
    interpreted = launch.interpreted(_kernel)
    return [d for d in launch.DTYPES if not (interpreted and d == torch.bfloat16)]


def time_all(cases: list, device: torch.device, dtype: torch.dtype, compiler: Compiler,
             rounds: int, deadline: float, add: Callable[..., None]) -> list[dict]:
    """The rows of every case; cases left when the time is up get a row that says so."""
    limits, found = timing.limits(device), []
    print(f"\nmeasured here: {limits.flops / 1e12:.3g} TFLOP/s, {limits.bytes / 1e9:.4g} GB/s; "
          f"computed: {limits.exponentials / 1e12:.3g} T exponentials/s")
    for case in cases:
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("the time was up (--minutes)")
            measured = measure(case, device, dtype, compiler, rounds)
        except Exception as failure:  # out of memory, for example: the other sizes go on
            lost = {"kernel": case.kernel, "shape": case.label, "metric": "not timed",
                    "provider": "" if isinstance(failure, TimeoutError) else OURS,
                    "note": one_line(failure)}
            add(lost)
            found.append(lost)
            print(f"\n{case.kernel}, {case.label} not timed: {lost['note']}")
            if not alive(device):
                break
            continue
        show(measured, limits)
        new = rows(measured, limits)
        add(*new)
        found += new
    return found


def ours_timed(found: list[dict]) -> bool:
    """Whether minisd ran at every size that was timed."""
    return not any(row["provider"] == OURS and row["metric"] == "not timed" for row in found)


def main() -> int:
    args = parse()
    record.refuse_two_trees()
    interpreted = launch.interpreted(_kernel)
    gpu = torch.cuda.is_available() and not interpreted
    if gpu:
        device, cases = torch.device("cuda", torch.cuda.current_device()), shapes.full()
    else:
        device, cases = torch.device("cpu"), shapes.tiny() if interpreted else shapes.small()
        print("rows of the CPU, on small sizes: " + ("TRITON_INTERPRET is set" if interpreted else
                                                     "there is no GPU here"))
    dtype = getattr(torch, args.dtype or ("float16" if gpu or interpreted else "float32"))
    if args.compile_minutes is None:
        args.compile_minutes = 2 if gpu else 0
    cases = [case for case in cases if args.only in f"{case.kernel} {case.label}"]
    if not cases:
        raise SystemExit(f"no size has {args.only!r} in its name")
    machine = record.machine(device, interpreted, args.commit)
    folder = args.out or (None if interpreted else record.ROOT / "bench" / "results")
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")

    def add(name: str, columns: list[str], *found: dict) -> None:
        if folder:
            record.append(folder / name, columns, [machine | row for row in found])

    start = time.monotonic()
    deadline = start + 60 * args.minutes
    if args.tune:
        setup = tune.Setup(device, dtype, args.rounds)
        return tune.tune(cases, setup, deadline, args.workers,
                         partial(add, "tune.csv", record.COLUMNS))
    right = True
    if gpu or interpreted:
        right = equality(cases, device, dtypes(), partial(add, "equality.csv", record.EQUALITY),
                         args.workers, start + 20 * args.minutes)
    found = time_all(cases, device, dtype, Compiler(60 * args.compile_minutes), args.rounds,
                     deadline, partial(add, "kernels.csv", record.COLUMNS))
    if gpu or interpreted:
        right &= ours_timed(found)
    if folder:
        print(plot(found, folder, machine))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
