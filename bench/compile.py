"""What the compiler makes of every kernel for five GPUs, none of which need be there.

    python -m bench.compile              # a chosen list: under a minute on two cores
    python -m bench.compile --only D=512 # of every variant, lines with this
    TRITON_CACHE_DIR=DIR python -m bench.compile --ahead sm_90

The last fills Triton's cache with all that `python -m bench.everything` will launch on such a GPU
but for its tests, so that nothing is compiled there. A cache serves the release of Triton and the
kernels that it was made with, in a folder of the same name. What does not compile is named.

A line is a variant and a target (machine_code.py). The first two end with 1, naming what is broken,
unless in every line

  * nothing spills: NVIDIA's stack and local loads and stores, AMD's vector registers, are 0;
  * shared memory is within what the target gives one program;
  * attention in half precision uses the target's matrix units (wgmma on sm_90);
  * on sm_80 to sm_90, no uniform register is read that nothing wrote.

The variants are no second list of constants: every size of cases.py in both layouts, and whole
models (counts.py), are planned on tensors without memory, and what would be launched is kept.
"""

import argparse
import functools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
import triton
from minisd_kernels.ops import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bench import cases
from bench.counts import META, Forward, fused, planned, readable
from bench.harness import one_line, positive
from bench.kernels import served
from bench.machine_code import TARGETS, Figures, broken, read
from bench.providers import padded_attention, tuned
from minisd.backends import kernels
from minisd.checkpoints.checkpoint import open_checkpoint
from minisd.config import SD1, SD2_V

MOST = "sm_90"  # the target for which most is compiled


class Variant(NamedTuple):
    """``sizes`` names every constant, every flag, and every number not divisible by 16."""

    kernel: str
    dtype: str
    sizes: str
    warps: int
    stages: int

    @property
    def products(self) -> bool:
        """Whether it has some that matrix units should compute."""
        return self.kernel.startswith("attention") and self.dtype != "float32"

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} {self.sizes}, {self.warps} warps, {self.stages} stages"


def source(call: launch.Call, gpu: GPUTarget) -> tuple[ASTSource, dict]:
    """What Triton would compile at that launch on that GPU, and with which options.

    By the private parts of JITFunction.run: what it reads off the arguments (a 1 becomes a
    constant, a multiple of 16 is noted) is read off here by the same code.
    """
    backend, kernel = make_backend(gpu), call.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, found, _ = bind(*call.args, **call.constants)
    given = dict(num_warps=call.num_warps, num_stages=call.num_stages, enable_fp_fusion=True)
    options, *parts = kernel._pack_args(backend, given, arguments, found, None)
    return ASTSource(kernel, *parts), options.__dict__


def variant(call: launch.Call) -> Variant:
    seen, _ = source(call, TARGETS[MOST].gpu)  # what it is specialised on is the same for all
    words = []
    for i, (name, kind) in enumerate(seen.signature.items()):
        value = seen.constants.get((i,))
        if kind == "constexpr" and value is not False:
            words.append(name if value is True else f"{name}={value}")
        elif kind in ("i32", "i64") and not seen.attrs.get((i,)):
            words.append(f"{name}:{kind}")
    module = call.kernel.__module__.rpartition(".")[2]
    dtype = str(call.args[0].dtype).removeprefix("torch.")
    return Variant(module + call.kernel.__name__, dtype, " ".join(words), call.num_warps,
                   call.num_stages)


# --- which variants -------------------------------------------------------------------------------


def ours(op: str, *args) -> object:
    return getattr(kernels(), op)(*args)


def padded(op: str, *args) -> None:
    with suppress(ValueError):  # of the widths that have no padded variant
        padded_attention(*args)


def calls(provider: Callable[..., object], some: Iterable[cases.Case],
          *dtypes: torch.dtype) -> Iterator[Forward]:
    """``provider(case.op, ...)`` of every case."""
    for dtype in dtypes:
        for case in some:
            yield partial(case.call, partial(provider, case.op), *case.inputs(META, dtype))


def work() -> Iterator[Forward]:
    """Every size in float16 and some in the other dtypes; both models' repacked networks."""
    norm = cases.group_norms("SD1.5")[0]
    some = [*cases.SELF_ATTENTION, *cases.CROSS_ATTENTION, *cases.VAE_ATTENTION,
            *cases.layouts([norm])]
    yield from calls(ours, cases.full(), torch.float16)
    yield from calls(ours, some, torch.bfloat16, torch.float32)
    for config in (SD1, SD2_V):
        yield from fused(config, kernels())
    yield readable(SD1, kernels())[2]  # the prompts


def everything() -> Iterator[Forward]:
    """All that `python -m bench.everything` launches but for its tests, whose sizes are small."""
    yield from work()
    yield from calls(ours, cases.full(), torch.bfloat16, torch.float32)
    attentions = [case for case in cases.full() if case.op == "attention"]
    yield from calls(padded, attentions, torch.float16)
    for config in (SD1, SD2_V, open_checkpoint(None).config):
        yield from readable(config, kernels())
        yield from fused(config, kernels(), batches=(1, 4, 16))
    for key, some in served(cases.sd1(), torch.float16).items():
        for setting in launch.CANDIDATES.get(key, []):  # of the six cases that --tune takes
            yield from calls(partial(tuned, key, setting), some[:6], torch.float16)
    for (_, *key), setting in [*launch.MEASURED.items()]:
        yield from calls(partial(tuned, tuple(key), setting), cases.full(), *launch.DTYPES)


@functools.cache
def variants(all_of: Callable[[], Iterator[Forward]] = work) -> dict[Variant, launch.Call]:
    """Every variant, and a launch of it."""
    return {variant(call): call for call in planned(all_of())}


def chosen() -> list[tuple[Variant, str]]:
    """What is compiled in a minute: for MOST every attention in float16, and of all else the
    widest of those that differ in numbers alone; elsewhere the widest of each, in float16."""
    kinds, widest = {}, {}
    for v in sorted(variants(), key=lambda v: [*map(int, re.findall(r"=(\d+)", v.sizes))]):
        half = v.dtype == "float16"
        whole = v.kernel.startswith("attention") and half
        kinds[v.kernel, v.dtype, v.sizes if whole else re.sub(r"=\d+", "", v.sizes)] = v
        if half:
            widest[v.kernel, "ONE_TILE" in v.sizes] = v
    return ([(v, target) for v in widest.values() for target in TARGETS if target != MOST]
            + [(v, MOST) for v in kinds.values()])


# --- the command ----------------------------------------------------------------------------------


def compiled(all_of: Callable[[], Iterator[Forward]], job: tuple[Variant, str]) -> Figures | str:
    """A variant of those, for the target of that name; a sentence where it does not compile."""
    try:
        code, options = source(variants(all_of)[job[0]], gpu := TARGETS[job[1]].gpu)
        return read(triton.compile(code, gpu, options), job[1])
    except Exception as failure:
        return f"does not compile: {one_line(failure)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="of every variant, lines with this in them")
    parser.add_argument("--ahead", choices=TARGETS, help="fill Triton's cache for that GPU instead")
    parser.add_argument("--workers", type=positive, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.ahead and "TRITON_CACHE_DIR" not in os.environ:
        parser.error("--ahead needs TRITON_CACHE_DIR, the folder to fill")
    all_of = everything if args.ahead else work
    every = [(v, target) for v in variants(all_of)
             for target in ([args.ahead] if args.ahead else TARGETS)]
    jobs = every if args.ahead or args.only else chosen()
    jobs = sorted((job for job in jobs if not args.only or args.only in f"{job[1]} {job[0]}"),
                  key=lambda job: job[1])
    if not jobs:
        raise SystemExit(f"no variant's line has {args.only!r} in it")
    done, wrong = 0, []
    fork = multiprocessing.get_context("fork")  # workers inherit the variants, made by now
    with ProcessPoolExecutor(args.workers, fork) as pool:
        for (v, target), made in zip(jobs, pool.map(partial(compiled, all_of), jobs)):
            if isinstance(made, str):
                wrong.append(f"{target} {v} {made}")
                continue
            done += 1
            print(f"{target:6} {made}  {v}", flush=True)
            if not args.ahead:  # where some settings are only tried
                wrong += [f"{why}: {target} {v}" for why in broken(made, target, v.products)]
    print(f"{done} of {len(every)} compiled with Triton {triton.__version__}")
    if wrong:
        print("broken:", *wrong, sep="\n  ")
    return 1 if wrong and not args.ahead else 0


if __name__ == "__main__":
    raise SystemExit(main())
