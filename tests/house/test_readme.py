"""What the README says of the tree is true of the tree."""

import inspect
import re
from pathlib import Path

import torch

import minisd
from weights.recipe.gallery import captions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in (
    "README.md", "weights/README.md", "tests/README.md", "bench/README.md", "kernels/README.md",
    "kernels/ladder/README.md", "minisd/WALKTHROUGH.md", "CONTRIBUTING.md")]
TESTS = [*(ROOT / "tests").rglob("test_*.py")]
PROGRAM, EXAMPLE = (block.split("```")[0] for block in README.split("```python")[1:])


def test_it_stays_short():
    assert len(README.splitlines()) <= 150


def test_the_program_draws_the_image_of_a_call():
    """Stable Diffusion in 20 lines: to the last bit."""
    assert len(PROGRAM.strip().splitlines()) == 23
    names = {}
    exec(PROGRAM, names)
    out = names["sd"](names["prompt"], num_inference_steps=30, seed=0, output_type="pt",
                      progress=False)
    assert torch.equal(names["image"], out.images)


def test_the_map_has_every_file_of_the_package():
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "minisd").rglob("*.py")
               if not p.name.startswith("__")}
    assert package <= set(re.findall(r"\]\((minisd/[\w/]+\.py)\)", README))


def test_the_prompts_of_the_gallery():
    page = (ROOT / "weights/README.md").read_text()
    assert page.count("\n1. ") == len(captions())
    assert all(f"\n1. {line}\n" in page for line in captions())


def test_every_link_leads_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r'(?:\]\(|src=")(?!http)([^)#"]+)', text):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_test_named_is_there():
    for page in PAGES:
        for name in re.findall(r"[`/(\s]((?:tests/)?(?:\w+/)?test_\w+\.py)", page.read_text()):
            assert any(path.match(name) for path in TESTS), f"{page}: {name}"


def test_the_example_names_real_arguments():
    for function, text in ((minisd.StableDiffusion.__call__, "sd("), (minisd.load, "minisd.load(")):
        known = inspect.signature(function).parameters
        calls = re.findall(re.escape(text) + r"([^\n#]*)\)", EXAMPLE)
        assert calls
        for call in calls:
            assert set(re.findall(r"(\w+)=", call)) <= set(known)
