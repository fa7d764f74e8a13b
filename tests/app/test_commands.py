"""The commands info, download and words, and the command line as a process."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from small_models import SMALL, small_model

import minisd
from minisd.app.cli import main
from minisd.app.png import read_settings, save
from minisd.config import SD2_V


def test_info_of_an_image_is_its_settings(tmp_path, capsys):
    settings = {"prompt": 'ein "rotes"\nHerz ❤', "seed": 3}
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings)
    assert main(["info", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out) == settings


def test_info_of_a_checkpoint_is_six_lines(capsys, monkeypatch):
    checkpoint = SimpleNamespace(layout="folder", config=SD2_V, dtypes=Counter(F16=1200, F32=1),
                                 prediction_source="its scheduler_config.json",
                                 parts=dict.fromkeys(["text_encoder", "unet", "vae"]))
    opened = []
    mock = SimpleNamespace(
        open_checkpoint=lambda path, config: opened.append((path, config)) or checkpoint)
    monkeypatch.setitem(sys.modules, "minisd.checkpoints.checkpoint", mock)
    assert main(["info", "some/folder", "--config", "sizes"]) == 0
    assert opened == [("some/folder", "sizes")]
    assert capsys.readouterr().out.splitlines() == [
        "layout      folder",
        "version     Stable Diffusion 2 v",
        "kind        text to image (text_encoder, unet, vae)",
        "dtype       F16 (1,200 tensors), F32 (1 tensors)",
        "prediction  v_prediction (its scheduler_config.json)",
        "sampler     ddim, leading timesteps, steps 50, guidance 7.5",
    ]


def test_download_prints_the_folder(capsys, monkeypatch):
    def fetch(name, log):
        log("fetching " + name)
        return Path("/models") / name

    monkeypatch.setattr("minisd.checkpoints.hub.download", fetch)
    assert main(["download", "sd15"]) == 0
    assert capsys.readouterr() == ("/models/sd15\n", "fetching sd15\n")


def test_a_prompt_of_5000_words_is_cut_and_a_warning_quotes_the_rest(tmp_path, capsys):
    small_model(SMALL).save(tmp_path / "model")
    prompt = " ".join(["cat"] * 75 + ["dog"] * 4925)
    assert main([prompt, "--size", "8x8", "--steps", "1", "--quiet", "-m", f"{tmp_path}/model",
                 "-o", f"{tmp_path}/a.png"]) == 0
    text = capsys.readouterr().err
    assert text.startswith("minisd: warning: the prompt is 5000 tokens long and the model reads 75")
    assert text.count("\n") == 1 and text.count("dog") == 4925 and "cat" not in text
    assert read_settings(tmp_path / "a.png")["prompt"] == prompt


@pytest.mark.parametrize("first, then", [("DPM++ 2M", "dpmpp_2m"), ("DPM2 a", "dpm2")])
def test_an_image_of_another_spacing_or_eta_is_not_kept(tmp_path, first, then):
    line = ["a red heart", "--steps", "2", "--seed", "1", "--quiet", "-o", f"{tmp_path}/a.png"]
    assert main([*line, "--sampler", first]) == 0
    assert main([*line, "--sampler", then]) == 5


def test_previews_replace_each_other_and_nothing_else(tmp_path, capsys):
    a, b, preview = (str(tmp_path / name) for name in ("a.png", "b.png", "p.png"))
    line = ["a red heart", "--steps", "2", "--seed", "1", "--quiet"]
    assert main([*line, "-o", a, "--preview", preview]) == 0 and read_settings(preview) == {}
    assert main([*line, "-o", b, "--preview", preview]) == 0
    assert main([*line, "-o", f"{tmp_path}/c.png", "--preview", a]) == 5
    assert main([*line, "-o", b, "--preview", a, "--image", a, "--overwrite"]) == 2
    assert f"--preview and --image are both {a}" in capsys.readouterr().err
    assert read_settings(a)["seed"] == 1


def run(*line):
    root = str(Path(minisd.__file__).parents[1])
    return subprocess.run([sys.executable, *line], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": root, "COLUMNS": "200"})


def test_help_names_every_option_and_command():
    shown = run("-m", "minisd", "--help")
    assert shown.returncode == 0 and shown.stderr == ""
    for word in ("--model", "--negative", "--output", "--steps", "--guidance", "--seed", "--size",
                 "--count", "--device", "--dtype", "--ops", "--image", "--mask", "--strength",
                 "--eta", "--overwrite", "--quiet", "--debug", "--version", "minisd info FILE",
                 "minisd download NAME", "minisd words", "minisd explain PROMPT", "(default: 50)",
                 "(default: 7.5)", "--vae", "--prediction-type", "--tile", "--config"):
        assert word in shown.stdout, word


def test_version_and_errors_by_exit_status():
    assert run("-m", "minisd", "--version").stdout == f"minisd {minisd.__version__}\n"
    wrong = run("-m", "minisd", "x", "--steps", "0")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("line", [["x", "--steps", "0"], ["x", "-o", "a.jpg"], ["info", "no.png"]])
def test_usage_errors_do_not_import_torch(line):
    code = ("import sys; from minisd.app.cli import main; code = main(sys.argv[1:]);"
            "sys.exit(99 if 'torch' in sys.modules else code)")
    assert run("-c", code, *line).returncode in (2, 3)
