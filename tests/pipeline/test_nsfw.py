"""A model with a safety checker tells what it flags, and makes it black only if asked."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from reference_models import SMALL, VISION, official_safety_checker, randomise, small_model

import minisd
from minisd.app.png import read_settings

CALL = dict(num_inference_steps=1, height=16, width=24, num_images_per_prompt=2, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checker that flags every image: all of its thresholds are below any cosine."""
    place = tmp_path_factory.mktemp("checker")
    with torch.no_grad():
        checker = randomise(official_safety_checker(VISION))
        checker.concept_embeds_weights.fill_(-2.0)
        checker.float().save_pretrained(place)
    return place


@pytest.fixture
def sd():
    """A model whose checker flags the second image, and what it was given."""
    model = copy.copy(small_model(SMALL))
    model.given = []
    model.safety_checker = lambda images: model.given.append(images) or [False, True]
    return model


@pytest.mark.parametrize("output_type", ["pil", "pt", "np"])
def test_flags_are_told_and_images_are_as_they_were(sd, output_type):
    out = sd("a", output_type=output_type, **CALL)
    plain = small_model(SMALL)("a", output_type=output_type, **CALL)
    assert out.nsfw == [False, True] and sd.given[0] is out.images
    assert plain.nsfw is None
    black = out.blackened()
    assert type(black) is type(out.images)
    made, same, black = ([np.asarray(image) for image in images]
                         for images in (out.images, plain.images, black))
    assert np.array_equal(made, same) and made[1].any()
    assert np.array_equal(black[0], made[0]) and np.array_equal(black[1], 0 * made[1])


def test_without_a_check_nothing_is_blackened(sd):
    latents = sd("a", output_type="latent", **CALL)
    assert latents.nsfw is None and not sd.given
    with pytest.raises(ValueError, match="no safety checker has seen the images"):
        latents.blackened()


def test_a_checker_of_ones_own_that_miscounts():
    sd = copy.copy(small_model(SMALL))
    sd.safety_checker = lambda images: [True]
    with pytest.raises(ValueError, match="^safety_checker must give 2 flags, .* not 1$"):
        sd("a", **CALL)


def test_it_is_loaded_with_the_model(folder):
    sd = minisd.load(safety_checker=folder)
    assert isinstance(sd.safety_checker, minisd.SafetyChecker)
    assert "safety_checker" not in sd.parts
    out = sd("a red heart", num_inference_steps=1, seed=0)
    assert out.nsfw == [True] and not np.array(out.blackened()[0]).any()
    sd.to(dtype="float64")
    assert sd.safety_checker.network.concept_embeds.dtype == torch.float64
    assert sd.safety_checker(Image.new("RGB", (8, 8))) == [True]


def test_a_wrong_folder_is_an_error_before_the_weights_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr("minisd.checkpoints.checkpoint.read_tensor",
                        lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(minisd.WeightError, match="config.json is missing: the folder holds no"):
        minisd.load(safety_checker=tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        minisd.load(safety_checker=tmp_path / "nowhere")


def test_on_the_command_line(folder, monkeypatch, tmp_path, capsys):
    from minisd.app.cli import main

    monkeypatch.chdir(tmp_path)
    line = ["a red heart", "-o", "a.png", "--steps", "2", "--quiet", "--safety-checker"]
    assert main([*line, str(tmp_path)]) == 3
    assert f"{tmp_path / 'config.json'} is missing" in capsys.readouterr().err
    assert main([*line, str(folder)]) == 0
    assert capsys.readouterr().err == "minisd: warning: the safety checker flags a.png\n"
    assert read_settings("a.png")["nsfw"] is True
    assert np.array(Image.open("a.png")).any()
