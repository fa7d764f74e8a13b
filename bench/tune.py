"""Which launch setting is fastest on this device: a walk from each setting over its neighbours.

Only for who asks (--tune). A neighbour has one number doubled or halved (stages: one more or one
less). It is checked against float64 before it is timed, and one that does not compile, does not fit
on the device or computes something else is written down with its reason. Printed in the end are the
rows to paste into launch.MEASURED.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from minisd_kernels import group_norm_silu, launch

from bench import timing
from bench.check import check, one_line
from bench.group_norm import AllGroupNorms

# What a field may be, at least and at most.
RANGES = {
    "queries": (16, 256), "keys": (16, 128), "warps": (1, 16), "stages": (1, 5),
    "elements": (256, 32768), "groups": (1, 32),
    "LARGEST_IN_ONE_LAUNCH": (1024, 262144), "SPLITS": (8, 256),
}
CONSTANTS = ("LARGEST_IN_ONE_LAUNCH", "SPLITS")  # of group_norm_silu
STEPS = 50  # of a picture
MOST_CASES = 6  # of those that a setting serves, the ones with most work for a picture
MOST_NORMS = 24  # and for the constants of GroupNorm, on which side of them a size falls matters
GAIN = 0.99  # another setting must take less than this of the time


class Setup(NamedTuple):
    """What every candidate has in common."""

    device: torch.device
    dtype: torch.dtype
    rounds: int  # samples of each


class Constant(NamedTuple):
    """A module's constant as a setting of one field."""

    name: str
    value: int


@contextmanager
def using(key: tuple, setting: NamedTuple) -> Iterator[None]:
    """Inside, plans for ``key`` take that setting; all others what they would."""
    if isinstance(setting, Constant):
        change = patch.object(group_norm_silu, setting.name, setting.value)
    else:
        before = launch.setting

        def chosen(device: torch.device, kernel: str, size: int) -> NamedTuple:
            return setting if (kernel, size) == key else before(device, kernel, size)

        change = patch.object(launch, "setting", chosen)
    with change:
        yield


def served(cases: list, dtype: torch.dtype) -> dict[tuple, list]:
    """Setting -> the cases that use it, by planning each on tensors without memory."""
    found: dict[tuple, list] = {}
    before = launch.setting
    cases = [case for case in cases  # rows of many calls and other strides aside
             if not isinstance(case, AllGroupNorms) and not getattr(case, "packed", False)]
    for case in cases:
        keys: list[tuple] = []
        with patch.object(launch, "setting", lambda *args: keys.append(args[1:]) or before(*args)):
            case.ours(*case.inputs(torch.device("meta"), dtype))
        for key in dict.fromkeys(keys):
            found.setdefault(key, []).append(case)
    if norms := [case for case in cases if case.kernel == "group_norm_silu"]:
        found |= {("group norm", name): norms for name in CONSTANTS}
    most = {key: MOST_NORMS if key[1] in CONSTANTS else MOST_CASES for key in found}
    return {key: heaviest(mine, dtype)[: most[key]] for key, mine in found.items()}


def weight(case) -> int:
    """How often it runs for one picture."""
    return case.calls * (1 if case.model == "VAE" else STEPS)


def heaviest(cases: list, dtype: torch.dtype) -> list:
    """By the work for one picture: operations in attention, bytes in GroupNorm."""
    def work(case) -> int:
        cost = case.cost(dtype.itemsize)
        return weight(case) * (cost.flops if case.rate == "TFLOP/s" else cost.bytes)

    return sorted(cases, key=work, reverse=True)


def current(key: tuple, device: torch.device) -> NamedTuple:
    if key[1] in CONSTANTS:
        return Constant(key[1], getattr(group_norm_silu, key[1]))
    return launch.setting(device, *key)


def neighbours(key: tuple, setting: NamedTuple) -> list[NamedTuple]:
    """One field changed, inside its range."""
    if isinstance(setting, Constant):
        least, most = RANGES[setting.name]
        values = (setting.value // 2, setting.value * 2)
        return [setting._replace(value=v) for v in values if least <= v <= most]
    found = []
    for name, value in setting._asdict().items():
        if (key[0], name) == ("one tile", "keys"):
            continue  # must hold as many keys as are ever one tile
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        least, most = RANGES[name]
        found += [setting._replace(**{name: v}) for v in steps if least <= v <= most]
    return found


def wrong(key: tuple, setting: NamedTuple, cases: list, setup: Setup) -> str:
    """Why the setting cannot be taken; empty if every case compiles, runs and is right."""
    try:
        with using(key, setting):
            for case in cases:
                verdict = check(case, setup.device, setup.dtype)
                if not verdict.ok:
                    return f"wrong by {verdict.ours:.3g} at {case.label}"
    except Exception as failure:  # out of resources, a compiler's error, a launch that fails
        return one_line(failure, f"at {case.label}")
    return ""


def compare(key: tuple, settings: list[NamedTuple], cases: list,
            setup: Setup) -> dict[NamedTuple, float]:
    """Seconds that each setting takes for its cases in one picture, timed in turns."""
    device, dtype, rounds = setup
    total = dict.fromkeys(settings, 0.0)
    for case in cases:
        sets = timing.input_sets(device, case.cost(dtype.itemsize).bytes)
        inputs = [case.inputs(device, dtype) for _ in range(sets)]

        def call(setting: NamedTuple, *args) -> object:
            with using(key, setting):
                return case.ours(*args)

        samplers = {setting: timing.sampler([partial(call, setting, *each) for each in inputs],
                                            device) for setting in settings}
        for setting, samples in timing.interleave(samplers, rounds).items():
            total[setting] += weight(case) * timing.Spread.of(samples).p50
    return total


class Walk(NamedTuple):
    """Where a walk ended, and the seconds of a picture at its two ends, in the same turns."""

    best: NamedTuple
    before: float
    after: float


def walk(key: tuple, cases: list, setup: Setup, deadline: float,
         check_all: Callable[[list[tuple]], list[str]], note: Callable[..., None]) -> Walk:
    """From the current setting to the best neighbour, at least once, until none is better or time
    is up."""
    first = best = current(key, setup.device)
    seen, found = {first}, Walk(first, 0.0, 0.0)
    while True:
        new = [setting for setting in neighbours(key, best) if setting not in seen]
        seen |= set(new)
        reasons = dict(zip(new, check_all([(key, s, cases, setup) for s in new])))
        good = [setting for setting in new if not reasons[setting]]
        times = compare(key, list(dict.fromkeys([first, best, *good])), cases, setup)
        for setting in [*times, *(s for s in new if reasons[s])]:
            note(key, setting, times.get(setting), reasons.get(setting, ""))
        winner = min(times, key=times.get)
        if not times[winner] < GAIN * times[best]:
            return found
        best = winner
        found = Walk(best, times[first], times[best])
        if time.monotonic() > deadline:
            return found


def paste(key: tuple, found: Walk, device_name: str) -> str:
    """The line for launch.MEASURED, or for the module's constant."""
    why = f"# {1e6 * found.after:.1f} us of a picture, was {1e6 * found.before:.1f}"
    if isinstance(found.best, Constant):
        return f"{found.best.name} = {found.best.value}  {why}"
    value = f"{type(found.best).__name__}({', '.join(map(str, found.best))})"
    return f'    ("{device_name}", "{key[0]}", {key[1]}): {value},  {why}'


@contextmanager
def checker(workers: int) -> Iterator[Callable[[list[tuple]], list[str]]]:
    """`wrong` of many jobs; in other processes, so that their compiling does not take turns."""
    if not workers:
        yield lambda jobs: [wrong(*job) for job in jobs]
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield lambda jobs: [job.result() for job in [pool.submit(wrong, *job) for job in jobs]]


def tune(cases: list, setup: Setup, deadline: float, workers: int,
         add: Callable[[dict], None]) -> int:
    """Walk from every setting that the cases use, each for its share of the time."""
    device = setup.device
    if why := launch.refusal(group_norm_silu._one_launch_kernel, x=torch.empty(1, device=device)):
        print(f"nothing to tune: {why}")
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"

    def note(key: tuple, setting: NamedTuple, seconds: float | None, why: str) -> None:
        row = {"kernel": " ".join(map(str, key)), "provider": str(setting), "note": why,
               "shape": "its heaviest", "dtype": str(setup.dtype).removeprefix("torch.")}
        timed = {"metric": "time of a picture", "unit": "us", "p50": f"{1e6 * (seconds or 0):.4g}"}
        add(row | (timed if seconds else {"metric": "not timed"}))
        print(f"  {row['kernel']:16} {row['provider']:58} {timed['p50'] if seconds else why}",
              flush=True)

    lines, settings = [], served(cases, setup.dtype)
    with checker(workers) as check_all:
        for i, (key, mine) in enumerate(settings.items()):
            if (now := time.monotonic()) > deadline and i:
                print(f"not tried, the time was up (--minutes): {list(settings)[i:]}")
                break
            share = now + (deadline - now) / (len(settings) - i)
            try:
                found = walk(key, mine, setup, share, check_all, note)
            except Exception as failure:  # a fault on the device ends every later launch too
                print(f"ends here: {one_line(failure)}")
                break
            if found.after:
                lines.append(paste(key, found, name))
    print("\nfor launch.MEASURED:" if lines else "\nno setting was better", *lines, sep="\n")
    return 0
