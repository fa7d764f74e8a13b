"""The import graph: the imports of every file are among the arrows listed here."""

import ast
import glob
import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# room of minisd, a folder or a file -> the rooms that it may import, anywhere in it: only downwards
ARROWS = {
    "__main__": {"app"},
    "__init__": {"checkpoints", "config", "errors", "loading", "models", "output", "pipeline",
                 "safety"},
    "app": {"checkpoints", "errors", "files", "image_files", "images", "models", "request",
            "samplers"},
    "numpy_sd": {"checkpoints", "config", "errors", "files", "progress", "text"},
    "loading": {"backends", "checkpoints", "checks", "config", "models", "pipeline", "safety",
                "text"},
    "pipeline": {"backends", "checkpoints", "checks", "conditioning", "config", "depth_maps",
                 "errors", "images", "memory", "models", "output", "pixels", "progress", "request",
                 "steps", "tensors", "text"},
    "pixels": {"errors", "models"},
    "safety": {"checkpoints", "checks", "errors", "images", "models"},
    "output": set(),
    "progress": set(),
    "steps": {"samplers"},
    "memory": {"config", "depth_maps", "models", "request"},
    "backends": {"config", "models"},
    "conditioning": {"depth_maps", "errors", "images", "models", "request", "samplers"},
    "request": {"checks", "config", "depth_maps", "images", "samplers", "sampling", "seeds",
                "tasks", "tensors", "text"},
    "tensors": {"config", "depth_maps"},
    "tasks": {"checks", "config"},
    "sampling": {"checks", "config", "samplers"},
    "seeds": {"checks"},
    "checkpoints": {"config", "errors", "files", "text"},
    "models": {"config"},
    "samplers": {"config"},
    "text": set(),
    "depth_maps": {"images"},
    "images": {"config", "errors", "files", "image_files"},
    "image_files": {"errors"},
    "files": set(),
    "checks": set(),
    "config": set(),
    "errors": set(),
}
# room of the kernels -> the rooms of the kernels, and of minisd, that it may import
KERNEL_ARROWS = {
    "ops": (set(), set()),
    "fused": (set(), {"models", "samplers", "steps"}),
    "ladder": ({"ops"}, set()),  # of ops, launch alone
    "proof": ({"ops"}, set()),
}
# Everything else that minisd may import: what pyproject.toml declares, by import name.
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BUILD = SETTINGS["project"], SETTINGS["tool"]
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "pytest_xdist": "pytest"}


def import_names(lines: list[str]) -> set[str]:
    found = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    return {IMPORTED_AS.get(name, name) for name in found}


DECLARED = import_names(PROJECT["dependencies"])
# No installed file may import these.
BESIDE = {"bench", "tests", "weights", "kernels"}
# No file imports or names these: code and objects made from data, other programs, the network.
MODULES = {
    "builtins", "code", "runpy", "ctypes", "pickle", "_pickle", "dill", "cloudpickle", "joblib",
    "marshal", "shelve", "subprocess", "multiprocessing", "pty", "socket", "socketserver", "ssl",
    "asyncio", "urllib", "urllib3", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp",
}
FUNCTIONS = {
    "eval", "exec", "compile", "__import__", "__builtins__", "torch.load", "torch.hub", "torch.jit",
    "numpy.load", "np.load", "os.system", "os.popen", "os.fork",
    *(f"os.{name}" for name in dir(os) if name.startswith(("exec", "spawn", "posix_spawn"))),
}
MINISD = sorted((ROOT / "minisd").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


FILES = pytest.mark.parametrize("path", MINISD, ids=name)


def imports(tree: ast.AST) -> set[str]:
    """Full names of all imports in a tree; `from x import y` is "x.y"."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_import(tree: ast.Module) -> set[str]:
    """The imports of a module that run when it is imported, not inside its functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    nodes, names = list(tree.body), set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= imports(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse  # what is for a type checker is not imported
        elif not isinstance(node, functions):
            nodes += ast.iter_child_nodes(node)
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def room(path: Path) -> str:
    """The folder or the file below minisd/ or kernels/."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def rooms(names: set[str], package: str) -> set[str]:
    return {each.split(".")[1] for each in names if each.startswith(package + ".")}


@FILES
def test_arrows(path):
    names = imports(ast.parse(path.read_text()))
    assert rooms(names, "minisd") <= ARROWS[room(path)] | {room(path)}
    outside = roots(names) - set(sys.stdlib_module_names) - {"minisd"}
    assert outside <= DECLARED | ({"minisd_kernels"} if path.stem == "backends" else set())


def test_arrows_only_go_down():
    order = [*TopologicalSorter(ARROWS).static_order()]  # CycleError in a circle
    assert set(order) == set(ARROWS)


@FILES
def test_kernels_are_asked_for_inside_functions(path):
    assert not roots(at_import(ast.parse(path.read_text()))) & {"minisd_kernels", "triton"}


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_arrows_of_the_kernels(path):
    names = imports(ast.parse(path.read_text()))
    kernels, minisd = KERNEL_ARROWS[room(path)]
    assert rooms(names, "minisd_kernels") <= kernels | {room(path)}
    assert rooms(names, "minisd") <= minisd
    if room(path) == "ladder":
        assert not [name for name in names if ".ops." in name and not name.endswith(".ops.launch")]


def test_nothing_imports_what_is_not_installed():
    for path in [*MINISD, *KERNELS, ROOT / "weights" / "__init__.py"]:
        names = imports(ast.parse(path.read_text())) if path.exists() else set()
        assert not roots(names) & BESIDE, path.name
        assert not [name for name in names if name.startswith("minisd_weights.")], path.name


def folder_of(package: str) -> Path:
    """minisd_kernels.ops lies in kernels/ops."""
    return ROOT / package.replace("minisd_", "").replace(".", "/")


def test_the_wheel_holds_no_recipe():
    setup = BUILD["setuptools"]
    assert not setup["include-package-data"]  # so that packages and package-data name all of it
    held = {}
    for package in setup["packages"]:
        folder = folder_of(package)
        patterns = ["*.py", *setup["package-data"].get(package, [])]
        held[package] = {path for pattern in patterns
                         for path in glob.glob(pattern, root_dir=folder, recursive=True)
                         if (folder / path).is_file()}
    folders = {path.parent for path in [*MINISD, *KERNELS]} | {ROOT / "weights", ROOT / "kernels"}
    assert {folder_of(package) for package in held} == folders
    assert "proven.json" in held["minisd_kernels"]
    assert {"py.typed", "app/explain.html"} <= held["minisd"]
    tops = {path.split("/")[0] for path in held["minisd_weights"]}
    assert tops == {"README.md", "__init__.py", "tiny"}
    assert {Path(path).suffix for path in held["minisd_weights"] if path.startswith("tiny/")} == {
        ".json", ".safetensors", ".txt"}


def never(tree: ast.AST) -> set[str]:
    """The MODULES that a tree imports, and the FUNCTIONS that it imports or names."""
    said = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute))}
    return roots(imports(tree)) & MODULES | (said | imports(tree)) & FUNCTIONS


@pytest.mark.parametrize("path", [*MINISD, *KERNELS], ids=name)
def test_what_no_file_does(path):
    """No code from data, no other program, no network except in hub; no print, no environment."""
    tree = ast.parse(path.read_text())
    assert not never(tree)
    assert "huggingface_hub" not in roots(imports(tree)) or path.stem == "hub"
    said = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute))}
    if path.stem not in ("__main__", "cli"):
        assert not said & {"print", "os.environ", "os.getenv"}


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads as f", "import os.path, socket", "f = eval",
    "from torch import load", "x = torch.load(f)", "from urllib.request import urlopen",
    "def f():\n    import requests", "os.system(c)", "from os import popen", "np.load(f)",
    "compile(a, b, 'exec')", "__builtins__['exec']",
])
def test_the_search_finds_forbidden_code(line):
    assert never(ast.parse(line))


@pytest.mark.parametrize("extra, folders", [
    ("", ["minisd"]), ("bench", ["bench", "weights/recipe"]), ("kernels", ["kernels"]),
    ("test", ["tests"]),
])
def test_what_is_declared_is_what_is_imported(extra, folders):
    """The core declares all that minisd imports; an extra, what its folder imports besides."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    declared = import_names(lines)
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    imported = roots(set().union(*(imports(ast.parse(path.read_text())) for path in paths)))
    own = {path.stem for path in paths} | {
        "minisd", "minisd_kernels", "minisd_weights", "bench", "tests", "weights"}
    imported -= set(sys.stdlib_module_names) | own
    if extra:
        assert declared <= imported
        imported -= DECLARED
    if extra != "bench":  # bench may import what the tests import
        assert imported == declared - DECLARED if extra else imported == declared


def test_the_version_of_the_citation_and_the_changelog():
    version = re.search(r'__version__ = "(.*)"', (ROOT / "minisd/__init__.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


CHEAP = """
import socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "minisd_kernels", "diffusers", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def blocked(*args, **kwargs):
    raise OSError("a socket was opened")

sys.meta_path.insert(0, Blocked())
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = blocked
import minisd
assert "torch" not in sys.modules, "import minisd should be cheap"
[getattr(minisd, name) for name in minisd.__all__]  # now all is imported
assert "torch" in sys.modules
import minisd.checkpoints.hub, minisd.app.cli
from minisd.backends import resolve
import torch
resolve("auto", None, torch.device("cpu"), torch.float32)
"""


def test_importing_opens_no_socket_and_needs_no_triton():
    done = subprocess.run([sys.executable, "-c", CHEAP], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
