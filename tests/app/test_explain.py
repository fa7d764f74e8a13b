"""The page of `minisd explain`: its numbers are the run's, its maps are attention, and it is one
file of valid HTML that needs nothing else and renders in a browser."""

import ast
import base64
import copy
import html
import io
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import fails, run
from PIL import Image
from small_models import DENOISER, SMALL, SMALL_V, small_model

import minisd
from minisd.app.explain import WordMaps, over_all_sizes, watched
from minisd.app.explain_html import shell
from minisd.app.explain_page import page
from minisd.config import SD1_INPAINT, ScheduleConfig
from minisd.models.transformer import SpatialTransformer
from minisd.request import Request

PROMPT = "a red heart on a blue background"
ASKED = ["--seed", "5", "--steps", "3", "--quiet", "--device", "cpu"]
VOID = {"meta", "img", "br"}
TAGS = VOID | {
    "html", "head", "title", "style", "body", "header", "div", "h1", "h2", "h3", "p", "nav", "ol",
    "ul", "li", "a", "main", "section", "code", "span", "b", "i", "bdi", "table", "tr", "th", "td",
    "figure", "figcaption", "sub", "sup", "pre", "footer", "svg", "path", "polyline", "circle",
    "text",
}
HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


class Parsed(HTMLParser):
    """A page's tags with their attributes, and its text; AssertionError where a tag is not closed.
    """

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join("".join(self.texts).split())
        self.images = [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self._open
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)


def picture(source: str) -> Image.Image:
    head, data = source.split(",", 1)
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        image.load()
        return image


def explained(folder: Path, *line: str) -> str:
    code, out, err = run(["explain", *line, *ASKED, "-o", str(folder / "page.html")])
    assert (code, out) == (0, f"{folder / 'page.html'}  seed 5\n"), err
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return explained(tmp_path_factory.mktemp("explain"), PROMPT)


@pytest.fixture(scope="module")
def sd():
    return minisd.load(device="cpu")


# The numbers


def said(name: str, x: torch.Tensor) -> str:
    x = x.numpy()
    shape = " × ".join(map(str, x.shape))
    return f"{name}{shape}mean {x.mean():.4f}, standard deviation {x.std():.4f}"


def test_the_numbers_are_those_of_the_run(made, sd):
    text = Parsed(made).text
    ids = sd.tokenizer([PROMPT])[0]
    shown = [int(number) for number in re.findall(r"</code><i>(\d+)</i>", made)]
    assert shown == ids[:9].tolist() and (ids[9:] == ids[9]).all()
    assert "Here 9 are taken" in text and "The other 68 are padding." in text
    cond, empty = sd.text_encoder(sd.tokenizer([PROMPT, ""]))
    noise = torch.randn(6, 16, 16, generator=torch.Generator().manual_seed(5))
    latent = sd(PROMPT, num_inference_steps=3, seed=5, output_type="latent").images[0]
    for row in (said("the prompt", cond), said("an empty prompt", empty), said("xT", noise),
                said("the latent", latent)):
        assert row in text
    for t in (667, 334, 1):
        assert text.count(f"t {t}") >= 2


def test_the_image_is_that_of_the_line_in_the_page(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = shlex.split(html.unescape(re.search(r"<pre><code>(.*)</code></pre>", made)[1]))
    assert line.pop(0) == "minisd" and run([*line, "--quiet"])[0] == 0
    drawn = np.asarray(Image.open("image.png"))
    images = {image["alt"]: picture(image["src"]) for image in Parsed(made).images}
    assert np.array_equal(np.asarray(images["The finished image"]), drawn)
    assert np.array_equal(np.asarray(images[f"The image that was drawn: {PROMPT}"]), drawn)


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


# The maps


def watched_model(config) -> tuple[minisd.StableDiffusion, WordMaps]:
    words, sd = WordMaps(), copy.deepcopy(small_model(config))
    for module in (module for part in sd.parts.values() for module in part.modules()):
        if hasattr(module, "ops"):
            module.ops = words.ops
    return sd, words


def watch(config, **call):
    """A run of a small model, and each call of its cross-attention: size, module, x, context."""
    sd, words = watched_model(config)
    calls, size = [], []
    for name, module in sd.unet.named_modules():
        if isinstance(module, SpatialTransformer):
            module.register_forward_pre_hook(
                lambda module, given: size.append(tuple(given[0].shape[2:])))
        if name.endswith("attn2"):
            module.register_forward_pre_hook(
                lambda module, given: calls.append((size[-1], module, *given)))
    call = {"seed": 0, "num_inference_steps": 2, "progress": False, **call}
    plan = Request(prompt="a cat", **call).plan(config)
    return watched(sd, words, "a cat", plan, **call), calls


@pytest.mark.parametrize("config, call", [
    (SMALL, {"height": 28, "width": 44}),  # 7 x 11 is 77 places: as many as the context has
    (SMALL_V, {"height": 24, "width": 16, "guidance_scale": 1.0}),
    (SMALL, {"height": 16, "width": 16, "sampler": "heun"}),
], ids=["77 places", "no guidance", "two calls a step"])
def test_the_maps_are_the_mean_attention_with_the_prompt(config, call):
    run, calls = watch(config, **call)
    found = {}
    for size, attn, x, context in calls:
        q, k = attn.to_q(x[-1]), attn.to_k(context[-1])
        q, k = (y.reshape(len(y), attn.heads, -1) for y in (q, k))
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        found.setdefault(size, []).append(weights.mean(0).T.reshape(-1, *size))
    assert list(run.maps) == sorted(found, reverse=True) and len(found) == 3
    for size, each in run.maps.items():
        assert np.abs(each - torch.stack(found[size]).mean(0).numpy()).max() < 1e-6
        assert np.abs(each.sum(0) - 1).max() < 1e-5
    whole = over_all_sizes(run.maps)
    assert whole.shape == (77, *max(found)) and np.abs(whole.sum(0) - 1).max() < 1e-5


@pytest.mark.parametrize("config", [SMALL, SMALL_V])
def test_watching_changes_nothing(config):
    call = {"seed": 0, "num_inference_steps": 3, "height": 24, "width": 16, "progress": False}
    run, _ = watch(config, **call)
    latent = small_model(config)("a cat", **call, output_type="latent").images[0]
    assert np.array_equal(run.latent, latent.float().numpy())


def test_the_halves_of_guidance():
    run, _ = watch(SMALL, height=16, width=16, num_inference_steps=1, sampler="ddim")
    sd, (moment,) = small_model(SMALL), run.moments
    context = sd.text_encoder(sd.tokenizer(["", "a cat"]))
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    eps = sd.unet(x.repeat(2, 1, 1, 1), moment.level.t, context)
    x0 = (x - moment.level.sigma * eps) / moment.level.alpha
    far = (x0[1] - x0[0]).square().sum(0).sqrt()
    assert np.abs(moment.change - far.numpy()).max() < 1e-5
    for image, half in zip(moment.halves, x0.split(1)):
        levels = 255 * (sd.vae.decode(half)[0] / 2 + 0.5).clamp(0, 1)
        assert np.abs(np.asarray(image) - levels.permute(1, 2, 0).numpy()).max() < 0.51


# The page


def check(text: str) -> Parsed:
    """It is valid, and needs nothing but itself."""
    parsed = Parsed(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=\"en\">") and HIDDEN.search(text) is None
    assert {tag for tag, _ in parsed.tags} <= TAGS
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and "curves" in ids
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes or tag == "img"
        if "href" in attributes:
            assert tag == "a"
            target = attributes["href"]
            assert target.startswith("https://arxiv.org/abs/") or target.removeprefix("#") in ids
    assert parsed.images
    for image in parsed.images:
        assert image["alt"].strip()
        assert picture(image["src"]).format == "PNG"
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert style.count("{") == style.count("}") and "prefers-color-scheme: dark" in style
    return parsed


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


# The command


@pytest.mark.parametrize("line, code, words", [
    ([], 2, ["prompt"]),
    (["x", "-o", "a.png"], 2, ["a.png", "must end in .html"]),
    (["x", "-o", "there.html"], 5, ["there.html exists", "--overwrite"]),
    (["x", "-o", "nowhere/a.html"], 5, ["nowhere is not a folder"]),
    (["x", "--steps", "0"], 2, ["--steps", "from 1 to 1000", "minisd explain --help"]),
    (["x", "--seed", "-1"], 2, ["--seed"]),
    (["x", "--size", "66x64"], 2, ["--size", "multiple of 4"]),
    (["x", "--sampler", "best"], 2, ["--sampler: sampler must be one of"]),
    (["x\udcff"], 2, ["lone surrogate"]),
    (["x", "--image", "a.png"], 2, ["--image"]),
    (["x", "-m", "nothing"], 3, ["nothing does not exist"]),
])
def test_bad_input_is_one_sentence_before_the_model_is_loaded(
        tmp_path, monkeypatch, line, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vars(minisd), "load", lambda *_, **__: pytest.fail("loaded"))
    Path("there.html").write_text("precious")
    fails(["explain", *line], code, *words)
    assert os.listdir() == ["there.html"] and Path("there.html").read_text() == "precious"


def test_a_model_that_needs_an_image_is_rejected(model, monkeypatch):
    monkeypatch.setattr("minisd.checkpoints.checkpoint.open_checkpoint",
                        lambda *_, **__: SimpleNamespace(config=SD1_INPAINT))
    fails(["explain", "x"], 2, "this is an inpainting model, and explain is for text to image")
    assert model.loaded == []


def test_the_options_reach_the_model_and_the_line(model, monkeypatch):
    calls = []
    monkeypatch.setattr("minisd.app.explain.watched",
                        lambda sd, words, prompt, plan, **call: calls.append((prompt, call)))
    lines = []
    monkeypatch.setattr("minisd.app.explain_page.page",
                        lambda run, command: lines.append(command) or "the page")
    Path("out").mkdir()
    line = ["-x", "-m", "m", "--vae", "v", "-n", "-b", "--steps", "3", "--guidance", "-1.5",
            "--size", "96x64", "--dtype", "float16", "--sampler", "euler", "--spacing", "karras"]
    line = [*line[1:], "--seed", "7", "-o", "out", "--", "-x"]
    line[line.index("-n"):line.index("-n") + 2] = ["--negative=-b"]
    assert run(["explain", *line])[:2] == (0, "out/minisd-7.html  seed 7\n")
    assert Path("out/minisd-7.html").read_text() == "the page"
    ((path, options),) = model.loaded
    assert path == "m" and options["fused"] is False and options["dtype"] == "float16"
    assert options["vae"] == "v" and callable(options["ops"].attention)
    asked = {"negative_prompt": "-b", "num_inference_steps": 3, "guidance_scale": -1.5,
             "width": 96, "height": 64, "sampler": "euler", "spacing": "karras", "seed": 7}
    assert calls == [("-x", {**asked, "progress": None})]
    (command,) = lines
    assert command[0] == "minisd" and run(command[1:])[0] == 0
    drawn = model.calls[-1]
    assert drawn["prompt"] == "-x" and {name: drawn[name] for name in asked} == asked
    assert model.loaded[-1][0] == "m" and model.loaded[-1][1]["dtype"] == "float16"


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
