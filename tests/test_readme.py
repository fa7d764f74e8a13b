"""What the README says of the tree is true of the tree."""

import re
import tomllib
from pathlib import Path

import pytest

from weights.recipe.gallery import captions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TOUR = re.findall(r"^\| \[.*\]\((\S+\.py)\) \|", README, re.MULTILINE)


def test_the_tour_has_every_file_of_the_package():
    package = {f"minisd/{p.name}" for p in (ROOT / "minisd").glob("*.py")} - {"minisd/__init__.py"}
    assert package <= set(TOUR)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROW = r"^\| (\w+)(?: \(extras? (.*)\))? \| .* \| (\[.*\)) \|$"  # name, extras, where used
NEEDS = re.findall(ROW, README.split("## Dependencies")[1], re.MULTILINE)


def test_the_dependencies_are_those_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {(re.match(r"\w+", line)[0], "") for line in PROJECT["dependencies"]}
    declared |= {(re.match(r"\w+", line)[0], extra) for extra in extras for line in extras[extra]}
    told = {(name, extra) for name, extras, _ in NEEDS
            for extra in re.findall(r"\w+", extras) or [""]}  # fmt: skip
    assert told == declared and len(NEEDS) == len({name for name, _ in declared})


@pytest.mark.parametrize("name, where", [(name, where) for name, _, where in NEEDS])
def test_dependencies_are_used_where_it_says(name, where):
    imported = re.compile(rf"^\s*(import|from) {'PIL' if name == 'pillow' else name}\b", re.M)
    for target in re.findall(r"\((.*?)\)", where):
        files = [ROOT / target] if target.endswith(".py") else (ROOT / target).glob("*.py")
        assert any(imported.search(file.read_text()) for file in files), target


def test_the_prompts_of_the_gallery():
    assert README.count("\n1. ") == len(captions())
    assert all(f"\n1. {line}\n" in README for line in captions())


def test_every_link_leads_somewhere():
    for target in re.findall(r'(?:\]\(|src=")(?!http)([^)#"]+)', README):
        assert (ROOT / target).exists(), target


def test_every_test_named_is_there():
    for name in re.findall(r"`(?:tests/)?(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).exists(), name


def test_the_example_names_real_arguments():
    import inspect

    import minisd

    for function, text in ((minisd.StableDiffusion.__call__, "sd("), (minisd.load, "minisd.load(")):
        known = inspect.signature(function).parameters
        calls = re.findall(re.escape(text) + r"([^\n#]*)\)", README.split("```python")[1])
        for call in calls:
            assert set(re.findall(r"(\w+)=", call)) <= set(known)
