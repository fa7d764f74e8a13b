"""Which launch setting is fastest on this device: every listed one, checked and then timed.

Only for who asks (--tune). A setting is listed whole, because its fields go together: on Hopper a
tile of 64 rows wants four warps, and one of 128 eight. It is checked against float64 before it is
timed, and one that does not compile, does not fit on the device or computes something else is
written down with its reason. Printed in the end are the rows to paste into launch.MEASURED.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from minisd_kernels.ops import launch
from minisd_kernels.ops.attention import _kernel
from minisd_kernels.ops.launch import Norm, Tile

from bench import timing
from bench.check import check, one_line, spread

SETTINGS = {
    "attention 32": [Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(64, 64, 4, 2),
                     Tile(64, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2),
                     Tile(128, 64, 8, 4), Tile(256, 64, 16, 3)],
    "attention 64": [Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2),
                     Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 4)],
    "attention 128": [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 4),
                      Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)],
    "one tile 32": [Tile(128, 128, 8, 1), Tile(128, 128, 4, 1), Tile(64, 128, 8, 1)],
    "one tile 64": [Tile(128, 128, 8, 1), Tile(64, 128, 8, 1)],
    "sliced 2": [Tile(64, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
                 Tile(64, 128, 8, 2), Tile(128, 128, 8, 2)],
    "group norm 0": [Norm(n, 1, w) for n, w in (
        (32768, 8), (16384, 16), (16384, 8), (8192, 16))],
    "group norm 1": [Norm(*setting) for setting in (
        (4096, 64, 8), (4096, 128, 4), (4096, 64, 4), (8192, 64, 8), (8192, 128, 8), (2048, 64, 4),
        (2048, 64, 2), (2048, 32, 2), (2048, 128, 2), (8192, 64, 4))],
    "layer norm 0": [Norm(1024, 1, 4), Norm(1024, 1, 2), Norm(2048, 1, 4), Norm(2048, 1, 8)],
    "geglu 0": [Norm(1024, 256, 4), Norm(1024, 256, 2), Norm(4096, 256, 4), Norm(4096, 256, 8),
                Norm(2048, 512, 4)],
}
STEPS = 50  # of a picture
MOST_CASES = 6  # of those that a setting serves, the ones with most work for a picture
GAIN = 0.99  # another setting must take less than this of the time


class Setup(NamedTuple):
    """What every candidate has in common."""

    device: torch.device
    dtype: torch.dtype
    rounds: int  # samples of each


@contextmanager
def using(key: tuple, setting: NamedTuple) -> Iterator[None]:
    """Inside, plans for ``key`` take that setting, also where another one was measured."""
    measured = {row: setting for row in launch.MEASURED if row[1:] == key}
    with patch.dict(launch.DEFAULT, {key: setting}), patch.dict(launch.MEASURED, measured):
        yield


def served(cases: list, dtype: torch.dtype) -> dict[tuple, list]:
    """Setting -> the heaviest cases that use it, by planning each on tensors without memory."""
    found: dict[tuple, list] = {}
    before = launch.setting
    for case in cases:
        if getattr(case, "packed", False):
            continue  # other strides alone
        keys: list[tuple] = []
        with patch.object(launch, "setting", lambda *args: keys.append(args[1:]) or before(*args)):
            case.ours(*case.inputs(torch.device("meta"), dtype))
        found.setdefault(keys[-1], []).append(case)  # what decided; a GroupNorm asks twice
    return {key: heaviest(mine, dtype)[:MOST_CASES] for key, mine in found.items()}


def weight(case) -> int:
    """How often it runs for one picture."""
    return case.calls * (1 if case.model == "VAE" else STEPS)


def heaviest(cases: list, dtype: torch.dtype) -> list:
    """By the work for one picture: operations in attention, bytes elsewhere."""
    def work(case) -> int:
        cost = case.cost(dtype.itemsize)
        return weight(case) * (cost.flops if case.rate == "TFLOP/s" else cost.bytes)

    return sorted(cases, key=work, reverse=True)


def candidates(key: tuple, device: torch.device) -> list[NamedTuple]:
    """The setting of today first, then those listed."""
    return list(dict.fromkeys([launch.setting(device, *key),
                               *SETTINGS.get(" ".join(map(str, key)), [])]))


def wrong(key: tuple, setting: NamedTuple, cases: list, setup: Setup) -> tuple:
    """(key, setting, why it cannot be taken): empty if every case compiles, runs and is right."""
    try:
        with using(key, setting):
            for case in cases:
                verdict = check(case, setup.device, setup.dtype)
                if not verdict.ok:
                    return key, setting, f"wrong by {verdict.ours:.3g} at {case.label}"
    except Exception as failure:  # out of resources, a compiler's error, a launch that fails
        return key, setting, one_line(failure, f"at {case.label}")
    return key, setting, ""


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


def paste(key: tuple, times: dict[NamedTuple, float], name: str) -> str:
    """The line for launch.MEASURED, of seconds by setting, today's first; empty where none of the
    others is better."""
    today, best = next(iter(times)), min(times, key=times.get)
    if not times[best] < GAIN * times[today]:
        return ""
    value = f"{type(best).__name__}({', '.join(map(str, best))})"
    why = f"# {1e6 * times[best]:.1f} us of a picture, was {1e6 * times[today]:.1f}"
    return f'    ("{name}", "{key[0]}", {key[1]}): {value},  {why}'


def tune(cases: list, setup: Setup, deadline: float, workers: int,
         add: Callable[[dict], None]) -> int:
    """Check every candidate, in processes where there are ``workers``; then time those of one key
    after the other, until the time is up."""
    device = setup.device
    if why := launch.refusal(_kernel, x=torch.empty(1, device=device)):
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

    settings, lines = served(cases, setup.dtype), []
    jobs = [(key, setting, mine, setup) for key, mine in settings.items()
            for setting in candidates(key, device)]
    with spread(wrong, jobs, workers, deadline) as results:
        reasons = {(key, setting): why for key, setting, why in results}
    for key, mine in settings.items():
        every = [setting for setting in candidates(key, device) if (key, setting) in reasons]
        good = [setting for setting in every if not reasons[key, setting]]
        for setting in every:
            if setting not in good:
                note(key, setting, None, reasons[key, setting])
        if time.monotonic() > deadline or good[:1] != every[:1]:
            print(f"not timed: {key}; the time was up (--minutes), or today's setting is wrong")
            continue
        try:
            times = compare(key, good, mine, setup)
        except Exception as failure:  # a fault on the device ends every later launch too
            print(f"ends here: {one_line(failure)}")
            break
        for setting, seconds in times.items():
            note(key, setting, seconds, "")
        if line := paste(key, times, name):
            lines.append(line)
    print("\nfor launch.MEASURED:" if lines else "\nno setting was better", *lines, sep="\n")
    return 0
