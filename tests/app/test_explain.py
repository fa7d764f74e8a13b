"""`minisd explain`: its numbers are those of the run, its maps are attention, and its options."""

import html
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import fails, run
from explained import PROMPT, Parsed, explained, picture, watched_model
from PIL import Image
from small_models import SMALL, SMALL_V, small_model

import minisd
from minisd.app.explain import over_all_sizes, watched
from minisd.config import SD1_INPAINT
from minisd.models.transformer import SpatialTransformer
from minisd.request import Request


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return explained(tmp_path_factory.mktemp("explain"), PROMPT)


@pytest.fixture(scope="module")
def sd():
    return minisd.load(device="cpu")


# The numbers


def said(name: str, x: torch.Tensor) -> str:
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


# The maps


def watch(config, prompt="a cat", **call):
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
    plan = Request(prompt=prompt, **call).plan(config)
    return watched(sd, words, prompt, plan, **call), calls


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


@pytest.mark.parametrize("prompt, words", [
    ("a  cat, a", ["a", "cat", ",", "a"]),
    ("xyxyxy", ["xyxyxy"]),  # three equal tokens
    ("👩‍👩‍👧 é", ["👩‍👩‍👧", "é"]),  # one character of several tokens
    ("", []),
])
def test_the_words_are_parts_of_the_prompt(prompt, words):
    run, _ = watch(SMALL, prompt, height=8, width=8, num_inference_steps=1, sampler="ddim")
    assert [word for word, _ in run.words] == words
    positions = [position for _, where in run.words for position in where]
    assert positions == list(range(1, len(run.tokens) - 1))


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
    fails(["explain", "x"], 2, "explain is for text to image, and this model is for inpainting")
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
