"""Loading a full-size Stable Diffusion 1.5 file, compared with safetensors alone.

    python -m bench.load --folder /tmp --rounds 5

Writes random weights under the official names (2.1 GB in float16, 4.3 GB in float32) and loads
them in turns, each time in a new process: minisd.load, which also checks every weight for NaN and
builds the models, and safetensors' load_file plus a copy of every tensor. Adds rows to load.csv:
the seconds, the ratio, and the peak of anonymous memory (which excludes the mapped pages of the
file) beyond that of a process that has imported torch, as a multiple of the weights.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench import harness, models, timing
from minisd import load
from minisd.checkpoints import names
from minisd.config import SD1

CASES = (("float16", "float16"), ("float32", "float32"), ("float32", "float16"))
OURS, THEIRS = "minisd", "safetensors and a copy"
CPU = torch.device("cpu")


def write(path: Path, dtype: torch.dtype) -> None:
    """SD1.5 under the names of the original single file."""
    weights, tensors = models.random_weights(SD1, CPU, dtype), {}
    for part, rows in names.single_file(SD1).items():
        official = {ours[0]: name for name, ours in reversed(rows.items()) if len(ours) == 1}
        tensors |= {official[name]: p for name, p in weights[part].items()}
    save_file(tensors, path)


def measure(who: str, path: str, dtype: str) -> None:
    """In a process of its own: load once, print seconds and peak memory as JSON."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, timing.resident("RssAnon") or 0)

    def ours() -> list:
        sd = load(path, device="cpu", dtype=dtype)
        return [p for part in sd.parts.values() for p in part.parameters()]

    def theirs() -> list:
        return [p.to(getattr(torch, dtype), copy=True) for p in load_file(path).values()]

    base, watcher = timing.resident("RssAnon") or 0, threading.Thread(target=watch)
    watcher.start()
    seconds, weights = timing.timed(ours if who == OURS else theirs, CPU)
    done.set()
    watcher.join()
    size = sum(p.nbytes for p in weights)
    print(json.dumps({"seconds": seconds, "memory": (peak - base) / size}))


def main(argv: list[str] | None = None) -> int:
    parser = harness.options(__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="needs 6.4 GB; files are kept")
    parser.add_argument("--rounds", type=harness.positive, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure(*args.measure)
        return 0
    rows = harness.Rows(args.out or harness.RESULTS,
                        harness.machine(CPU, args.commit, args.date))
    end = time.monotonic() + 60 * (args.minutes or float("inf"))
    for stored, dtype in CASES:
        if time.monotonic() > end:
            print(harness.LATE)
            break
        path = args.folder / f"minisd-bench-{stored}.safetensors"
        if not path.exists():
            write(path, getattr(torch, stored))

        def once(who: str) -> dict[str, float]:
            command = [sys.executable, "-m", "bench.load", "--folder", str(args.folder),
                       "--measure", who, str(path), dtype]
            return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

        once(OURS), once(THEIRS)  # they warm the page cache
        runs = timing.interleave({who: lambda who=who: once(who) for who in (OURS, THEIRS)},
                                 args.rounds)
        times = {who: [run["seconds"] for run in mine] for who, mine in runs.items()}
        figures = [(who, "load a file", "s", samples) for who, samples in times.items()]
        figures += [(who, "load over minisd's", "1", samples)
                    for who, samples in harness.ratios(times, OURS).items()]
        figures += [(who, "memory over the weights", "1", [max(run["memory"] for run in mine)])
                    for who, mine in runs.items()]
        for who, what, unit, samples in figures:
            row = {"model": f"SD1.5 in {stored}", "provider": who, "what": what, "unit": unit,
                   "dtype": dtype, **harness.percentiles(samples)}
            rows.add("load", row)
            print(*row.values(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
