"""What a sentence advises can be done, from Python and from the command line, and helps."""

import ast
import contextlib
import inspect
import re
import shlex
import shutil
from pathlib import Path

import minisd_weights
import pytest
import torch
from files import save
from safetensors.torch import load_file
from small_hub import REPOSITORY
from test_streams import shell

import minisd
from minisd import memory
from minisd.app import cli, options
from minisd.app.cli import COMMANDS, main
from minisd.checkpoints.checkpoint import open_checkpoint
from minisd.pipeline import StableDiffusion

ROOT = Path(minisd.__file__).parent
TINY = Path(minisd_weights.__path__[0], "tiny")
DRAW = ["x", "--steps", "1", "--seed", "0", "--quiet"]
SPELLED = {action.dest: action.option_strings[-1] for action in
           options._drawing_parser()._actions if action.option_strings}

# Every sentence that names an argument


def literals() -> list[str]:
    """Every text in minisd with a space in it, save docstrings; {} stands for what is put in."""
    found = []
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        bodies = (node.body for node in ast.walk(tree) if isinstance(getattr(
            node, "body", None), list))
        left_out = {id(part) for body in bodies for line in body if isinstance(line, ast.Expr)
                    for part in ast.walk(line) if isinstance(line.value, ast.Constant)}
        joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        left_out |= {id(part) for node in joined for part in node.values}
        found += ["".join(part.value if isinstance(part, ast.Constant) else "{}"
                          for part in node.values) for node in joined]
        found += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                  and isinstance(node.value, str) and id(node) not in left_out]
    return [text for text in found if " " in text.strip()]


ARGUMENTS = {name for call in (minisd.load, StableDiffusion.__call__)
             for name in inspect.signature(call).parameters} - {"self"}
# Only an argument that the command line has not leads to these.
FROM_PYTHON = {
    "output_type must be one of {}, not {}",
    "callback_on_step_end must be a function, not {}",
    "give either prompt or prompt_embeds",
    "give either negative_prompt or negative_prompt_embeds",
    "give either image or image_embeds, not both",
    'ops="fused" and fused=False contradict each other',
}


def named(text: str) -> set[str]:
    """The arguments that a text names so that they can be nothing else."""
    words = set(re.findall(r"\b([a-z]+(?:_[a-z]+)+)\b", text)) | set(re.findall(r"\b(\w+)=", text))
    return words & ARGUMENTS


def can_be_followed(text: str, name: str) -> bool:
    """By a user of the command line: it adds the option, or the sentence has it."""
    at_the_start = re.match(rf"{name}[ =]", text) and name in cli.OPTIONS
    option = cli.OPTIONS.get(name, f"--{name}")
    return bool(at_the_start) or option in text or f"in Python give {name}" in text


def test_every_sentence_that_names_an_argument_names_the_option():
    sentences = [text for text in literals() if named(text)]
    assert len(sentences) > 10 and FROM_PYTHON <= set(sentences)
    wrong = [text for text in sentences for name in named(text)
             if text not in FROM_PYTHON and not can_be_followed(text, name)]
    assert wrong == []


def test_every_argument_that_is_named_first_is_an_option():
    """checks.integer("num_inference_steps", ...) and the like begin their sentence with it."""
    checked = {call: set() for call in ("integer", "real", "side", "scaled", "check_texts")}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            own = path.parent.name != "checkpoints"  # there they are fields of files
            if own and name in checked and isinstance(node.args[0], ast.Constant):
                checked[name].add(node.args[0].value)
    assert all(checked.values())
    only_python = {"num_images_per_prompt", "prompt"}  # the prompt has no option
    for name in set().union(*checked.values()) - only_python:
        assert cli.OPTIONS.get(name, f"--{name}") in SPELLED.values(), name


def test_options_and_commands_that_sentences_name_exist():
    known = {*SPELLED.values(), "--debug", "--help", "--strength"}
    texts = literals()
    found = {word for text in texts for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    assert found <= known
    said = {word for text in texts for word in re.findall(r"`minisd (\w+)", text)}
    assert said and said <= set(COMMANDS)
    assert set(cli.OPTIONS.values()) <= known


@pytest.mark.parametrize("line, words", [
    (["--size", "65x64"], "--size: width must be a multiple of 4"),
    (["--size", "64x9000"], "--size: height must be a multiple of 4"),
    (["-n", "a\udcff"], "--negative: negative_prompt has a lone surrogate"),
    (["--prediction-type", "v"], "--prediction-type: prediction_type is 'v'"),
    (["--ops", "fast"], "--ops: ops must be one of"),
    (["-m", "width"], "error: width does not exist"),
    (["--dtype", "int8"], "error: dtype must be auto or one of"),
    (["--config", str(TINY), "-m", str(TINY)], "error: config= (--config) is for single"),
])
def test_the_command_line_says_the_option(capsys, tmp_path, line, words):
    assert main([*DRAW, *line, "-o", str(tmp_path / "a.png")]) in (2, 3)
    assert words in capsys.readouterr().err


def test_a_model_of_fewer_steps_names_the_option(capsys, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("1000", "500"))
    assert main(["x", "--steps", "900", "-m", str(folder), "-o", str(tmp_path / "a.png")]) == 2
    assert "--steps: num_inference_steps must be an integer from 1 to 500" in (
        capsys.readouterr().err)


# Every advice, followed


def fails(capsys, *line: str) -> str:
    """What a line that draws says instead."""
    assert main([*DRAW, *line]) in (2, 3, 5)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """The shipped model in one file, whose sizes are unusual."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    minisd.load(device="cpu").save(path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_config_for_a_file_of_unusual_sizes(here, single_file, capsys):
    assert "give config= (--config), a folder" in fails(capsys, "-m", str(single_file))
    assert main(["info", str(single_file)]) == 3 and "--config" in capsys.readouterr().err
    assert main(["info", str(single_file), "--config", str(TINY)]) == 0
    assert "layout      single file" in capsys.readouterr().out
    line = [*DRAW, "-m", str(single_file), "--config", str(TINY), "-o", "a.png"]
    assert main(line) == 0
    assert "(kept" not in capsys.readouterr().out
    assert main(line) == 0 and "(kept" in capsys.readouterr().out
    assert minisd.load(single_file, config=TINY, device="cpu")


def test_the_tokenizer_of_a_file_of_unusual_sizes(here, single_file, capsys):
    folder = shutil.copytree(TINY, here / "sizes", ignore=shutil.ignore_patterns("tokenizer"))
    line = ["-m", str(single_file), "--config", str(folder)]
    assert "its own tokenizer (a single file's is in the folder of config=, --config)" in (
        fails(capsys, *line))
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    assert main([*DRAW, *line, "-o", "a.png"]) == 0


def test_a_vae_from_elsewhere(here, single_file, capsys):
    tensors = {name: tensor for name, tensor in load_file(single_file).items()
               if not name.startswith("first_stage_model.")}
    bare = ["-m", str(save(here / "bare.safetensors", tensors)), "--config", str(TINY)]
    assert "can be given as vae= (--vae)" in fails(capsys, *bare)
    for vae in (TINY / "vae", TINY, single_file):
        line = [*DRAW, *bare, "--vae", str(vae), "-o", "a.png", "--overwrite"]
        assert main(line) == 0


def test_a_vae_where_a_model_should_be(here, capsys):
    file = TINY / "vae" / "diffusion_pytorch_model.safetensors"
    for path in (TINY / "vae", file):
        assert "a VAE alone: give it as vae= (--vae), beside a model" in (
            fails(capsys, "-m", str(path)))
        assert main([*DRAW, "--vae", str(path), "-o", f"{path.stem}.png"]) == 0
        capsys.readouterr()


def test_a_taken_name(here, capsys):
    assert main([*DRAW, "-o", "a.png"]) == 0
    capsys.readouterr()
    error = fails(capsys, "-o", "a.png", "--seed", "1")
    option = re.search(r"\((--\w+)\)", error)[1]
    assert main([*DRAW, "-o", "a.png", "--seed", "1", option]) == 0


def test_the_remedies_for_too_little_memory(here):
    remedies = re.findall(r"\((--[^)]*)\)", memory.REMEDIES)
    assert remedies == ["--tile 64", "--dtype float16"]
    for i, remedy in enumerate(remedies):
        assert main([*DRAW, *remedy.split(), "-o", f"{i}.png"]) == 0


def test_the_words_of_the_shipped_model(here, capsys):
    assert main([*DRAW, "-o", "a.png", "zzqx"]) == 2  # the prompt is given once
    capsys.readouterr()
    assert main(["zzqx", *DRAW[1:], "-o", "a.png"]) == 0
    command = re.search(r"`minisd (\w+)` lists", capsys.readouterr().err)[1]
    assert main([command]) == 0 and "heart\n" in capsys.readouterr().out


def converted(error: str, folder: Path) -> None:
    """Run the lines that an error gives for a pickle, as they stand, in its folder."""
    lines = re.search(r"save it with safetensors: (.*?\))(?=$| )", error)[1]
    with contextlib.chdir(folder):
        exec(lines, {"path": str(folder / "weights")})


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_is_converted(here, single_file, wrapped):
    tensors = load_file(single_file)
    path = here / "weights"
    torch.save({"state_dict": tensors} if wrapped else tensors, path)
    with pytest.raises(minisd.WeightError, match="never opens pickles") as caught:
        minisd.load(path, config=TINY)
    converted(str(caught.value), here)
    assert open_checkpoint(here / "model.safetensors", config=TINY).parts["unet"]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_in_a_folder_is_converted(here, part):
    folder = shutil.copytree(TINY, here / "model")
    (weights,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(weights), folder / part / "weights")
    (folder / part / "weights").with_suffix(".bin").touch()
    weights.unlink()
    with pytest.raises(minisd.WeightError, match="of the pickles there") as caught:
        minisd.load(folder)
    converted(str(caught.value), folder / part)
    assert minisd.load(folder, device="cpu")


def repository(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


# This process is offline and has another cache; a new one has that of the test.
@pytest.mark.parametrize("folder, option, address", [
    (TINY, "--model", ""), (TINY / "vae", "--vae", "https://hf.co/"),
    (TINY, "--vae", "https://huggingface.co/"),
])
def test_the_command_that_downloads(hub, here, capsys, folder, option, address):
    """A name that is not there leads to a command, which makes the same line work."""
    hub.files = repository(folder)
    offline = {"HF_ENDPOINT": hub.url, "HF_HOME": str(here / "cache"), "HF_HUB_OFFLINE": "1"}
    error = fails(capsys, option, address + REPOSITORY, "-o", "a.png")
    command = re.search(r"run `minisd ([^`]*)`", error)[1]
    done = shell(f"$MINISD {command}", here, **offline | {"HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0, done.stderr
    again = shell(f"$MINISD {shlex.join(DRAW)} -o a.png {option} {REPOSITORY}", here, **offline)
    assert (again.returncode, again.stdout) == (0, "a.png  seed 0\n"), again.stderr
    if (folder, option) == (TINY / "vae", "--vae"):
        for command in (f"info {REPOSITORY}", f"x -m {REPOSITORY}"):
            done = shell(f"$MINISD {command}", here, **offline)
            assert done.returncode == 3
            assert "is a VAE alone: give it as vae= (--vae), beside a model" in done.stderr
