"""Every rejected model and call, through minisd.load and through the command line.

Each error has the exact type and one line, before a weight is read. Nothing is written. A model
that was loaded before still works, and after all errors a model can be loaded.
"""

import json
import os
import shutil

import pytest
import torch
from files import all_shapes, header, save_folder, write
from PIL import Image
from reference_models import SMALL
from safetensors.torch import load_file, save_file
from test_bad_files import BAD
from test_bad_tensors import OTHERS, damaged

import minisd
from minisd.app.cli import main
from minisd.app.png import read_settings
from minisd.checkpoints import checkpoint
from minisd.config import SD1

WHOLE = "unet/diffusion_pytorch_model.safetensors"
IN = "model.diffusion_model.input_blocks.0.0.bias"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole small model in float32."""
    folder = save_folder(SMALL, tmp_path_factory.mktemp("good") / "model")
    for path in folder.glob("*/*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    return folder


@pytest.fixture(scope="module")
def loaded(good):
    return minisd.load(good)


# Wrong weights: a function that makes them from a good folder; type and words of the error.


def bad_file(content):
    def make(folder):
        path = folder.parent / "a.safetensors"
        path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
        return path

    return make


def bad_tensor(change):
    def make(folder):
        tensors = change(load_file(folder / WHOLE))
        save_file(tensors, folder / WHOLE)
        return folder

    return make


def bad_field(file, **fields):
    def make(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return make


def edited(how):
    return bad_file(damaged(all_shapes(SD1), IN, how))


def shard_outside(folder):
    (folder / WHOLE).rename(folder / "x.safetensors")
    index = {"weight_map": {"conv_in.bias": "../x.safetensors"}}
    (folder / f"{WHOLE}.index.json").write_text(json.dumps(index))
    return folder


def without_index(folder):
    (folder / "model_index.json").unlink()
    return folder


def huge_config(folder):
    os.truncate(folder / "unet" / "config.json", 10**8)
    return folder


def not_finite(tensors):
    tensors["conv_out.bias"][0] = torch.nan
    return tensors


WE, NAN = minisd.WeightError, "NaN or infinity"
WEIGHTS = {
    "missing": (lambda folder: folder.parent / "modle", FileNotFoundError, "modle .*has model"),
    "no index": (without_index, WE, "no model_index.json"),
    **{case: (bad_file(content), WE, words) for case, (content, words) in BAD.items()},
    "dropped": (edited("dropped"), WE, f"1 missing: {IN}"),
    "renamed": (edited("renamed"), WE, f"1 missing: {IN}; 1 unexpected: {IN}x"),
    "reshaped": (edited("reshaped"), WE, f"1 of the wrong shape: {IN}"),
    "retyped": (edited("retyped"), WE, f"1 of a dtype other than .*: {IN} I8"),
    "dropped in a folder": (bad_tensor(lambda t: {n: t[n] for n in t if n != "conv_in.bias"}), WE,
                            "unet: 1 missing: conv_in.bias"),
    **{case: (bad_file(header(shapes)), WE, case.strip() if case != "unusual" else "give config=")
       for case, shapes in OTHERS.items()},
    "NaN": (bad_tensor(not_finite), WE, f"conv_out.bias has {NAN}"),
    "shard outside": (shard_outside, WE, "not a shard in its own folder"),
    "unknown class": (bad_field("model_index.json", _class_name="FluxPipeline"), WE, "FluxPipe"),
    "absurd number": (bad_field("unet/config.json", layers_per_block=10**18), WE, "layers_per"),
    "100 MB config": (huge_config, WE, "is too large"),
}


def everything(folder):
    """Each file below a folder, with its size and modification time."""
    paths = sorted(folder.rglob("*"))
    return [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def one_line(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minisd: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, good, loaded, tmp_path, capsys, monkeypatch):
    make, kind, words = WEIGHTS[case]
    path = make(shutil.copytree(good, tmp_path / "model"))
    before = everything(tmp_path)
    if case != "NaN":  # only the values are wrong
        monkeypatch.setattr(checkpoint, "read_tensor", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(kind, match=words) as caught:
        minisd.load(path)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert main(["x", "-m", str(path), "-o", str(tmp_path / "a.png")]) == 3
    assert str(path) in one_line(capsys)
    assert everything(tmp_path) == before
    works(loaded)


def works(sd):
    assert sd("a", num_inference_steps=1, seed=0, height=8, width=8).images[0].size == (8, 8)


def test_absurd_headers_cost_no_memory(tmp_path):
    import tracemalloc

    for case in ("length 2^63", "length over the limit", "not UTF-8", "not JSON", "deep nesting"):
        path = bad_file(BAD[case][0])(tmp_path / "model")
        tracemalloc.start()
        try:
            with pytest.raises(WE):
                minisd.load(path)
            assert tracemalloc.get_traced_memory()[1] < 10 * 2**20, case
        finally:
            tracemalloc.stop()


def test_a_loaded_model_no_longer_needs_its_file(good, tmp_path):
    """If the file were mapped, cutting it would kill the process."""
    folder = shutil.copytree(good, tmp_path / "model")
    sd = minisd.load(folder)
    for path in folder.glob("*/*.safetensors"):
        os.truncate(path, 0)
    works(sd)


# On the command line: errors that follow from the model's configs come before weights are read.

SHORT = ["--size", "8x8", "--steps", "1", "--quiet"]
LINES = [
    (["x\udcff"], 2, "prompt has a lone surrogate"),
    (["x", "-n", "y\udcff"], 2, "negative_prompt has a lone surrogate"),
    (["x", "--size", "0x64"], 2, "width must be a multiple of 4"),
    (["x", "--size", "64x7"], 2, "nearest valid: 4 or 8"),
    (["x", "--size", "1000000x64"], 2, "from 4 to 8192 pixels"),
    (["x", "--size", f"{10**20}x64"], 2, "nearest valid: 8192"),
    (["x", "--image", "start.png", "--strength", "0.01"], 2, "must be at least 1"),
    (["x", "--image", "text.png"], 2, "text.png is not an image"),
    (["x", "--image", "start.png", "--mask", "https://example.com/a.png"], 2, "is an address"),
    (["x", "--image", "none.png"], 3, "none.png"),
    (["x", "--image", "."], 5, "."),
    (["x", "--device", "gpu"], 2, "device must be auto or one of"),
    (["x", "--device", "cuda:99"], 2, "device must be auto or one of"),
    (["x", "--dtype", "int8"], 2, "dtype must be auto or one of"),
    (["x", "--ops", "fast"], 2, "fast"),
]


@pytest.mark.parametrize(("line", "code", "words"), LINES, ids=lambda v: str(v)[:50])
def test_command_lines(line, code, words, good, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "read_tensor", lambda *_: pytest.fail("a weight was read"))
    Image.new("RGB", (8, 8)).save("start.png")
    (tmp_path / "text.png").write_text("a red heart")
    before = everything(tmp_path)
    assert main([*line, "-m", str(good), "-o", "a.png"]) == code
    assert words in one_line(capsys)
    assert everything(tmp_path) == before


def test_an_inpainting_model_without_a_mask(tmp_path, capsys):
    path = write(tmp_path / "a.safetensors", header(all_shapes(SD1) | {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}))
    assert main(["x", "-m", str(path), "-o", str(tmp_path / "a.png")]) == 2
    assert "give it image and mask_image" in one_line(capsys)


def test_after_errors_the_same_process_works(good, tmp_path, capsys):
    for line, code, _ in LINES[:5]:
        assert main([*line, "-m", str(good), "-o", str(tmp_path / "a.png")]) == code
    assert main([*SHORT, "x", "-m", str(good), "-o", str(tmp_path / "a.png")]) == 0
    assert read_settings(tmp_path / "a.png")["prompt"] == "x"


def test_a_prompt_of_5000_words_is_cut_and_a_warning_quotes_the_rest(good, tmp_path, capsys):
    prompt = " ".join(["cat"] * 75 + ["dog"] * 4925)
    assert main([*SHORT, prompt, "-m", str(good), "-o", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().err
    assert text.startswith("minisd: warning: the prompt is 5000 tokens long and the model reads 75")
    assert text.count("\n") == 1 and text.count("dog") == 4925 and "cat" not in text
    assert read_settings(tmp_path / "a.png")["prompt"] == prompt
