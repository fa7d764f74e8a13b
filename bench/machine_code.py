"""What the compiler made of a kernel, read from its machine code, and the bounds of that.

    made = triton.compile(source, TARGETS["sm_90"].gpu, options)
    print(figures := read(made, "sm_90"))
    broken(figures, "sm_90", products=True)  # in half precision; a sentence for each broken bound

NVIDIA's machine code is read with cuobjdump, which comes with triton; AMD's assembly is text.

ptxas, NVIDIA's assembler, has bugs. Release 12.8 drops a copy where two tiles of different widths
use the same shared memory one after the other: the second product then reads its tile from an
uninitialised address. On a GPU the result is wrong numbers or an illegal access, only at times; the
machine code always shows it, as a uniform register that is read though nothing wrote it.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

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


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 164 * 1024, 64, "HMMA"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 100 * 1024, 48, "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 228 * 1024, 64, "HGMMA"),  # wgmma
    "sm_100": Target(GPUTarget("cuda", 100, 32), 228 * 1024, 64, "UTCHMMA"),  # tcgen05.mma
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 32, "v_mfma"),
}


class Figures(NamedTuple):
    """Stack is in bytes a thread, shared memory in bytes a program; spills are loads and stores of
    a thread's own memory on NVIDIA, vector registers on AMD (scalar registers spill into those)."""

    registers: int
    stack: int
    spills: int
    matrix: int  # matrix instructions
    instructions: int
    unwritten: str  # registers that are read though nothing wrote them
    shared: int = 0
    programs: int = 0  # that a multiprocessor holds at once; on AMD not computed

    def __str__(self) -> str:
        return (f"{self.registers:3} registers, {self.stack} stack, {self.spills} spills, "
                f"{self.shared:6} shared, {self.matrix:3} matrix of {self.instructions:4}, "
                f"{self.programs:2} resident")


def read(made, name: str) -> Figures:
    """Of a result of triton.compile for the target of that name."""
    target, shared = TARGETS[name], made.metadata.shared
    if target.gpu.backend != "cuda":
        return amd(made.asm["amdgcn"], target.matrix)._replace(shared=shared)
    found = nvidia(made.asm["cubin"], target.matrix)
    fit = programs(target, found.registers, shared, made.metadata.num_warps)
    return found._replace(shared=shared, programs=fit)


def nvidia(cubin: bytes, matrix: str) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    code = instructions(text)
    names = [x.name.split(".")[0] for x in code]
    # Which registers the products of sm_100 read is not written down here.
    found = [] if matrix == "UTCHMMA" else unwritten(code)
    return Figures(registers, stack, names.count("STL") + names.count("LDL"), names.count(matrix),
                   len(names), " ".join(found))


def amd(text: str, matrix: str) -> Figures:
    """The assembly ends with what the kernel takes."""
    fields = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count"
    figures = [int(re.search(rf"\.{field}:\s+(\d+)", text)[1]) for field in fields]
    names = re.findall(r"^\t([a-z]+_\w+)", text, re.M)
    return Figures(*figures, sum(name.startswith(matrix) for name in names), len(names), "")


def programs(target: Target, registers: int, shared: int, warps: int) -> int:
    """How many a multiprocessor holds: by registers (65536, a warp takes them by 256), by shared
    memory (1 KiB more each), by warps, and 32 at most."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, target.shared // (shared + 1024), target.warps // warps, 32)


def broken(figures: Figures, name: str, products: bool) -> list[str]:
    """The bounds that are broken. ``products``: there are some that matrix units should compute."""
    found, target = [], TARGETS[name]
    most = target.shared - 1024 * (target.gpu.backend == "cuda")  # NVIDIA keeps 1 KiB a program
    if figures.stack or figures.spills:
        found.append(f"spills, with {figures.stack} bytes of stack")
    if figures.shared > most:
        found.append(f"shared memory past {most} bytes")
    if figures.unwritten:
        found.append(f"reads what nothing wrote, {figures.unwritten}")
    if products and not figures.matrix:
        found.append(f"no {target.matrix}: the matrix units are idle")
    return found


# --- NVIDIA's instructions ------------------------------------------------------------------------

#     /*0a30*/              @!P0 HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\S+\s+)?([A-Z]\w*\S*)\s*(.*?)\s*;", re.M)
NO_RESULT = ("ST", "RED", "BRA", "EXIT")  # the first operand of these is read


class Instruction(NamedTuple):
    address: int
    guarded: bool  # runs only if a predicate holds
    name: str
    operands: list[str]

    def writes(self) -> range:
        """The uniform registers that it writes."""
        found = re.match(r"UR(\d+)", self.operands[0]) if self.operands else None
        if not found or self.name.startswith(NO_RESULT):
            return range(0)
        width = 4 if ".128" in self.name else 2 if re.search("64|WIDE", self.name) else 1
        return range(int(found[1]), int(found[1]) + width)

    def reads(self) -> set[int]:
        """The uniform registers that it reads."""
        found = set()
        for text in self.operands[len(self.writes()) > 0:]:
            for kind, first in re.findall(r"(g?desc\[)?UR(\d+)", text):
                if kind == "gdesc[" and self.name.startswith("HGMMA"):
                    # The descriptors of A and B; of B alone if A is in registers.
                    of_a = re.match(r"R\d", self.operands[1]) is None
                    found |= set(range(int(first) + 2 * (not of_a), int(first) + 4))
                else:
                    wide = kind or self.name.startswith("U") and self.name.endswith(".64")
                    found |= {int(first), int(first) + 1} if wide else {int(first)}
        return found


def instructions(text: str) -> list[Instruction]:
    """Of what cuobjdump -sass prints."""
    return [Instruction(int(address, 16), bool(guard), name, [x.strip() for x in rest.split(",")])
            for address, guard, name, rest in LINE.findall(text)]


def unwritten(code: list[Instruction]) -> list[str]:
    """Data flow analysis: the uniform registers that are read although, on some path from the
    entry, nothing has written them; each with the address of such a read."""
    places = {x.address: i for i, x in enumerate(code)}
    written: dict[int, set[int]] = {0: set()}  # on every path to an instruction
    waiting = [0]
    while waiting:
        i = waiting.pop()
        after = written[i] | set(code[i].writes())
        for j in _next(i, code, places):
            known = after & written.get(j, after)
            if known != written.get(j):
                written[j] = known
                waiting.append(j)
    return [f"UR{register} at {code[i].address:04x}" for i in sorted(written)
            for register in sorted(code[i].reads() - written[i])]


def _next(i: int, code: list[Instruction], places: dict[int, int]) -> list[int]:
    """The successors of an instruction."""
    name, follows = code[i].name.split(".")[0], []
    if name == "BRA":
        target = re.search(r"0x([0-9a-f]+)", ",".join(code[i].operands))
        follows = [places[int(target[1], 16)]]
    if name not in ("BRA", "EXIT") or code[i].guarded:
        follows += [i + 1] if i + 1 < len(code) else []
    return follows
