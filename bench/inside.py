"""Which kernels a fused step and a decoding run, and how fast they are with one change.

`CHANGES` were predicted to be faster, were slower on an H200 (bench/NOTES.md), and may be faster on
another GPU or with other libraries. Each is tried alone; its gain is the predicted milliseconds of
a step that it saves.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from minisd_kernels.fused import unet as fused_unet
from minisd_kernels.ops.launch import Tile
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import tune
from bench.check import one_line
from bench.contest import FUSED, Contest
from minisd.models.ops import TORCH


class Change(NamedTuple):
    """``made(model)`` is a context in which the fused model runs with the change."""

    label: str
    gain: str  # milliseconds of SD1.5's step, predicted
    made: Callable[[object], AbstractContextManager]
    decodes: bool = False  # whether the decoder changes too
    compiles: bool = False  # whether it launches kernels that no other change does


def tile(piece: int, *setting: int) -> Change:
    return Change(f"attention {piece}: {setting}", "0.05 to 0.3",
                  lambda model: tune.using(("attention", piece), Tile(*setting)), compiles=True)


@contextmanager
def functions(model, **others: Callable) -> Iterator[None]:
    """Other functions in the transformer blocks of the fused UNet."""
    layers = model.sd._fused().unet.attentions
    before = layers[0].ops
    for layer in layers:
        layer.ops = replace(before, **others)
    try:
        yield
    finally:
        for layer in layers:
            layer.ops = before


def by_sdpa(backend: SDPBackend, *args) -> Tensor:
    with sdpa_kernel(backend):
        return TORCH.attention(*args)


def doubled(self: fused_unet.Up, s: fused_unet.Pending, size=None) -> fused_unet.Pending:
    """`fused_unet.Up.forward` unfused: nearest-neighbour doubling, then a 3x3 convolution."""
    x, phases = fused_unet.add_up(*s), self.phases.weight
    if not hasattr(self, "taken_apart"):
        undo = phases.new_tensor([[0, 0, 0, 1], [-1, 1, 0, 0], [1, 0, 0, 0]])  # PHASES undone
        weight = torch.einsum("ia,jb,coab->ocij", undo, undo, phases)
        self.taken_apart = weight.contiguous(memory_format=torch.channels_last)
    x = F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest")
    return fused_unet.Pending(F.conv2d(x, self.taken_apart, padding=1), self.bias, None)


CHANGES = [
    Change("as it is", "", lambda model: nullcontext(), True),
    Change("cudnn.benchmark, deterministic", "0 to 0.7", lambda model: torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=True, allow_tf32=True), True),
    Change("doubled, then a 3x3 convolution", "-0.1 to 0.1",
           lambda model: patch.object(fused_unet.Up, "forward", doubled), True),
    tile(32, 64, 128, 4, 2), tile(32, 64, 64, 4, 3), tile(64, 64, 128, 4, 2),
    tile(128, 64, 64, 4, 2),
    Change("attention by cuDNN", "-0.5", lambda model: functions(
        model, attention=partial(by_sdpa, SDPBackend.CUDNN_ATTENTION))),
    Change("attention by flash", "-0.5", lambda model: functions(
        model, attention=partial(by_sdpa, SDPBackend.FLASH_ATTENTION))),
    Change("layer_norm by torch", "-0.3",
           lambda model: functions(model, layer_norm=TORCH.layer_norm)),
    Change("geglu by torch", "-0.3", lambda model: functions(model, geglu=TORCH.geglu)),
    Change("as it is, again", "", lambda model: nullcontext(), True),
]


def try_all(contest: Contest, late: Callable[[], bool], changes: list[Change] = CHANGES) -> None:
    """A row for the step with each change, and for the decoding where it changes too."""
    ours = contest.entered[FUSED].contender
    for change in changes:
        for what in ("step", "decode")[: 1 + change.decodes]:
            note = f"{change.label}; predicted {change.gain or 'nothing'}"
            if late():
                contest.add(FUSED, f"A/B {what} not run", note=f"{note}: the time was up")
                continue
            ours.release()
            try:
                with change.made(ours):
                    call = getattr(ours, what)()
                    for _ in range(3):
                        result = call()
                    error = contest.errors(what, result)
                    sample, _ = contest.clock.sampler(call)
                    samples = [1e3 * sample() for _ in range(5)]
            except Exception as failure:
                contest.add(FUSED, f"A/B {what} not run", note=f"{note}: {one_line(failure)}")
                continue
            contest.add(FUSED, f"A/B {what}", "ms", samples, batch=1, note=note, **error)
    ours.release()


def profile(contest: Contest, path: Path, most: int = 70) -> None:
    """The kernels of every provider's step and decoding, added to a text file."""
    activities = [torch.profiler.ProfilerActivity.CUDA if contest.device.type == "cuda"
                  else torch.profiler.ProfilerActivity.CPU]
    for name, entrant in contest.entered.items():
        for what in ("step", "decode"):
            call, repeat = entrant.calls[what], 5
            call()
            contest.clock.wait()
            with torch.profiler.profile(activities=activities) as seen:
                for _ in range(repeat):
                    call()
                contest.clock.wait()
            gpu = contest.device.type == "cuda"
            time = {k.key: (k.self_device_time_total if gpu else k.self_cpu_time_total, k.count)
                    for k in seen.key_averages()}
            total = sum(t for t, _ in time.values()) / repeat
            with path.open("a") as file:
                print(f"\n== {contest.model.name}, {name}, {what}: {total:.0f} us of kernels",
                      file=file)
                for key, (t, n) in sorted(time.items(), key=lambda kv: -kv[1][0])[:most]:
                    print(f"{t / repeat:9.1f} us  n {n / repeat:6.1f}  {key[:150]}", file=file)
            print(f"profile of {name}, {what}: {total:.0f} us of kernels", flush=True)
