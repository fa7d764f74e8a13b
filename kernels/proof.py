"""On which GPUs the kernels proved equal to torch: the rows of proven.json, one per capability.

`record` writes a row from a run of checks on a GPU; nobody edits the file by hand. A row names the
kernels that ran by their `fingerprint`, so it says nothing about others: a changed kernel or tile
must be measured again. ops="auto" takes the kernels only where `proven` has no objection.
"""

import ast
import hashlib
import inspect
import json
import os
from pathlib import Path
from types import FunctionType, ModuleType

import triton
from minisd_kernels.ops import (
    attention as flash_attention,
    geglu,
    group_norm as group_norm_silu,
    launch,
    layer_norm,
)
from triton.runtime.jit import KernelInterface

FILE = Path(__file__).with_name("proven.json")
FAMILIES = (flash_attention, geglu, group_norm_silu, layer_norm)
# Settings of a launch that are no row of launch.DEFAULT.
CONSTANTS = {
    flash_attention: ("ONE_TILE_KEYS", "SLICES", "WIDEST_IN_ONE_TILE", "WIDEST_IN_PIECES"),
    group_norm_silu: ("JOINED", "PROGRAMS"),
}
# A row: the fingerprint, where and when the kernels were measured, and how many checks passed.
FIELDS = ("kernels", "device", "torch", "triton", "commit", "date", "checks")


def proven(capability: tuple[int, int], device: str) -> str:
    """Why the kernels are not proven on a GPU of that compute capability and name (as torch gives
    it); empty if they are."""
    name = "{}.{}".format(*capability)
    row = json.loads(FILE.read_text()).get(name)
    if row is None:
        return f"the kernels have not been measured on compute capability {name}"
    if row["kernels"] != fingerprint():
        return f"the kernels have changed since they were measured on compute capability {name}"
    if settings(row["device"]) != settings(device):
        return f"the kernels were measured on {row['device']} with other settings than {device} has"
    # Another release compiles other code, and a compiler has been wrong before.
    if row["triton"] != triton.__version__:
        return f"the kernels were measured with Triton {row['triton']}, not {triton.__version__}"
    return ""


def settings(device: str) -> dict[tuple[str, int], tuple]:
    """The launch settings of a GPU of that name."""
    return {key: launch.MEASURED.get((device, *key), default)
            for key, default in launch.DEFAULT.items()}


def record(path: str | os.PathLike, capability: str, row: dict) -> None:
    """Put the row of a capability such as "9.0" into the file; it replaces an earlier one.

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
    """A sha256 of the code of every kernel, of its plan and launch, and of every setting.

    Comments, docstrings, files and the order of functions are no part of it; nor are functions that
    build sentences, because each release of Python unparses f-strings in its own way.
    """
    functions = [function for module in (*FAMILIES, launch)
                 for function in (*defined(module), *(kernel.fn for kernel in jitted(module)))]
    codes = sorted({code for code in map(plain, functions) if code})
    tables = [sorted(launch.DEFAULT.items()), sorted(launch.MEASURED.items())]
    constants = [(name, getattr(family, name))
                 for family, names in CONSTANTS.items() for name in names]
    return hashlib.sha256(repr((codes, tables, constants)).encode()).hexdigest()


def defined(module: ModuleType) -> list[FunctionType]:
    """The functions that a module defines itself."""
    return [x for x in vars(module).values()
            if isinstance(x, FunctionType) and x.__module__ == module.__name__]


def jitted(family: ModuleType) -> list[KernelInterface]:
    """The @triton.jit functions of a module, compiled or interpreted."""
    return [x for x in vars(family).values() if isinstance(x, KernelInterface)]


def plain(function: FunctionType) -> str:
    """The source of a function without comments and docstring, in one layout; empty if it has an
    f-string."""
    tree = ast.parse(inspect.getsource(function))
    (body,) = tree.body
    assert isinstance(body, ast.FunctionDef)
    if any(isinstance(node, ast.JoinedStr) for node in ast.walk(tree)):
        return ""
    if ast.get_docstring(body) is not None:
        body.body = body.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
