"""The command line: its calls of the model, its file names, and its exit codes."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from command_line import fails
from PIL import Image

import minisd
from minisd.app.cli import main
from minisd.app.png import read_settings
from minisd.errors import HubError

# Drawing

LOADED = {"device": "auto", "dtype": "auto", "ops": "auto", "tile": None, "config": None,
          "vae": None, "prediction_type": None, "safety_checker": None}


def test_the_simplest_command_uses_the_documented_defaults(model, capsys):
    assert main(["a red heart", "-o", "heart.png", "--seed", "42"]) == 0
    assert capsys.readouterr().out == "heart.png  seed 42\n"
    assert model.loaded == [(None, LOADED)]
    assert model.calls == [{
        "prompt": "a red heart", "negative_prompt": "", "seed": 42, "image": None,
        "mask_image": None, "progress": None,
    }]  # the model has the other defaults
    made = read_settings("heart.png")
    assert made["prompt"] == "a red heart" and made["seed"] == 42
    assert made["model"] == "tiny" and made["version"] == minisd.__version__


def test_every_option_reaches_the_model(model):
    Image.new("RGB", (8, 8), "red").save("start.png")
    Image.new("L", (8, 8), 255).save("mask.png")
    line = ["-m", "models/x.safetensors", "-n", "blur", "-o", "a.png", "--steps", "3",
            "--guidance", "-1.5", "--seed", "4294967295", "--size", "96x64", "--device", "cuda:1",
            "--dtype", "float16", "--ops", "reference", "--image", "start.png", "--mask",
            "mask.png", "--strength", "0.5", "--eta", "1", "--quiet", "--vae", "v.safetensors",
            "--prediction-type", "v_prediction", "--tile", "64", "--config", "sizes",
            "--safety-checker", "safe", "a prompt"]
    assert main(line) == 0
    options = {"device": "cuda:1", "dtype": "float16", "ops": "reference", "tile": 64,
               "config": "sizes", "vae": "v.safetensors", "prediction_type": "v_prediction",
               "safety_checker": "safe"}
    assert model.loaded == [("models/x.safetensors", options)]
    call = model.calls[0]
    assert call.pop("image").getpixel((0, 0)) == (255, 0, 0)
    assert call.pop("mask_image").getpixel((0, 0)) == (255, 255, 255)
    assert call == {
        "prompt": "a prompt", "negative_prompt": "blur", "num_inference_steps": 3,
        "guidance_scale": -1.5, "seed": 4294967295, "eta": 1.0, "strength": 0.5, "width": 96,
        "height": 64, "progress": False,
    }
    assert read_settings("a.png")["model"] == "x.safetensors"


def test_a_flagged_image_is_told_and_kept_as_it_is(model, capsys):
    line = ["a", "--count", "2", "--seed", "5", "-o", "a.png", "--safety-checker", "safe"]
    model.nsfw = [True]
    assert main(line) == 0
    assert capsys.readouterr().err == "".join(
        f"minisd: warning: the safety checker flags a-0000{i}.png\n" for i in range(2))
    assert read_settings("a-00001.png")["nsfw"] is True
    model.nsfw = [False]
    assert main([*line, "--overwrite"]) == 0
    assert capsys.readouterr().err == "" and read_settings("a-00001.png")["nsfw"] is False
    assert main(["a", "--seed", "5", "-o", "b.png"]) == 0
    fails(["a", "--seed", "5", "-o", "b.png", "--safety-checker", "safe"], 5, "b.png exists")


@pytest.mark.parametrize("options, names", [
    ([], ["minisd-5.png"]),
    (["-o", "out"], ["out/minisd-5.png"]),
    (["--count", "2"], ["00000-5.png", "00001-6.png"]),
    (["--count", "2", "-o", "out/"], ["out/00000-5.png", "out/00001-6.png"]),
    (["--count", "2", "-o", "out/heart.png"], ["out/heart-00000.png", "out/heart-00001.png"]),
])
def test_names(model, tmp_path, capsys, options, names):
    (tmp_path / "out").mkdir()
    assert main(["x", "--seed", "5", *options]) == 0
    lines = [f"{name}  seed {5 + i}" for i, name in enumerate(names)]
    assert capsys.readouterr().out.splitlines() == lines
    assert [read_settings(name)["seed"] for name in names] == [5 + i for i in range(len(names))]


def test_a_drawn_seed_is_printed_and_saved(model, capsys):
    assert main(["x", "-o", "a.png"]) == main(["x", "-o", "b.png"]) == 0
    seeds = [int(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert seeds == [call["seed"] for call in model.calls]
    assert seeds == [read_settings(name)["seed"] for name in ("a.png", "b.png")]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("line, prompt", [
    (["--", "info"], "info"), (["-n", "", "words"], "words"), (["--", "-o"], "-o"), ([""], ""),
    (["information"], "information"),
])
def test_prompts_that_look_like_something_else(model, line, prompt):
    assert main(line) == 0
    assert model.calls[0]["prompt"] == prompt


# Existing files, interruptions


def test_an_existing_file_is_rejected_before_any_work(model):
    Path("a.png").write_text("precious")
    fails(["x", "-o", "a.png"], 5, "a.png exists")
    assert model.loaded == [] and Path("a.png").read_text() == "precious"
    assert main(["x", "-o", "a.png", "--overwrite"]) == 0
    assert read_settings("a.png")["prompt"] == "x"


def test_the_last_of_many_names_is_checked_before_the_first_is_made(model):
    Path("a-00002.png").write_text("precious")
    fails(["x", "-o", "a.png", "--count", "3"], 5, "a-00002.png")
    assert model.loaded == []


def test_an_image_of_the_same_settings_is_kept_and_reported(model, capsys):
    line = ["x", "-o", "a.png", "--seed", "1"]
    assert main(line) == 0
    before = os.stat("a.png").st_mtime_ns
    capsys.readouterr()
    assert main(line) == 0
    assert "a.png  seed 1  (kept" in capsys.readouterr().out
    assert len(model.loaded) == 1 and os.stat("a.png").st_mtime_ns == before


@pytest.mark.parametrize("same", [["--steps", "50"], ["--size", "64x64"], ["--guidance", "7.5"]])
def test_the_default_said_is_the_default(model, capsys, same):
    model.defaults = {"num_inference_steps": 50, "guidance_scale": 7.5}
    line = ["x", "-o", "a.png", "--seed", "1"]
    assert main(line) == main([*line, *same]) == 0
    assert "(kept" in capsys.readouterr().out and len(model.calls) == 1


def test_a_model_of_the_same_name_elsewhere_is_another(model):
    assert main(["x", "-o", "a.png", "--seed", "1", "-m", "a/model"]) == 0
    fails(["x", "-o", "a.png", "--seed", "1", "-m", "b/model"], 5, "a.png exists")


@pytest.mark.parametrize("change", [
    ["--seed", "2"], ["-n", "blur"], ["--steps", "49"], ["--guidance", "7"], ["--eta", "0.5"],
    ["--size", "96x64"], ["-m", "other"], ["--image", "start.png"], ["--vae", "other"],
    ["--prediction-type", "epsilon"], ["--tile", "8"], ["--config", "other"],
], ids=lambda change: change[0])
def test_an_image_of_other_settings_is_an_error(model, change):
    Image.new("RGB", (8, 8)).save("start.png")
    plain = ["x", "-o", "a.png", "--seed", "1"]
    for first, second in ((plain, plain + change), (plain + change, plain)):
        assert main([*first, "--overwrite"]) == 0
        fails(second, 5, "a.png exists")


def test_an_interruption_keeps_finished_images_and_the_next_run_resumes(model, capsys):
    line = ["x", "-o", "a.png", "--seed", "1", "--count", "3"]
    model.failure = (2, KeyboardInterrupt())
    assert main(line) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("a-00000.png  seed 1\n", "minisd: error: interrupted\n")
    assert os.listdir() == ["a-00000.png"]
    assert main(line) == 0
    assert [call["seed"] for call in model.calls] == [1, 2, 2, 3]
    assert sorted(os.listdir()) == [f"a-0000{i}.png" for i in range(3)]


# Errors


@pytest.mark.parametrize("error, code, words", [
    (ValueError("height must be\na multiple of 8"), 2, ["height must be a multiple of 8\n"]),
    (ArithmeticError("the VAE gave NaN"), 2, ["the VAE gave NaN"]),
    (type("WeightError", (ValueError,), {})("x: cut short"), 3, ["x: cut short"]),
    (HubError("no such model"), 3, ["no such model"]),
    (FileNotFoundError(2, "No such file or directory", "m"), 3, ["m: No such file"]),
    (MemoryError(), 4, ["--size"]),
    (torch.OutOfMemoryError("CUDA out of memory"), 4, ["CUDA out of memory", "--size"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, ["--size"]),
    (OSError(28, "No space left on device", "a.png"), 5, ["a.png: No space left on device"]),
    (KeyError("oops"), 1, ["KeyError", "oops", "--debug"]),
])
def test_failures_of_the_model_have_their_codes(model, error, code, words):
    model.failure = (1, error)
    fails(["x", "-o", "a.png"], code, *words)
    assert os.listdir() == []


def test_a_real_failed_allocation_is_a_memory_error(model, monkeypatch):
    monkeypatch.setitem(vars(minisd), "load", lambda *_, **__: torch.empty(10**15))
    fails(["x"], 4, "--size")


def test_the_names_of_errors_that_exit_codes_depend_on():
    assert minisd.WeightError.__name__ == "WeightError"
    assert HubError.__name__ == "HubError"


def test_a_traceback_only_with_debug(model, capsys):
    model.failure = (1, ValueError("oops"))
    assert main(["x", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("\nminisd: error: oops\n")


def test_a_warning_is_one_line(model, capsys, monkeypatch):
    def load(*_, **__):
        warnings.warn("the prompt is too long,\ndropped: heart")
        return model

    monkeypatch.setitem(vars(minisd), "load", load)
    assert main(["x", "-o", "a.png"]) == 0
    assert capsys.readouterr().err == (
        "minisd: warning: the prompt is too long, dropped: heart\n"
    )
