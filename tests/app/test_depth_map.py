"""Depth models on the command line: `minisd "..." -m sd2-depth --image photo.png`."""

from dataclasses import replace

import numpy as np
import pytest
from command_line import fails, run
from PIL import Image
from reference_models import SMALL, SMALL_DEPTH, small_model

import minisd
from minisd.app.png import read_settings

DRAW = ["a red heart", "--steps", "2", "--quiet", "--seed", "3"]
LEVELS = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint16) * 700


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, config in (("depth", SMALL_DEPTH), ("without", replace(SMALL_DEPTH, depth=None)),
                         ("sd1", SMALL)):
        small_model(replace(config, name=f"line {name}")).to(dtype="float32").save(place / name)
    return place


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((32, 24), 80).convert("RGB").save("photo.png")
    Image.fromarray(LEVELS).save("near.png")
    Image.new("L", (8, 8), 7).save("flat.png")


def pixels(path):
    return np.array(Image.open(path))


def test_an_image_a_map_or_both(models):
    sd, call = minisd.load(models / "depth", device="cpu"), dict(num_inference_steps=2, seed=3)
    photo, near = ["--image", "photo.png"], ["--depth-map", "near.png"]
    given = {"image": "photo.png"}, {"depth_map": LEVELS}, {"image": "photo.png",
                                                            "depth_map": "near.png"}
    for i, (line, arguments) in enumerate(zip((photo, near, photo + near), given)):
        code, out, err = run([*DRAW, "-m", f"{models}/depth", "-o", f"{i}.png", *line])
        assert (code, out, err) == (0, f"{i}.png  seed 3\n", "")
        image, = sd("a red heart", **call, **arguments).images
        assert image.size == (32, 24) and np.array_equal(pixels(f"{i}.png"), np.array(image))
    made = read_settings("2.png")
    assert (made["image"], made["depth_map"], made["strength"]) == ("photo.png", "near.png", 0.8)
    assert len({pixels(f"{i}.png").tobytes() for i in range(3)}) == 3
    # The map may be another by now, so the image is not taken for made.
    fails([*DRAW, "-m", f"{models}/depth", "-o", "1.png", *near], 5, "1.png exists")


@pytest.mark.parametrize("model, line, code, words", [
    ("depth", [], 2, "give it depth_map or image (--depth-map, --image)"),
    ("without", ["--image", "photo.png"], 2, "without its depth estimator: give it depth_ma"),
    ("depth", ["--depth-map", "flat.png"], 2, "the depth is the same everywhere"),
    ("depth", ["--depth-map", "photo.png", "--strength", "0.5"], 2, "--strength need --image"),
    ("depth", ["--depth-map", "colour.png"], 2, "colour.png has colours: turn it grey first"),
    ("depth", ["--depth-map", "none.png"], 3, "none.png: No such file"),
    ("depth", ["--depth-map", "near.png", "--preview", "near.png", "--overwrite"], 2,
     "--preview and --depth-map are both near.png"),
    ("sd1", ["--depth-map", "near.png"], 2, "a text to image model, which takes no depth_map"),
])
def test_what_is_refused(model, line, code, words, models, monkeypatch):
    Image.new("RGB", (8, 8), "red").save("colour.png")
    monkeypatch.setattr(minisd, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    fails([*DRAW, "-m", f"{models}/{model}", "-o", "a.png", *line], code, words)


@pytest.mark.parametrize("model, said", [
    ("depth", "kind        depth (text_encoder, unet, vae, depth_estimator)"),
    ("without", "kind        depth (text_encoder, unet, vae)"),
])
def test_info_says_the_kind_and_its_networks(model, said, models):
    code, out, _ = run(["info", f"{models}/{model}"])
    assert code == 0 and said in out.splitlines()
