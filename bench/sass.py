"""Reads NVIDIA's machine code: its resources, and whether it reads registers that nothing wrote.

ptxas, NVIDIA's assembler, has bugs. Release 12.8 drops a copy where two tiles of different widths
use the same shared memory one after the other: the second product then reads its tile from an
uninitialised address. On a GPU the result is wrong numbers or an illegal access, only at times; the
machine code always shows it.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

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


def sass(cubin: Path, cuobjdump: Path) -> str:
    command = [cuobjdump, "-res-usage", "-sass", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[Instruction]:
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
            known = after if j not in written else written[j] & after
            if j not in written or known != written[j]:
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
