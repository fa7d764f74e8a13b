"""On which GPUs the kernels were found equal to torch: the rows of proven.json, one a capability.

`record` writes a row from a run of checks on a GPU, and nobody edits the file. A row names the
kernels that ran by their `fingerprint`, so it says nothing about any others: a kernel or a tile
that changes has to be measured again. ops="auto" takes the kernels only where `proven` has nothing
to say against them.
"""

import ast
import hashlib
import inspect
import json
import os
from pathlib import Path
from types import ModuleType

from triton.runtime.jit import KernelInterface

from minisd_kernels import flash_attention, geglu, group_norm_silu, launch, layer_norm

FILE = Path(__file__).with_name("proven.json")
FAMILIES = (flash_attention, geglu, group_norm_silu, layer_norm)
# Settings of a launch that are no row of launch.DEFAULT.
CONSTANTS = {
    flash_attention: ("ONE_TILE_KEYS", "SLICES", "WIDEST_IN_ONE_TILE", "WIDEST_IN_PIECES"),
    group_norm_silu: ("JOINED", "PROGRAMS"),
}
# What a row says: the fingerprint, where and when it was measured, and how many checks passed.
FIELDS = ("kernels", "device", "torch", "triton", "commit", "date", "checks")


def proven(capability: tuple[int, int]) -> str:
    """Why the kernels are not proven on that compute capability; empty if they are."""
    name = "{}.{}".format(*capability)
    row = json.loads(FILE.read_text()).get(name)
    if row is None:
        return f"the kernels have not been measured on compute capability {name}"
    if row["kernels"] != fingerprint():
        return f"the kernels have changed since they were measured on compute capability {name}"
    return ""


def record(path: str | os.PathLike, capability: str, row: dict) -> None:
    """Put the row of a capability such as "9.0" into the file, in place of an earlier one.

    The file is written whole or not at all. Raises ValueError for a row without all of FIELDS.
    """
    if missing := [field for field in FIELDS if field not in row]:
        raise ValueError(f"the row of {capability} lacks {', '.join(missing)}")
    path = Path(path)
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[capability] = row
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(rows, sort_keys=True, indent=1) + "\n")
    os.replace(new, path)


def fingerprint() -> str:
    """A sha256 of every kernel's code, of its plan and of every setting that it is launched with.

    Comments, docstrings, and the file and the order in which kernels stand are no part of it.
    """
    functions = [family.plan for family in FAMILIES] + [
        kernel.fn for family in FAMILIES for kernel in jitted(family)]
    kernels = sorted({code(inspect.getsource(function)) for function in functions})
    tables = [sorted(launch.DEFAULT.items()), sorted(launch.MEASURED.items())]
    constants = [(name, getattr(family, name))
                 for family, names in CONSTANTS.items() for name in names]
    return hashlib.sha256(repr((kernels, tables, constants)).encode()).hexdigest()


def jitted(family: ModuleType) -> list[KernelInterface]:
    """All that @triton.jit made in a module, compiled or interpreted."""
    return [x for x in vars(family).values() if isinstance(x, KernelInterface)]


def code(source: str) -> str:
    """A function's source without comments and docstring, laid out in one way."""
    tree = ast.parse(source)
    (function,) = tree.body
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
