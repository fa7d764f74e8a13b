"""The import graph: the imports of every file are among the arrows listed here."""

import ast
import glob
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# file of minisd -> the files of minisd that it may import, anywhere in it
ARROWS = {
    "__init__": {"config", "errors", "hub", "loading", "ops", "sd"},
    "__main__": {"arguments", "checkpoint", "files", "hub", "image", "options"},
    "options": set(),
    "loading": {"arguments", "backends", "checkpoint", "clip", "config", "ops", "sd", "tokenizer",
                "tokenizer_folder", "unet", "vae"},
    "sd": {"arguments", "clip", "backends", "config", "ddim", "image", "latents", "memory", "ops",
           "save", "steps", "tokenizer", "unet", "vae"},
    "save": {"config", "files", "names", "recognise", "tokenizer", "tokenizer_folder"},
    "memory": {"arguments", "config", "unet", "vae"},
    "latents": {"arguments", "ddim"},
    "backends": {"config", "ops", "unet", "vae"},
    "steps": {"ddim"},
    "arguments": {"config", "ddim", "tokenizer"},
    "clip": {"config", "ops"},
    "unet": {"config", "ops", "transformer"},
    "transformer": {"config", "ops"},
    "vae": {"config", "ops"},
    "ddim": {"config"},
    "ops": set(),
    "config": set(),
    "tokenizer": set(),
    "tokenizer_folder": {"diffusers_config", "errors", "tokenizer"},
    "image": {"errors", "files"},
    "hub": {"errors"},
    "errors": set(),
    "files": set(),
    "checkpoint": {"config", "diffusers_config", "errors", "hub", "names", "recognise",
                   "safetensors_file"},
    "recognise": {"config", "diffusers_config", "errors", "names", "safetensors_file"},
    "diffusers_config": {"config", "errors", "names", "safetensors_file"},
    "names": {"config"},
    "safetensors_file": {"errors"},
}
# Everything else that minisd may import: what pyproject.toml declares, by import name.
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BUILD = SETTINGS["project"], SETTINGS["tool"]
DEPENDENCIES = {re.match(r"\w+", line)[0] for line in PROJECT["dependencies"]}
DECLARED = DEPENDENCIES - {"pillow"} | {"PIL"}
# The files that may import the kernels, and only inside a function.
ASK_FOR_KERNELS = {"backends"}
# The only kernel files that import the model.
BRIDGE = {"fused_unet", "fused_step", "fused_vae"}
# No installed file may import these.
BESIDE = {"bench", "tests", "weights", "kernels"}
# No file imports or names these: code and objects made from data, other programs, the network.
MODULES = {
    "builtins", "code", "runpy", "ctypes", "pickle", "_pickle", "dill", "cloudpickle", "joblib",
    "marshal", "shelve", "subprocess", "multiprocessing", "pty", "socket", "socketserver", "ssl",
    "asyncio", "urllib", "urllib3", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp",
}  # fmt: skip
FUNCTIONS = {
    "eval", "exec", "compile", "__import__", "__builtins__", "torch.load", "torch.hub", "torch.jit",
    "numpy.load", "np.load", "os.system", "os.popen", "os.fork",
    *(f"os.{name}" for name in dir(os) if name.startswith(("exec", "spawn", "posix_spawn"))),
}  # fmt: skip
MINISD = sorted((ROOT / "minisd").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
FILES = pytest.mark.parametrize("path", MINISD, ids=lambda path: path.stem)


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


@FILES
def test_arrows(path):
    names = imports(ast.parse(path.read_text()))
    inside = {name.split(".")[1] for name in names if name.startswith("minisd.")}
    allowed = ARROWS[path.stem]  # a new file needs its arrows
    assert inside <= allowed
    outside = roots(names) - set(sys.stdlib_module_names) - {"minisd"}
    kernels = {"minisd_kernels"} if path.stem in ASK_FOR_KERNELS else set()
    assert outside <= DECLARED | kernels


@FILES
def test_kernels_are_asked_for_inside_functions(path):
    assert not roots(at_import(ast.parse(path.read_text()))) & {"minisd_kernels", "triton"}


def test_kernels_do_not_know_the_model():
    for path in KERNELS:
        names = roots(imports(ast.parse(path.read_text())))
        assert path.stem in BRIDGE or "minisd" not in names, path.name


def test_nothing_imports_what_is_not_installed():
    for path in [*MINISD, *KERNELS, ROOT / "weights" / "__init__.py"]:
        names = imports(ast.parse(path.read_text())) if path.exists() else set()
        assert not roots(names) & BESIDE, path.name
        assert not [name for name in names if name.startswith("minisd_weights.")], path.name


def test_the_wheel_holds_no_recipe():
    setup = BUILD["setuptools"]
    assert not setup["include-package-data"]  # so that packages and package-data name all of it
    held = {}
    for package in setup["packages"]:
        folder = ROOT / setup["package-dir"].get(package, package)
        patterns = ["*.py", *setup["package-data"][package]]
        held[package] = {path for pattern in patterns
                         for path in glob.glob(pattern, root_dir=folder, recursive=True)
                         if (folder / path).is_file()}  # fmt: skip
    assert set(held) == {"minisd", "minisd_kernels", "minisd_weights"}
    assert held["minisd_kernels"] == {path.name for path in KERNELS} | {"proven.json"}
    tops = {path.split("/")[0] for path in held["minisd_weights"]}
    assert tops == {"README.md", "__init__.py", "tiny"}
    assert {Path(path).suffix for path in held["minisd_weights"] if path.startswith("tiny/")} == {
        ".json", ".safetensors", ".txt"}


def never(tree: ast.AST) -> set[str]:
    """The MODULES that a tree imports, and the FUNCTIONS that it imports or names."""
    said = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute))}
    return roots(imports(tree)) & MODULES | (said | imports(tree)) & FUNCTIONS


@pytest.mark.parametrize("path", [*MINISD, *KERNELS], ids=lambda path: "/".join(path.parts[-2:]))
def test_what_no_file_does(path):
    """No code from data, no other program, no network except in hub; no print, no environment."""
    tree = ast.parse(path.read_text())
    assert not never(tree)
    assert "huggingface_hub" not in roots(imports(tree)) or path.stem == "hub"
    said = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute))}
    if path.stem != "__main__":
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
    declared = {re.match(r"\w+", line)[0].replace("pillow", "PIL") for line in lines}
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    imported = roots(set().union(*(imports(ast.parse(path.read_text())) for path in paths)))
    own = {p.stem for folder in folders for p in (ROOT / folder).glob("*.py")} | {
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
import minisd.hub, minisd.__main__
from minisd.backends import resolve
import torch
resolve("auto", None, torch.device("cpu"), torch.float32)
"""


def test_importing_opens_no_socket_and_needs_no_triton():
    done = subprocess.run([sys.executable, "-c", CHEAP], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
