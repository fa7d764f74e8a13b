"""The table of refusals: what minisd rejects, in Python and on the command line.

A row is run through `minisd.load` or a call, and through the command line, if it has an option for
it. Each way there is one error: of the exact type, one line, before a weight is read or computed
with. Nothing is written, and a model that was loaded before still works. row.py says what a row is;
the rows are in bad_calls.py, bad_files.py, bad_folders.py and bad_tensors.py.
"""

import inspect
import re
import tracemalloc

import bad_calls
import bad_files
import bad_folders
import bad_tensors
import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image
from row import everything, whole

import minisd
from minisd.app.cli import COMMANDS
from minisd.app.png import read_settings
from minisd.checkpoints import checkpoint

ROWS = [*bad_calls.ROWS, *bad_files.ROWS, *bad_folders.ROWS, *bad_tensors.ROWS]
PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return bad_folders.good_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def loaded(good):
    return minisd.load(good)


def works(sd):
    assert sd("a", num_inference_steps=1, seed=0, height=8, width=8).images[0].size == (8, 8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with an image, and with one that is none."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("start.png")
    (tmp_path / "text.png").write_text("a red heart")
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_a_refusal(row, good, loaded, here, monkeypatch):
    path = row.make(here, good)
    before = everything(here)
    with monkeypatch.context() as patched:
        if not row.late:
            patched.setattr(checkpoint, "read_tensor", never("a weight was read"))
        if row.call is not None and not row.late:
            for part in PARTS:
                patched.setattr(getattr(loaded, part), "forward", never("a model was run"))
        if row.kind:
            in_python(row, path, loaded)
        if row.line is not None:
            if row.make is whole and not row.load:  # all other weights are opened to be rejected
                patched.setitem(vars(minisd), "load", never("the model was loaded"))
            on_the_command_line(row, path)
    assert everything(here) == before
    works(loaded)


def never(what):
    return lambda *_, **__: pytest.fail(what)


def in_python(row, path, loaded):
    with pytest.raises(row.kind, match=row.words) as caught:
        if row.call is None:
            minisd.load(path, **row.load)
        else:
            loaded(**{"prompt": "a", "num_inference_steps": 2, "seed": 0} | row.call)
    said = str(caught.value)
    assert type(caught.value) is row.kind and "\n" not in said
    assert row.make is whole or named(path) in said


def named(path):
    """What names it, or a file of another kind beside it."""
    return str(path).removesuffix(".safetensors")


def on_the_command_line(row, path):
    argv = row.line
    if not COMMANDS.keys() & set(argv[:1]):
        argv = [*argv, "-m", str(path), *([] if "-o" in argv else ["-o", "a.png"])]
    code, out, err = run(argv)
    assert (code, out) == (row.code, "")
    error, said, rest = err.partition("\n")[0].partition("minisd: error: ")
    assert (error, said) == ("", "minisd: error: ") and err.count("\n") == 1, err
    assert re.search(row.said or row.words, rest), err
    assert row.make is whole or row.said or named(path) in rest


def test_after_errors_the_same_process_works(good, here):
    rest = ["--steps", "1", "--quiet", "-m", str(good), "-o", "a.png"]
    for wrong in (["x\udcff"], ["x", "-n", "y\udcff"], ["x", "--size", "0x64"],
                  ["x", "--size", "64x7"], ["x", "--size", "1000000x64"]):
        assert run([*wrong, *rest])[0] == 2
    assert run(["x", "--size", "8x8", *rest])[0] == 0
    assert read_settings("a.png")["prompt"] == "x"


def test_absurd_headers_cost_no_memory(tmp_path):
    for case in ("length 2^63", "length over the limit", "not UTF-8", "not JSON", "deep nesting"):
        path = bad_files.written(tmp_path / "model", bad_files.BAD[case][0])
        tracemalloc.start()
        try:
            with pytest.raises(minisd.WeightError):
                minisd.load(path)
            assert tracemalloc.get_traced_memory()[1] < 10 * 2**20, case
        finally:
            tracemalloc.stop()


def test_a_list_of_many_names_is_cut(tmp_path):
    with pytest.raises(minisd.WeightError) as caught:
        minisd.load(bad_tensors.many_faults(tmp_path, tmp_path))
    assert str(caught.value).count("attn") <= 11 and str(caught.value).count(", ...") == 2


ODD = [np.zeros((3, 3)), np.array("pil"), torch.full((2, 2), bad_calls.NAN), {"a": 1}, set(), (),
       [[]], b"x", 1j, 10**400, "x" * 1000, range(3), int, object()]
NEVER_ODD = {"self", "prompt", "negative_prompt", "image", "callback_on_step_end", "progress"}
CALLED = inspect.signature(minisd.StableDiffusion.__call__).parameters.keys()


@pytest.mark.parametrize("name", sorted(CALLED - NEVER_ODD))
def test_odd_objects_are_rejected_in_one_line(name, loaded):
    for value in ODD:
        call = {"prompt": "a", "num_inference_steps": 2, name: value}
        with pytest.raises((TypeError, ValueError)) as caught:
            loaded(**call)
        message = str(caught.value)
        assert name in message or name in ("mask_image", "seed", "generator")
        assert "\n" not in message and len(message) < 200
