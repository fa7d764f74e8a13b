"""Seconds an image, a step and a decoding take, and the memory: minisd beside diffusers.

    python -m bench.image                # everything, on the GPU if there is one
    python -m bench.image --quick        # small models, under 50 s on two CPU cores
    python -m bench.image --models SD1.5-512 --only fused

All providers get copies of the same weights and the same noise, and take turns in one process; one
that is not installed or fails gets a row with the reason. diffusers compiled comes last and takes
turns with minisd fused alone, so that its compiling delays no other. Times are wall times that
include waiting for the GPU. Adds rows to image.csv, from which `python -m bench.report` makes
tables. In the rows, an image is a "picture":

  load           from weights in memory to a model that can be called: copied, repacked
  first picture  with what is done once: kernels compiled, graphs recorded, plans chosen
  picture        from a prompt to pixels: text encoder, all the steps with guidance, decoder; warm
  step           the UNet with guidance, once; max_err is relative to the largest value
  decode         the VAE, once
  memory         the most that the allocator holds during a warm image, weights included (on a CPU,
                 the growth of the process); "memory allocated" is without the memory of CUDA graphs
  pictures/s     in batches

max_err and psnr (of images in [0, 1]) are against minisd's readable model with the same weights, in
float32; in float64 where float32 is timed.
"""

import argparse
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from bench import models, record
from bench.check import one_line
from bench.clock import limited
from bench.contest import COMPILED, EAGER, FUSED, Contest

COLUMNS = ["model", "provider", "what", "unit", "batch", "steps", "dtype", "p20", "p50", "p80",
           "max_err", "psnr", *record.MACHINE, "note"]
EVERYONE = (FUSED, EAGER, "minisd torch", "minisd triton")
LATE = "the time was up (--minutes)"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="small models; without a GPU in any case")
    add("--models", nargs="+", metavar="NAME", help="only these")
    add("--only", default="", help="providers with this in their name")
    add("--dtype", choices=("float16", "bfloat16", "float32"),
        help="default: float16; float32 on a CPU")
    add("--rounds", type=int, default=7, help="samples of each, at most (default: %(default)s)")
    add("--batches", type=int, nargs="*", help="default: 1 2 4 8 16; none with --quick")
    add("--batch-steps", type=int, default=20, help="steps of these (default: %(default)s)")
    add("--minutes", type=float, help="then nothing new starts (default: 6.5; 0.6 with --quick)")
    add("--compile-minutes", type=float, help="for torch.compile (default: 3; 0 on a CPU)")
    add("--compile-mode", default="reduce-overhead", help="of torch.compile (default: %(default)s)")
    add("--out", type=Path, default=record.ROOT / "bench" / "results", help="folder of the files")
    add("--commit", default="", help="what is measured, for where there is no git")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    args.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    args.quick |= not gpu
    args.dtype = getattr(torch, args.dtype or ("float16" if gpu else "float32"))
    if args.minutes is None:
        args.minutes = 0.6 if args.quick else 6.5
    if args.compile_minutes is None:
        args.compile_minutes = 3 if gpu else 0
    if args.batches is None:
        args.batches = [] if args.quick else [1, 2, 4, 8, 16]
    return args


class Compiling:
    """The seconds that are left for torch.compile, for all models together."""

    def __init__(self, seconds: float):
        self.left = seconds

    def __enter__(self) -> None:
        self.start = time.monotonic()
        self.limit = limited(self.left, "the time for compiling was up (--compile-minutes)")
        self.limit.__enter__()

    def __exit__(self, kind, *error) -> None:
        self.limit.__exit__(kind, *error)
        self.left -= time.monotonic() - self.start
        if kind:  # workers that still compile would disturb what is timed
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()


def enter(contest: Contest, name: str, mode: str = "",
          limit: AbstractContextManager | None = None) -> None:
    """Enter a provider: "minisd" with the name of its ops, or diffusers, compiled in a ``mode`` if
    one is given. A provider that cannot be imported gets a row that says why."""
    given = contest.model, contest.weights
    if name.startswith("minisd "):
        make = partial(models.Ours, *given, name.removeprefix("minisd "), contest.device)
    else:
        try:
            from bench.peers import Theirs
        except ImportError as error:
            return contest.add(name, "not run", note=one_line(error))
        make = partial(Theirs, *given, mode, contest.device)
    contest.enter(name, make, limit)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    record.refuse_two_trees()
    machine = record.machine(args.device, False, args.commit)
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        record.append(args.out / "image.csv", COLUMNS, [machine | row])
        print(line(row), flush=True)

    end, compiling = time.monotonic() + 60 * args.minutes, Compiling(60 * args.compile_minutes)
    wanted = models.standard(args.quick)
    for name in args.models or wanted:
        if name not in wanted:
            raise SystemExit(f"{name} is none of the models: {', '.join(wanted)}")
    wanted = {name: wanted[name] for name in args.models or wanted}
    contests = {}
    for i, (name, make) in enumerate(wanted.items()):
        if time.monotonic() > end:
            add({"model": name, "what": "not run", "note": LATE})
            continue
        contests[name] = contest = Contest(make(), args.device, args.dtype, add)
        for provider in EVERYONE:
            if args.only in provider and time.monotonic() > end:
                contest.add(provider, "not run", note=LATE)
            elif args.only in provider:
                enter(contest, provider)
        share = (end - time.monotonic()) / (len(wanted) - i)
        contest.race(args.rounds, share)
        if args.only in COMPILED:
            enter(contest, COMPILED, args.compile_mode, compiling)
            if COMPILED in contest.entered:
                contest.race(args.rounds, share, (FUSED, COMPILED))
    if "tiny" in contests and args.dtype == torch.float32 and args.only in FUSED:
        contests["tiny"].half()
    for contest in contests.values():
        contest.batches(args.batches, args.batch_steps, 2, lambda: time.monotonic() > end)
    return 0 if rows else 1


def line(row: dict) -> str:
    """A row, to be printed."""
    get = row.get
    text = f"{row['model']:10} {get('provider', ''):19} {row['what']:22}"
    if get("batch"):
        text += f" batch {row['batch']}"
    if get("p50"):
        text += f" {row['p50']:>9} {row['unit'].replace('1/s', 'pictures/s')}"
        if row["p20"] != row["p80"]:
            text += f" ({row['p20']} to {row['p80']})"
    for key in ("max_err", "psnr", "note"):
        text += f", {key} {row[key]}" if get(key) else ""
    return text


if __name__ == "__main__":
    raise SystemExit(main())
