"""Stable Diffusion in NumPy equals that in torch, part by part, in float64, and needs no torch."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from files import all_shapes
from PIL import Image
from safetensors.torch import save_file
from small_models import SMALL, SMALL_V, error, randn, small_model

import minisd
from minisd import numpy_sd
from minisd.config import SD1, SD2
from minisd.errors import WeightError
from minisd.loading import build
from minisd.models.ops import TORCH
from minisd.models.unet import timestep_embedding
from minisd.samplers import schedule
from minisd.seeds import MAX_SEED

TINY = Path(minisd.__file__).parents[1] / "weights" / "tiny"
PROMPT = "a red heart on a blue background"
MODELS = pytest.mark.parametrize("name", ["SD1", "SD2 v", "shipped"])


@cache
def pair(name: str):
    """A model of torch's in float64, and the same parameters in NumPy."""
    if name == "shipped":
        sd = minisd.load(TINY, dtype="float64")
    else:
        sd = small_model({"SD1": SMALL, "SD2 v": SMALL_V}[name])
    trees = (numpy_sd.tree({key: p.numpy() for key, p in part.state_dict().items()})
             for part in sd.parts.values())
    vocabulary = numpy_sd.read_vocabulary(TINY / "tokenizer" if name == "shipped" else Path("none"))
    return sd, numpy_sd.Model(sd.config, *vocabulary, *trees)


@pytest.fixture
def same_embedding(monkeypatch):
    """Both compute it in float32, where a last digit of w_i is 6e-5 of the angle at t = 1000."""
    monkeypatch.setattr(numpy_sd, "timestep_embedding",
                        lambda t, width: timestep_embedding(torch.tensor([t]), width).numpy())


@MODELS
def test_the_text_encoder(name):
    sd, model = pair(name)
    ids = sd.tokenizer(["", PROMPT])
    assert numpy_sd.ids(model, ["", PROMPT]).tolist() == ids.tolist()
    ours = numpy_sd.text_encoder(model.text_encoder, model.config, ids.numpy())
    assert error(torch.from_numpy(ours), sd.text_encoder(ids)) < 1e-9


@MODELS
@pytest.mark.parametrize("t", [1, 981])
def test_the_unet(name, t, same_embedding):
    sd, model = pair(name)
    x = randn(2, sd.config.vae.latent_channels, 8, 12)
    context = randn(2, 77, sd.config.text.hidden_size, seed=1)
    ours = numpy_sd.unet(model.unet, model.config, x.numpy(), t, context.numpy())
    assert error(torch.from_numpy(ours), sd.unet(x, t, context)) < 1e-9


@MODELS
def test_the_decoder(name):
    sd, model = pair(name)
    x = randn(2, sd.config.vae.latent_channels, 8, 12)
    ours = numpy_sd.decode(model.vae, model.config, x.numpy())
    assert error(torch.from_numpy(ours), sd.vae.decode(x)) < 1e-9


@MODELS
def test_the_whole_image(name):
    sd, model = pair(name)
    ours = numpy_sd.draw(model, PROMPT, steps=5, guidance=3.0, seed=2)
    side = sd.config.sample_size // sd.config.vae.downscale
    latents = numpy_sd.noise(2, (1, sd.config.vae.latent_channels, side, side))
    theirs = sd(PROMPT, num_inference_steps=5, guidance_scale=3.0, sampler="ddim",
                latents=torch.from_numpy(latents), output_type="np").images[0]
    assert ours.dtype == np.float64 and np.ptp(ours) > 0.1
    assert np.abs(ours - theirs).max() < 1e-6


def test_values_that_are_not_finite_end_it_in_the_step_that_makes_them(monkeypatch):
    calls, unet = [], numpy_sd.unet
    monkeypatch.setattr(numpy_sd, "unet", lambda *args: calls.append(args) or unet(*args))
    with pytest.raises(ArithmeticError, match="not finite"):
        numpy_sd.draw(pair("SD1")[1], PROMPT, steps=5, guidance=float("nan"))
    assert len(calls) == 1


def test_the_embedding():
    for t in range(0, 1000, 37):
        theirs = timestep_embedding(torch.tensor([t]), 320).numpy()
        assert np.abs(numpy_sd.timestep_embedding(t, 320) - theirs).max() < 1e-4


@pytest.mark.parametrize("n", [16, 17, 31, 32, 33, 1000, 6 * 16 * 16, 4 * 64 * 64])
@pytest.mark.parametrize("seed", [0, 1, 2**31, MAX_SEED])
def test_the_noise_of_a_seed(n, seed):
    theirs = torch.randn(n, generator=torch.Generator().manual_seed(seed)).numpy()
    ours = numpy_sd.noise(seed, (1, n))
    assert ours.dtype == np.float32 and np.abs(ours[0] - theirs).max() < 1.2e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 50, 333, 500, 501, 999, 1000])
def test_the_levels(steps):
    theirs = schedule.alphas_cumprod(SD1.schedule).tolist()
    ours = numpy_sd.alphas_cumprod(SD1)
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-14
    levels = schedule.ladder("leading", steps, theirs).levels[:-1]
    assert [*numpy_sd.timesteps(steps, 1000)] == [level.t for level in levels]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_safetensors_file(dtype, tmp_path):
    tensors = {"a": randn(3, 5).to(getattr(torch, dtype)), "b": randn(2).to(getattr(torch, dtype))}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    read = numpy_sd.read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].astype(float).tolist() == tensor.tolist()


def flat(tree: dict, above: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of a tree's parameters by their names."""
    rows: dict[str, tuple[int, ...]] = {}
    for name, below in tree.items():
        below = below if isinstance(below, dict) else {"": below}
        rows |= ({f"{above}{name}": below[""].shape} if "" in below
                 else flat(below, f"{above}{name}."))
    return rows


def no_linear(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes without the two ones of a 1x1 convolution, which is a linear layer too."""
    return {name: shape[:2] if shape[2:] == (1, 1) else shape for name, shape in shapes.items()}


@pytest.mark.parametrize("config, kind", [
    (SD1, None), (SD2, "epsilon"), (SD2, "v_prediction")])
def test_a_single_file(config, kind, monkeypatch):
    """Each official tensor becomes the parameter that torch's model has."""
    tensors = {name: np.broadcast_to(np.float32(0), shape)
               for name, shape in all_shapes(config).items()}
    monkeypatch.setattr(numpy_sd, "read_safetensors", lambda path: tensors)
    model = numpy_sd.load(Path("model.safetensors"), kind)
    assert model.config.schedule.prediction_type == (kind or "epsilon")
    assert model.config.sample_size == (768 if kind == "v_prediction" else 512)
    parts = build(config, TORCH)
    for part, tree in (("text_encoder", model.text_encoder), ("unet", model.unet),
                       ("vae", model.vae)):
        shapes = {name: tuple(p.shape) for name, p in parts[part].state_dict().items()}
        assert no_linear(flat(tree)) == no_linear(shapes)


@pytest.mark.parametrize("config", [SMALL, SMALL_V])
def test_a_folder(config, tmp_path):
    sd = small_model(config)
    sd.save(tmp_path / "model")
    model = numpy_sd.load(tmp_path / "model")
    assert replace(model.config, name="small") == config
    for tree, part in zip(model[3:], sd.parts.values()):
        assert flat(tree) == {name: tuple(p.shape) for name, p in part.state_dict().items()}
        assert all(value.dtype == np.float32 for value in leaves(tree))


def leaves(tree: dict) -> list[np.ndarray]:
    return [leaf for below in tree.values()
            for leaf in (leaves(below) if isinstance(below, dict) else [below])]


# --- the command ----------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "tokenizers", "safetensors", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from minisd.numpy_sd import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_needs_no_torch_and_draws_what_minisd_draws(tmp_path):
    line = [PROMPT, "-o", str(tmp_path / "heart.png"), "--seed", "3", "--steps", "6"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *line],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    theirs = minisd.load(TINY)(PROMPT, num_inference_steps=6, seed=3, sampler="ddim").images[0]
    ours = np.asarray(Image.open(tmp_path / "heart.png")).astype(int)
    assert np.abs(ours - np.asarray(theirs)).max() <= 2


@pytest.mark.parametrize("line, code, words", [
    (["a heart", "--steps", "0"], 2, "--steps must be from 1 to 1000, not 0"),
    (["a heart", "--steps", "1001"], 2, "not 1001"),
    (["a heart", "--seed", "-1"], 2, "Seed must be"),
    (["a heart", "--guidance", "nan"], 2, "not finite"),
    (["\ud800", "--steps", "1"], 2, "surrogates not allowed"),
    (["a heart", "-m", "none"], 3, "none"),
    (["a heart", "-m", "words.txt"], 3, "words.txt is not a safetensors file"),
    (["a heart", "-m", "empty"], 3, "empty/text_encoder/config.json"),
    (["a heart", "-o", "words.txt"], 2, "must end in .png"),
    (["a heart", "-o", "there.png"], 5, "there.png exists"),
    (["a heart", "-o", "none/x.png"], 5, "none is not a folder"),
])
def test_bad_input(line, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("no weights at all")
    (tmp_path / "there.png").write_text("")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    assert numpy_sd.main(line if "--steps" in line else [*line, "--steps", "1"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("python -m minisd.numpy_sd: error: ")
    assert words in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("unet, schedule", [
    ({"in_channels": 9}, {}),
    ({"time_cond_proj_dim": 8}, {}),
    ({"in_channels": 5}, {}),
    ({}, {"timestep_spacing": "trailing"}),
    ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
])
def test_models_that_take_the_command(unet, schedule, tmp_path):
    config = replace(SMALL, unet=replace(SMALL.unet, **unet),
                     schedule=replace(SMALL.schedule, **schedule))
    small_model(config).save(tmp_path / "model")
    with pytest.raises(WeightError, match="that takes the minisd command"):
        numpy_sd.load(tmp_path / "model")


@pytest.mark.parametrize("path, text, said", [
    ("text_encoder/config.json", "[]", "not an object"),
    ("unet/config.json", '{"attention_head_dim": "x"}', "attention_head_dim"),
    ("scheduler/scheduler_config.json",
     '{"prediction_type": "x", "beta_schedule": "scaled_linear"}', "prediction_type"),
    ("scheduler/scheduler_config.json", '{"beta_schedule": "linear"}', "beta_schedule"),
])
def test_a_folder_that_is_no_such_model(path, text, said, tmp_path, capsys):
    small_model(SMALL).save(tmp_path / "model")
    (tmp_path / "model" / path).write_text(text)
    line = [PROMPT, "-m", str(tmp_path / "model"), "-o", str(tmp_path / "x.png")]
    assert numpy_sd.main(line) == 3
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_tensor_that_is_missing(tmp_path, monkeypatch, capsys):
    read = numpy_sd.read_safetensors
    monkeypatch.setattr(numpy_sd, "read_safetensors", lambda path: {
        name: tensor for name, tensor in read(path).items() if not name.startswith("conv_out.")})
    line = [PROMPT, "-o", str(tmp_path / "heart.png"), "--steps", "1"]
    assert numpy_sd.main(line) == 3 and not [*tmp_path.iterdir()]
    assert "lacks the tensors of 'conv_out'" in capsys.readouterr().err


def test_single_files_that_are_not_recognised():
    tensors = {name: np.broadcast_to(np.float32(0), shape)
               for name, shape in all_shapes(SD2).items()}
    with pytest.raises(ValueError, match="give --prediction-type"):
        numpy_sd.recognise(Path("x"), tensors, None)
    with pytest.raises(WeightError, match="no Stable Diffusion 1 or 2"):
        numpy_sd.recognise(Path("x"), {}, None)
