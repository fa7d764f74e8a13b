"""One size and every provider that can compute it: checked on one set of inputs, timed in turns."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench import timing
from bench.check import alive, error, one_line, verdict
from bench.group_norm import Compiler

OURS = "minisd"


class Measured(NamedTuple):
    """By provider: the seconds of each sample, and the largest error; or the reason for none."""

    case: NamedTuple
    dtype: torch.dtype
    times: dict[str, list[float]]
    errors: dict[str, float]
    reasons: dict[str, str]

    def over_ours(self, name: str) -> list[float] | None:
        """A peer's time over the kernel's, round by round."""
        if name == OURS or OURS not in self.times:
            return None
        return [peer / our for peer, our in zip(self.times[name], self.times[OURS])]


def measure(case, device: torch.device, dtype: torch.dtype, compiler: Compiler,
            rounds: int) -> Measured:
    """A kernel that is wrong is not timed; a peer that is wrong is timed, and its error noted."""
    sets = timing.input_sets(device, case.cost(dtype.itemsize).bytes)
    inputs = [case.inputs(device, dtype) for _ in range(sets)]
    exact = case.exact(*inputs[0])
    samplers, errors, reasons = {}, {}, {}
    for name, call in {OURS: case.ours, **case.peers(device, compiler)}.items():
        if isinstance(call, str):
            reasons[name] = call
            continue
        # scaled_dot_product_attention warns of the reason for which a backend rejects a call.
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                if name == OURS:
                    errors[name] = checked(case, inputs[0], exact, dtype)
                else:
                    errors[name] = error(call(*inputs[0]), exact)
                samplers[name] = timing.sampler([partial(call, *each) for each in inputs], device)
            except Exception as failure:
                reasons[name] = one_line(failure, *(str(w.message) for w in said))
                if not alive(device):
                    raise
    return Measured(case, dtype, timing.interleave(samplers, rounds), errors, reasons)


def checked(case, inputs: tuple, exact: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """The kernel's error. Raises ArithmeticError if it exceeds the bound."""
    found = verdict(case, inputs, exact, dtype)
    if not found.ok:
        raise ArithmeticError(f"wrong by {found.ours:.3g}; {found.bound:.3g} is allowed")
    return found.ours


def rows(measured: Measured, limits: timing.Limits) -> list[dict]:
    """The rows of kernels.csv: time, rate, share of the limit, and a peer's time over ours."""
    case, dtype, times, errors, reasons = measured
    cost = case.cost(dtype.itemsize)
    least, waits_for = limits.floor(cost)
    work = cost.flops / 1e12 if case.rate == "TFLOP/s" else cost.bytes / 1e9
    what = {"kernel": case.kernel, "shape": case.label, "dtype": str(dtype).removeprefix("torch.")}
    found = []
    for name, samples in times.items():
        metrics = {("time", "us"): [1e6 * t for t in samples],
                   ("rate", case.rate): [work / t for t in samples],
                   (f"share of the limit ({waits_for})", "1"): [least / t for t in samples]}
        if ratios := measured.over_ours(name):
            metrics["time over minisd's", "1"] = ratios
        for (metric, unit), values in metrics.items():
            spread = {key: f"{p:.4g}" for key, p in timing.Spread.of(values)._asdict().items()}
            found.append(what | spread | {"provider": name, "metric": metric, "unit": unit,
                                          "max_err": f"{errors[name]:.3g}"})
    found += [what | {"provider": name, "metric": "not timed", "note": why}
              for name, why in reasons.items()]
    return found


def show(measured: Measured, limits: timing.Limits) -> None:
    """Print them."""
    case, dtype, times, errors, reasons = measured
    least, waits_for = limits.floor(case.cost(dtype.itemsize))
    print(f"\n{case.kernel}, {case.label}, {dtype}: at least {1e6 * least:.1f} us ({waits_for}); "
          f"{case.calls} a forward")
    for name, samples in times.items():
        low, middle, high = timing.Spread.of([1e6 * t for t in samples])
        ratios = measured.over_ours(name)
        times_ours = f", {timing.Spread.of(ratios).p50:.2f}x ours" if ratios else ""
        print(f"  {name:24} {middle:10.1f} us ({low:.1f} to {high:.1f}), "
              f"{1e8 * least / middle:3.0f}% of the limit, error {errors[name]:.1e}{times_ours}")
    for name, why in reasons.items():
        print(f"  {name:24} not timed: {why}")
