"""The page of `minisd explain` is valid HTML that needs nothing else, and renders in a browser."""

import ast
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from explained import PROMPT, check, explained, watched_model
from PIL import Image
from small_models import DENOISER, SMALL, SMALL_V

import minisd
from minisd.app.explain import watched
from minisd.app.explain_html import shell
from minisd.app.explain_page import page
from minisd.config import ScheduleConfig
from minisd.request import Request


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return explained(tmp_path_factory.mktemp("explain"), PROMPT)


def test_it_needs_nothing_else(made):
    parsed = check(made)
    assert 50_000 < len(made) < 2_000_000
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        parsed.tags)


LCM = replace(SMALL, unet=replace(DENOISER, time_cond_proj_dim=32), num_inference_steps=4,
              schedule=ScheduleConfig(sampler="lcm", timestep_spacing="lcm"))


@pytest.mark.parametrize("config, prompt, call, words", [
    (SMALL, "", {}, ["Here 2 are taken", "This prompt has no words", "The empty prompt"]),
    (SMALL, "a cat", {"guidance_scale": 1.0}, ["because the guidance scale is 1", "no guidance"]),
    (LCM, "a cat", {}, ["this model is told the guidance scale, 7.5", "call 4 of 4"]),
    (SMALL_V, "cat " * 90, {"height": 8, "width": 32}, ["had 15 more", "8 by 2 cells", "8x2, 4x1"]),
    (SMALL, "Straße ❤", {"sampler": "DPM++ 2M Karras"}, ["dpmpp_2m", "karras", "Straße"]),
    (SMALL, "a", {"num_inference_steps": 1, "sampler": "euler"}, ["call 1 of 1"]),
])
@pytest.mark.filterwarnings("ignore:the prompt is 90 tokens")
def test_other_calls_and_models(config, prompt, call, words):
    sd, maps = watched_model(config)
    call = {"seed": 0, "num_inference_steps": 4, "height": 16, "width": 16, "progress": False,
            **call}
    plan = Request(prompt=prompt, **call).plan(config)
    run = watched(sd, maps, prompt, plan, **call)
    parsed = check(page(run, ["minisd", prompt]))
    for word in words:
        assert word in parsed.text
    read = [image for image in parsed.images if image["alt"].startswith("Where ")]
    assert len(read) == len(run.words) + len(run.moments[::2]) * run.plan.guided


@pytest.mark.filterwarnings("ignore:this model was not taught")
def test_no_text_is_markup_and_none_is_hidden(tmp_path):
    prompt = "</title><script>alert('1')</script> \"q\" & &lt; \u202erev\u2066 \x07\x00 é\n<!-- x"
    text = explained(tmp_path, prompt, "-n", "'></pre><img src=x onerror=y>\u200f")
    parsed = check(text)
    shown = prompt
    for character in "\u202e\u2066\x07\x00\n":
        shown = shown.replace(character, f"\\u{ord(character):04x}")
    assert f"“{shown}”" in "".join(parsed.texts)
    assert "'></pre><img src=x onerror=y>\\u200f" in parsed.text
    assert any(shown in image["alt"] for image in parsed.images)


@pytest.mark.parametrize("prompt", ["-x", "a 'b' \"c\" $d \\ e", "line\nand \u202eother\x07 \\'"])
def test_a_shell_reads_a_word_as_it_was(prompt):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    done = subprocess.run(["bash", "-c", f"printf %s {shell(prompt)}"], capture_output=True,
                          env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.stdout.decode() == prompt


def test_the_functions_that_are_named_are_there(made):
    named = re.findall(r"<code>([\w.]+)</code> in\s+<code>(minisd/[\w/]+\.py)</code>", made)
    assert len(named) == 10
    for name, path in named:
        body = ast.parse((Path(minisd.__file__).parents[1] / path).read_text()).body
        for part in name.split("."):
            (found,) = [node for node in body if getattr(node, "name", None) == part]
            body = found.body


# In a browser


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip("needs Chromium or Chrome")


def screenshot(browser: str, path: Path, width: int, height: int, dark: bool) -> np.ndarray:
    shot = path.with_suffix(".png")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},{height}",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         f"--screenshot={shot}", path.as_uri()], capture_output=True, timeout=120)
    assert shot.exists(), done.stderr.decode()[-2000:]
    return np.asarray(Image.open(shot).convert("RGB"))


@pytest.mark.parametrize("width, height, dark", [(390, 14_000, True), (1280, 9000, False)])
def test_it_renders_and_nothing_is_wider_than_the_window(
        browser, made, tmp_path, width, height, dark):
    path = tmp_path / "page.html"
    path.write_text(made, encoding="utf-8")
    pixels = screenshot(browser, path, width, height, dark)
    assert pixels.shape[1] == width
    background = pixels[0, 0]
    assert (background < 64).all() if dark else (background > 192).all()
    # What is too wide is drawn up to the edge, and the page's own margin is wider than this.
    assert (pixels[:, -10:] == background).all()
    # Every stage is there, down to the end: rows with something in them, and then none.
    rows = (pixels != background).any(axis=(1, 2)).nonzero()[0]
    assert len(rows) > 4000 and rows[0] < 100 and rows[-1] < len(pixels) - 20
    few = pixels[::5, ::5].reshape(-1, 3)
    assert len(np.unique(few, axis=0)) > 1000  # colours: the pictures are there
