"""The Triton kernels at every size of Stable Diffusion: checked, then timed beside their peers.

    python -m bench.kernels                             # everything, on the GPU if there is one
    python -m bench.kernels --only "SD1.5 2x8"          # the sizes whose name has this in it
    python -m bench.kernels --provider attention=my_module:my_attention
    python -m bench.kernels --tune                      # every launch setting of launch.CANDIDATES

A provider is a function with the signature of a field of `minisd.Ops`. One of your own is checked
in every dtype and timed beside the others, at the sizes of its op. It goes into a model by
`minisd.load(ops=replace(TORCH, attention=my_attention))`.

Rows: equality.csv, every size in float16, bfloat16 and float32 against float64; kernels.csv, the
times; tune.csv. If matplotlib is installed, plots the share of the limit that every provider
reaches. Rows of a part (--only, --provider) are kept only with --out.

Without a GPU a few small sizes are timed on the CPU, where our kernels do not run and the rows say
why. With TRITON_INTERPRET=1 kernels run, on tiny sizes, to test them: those times are no
measurements, and are kept only with --out. Exit code 1 if a kernel was wrong. Needs triton.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from minisd_kernels.ops import launch

from bench import cases, harness, providers, timing
from bench.cases import Case
from bench.harness import INTERPRETED, LATE, SHARE, Rows, one_line
from bench.providers import OURS
from minisd.backends import kernels

RUNS = harness.GPU or INTERPRETED  # whether our kernels do

# --- a size: checked, timed in turns, as rows -----------------------------------------------------


def measure(case: Case, device: torch.device, dtype: torch.dtype, rounds: int,
            checked: dict[str, Callable], others: dict[str, Callable],
            compiling: timing.Budget, limits: timing.Limits) -> list[dict]:
    """The rows of one size. Of the ``checked`` providers one that is wrong is not timed; of the
    ``others`` the error is noted. The peers' times are compared with the first one's."""
    sets = timing.input_sets(device, case.cost(dtype.itemsize).bytes)
    inputs = [case.inputs(device, dtype) for _ in range(sets)]
    exact = case.exact(*inputs[0])
    samples, errors, found = {}, {}, []
    what = {"kernel": case.op, "shape": case.label, "dtype": str(dtype).removeprefix("torch.")}
    for name, function in (checked | others).items():
        call = partial(case.call, function)
        # scaled_dot_product_attention warns of the reason for which a backend rejects a call.
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                if name in checked:
                    verdict = harness.verdict(case, function, inputs[0], exact)
                    if not verdict.ok:
                        raise ArithmeticError(
                            f"wrong by {verdict.error:.3g}; {verdict.bound:.3g} is allowed")
                    errors[name] = verdict.error
                else:
                    with compiling if name.startswith("compiled") else nullcontext():
                        errors[name] = harness.error(call(*inputs[0]), exact)
                samples[name] = timing.graph_sampler(
                    [partial(call, *each) for each in inputs], device).sample
            except (Exception, timing.OutOfTime) as failure:
                note = one_line(failure, *(str(w.message) for w in said))
                found.append(what | {"provider": name, "metric": "not timed", "note": note})
                if not harness.alive(device):
                    raise
    times = timing.interleave(samples, rounds)
    return time_rows(case, dtype, times, errors, next(iter(checked)), limits) + found


def time_rows(case: Case, dtype: torch.dtype, times: dict[str, list[float]],
              errors: dict[str, float], base: str, limits: timing.Limits) -> list[dict]:
    """The rows of kernels.csv: time, rate, share of the limit, and the time over the base's."""
    cost = case.cost(dtype.itemsize)
    least, waits_for = limits.floor(cost)
    work = cost.flops / 1e12 if case.rate == "TFLOP/s" else cost.bytes / 1e9
    what = {"kernel": case.op, "shape": case.label, "dtype": str(dtype).removeprefix("torch.")}
    over, found = harness.ratios(times, base), []
    for name, samples in times.items():
        metrics = {("time", "us"): [1e6 * t for t in samples],
                   ("rate", case.rate): [work / t for t in samples],
                   (f"{SHARE} ({waits_for})", "1"): [least / t for t in samples]}
        if name in over:
            metrics[f"time over {base}'s", "1"] = over[name]
        found += [what | harness.percentiles(values) | {
            "provider": name, "metric": metric, "unit": unit, "max_err": f"{errors[name]:.3g}"}
            for (metric, unit), values in metrics.items()]
    return found


def time_all(chosen: list[Case], device: torch.device, dtype: torch.dtype, rounds: int,
             deadline: float, compiling: timing.Budget, rows: Rows,
             mine: list[tuple[str, str, Callable]] = ()) -> bool:
    """The rows of every case; cases left when the time is up get a row that says so. Returns
    whether every kernel of ours, or of the caller's own, was timed at every size."""
    limits, right = timing.limits(device), True
    print(f"measured here: {limits.flops / 1e12:.3g} TFLOP/s, {limits.bytes / 1e9:.4g} GB/s; "
          f"computed: {limits.exponentials / 1e12:.3g} T exponentials/s")
    for case in chosen:
        ours = {OURS: getattr(kernels(), case.op)}
        checked = {name: function for op, name, function in mine if op == case.op} or ours
        try:
            if time.monotonic() > deadline:
                raise TimeoutError(LATE)
            others = ours | providers.peers(case, device)
            found = measure(case, device, dtype, rounds, checked, others, compiling, limits)
        except Exception as failure:  # out of memory, for example: the other sizes go on
            found = [{"kernel": case.op, "shape": case.label, "metric": "not timed",
                      "provider": "" if isinstance(failure, TimeoutError) else next(iter(checked)),
                      "note": one_line(failure)}]
        rows.add("kernels", *found)
        show(found)
        right &= not any(row["metric"] == "not timed" and row["provider"] in checked
                         for row in found)
        if not harness.alive(device):
            break
    return right


def show(found: list[dict]) -> None:
    """Print the rows of one size; "x" is the time over that of the first provider."""
    print(f"\n{found[0]['kernel']} {found[0]['shape']} {found[0].get('dtype', '')}")
    for name in dict.fromkeys(row["provider"] for row in found):
        mine = {row["metric"].partition(" (")[0]: row for row in found if row["provider"] == name}
        if "not timed" in mine:
            print(f"  {name:24} not timed: {mine['not timed']['note']}")
            continue
        took, share = mine["time"], float(mine[SHARE]["p50"])
        over = [f", {row['p50']}x" for what, row in mine.items() if what.startswith("time over")]
        print(f"  {name:24} {took['p50']:>10} us ({took['p20']} to {took['p80']}), "
              f"{share:.0%} of the limit, error {took['max_err']}{''.join(over)}")


# --- launch settings ------------------------------------------------------------------------------


def served(chosen: list[Case], dtype: torch.dtype) -> dict[tuple[str, int], list[Case]]:
    """The cases that use each setting, by planning them on tensors without memory; those with most
    work for an image first."""
    def work(case: Case) -> int:
        cost = case.cost(dtype.itemsize)
        return weight(case) * (cost.flops if case.rate == "TFLOP/s" else cost.bytes)

    found: dict[tuple[str, int], list[Case]] = {}
    before = launch.setting
    for case in sorted(chosen, key=work, reverse=True):
        if getattr(case, "packed", False):
            continue  # other strides alone
        keys: list[tuple[str, int]] = []
        with patch.object(launch, "setting", lambda *args: keys.append(args[1:]) or before(*args)):
            case.call(getattr(kernels(), case.op), *case.inputs(torch.device("meta"), dtype))
        found.setdefault(keys[-1], []).append(case)  # what decided; a GroupNorm asks twice
    return found


def weight(case: Case) -> int:
    """How often it runs for one image of 50 steps."""
    return case.calls * (1 if case.model == "VAE" else 50)


def tune(chosen: list[Case], device: torch.device, dtype: torch.dtype, rounds: int,
         deadline: float, rows: Rows) -> None:
    """Every candidate is a provider. The present setting comes first; the row of each is the time
    of its six heaviest cases in an image. Prints what to put into launch.MEASURED."""
    limits, unlimited = timing.Limits(*3 * [math.inf]), timing.Budget(math.inf, "")
    for key, mine in served(chosen, dtype).items():
        today = launch.setting(device, *key)
        settings = {str(each): each for each in [today, *launch.CANDIDATES.get(key, [])]}
        total, notes = dict.fromkeys(settings, 0.0), {}
        for case in mine[:6]:
            if time.monotonic() > deadline:
                notes |= dict.fromkeys(settings, LATE)
                break
            good = {name: partial(providers.tuned, key, setting, case.op)
                    for name, setting in settings.items() if name not in notes}
            for row in measure(case, device, dtype, rounds, good, {}, unlimited, limits):
                if row["metric"] == "time":
                    total[row["provider"]] += weight(case) * float(row["p50"])
                elif row["metric"] == "not timed":
                    notes[row["provider"]] = f"{row['note']} at {case.label}"
        what = {"kernel": " ".join(map(str, key)), "shape": "its heaviest", "dtype": str(dtype)[6:]}
        rows.add("tune", *(what | {"provider": name} | (
            {"metric": "not timed", "note": notes[name]} if name in notes else
            {"metric": "time of a picture", "unit": "us", "p50": f"{total[name]:.4g}"})
            for name in settings))
        times = {name: seconds for name, seconds in total.items() if name not in notes}
        if str(today) in times:
            best = min(times, key=times.get)
            gain = times[best] / times[str(today)]
            if gain < 0.99:  # nearer than that two runs differ
                print(f"for launch.MEASURED: {(rows.machine['device'], *key)}: {settings[best]}, "
                      f"{gain:.3f} of today's time")


# --- the plot -------------------------------------------------------------------------------------


def plot(rows: list[dict], folder: Path, title: str) -> str:
    """The share of the limit that every provider reaches, sizes from top to bottom, p20 to p80 as a
    line; a file for each kernel in ``folder``. Returns a sentence that names the files."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no plot: pip install 'minisd[bench]' brings matplotlib"
    shares, drawn = [row for row in rows if row.get("metric", "").startswith(SHARE)], []
    for kernel in dict.fromkeys(row["kernel"] for row in shares):
        mine = [row for row in shares if row["kernel"] == kernel]
        sizes = list(dict.fromkeys(row["shape"] for row in mine))[::-1]
        axes = Figure(figsize=(9, 1.5 + 0.25 * len(sizes)), layout="constrained").subplots()
        for provider in dict.fromkeys(row["provider"] for row in mine):
            low, middle, high, at = zip(*((*(float(row[p]) for p in harness.TIMES),
                                           sizes.index(row["shape"]))
                                          for row in mine if row["provider"] == provider))
            marks = axes.plot(middle, at, "D" if provider == OURS else "o", label=provider)
            axes.hlines(at, low, high, color=marks[0].get_color())
        axes.set_yticks(range(len(sizes)), sizes)
        axes.set(xlim=(0, None), title=f"{kernel}, {title}",
                 xlabel=f"{SHARE} (1 is as fast as can be)")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize="small")
        drawn.append(str(folder / f"{kernel}.png"))
        axes.figure.savefig(drawn[-1], dpi=110)
    return f"drawn: {', '.join(drawn)}" if drawn else "no plot: nothing was timed"


# --- the command ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.options(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", default=[""], metavar="TEXT",
        help='sizes with one of these in their name, as in "attention SD1.5"')
    add("--provider", type=providers.own, action="append", default=[], metavar="OP=MODULE:FUNCTION",
        help="a function of your own")
    add("--dtype", choices=("float16", "bfloat16", "float32"),
        help="of the times (default: float16; float32 on a CPU)")
    add("--rounds", type=harness.positive, default=15,
        help="samples of each provider (default: %(default)s)")
    add("--compile-minutes", type=float, help="for torch.compile (default: 2; 0 on a CPU)")
    add("--workers", type=int, default=0, help="processes that check")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--check", action="store_true", help="time nothing")
    part.add_argument("--time", action="store_true", help="check the timed dtype alone")
    part.add_argument("--tune", action="store_true", help="time launch settings instead")
    return parser.parse_args(argv)


def check_all(args: argparse.Namespace, chosen: list[Case], device: torch.device, deadline: float,
              rows: Rows) -> bool:
    """Our kernels where they run, as rows of equality.csv; or the caller's own, as lines."""
    def add(name: str, row: dict) -> None:
        if name == OURS:
            rows.add("equality", row)
        print("right" if row["ok"] else "WRONG", name, row["kernel"], row["shape"], row["dtype"],
              row.get("note") or f"error {row['max_err']}, torch's {row['torch_err']}", flush=True)

    # The interpreter multiplies the bits of bfloat16 as integers.
    dtypes = [d for d in launch.DTYPES if not (INTERPRETED and d == torch.bfloat16)]
    functions = args.provider or ([(op, OURS, None) for op in providers.PEERS] if RUNS else [])
    right = True
    for mine in dict.fromkeys(name for _, name, _ in functions):
        jobs = [(case, device, dtype, function) for dtype in dtypes
                for op, name, function in functions for case in chosen
                if (op, name) == (case.op, mine)]
        right &= harness.equality(jobs, partial(add, mine), args.workers, deadline)
    return right


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = harness.device()
    gpu = device.type == "cuda"
    chosen = cases.tiny() if INTERPRETED else cases.full() if gpu else cases.small()
    if not RUNS:
        print("there is no GPU here: small sizes on the CPU")
    ops = [op for op, *_ in args.provider] or providers.PEERS
    chosen = [case for case in chosen if case.op in ops
              and any(text in f"{case.op} {case.label}" for text in args.only)]
    if not chosen:
        raise SystemExit(f"no size has any of {args.only} in its name")
    part = INTERPRETED or args.provider or args.only != [""]
    kept = args.out or (None if part else harness.RESULTS)
    rows = Rows(kept, harness.machine(device, args.commit, args.date))
    print(*(f"{key} {value}" for key, value in rows.machine.items()), sep=", ")
    dtype = getattr(torch, args.dtype or ("float16" if RUNS else "float32"))
    minutes, start = 6.0 if args.minutes is None else args.minutes, time.monotonic()
    deadline = start + 60 * minutes
    if args.tune:
        if not RUNS:
            raise SystemExit("nothing to tune: the kernels run on a GPU")
        tune(chosen, device, dtype, args.rounds, deadline, rows)
        return 0
    share = 60 if args.check else 20  # checking takes at most a third of the time
    right = args.time or check_all(args, chosen, device, start + share * minutes, rows)
    if not args.check:
        seconds = 60 * ((2 if gpu else 0) if args.compile_minutes is None else args.compile_minutes)
        budget = timing.Budget(seconds, "the time for compiling was up (--compile-minutes)")
        timed = time_all(chosen, device, dtype, args.rounds, deadline, budget, rows, args.provider)
        right &= timed or not (RUNS or args.provider)
        if kept:
            print(plot(rows.all, kept, f"{rows.machine['device']} {rows.machine['date'][:10]}"))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
