"""What the compiler makes of every kernel for five GPUs, none of which need be there.

    python -m bench.compile              # a chosen list: under a minute on two cores
    python -m bench.compile --only D=512 # of every variant (bench/variants.py), lines with this
    TRITON_CACHE_DIR=DIR python -m bench.compile --ahead sm_90

The last fills Triton's cache with all that `python -m bench.everything` will launch on such a GPU
but for its tests, so that nothing is compiled there. A cache serves the release of Triton and the
kernels that it was made with, in a folder of the same name.

A line is a variant and a target. Ends with 1, naming what is broken, unless in every line

  * nothing spills: NVIDIA's stack and local loads and stores, AMD's vector registers, are 0;
  * shared memory is within what the target gives one program;
  * attention in half precision uses the target's matrix units (wgmma on sm_90);
  * on sm_80 to sm_90, no uniform register is read that nothing wrote (bench/sass.py).

Registers and the rest of NVIDIA's are read from the machine code with cuobjdump, AMD's from the
assembly text. Needs triton, which brings cuobjdump.
"""

import argparse
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from bench import sass
from bench.check import one_line
from bench.variants import Variant, chosen, everything, source, variants

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Target(NamedTuple):
    """A GPU, what one of its multiprocessors has, and the name of its matrix instructions.

    Sources: CUDA C++ Programming Guide, technical specifications per compute capability; AMD
    Instinct MI300 instruction set.
    """

    gpu: GPUTarget
    shared: int  # bytes
    warps: int
    matrix: str

    @property
    def most_shared(self) -> int:
        """What one program may have: NVIDIA keeps 1 KiB of it."""
        return self.shared - 1024 * (self.gpu.backend == "cuda")


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 164 * 1024, 64, "HMMA"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 100 * 1024, 48, "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 228 * 1024, 64, "HGMMA"),  # wgmma
    "sm_100": Target(GPUTarget("cuda", 100, 32), 228 * 1024, 64, "UTCHMMA"),  # tcgen05.mma
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 32, "v_mfma"),
}


class Row(NamedTuple):
    """A line. Stack is in bytes a thread, shared memory in bytes a program; spills are loads and
    stores of a thread's own memory on NVIDIA, vector registers on AMD."""

    kernel: str
    dtype: str
    sizes: str
    warps: int
    stages: int
    target: str
    registers: int
    stack: int
    spills: int
    scalar_spills: int  # AMD alone: into vector registers, not into memory
    shared: int
    matrix: int  # matrix instructions
    instructions: int
    unwritten: str  # registers that are read though nothing wrote them (bench/sass.py)
    programs: int  # that a multiprocessor holds at once; on AMD not computed, 0
    triton: str

    @property
    def key(self) -> tuple[Variant, str]:
        return Variant(*self[:5]), self.target

    def __str__(self) -> str:
        return (f"{self.target:6} {self.registers:3} registers, {self.stack} stack, {self.spills} "
                f"spills, {self.shared:6} shared, {self.matrix:3} matrix of {self.instructions:4}, "
                f"{self.programs:2} resident  {self.kernel} {self.dtype} {self.sizes}, "
                f"{self.warps} warps, {self.stages} stages")


def compiled(v: Variant, name: str) -> Row:
    """Compile a variant for the target of that name."""
    target = TARGETS[name]
    code, options = source(variants()[v], target.gpu)
    made = triton.compile(code, target.gpu, options)
    read = nvidia if target.gpu.backend == "cuda" else amd
    registers, stack, spills, scalar_spills, *rest = read(made.asm, target.matrix)
    shared = made.metadata.shared
    return Row(*v, name, registers, stack, spills, scalar_spills, shared, *rest,
               programs(target, registers, shared, v.warps), triton.__version__)


def nvidia(asm: dict, matrix: str) -> tuple[int, ...]:
    """The figures of `Row` from registers to unwritten, but for shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = sass.sass(Path(file.name), CUOBJDUMP)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    code = sass.instructions(text)
    names = [x.name.split(".")[0] for x in code]
    spills = names.count("STL") + names.count("LDL")
    # Which registers the products of sm_100 read is not written down here.
    found = [] if matrix == "UTCHMMA" else sass.unwritten(code)
    return registers, stack, spills, 0, names.count(matrix), len(names), " ".join(found)


def amd(asm: dict, matrix: str) -> tuple[int, ...]:
    """The same from the assembly text, which ends with what the kernel takes."""
    text = asm["amdgcn"]
    fields = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"
    figures = [int(re.search(rf"\.{field}:\s+(\d+)", text)[1]) for field in fields]
    names = re.findall(r"^\t([a-z]+_\w+)", text, re.M)
    return *figures, sum(name.startswith(matrix) for name in names), len(names), ""


def programs(target: Target, registers: int, shared: int, warps: int) -> int:
    """How many a multiprocessor holds: by registers (65536, a warp takes them by 256), by shared
    memory (1 KiB more each), by warps, and 32 at most."""
    if target.gpu.backend != "cuda":
        return 0
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, target.shared // (shared + 1024), target.warps // warps, 32)


def broken(row: Row) -> list[str]:
    """The bounds that a row breaks."""
    found, target = [], TARGETS[row.target]
    if row.stack or row.spills:
        found.append(f"spills, with {row.stack} bytes of stack")
    if row.shared > target.most_shared:
        found.append(f"shared memory past {target.most_shared} bytes")
    if row.unwritten:
        found.append(f"reads what nothing wrote, {row.unwritten}")
    if row.key[0].attention and row.dtype != "float32" and not row.matrix:
        found.append(f"no {target.matrix}: the matrix units are idle")
    return found


def compile_all(jobs: list[tuple[Variant, str]], workers: int) -> Iterator[Row | str]:
    """A row for each, in order, as they come; where one does not compile, a sentence."""
    fork = multiprocessing.get_context("fork")  # workers inherit the variants, made by now
    with ProcessPoolExecutor(workers, fork) as pool:
        waiting = [(job, pool.submit(compiled, *job)) for job in jobs]
        for (v, target), future in waiting:
            try:
                yield future.result()
            except Exception as failure:
                yield f"{target} {' '.join(map(str, v))} does not compile: {one_line(failure)}"


def ahead(name: str, workers: int) -> int:
    """Fill Triton's cache for the target of that name. What does not compile is named, and is no
    fault: some settings are only tried."""
    if "TRITON_CACHE_DIR" not in os.environ:
        print("--ahead needs TRITON_CACHE_DIR, the folder to fill")
        return 2
    calls = variants(everything)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        wrong = [why for why in pool.map(partial(fill, name), calls) if why]
    print(f"{len(calls) - len(wrong)} of {len(calls)} kernels for {name}, "
          f"Triton {triton.__version__}", *wrong, sep="\n")
    return 0


def fill(name: str, v: Variant) -> str:
    """Compile a variant into the cache; what went wrong, or nothing."""
    try:
        code, options = source(variants(everything)[v], TARGETS[name].gpu)
        triton.compile(code, TARGETS[name].gpu, options)
    except Exception as failure:
        return f"{' '.join(map(str, v))} does not compile: {one_line(failure)}"
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="of every variant, lines with this in them")
    parser.add_argument("--ahead", choices=TARGETS, help="fill Triton's cache for that GPU instead")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.ahead:
        return ahead(args.ahead, args.workers)
    every = [(v, target) for v in variants() for target in TARGETS]
    jobs = every if args.only else chosen([*TARGETS], full="sm_90")
    jobs = [(v, target) for v, target in jobs
            if not args.only or args.only in " ".join(map(str, (target, *v)))]
    done, wrong = 0, []
    for row in compile_all(sorted(jobs, key=lambda job: job[1]), args.workers):
        print(row, flush=True)
        done += isinstance(row, Row)
        wrong += [f"{why}: {row}" for why in broken(row)] if isinstance(row, Row) else [row]
    print(f"{done} of {len(every)} compiled with Triton {triton.__version__}")
    if wrong:
        print("broken:", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
