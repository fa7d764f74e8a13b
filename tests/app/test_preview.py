"""--sampler, --spacing and --preview: what is drawn, written on the way, and remembered."""

import json

import pytest
from command_line import run
from PIL import Image

DRAW = ["a red heart", "--seed", "0", "--steps", "5", "--quiet"]


def test_a_preview_is_the_image_so_far(tmp_path):
    preview, out = tmp_path / "preview.png", tmp_path / "heart.png"
    assert run([*DRAW, "--preview", str(preview), "-o", str(out)])[0] == 0
    assert run([*DRAW, "-o", str(tmp_path / "plain.png")])[0] == 0
    image, plain = Image.open(out), Image.open(tmp_path / "plain.png")
    assert image.tobytes() == plain.tobytes()
    so_far = Image.open(preview)  # after the first of 5 steps
    assert so_far.size == image.size and so_far.tobytes() != image.tobytes()


@pytest.mark.parametrize("preview, words", [
    ("taken.png", "taken.png"), ("heart.png", "--preview and --output are both"),
    ("preview.jpg", "only PNG is written")])
def test_a_preview_that_cannot_be(preview, words, tmp_path):
    (tmp_path / "taken.png").write_text("precious")
    out = str(tmp_path / "heart.png")
    code, _, err = run([*DRAW, "--preview", str(tmp_path / preview), "-o", out])
    assert code in (2, 5) and words in err and err.count("\n") == 1
    assert (tmp_path / "taken.png").read_text() == "precious"
    assert not (tmp_path / "heart.png").exists()


@pytest.mark.parametrize("options, parameters, settings", [
    (["--sampler", "DPM++ 2M Karras"], "Sampler: DPM++ 2M Karras,", ("dpmpp_2m", "karras", 0.0)),
    (["--sampler", "euler_a"], "Sampler: Euler a,", ("euler_a", "linspace", 1.0)),
    (["--sampler", "euler", "--spacing", "trailing"], "Spacing: trailing",
     ("euler", "trailing", 0.0)),
    ([], "Sampler: DDIM,", ("ddim", "leading", 0.0))])
def test_the_sampler_is_remembered(options, parameters, settings, tmp_path):
    out = tmp_path / "heart.png"
    assert run([*DRAW, *options, "-o", str(out)])[0] == 0
    assert parameters in Image.open(out).text["parameters"]
    told = json.loads(run(["info", str(out)])[1])
    assert (told["sampler"], told["spacing"], told["eta"]) == settings
    # Another sampler is another image: what is there is not kept for it.
    code, _, err = run([*DRAW, "--sampler", "lcm", "-o", str(out)])
    assert code == 5 and "exists" in err


def test_a_sampler_that_there_is_not(tmp_path):
    code, _, err = run([*DRAW, "--sampler", "dpm", "-o", str(tmp_path / "heart.png")])
    assert code == 2 and err.startswith("minisd: error: --sampler: sampler must be one of ddim")
    assert err.count("\n") == 1
