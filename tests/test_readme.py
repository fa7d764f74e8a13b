"""What the README says of the tree is true of the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TOUR = re.findall(r"^\| \[.*\]\((\S+\.py)\) \| ([\d,]+) \|", README, re.MULTILINE)


def test_the_tour_has_every_file_of_the_package():
    package = {f"minisd/{p.name}" for p in (ROOT / "minisd").glob("*.py")} - {"minisd/__init__.py"}
    assert package <= {path for path, _ in TOUR}


@pytest.mark.parametrize("path, lines", TOUR, ids=[path for path, _ in TOUR])
def test_line_counts(path, lines):
    assert len((ROOT / path).read_text().splitlines()) == int(lines.replace(",", ""))


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
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
