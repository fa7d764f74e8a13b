"""One model and its providers: each is made, checked against one result, timed in turns, as rows.

A provider has ``image(batch, steps)``, ``step()`` and ``decode()``, as `bench.models.Ours` has. An
image is a "picture" in the rows.
"""

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.check import one_line
from bench.clock import Clock, Memory, OutOfTime
from bench.models import Model, Ours
from bench.timing import Spread, interleave

FUSED, EAGER, COMPILED = "minisd fused", "diffusers eager", "diffusers compiled"
SHARES = {"step": 0.25, "decode": 0.15, "picture": 0.6}  # of the time for the race


class Entrant(NamedTuple):
    """A provider that runs: its calls, their errors, and the bytes that it holds before them."""

    contender: object
    calls: dict[str, Callable[[], Tensor]]
    errors: dict[str, dict[str, str]]
    size: int


class Contest:
    """Rows go to ``add`` as they come."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype,
                 add: Callable[[dict], None]):
        self.model, self.device, self.dtype, self._add = model, device, dtype, add
        self.clock, self.entered = Clock(device), {}
        self.weights = model.weights(device, dtype)
        higher = torch.float64 if dtype == torch.float32 else torch.float32
        exact = Ours(model, self._cast(higher), "torch", device)
        # By default cuDNN uses TF32, which drops 13 of float32's 23 bits of mantissa.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.exact = {"picture": exact.image(1, model.steps), "step": exact.step()(),
                          "decode": exact.decode()()}

    def _cast(self, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
        return {part: {name: p.to(dtype) for name, p in tensors.items()}
                for part, tensors in self.weights.items()}

    def add(self, provider: str, what: str, unit: str = "", values: list[float] = (),
            **more) -> None:
        """A row: one value, or several as their spread."""
        spread = {}
        if values:
            spread = Spread.of(values if len(values) > 1 else 2 * values)._asdict()
        self._add({"model": self.model.name, "provider": provider, "what": what, "unit": unit,
                   "dtype": str(self.dtype).removeprefix("torch."),
                   **{key: f"{p:.5g}" for key, p in spread.items()}, **more})

    def enter(self, provider: str, make: Callable, limit: AbstractContextManager | None = None,
              ) -> None:
        """Make a provider and run it twice: rows of the seconds, the memory and the errors."""
        steps, memory = self.model.steps, Memory(self.device)
        try:
            with limit or nullcontext():
                load, contender = self.clock.of(make)
                size = memory.growth().get("memory", 0)
                calls = {"picture": partial(contender.image, 1, steps)}
                first, _ = self.clock.of(calls["picture"])
                memory.restart()
                errors = {"picture": self.errors("picture", calls["picture"]())}
                peaks = memory.peaks()
                for what in ("step", "decode"):
                    calls[what] = getattr(contender, what)()
                    errors[what] = self.errors(what, calls[what]())
        except (Exception, OutOfTime) as failure:
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
            found = {name: self.clock.sampler(entrant.calls[what])
                     for name, entrant in self.entered.items() if not names or name in names}
            fit = int(share * seconds / (sum(once for _, once in found.values()) or 1))
            samplers = {name: sample for name, (sample, _) in found.items()}
            times = interleave(samplers, max(2, min(rounds, fit)))
            scale, unit = (1, "s") if what == "picture" else (1e3, "ms")
            more = {"batch": 1} | ({"steps": self.model.steps} if what == "picture" else {})
            for name, samples in times.items():
                self.add(name, what, unit, [scale * t for t in samples], **more,
                         **self.entered[name].errors[what])
                if name != FUSED and FUSED in times:
                    ratios = [t / ours for t, ours in zip(samples, times[FUSED])]
                    self.add(name, f"{what} over fused", "1", ratios, **more)

    def batches(self, sizes: list[int], steps: int, rounds: int, late: Callable[[], bool]) -> None:
        """Images a second and the memory held, batch by batch."""
        for batch in sizes:
            for name, entrant in self.entered.items():
                if name == COMPILED:
                    self.add(name, "not run", batch=batch, note="compiled for single images")
                elif late():
                    self.add(name, "not run", batch=batch, note="the time was up (--minutes)")
                else:
                    self._batch(name, entrant, batch, steps, rounds)

    def _batch(self, name: str, entrant: Entrant, batch: int, steps: int, rounds: int) -> None:
        draw = partial(entrant.contender.image, batch, steps)
        try:
            entrant.contender.release()
            memory = Memory(self.device)
            draw()
            memory.restart()
            samples = [batch / self.clock.of(draw)[0] for _ in range(rounds)]
        except Exception as failure:
            return self.add(name, "not run", batch=batch, note=one_line(failure))
        self.add(name, "pictures/s", "1/s", samples, batch=batch, steps=steps)
        for what, peak in memory.peaks().items():
            if what == "memory":
                self.add(name, what, "MB", [(entrant.size + peak) / 1e6], batch=batch, steps=steps)

    def half(self) -> None:
        """The error of the image in float16, where float32 is timed."""
        ours = Ours(self.model, self._cast(torch.float16), "fused", self.device)
        errors = self.errors("picture", ours.image(1, self.model.steps))
        self.add(FUSED, "picture", batch=1, steps=self.model.steps, **errors, dtype="float16",
                 note="not timed")


def psnr(image: Tensor, exact: Tensor) -> float:
    """Decibels, of images in [0, 1]; infinite if they are equal."""
    error = (image.to(exact) - exact).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error) if error > 0 else math.nan
