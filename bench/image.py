"""Seconds an image, a step and a decoding take, and the memory: minisd beside diffusers.

    python -m bench.image                # everything, on the GPU if there is one
    python -m bench.image --quick        # small models, about a minute on two CPU cores
    python -m bench.image --models SD1.5-512 --only fused eager
    python -m bench.image --only fused --provider geglu=my_module:my_geglu

All providers get copies of the same weights and the same noise, and take turns in one process; one
that is not installed or fails gets a row with the reason. diffusers compiled comes last and takes
turns with minisd fused alone, so that its compiling delays no other. With --provider, minisd fused
runs once more with that function (bench/kernels.py checks and times it alone). Times are wall times
that include waiting for the GPU. Rows of image.csv, kept of a part (--only, --provider) only with
--out; in them an image is a "picture". Exit code 1 if minisd fused, or a function of your own, did
not run:

  load           from weights in memory to a model that can be called: copied, repacked
  first picture  with what is done once: kernels compiled, graphs recorded, plans chosen
  picture        from a prompt to pixels: text encoder, all the steps with guidance, decoder; warm
  step           the UNet with guidance, once; max_err is relative to the largest value
  decode         the VAE, once
  memory         the most that the allocator holds during a warm image, weights included (on a CPU,
                 the growth of the process); "memory allocated" is without the memory of CUDA graphs
  pictures/s     in batches

max_err and psnr (of images in [0, 1]) are against minisd's readable model with the same weights, in
float32; in float64 where float32 is timed. --profile adds the kernels of every provider's step and
decoding to profile.txt.
"""

import argparse
import math
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench import harness, models, providers, timing
from bench.harness import LATE, Rows, one_line, positive
from bench.models import Model, Ours, Theirs
from bench.timing import Memory, interleave, timed

FUSED, EAGER, COMPILED = "minisd fused", "diffusers eager", "diffusers compiled"
EVERYONE = (FUSED, EAGER, "minisd torch", "minisd triton")
SHARES = {"step": 0.25, "decode": 0.15, "picture": 0.6}  # of the time for the race


class Entrant(NamedTuple):
    """A provider that runs: its calls, their errors, and the bytes that it holds before them."""

    contender: Ours | Theirs
    calls: dict[str, Callable[[], Tensor]]
    errors: dict[str, dict[str, str]]
    size: int


class Contest:
    """One model and its providers: each is made, checked against one result, timed in turns."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype,
                 add: Callable[[dict], None]):
        self.model, self.device, self.dtype, self._add = model, device, dtype, add
        self.entered: dict[str, Entrant] = {}
        self.weights = model.weights(device, dtype)
        higher = torch.float64 if dtype == torch.float32 else torch.float32
        exact = Ours(model, self._cast(higher), "torch", device)
        # By default cuDNN uses TF32, which drops 13 of float32's 23 bits of mantissa.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.exact = {"picture": exact.image(1, model.steps), "step": exact.step()(),
                          "decode": exact.decode()()}

    def _cast(self, dtype: torch.dtype) -> models.Weights:
        return {part: {name: p.to(dtype) for name, p in tensors.items()}
                for part, tensors in self.weights.items()}

    def add(self, provider: str, what: str, unit: str = "", values: Collection[float] = (),
            **more) -> None:
        """A row: one value, or several as their percentiles."""
        self._add({"model": self.model.name, "provider": provider, "what": what, "unit": unit,
                   "dtype": str(self.dtype).removeprefix("torch."),
                   **(harness.percentiles(values) if values else {}), **more})

    def enter(self, provider: str, make: Callable, limit=nullcontext()) -> None:
        """Make a provider and run it twice: rows of the seconds, the memory and the errors."""
        steps, memory = self.model.steps, Memory(self.device)
        try:
            with limit:
                load, contender = timed(make, self.device)
                size = memory.growth().get("memory", 0)
                calls = {"picture": partial(contender.image, 1, steps)}
                first, _ = timed(calls["picture"], self.device)
                memory.restart()
                errors = {"picture": self.errors("picture", calls["picture"]())}
                peaks = memory.peaks()
                for what in ("step", "decode"):
                    calls[what] = getattr(contender, what)()
                    errors[what] = self.errors(what, calls[what]())
        except (Exception, timing.OutOfTime) as failure:
            return self.add(provider, "not run", note=one_line(failure))
        self.entered[provider] = Entrant(contender, calls, errors, size)
        self.add(provider, "load", "s", [load])
        self.add(provider, "first picture", "s", [first], batch=1, steps=steps)
        for what, peak in peaks.items():
            self.add(provider, what, "MB", [peak / 1e6], batch=1, steps=steps)

    def errors(self, what: str, result: Tensor) -> dict[str, str]:
        """The columns max_err and psnr."""
        exact = self.exact[what]
        if what == "step":
            worst = (result.to(exact) - exact).abs().max() / exact.abs().max()
            return {"max_err": f"{worst.item():.2g}"}
        if what == "decode":
            result, exact = ((image.to(exact) / 2 + 0.5).clamp(0, 1) for image in (result, exact))
        worst = (result.to(exact) - exact).abs().max().item()
        return {"max_err": f"{worst:.2g}", "psnr": f"{psnr(result, exact):.1f}"}

    def race(self, rounds: int, seconds: float, names: Collection[str] = ()) -> None:
        """Time the step, the decoding and the whole image of ``names``, or of every provider, in
        turns; fewer rounds if the seconds do not suffice."""
        for what, share in SHARES.items():
            found = {name: timing.sampler(entrant.calls[what], self.device)
                     for name, entrant in self.entered.items() if not names or name in names}
            fit = int(share * seconds / (sum(each.seconds for each in found.values()) or 1))
            times = interleave({name: each.sample for name, each in found.items()},
                               max(2, min(rounds, fit)))
            scale, unit = (1, "s") if what == "picture" else (1e3, "ms")
            more = {"batch": 1} | ({"steps": self.model.steps} if what == "picture" else {})
            over = harness.ratios(times, FUSED)
            for name, samples in times.items():
                self.add(name, what, unit, [scale * t for t in samples], **more,
                         **self.entered[name].errors[what])
                if name in over:
                    self.add(name, f"{what} over fused", "1", over[name], **more)

    def batches(self, sizes: list[int], steps: int, rounds: int, end: float) -> None:
        """Images a second and the memory held, batch by batch, until the end (time.monotonic)."""
        for batch in sizes:
            for name, entrant in self.entered.items():
                if name == COMPILED:
                    self.add(name, "not run", batch=batch, note="compiled for single images")
                elif time.monotonic() > end:
                    self.add(name, "not run", batch=batch, note=LATE)
                else:
                    self._batch(name, entrant, batch, steps, rounds)

    def _batch(self, name: str, entrant: Entrant, batch: int, steps: int, rounds: int) -> None:
        draw = partial(entrant.contender.image, batch, steps)
        try:
            entrant.contender.release()
            memory = Memory(self.device)
            draw()
            memory.restart()
            samples = [batch / timed(draw, self.device)[0] for _ in range(rounds)]
        except Exception as failure:
            return self.add(name, "not run", batch=batch, note=one_line(failure))
        self.add(name, "pictures/s", "1/s", samples, batch=batch, steps=steps)
        for what, peak in memory.peaks().items():
            if what == "memory":
                self.add(name, what, "MB", [(entrant.size + peak) / 1e6], batch=batch, steps=steps)

    def profile(self, path: Path, repeat: int = 5, most: int = 70) -> None:
        """Add the kernels of every provider's step and decoding to a text file."""
        gpu = self.device.type == "cuda"
        activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if gpu else "CPU")
        for name, entrant in self.entered.items():
            for what in ("step", "decode"):
                entrant.calls[what]()
                timing.wait(self.device)
                with torch.profiler.profile(activities=[activity]) as seen:
                    timed(entrant.calls[what], self.device, repeat)
                kernels = sorted(
                    ((k.self_device_time_total if gpu else k.self_cpu_time_total, k.count, k.key)
                     for k in seen.key_averages()), reverse=True)
                total = sum(us for us, *_ in kernels) / repeat
                head = f"{self.model.name}, {name}, {what}: {total:.0f} us of kernels"
                print(f"profile of {head}", flush=True)
                with path.open("a") as file:
                    print(f"\n== {head}", *(
                        f"{us / repeat:9.1f} us  n {n / repeat:6.1f}  {key[:150]}"
                        for us, n, key in kernels[:most]), sep="\n", file=file)


def psnr(image: Tensor, exact: Tensor) -> float:
    """Decibels, of images in [0, 1]; infinite if they are equal."""
    error = (image.to(exact) - exact).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error) if error > 0 else math.nan


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


# --- the command ----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.options(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="small models; without a GPU in any case")
    add("--models", nargs="+", metavar="NAME", help="only these")
    add("--only", nargs="+", default=[""], metavar="TEXT",
        help="providers with one of these in their name")
    add("--provider", type=providers.own, action="append", default=[],
        metavar="OP=MODULE:FUNCTION", help="a function of your own in minisd fused")
    add("--dtype", choices=("float16", "bfloat16", "float32"),
        help="default: float16; float32 on a CPU")
    add("--rounds", type=positive, default=7, help="samples of each, at most (default: 7)")
    add("--batches", type=positive, nargs="*", help="default: 1 2 4 8 16; none with --quick")
    add("--batch-steps", type=positive, default=20, help="steps of these (default: %(default)s)")
    add("--compile-minutes", type=float, help="for torch.compile (default: 3; 0 on a CPU)")
    add("--compile-mode", default="reduce-overhead", help="of torch.compile (default: %(default)s)")
    add("--profile", action="store_true", help="and write profile.txt")
    args = parser.parse_args(argv)
    args.device = harness.device()
    gpu = args.device.type == "cuda"
    args.quick |= not gpu
    args.dtype = getattr(torch, args.dtype or ("float16" if gpu else "float32"))
    args.out = args.out or (None if args.provider or args.only != [""] else harness.RESULTS)
    if args.profile and not args.out:
        parser.error("--profile needs --out")
    if args.minutes is None:
        args.minutes = 0.9 if args.quick else 6.5
    if args.compile_minutes is None:
        args.compile_minutes = 3 if gpu else 0
    if args.batches is None:
        args.batches = [] if args.quick else [1, 2, 4, 8, 16]
    everyone = (*EVERYONE, COMPILED)
    if not args.provider and not any(text in name for text in args.only for name in everyone):
        parser.error(f"none of the providers has {args.only} in its name: {', '.join(everyone)}")
    standard = models.standard(args.quick)
    if unknown := set(args.models or ()) - set(standard):
        parser.error(f"{', '.join(unknown)} is none of the models: {', '.join(standard)}")
    args.models = {name: standard[name] for name in args.models or standard}
    return args


def makers(args: argparse.Namespace, contest: Contest) -> dict[str, Callable]:
    """By provider, a function that makes it."""
    given = contest.model, contest.weights
    found = {name: partial(Ours, *given, name.removeprefix("minisd "), args.device)
             for name in EVERYONE if name != EAGER}
    found |= {name: partial(Ours, *given, "fused", args.device, {op: function})
              for op, name, function in args.provider}
    theirs = {EAGER: "", COMPILED: args.compile_mode}
    found |= {name: partial(Theirs, *given, mode, args.device) for name, mode in theirs.items()}
    own = {name for _, name, _ in args.provider}
    return {name: make for name, make in found.items()
            if name in own or any(text in name for text in args.only)}


def run(args: argparse.Namespace, contest: Contest, end: float, seconds: float,
        compiling: timing.Budget) -> None:
    """The races of one model, in so many seconds."""
    made = makers(args, contest)
    compiled = made.pop(COMPILED, None)
    for name, make in made.items():
        if time.monotonic() > end:
            contest.add(name, "not run", note=LATE)
        else:
            contest.enter(name, make)
    contest.race(args.rounds, seconds)
    if compiled:
        contest.enter(COMPILED, compiled, compiling)
        if COMPILED in contest.entered:
            contest.race(args.rounds, seconds, (FUSED, COMPILED))
    if args.profile:
        contest.profile(args.out / "profile.txt")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows = Rows(args.out, harness.machine(args.device, args.commit, args.date))
    print(*(f"{key} {value}" for key, value in rows.machine.items()), sep=", ")

    def add(row: dict) -> None:
        rows.add("image", row)
        print(line(row), flush=True)

    end, contests = time.monotonic() + 60 * args.minutes, {}
    compiling = timing.Budget(min(60 * args.compile_minutes, 60 * args.minutes - 20),
                              "the time for compiling was up (--compile-minutes)")
    for i, (name, make) in enumerate(args.models.items()):
        if time.monotonic() > end:
            add({"model": name, "what": "not run", "note": LATE})
            continue
        contests[name] = contest = Contest(make(), args.device, args.dtype, add)
        run(args, contest, end, (end - time.monotonic()) / (len(args.models) - i), compiling)
    for contest in contests.values():
        contest.batches(args.batches, args.batch_steps, 2, end)
    own = {name for _, name, _ in args.provider} | {FUSED for text in args.only if text in FUSED}
    return 0 if all(own <= contest.entered.keys() for contest in contests.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
