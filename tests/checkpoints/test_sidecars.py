"""The config beside a single file: read as YAML, and an error by its name where it is no config.

Whatever else lies there under that name must not count as a config that says "eps".
"""

import random
import warnings

import pytest
from files import all_shapes, header, write
from reference_models import SMALL, small_model
from yaml import BaseLoader, load

import minisd
from minisd.checkpoints import ldm_yaml
from minisd.checkpoints.checkpoint import open_checkpoint
from minisd.config import SD1, SD2, SD2_V
from minisd.errors import WeightError

V = 'model:\n  target: x.Y\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n'
SGM = """model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.18215
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        num_idx: 1000
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling
"""
PAGE = ('\n\n<!DOCTYPE html>\n<html lang="en">\n<head><title>v.yaml</title></head>\n<body>'
        '<script>{"rawLines":["    parameterization: \\"v\\""]}</script></body></html>\n')

SAYS_V = {
    "as published": V.encode(),
    "with a byte order mark": V.encode("utf-8-sig"),
    "UTF-16": V.encode("utf-16"),
    "UTF-16, big endian": b"\xfe\xff" + V.encode("utf-16-be"),
    "flow style": b'model: {target: x.Y, params: {parameterization: "v"}}\n',
    "JSON": b'{"model": {"params": {"parameterization": "v"}}}',
    "a space before the colon": V.replace("parameterization:", "parameterization :").encode(),
    "a quoted key": V.replace("parameterization", "'parameterization'").encode(),
    "a block scalar": V.replace('"v"', "|-\n      v").encode(),
    "lines of Windows": V.replace("\n", "\r\n").encode(),
    "of old Macs": V.replace("\n", "\r").encode(),
    "two documents' marks": b"---\n" + V.encode() + b"...\n",
    "a version": b"%YAML 1.1\n---\n" + V.encode(),
    "after a comment of 100 kB": b"#" + b"x" * 100_000 + b"\n" + V.encode(),
    "of sgm": SGM.encode(),
}
SAYS_EPS = {
    "without the line": b"model:\n  target: x.Y\n  params:\n    timesteps: 1000\n",
    "in a comment": b"model:\n  params:\n    a: b  # parameterization: v\n",
    "in a text": b"model:\n  params:\n    note: 'parameterization: v'\n",
    "elsewhere": b"parameterization: v\nmodel:\n  params:\n    a: {parameterization: v}\n",
    "its word": b"model: {params: {parameterization: eps}}",
    "of sgm": SGM.replace("VScaling", "EpsScaling").encode(),
}
# What it is: content, words of the error.
NO_CONFIG = {
    "saved web page": (PAGE.encode(), "no YAML|no config"),
    "web page in one line": (b"<html><body>Sign in</body></html>", "no model with params"),
    "empty": (b"", "no model with params"),
    "spaces": (b" \n\n", "no model with params"),
    "only comments": (b"# parameterization: v\n", "no model with params"),
    "404": (b"404: Not Found", "no model with params"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                    "no model with params"),
    "JSON of an error": (b'{"error": "Repository not found"}', "no model with params"),
    "a list": (b"- parameterization: v", "no model with params"),
    "a model that is a word": (b"model: v", "no model with params"),
    "a model without params": (b"model:\n  parameterization: v\n", "no model with params"),
    "params that are empty": (b"model:\n  params:\n", "no model with params"),
    "params that are a list": (b"model: {params: [parameterization, v]}", "no model with params"),
    "not indented": (V.replace("  ", "").encode(), "no model with params"),
    "UTF-16 without a mark": (V.encode("utf-16-le"), "no YAML.*special characters"),
    "Latin-1": (V.encode() + "  note: \xe9".encode("latin-1"), "no YAML.*unexpected end of data"),
    "binary": (bytes(range(256)), "no YAML"),
    "a pickle": (b"\x80\x02}q\x00.", "no YAML"),
    "tabs": (V.replace("    ", "\t").encode(), "no YAML.*line 4"),
    "cut in a quotation": (V[: V.index("v\"") + 1].encode(), "no YAML.*end of stream"),
    "anchor and alias": (b"a: &x v\nmodel: {params: {parameterization: *x}}", "an anchor"),
    "merged mapping": (b"model: {params: {<<: {parameterization: v}}}", "'<<'"),
    "python object": (b"model: {params: !!python/object/apply:os.system [ls]}", "the tag"),
    "tag of a text": (b"model: {params: {parameterization: !!str v}}", "the tag"),
    "key twice": ((V + "    parameterization: eps\n").encode(), "'parameterization' is there"),
    "list as a key": (b"model: {params: {[a]: v}}", r"\['a'\] is there"),
    "two documents": (b"---\na: b\n---\n" + V.encode(), "a second document"),
    "deep": (b"model: " + b"{a: " * 99, "nested more than 32"),
    "deeper": (b"[" * 100_000, "nested more than 32"),
    "many nodes": (b"a: [" + b"1," * 30_000 + b"]", "more than 20000 keys"),
    "escape beyond Unicode": (b'a: "\\U00110000"', "no YAML.*chr"),
    "escape beyond 32 bits": (b'a: "\\UFFFFFFFF"', "no YAML"),
    "version of 9999 digits": (b"%YAML 1." + b"1" * 9999 + b"\n---\na: b", "no YAML"),
    "129 kB": (b"#" * 2**17 + b"\n", "too large for a config"),
    "parameterization null": (b"model: {params: {parameterization: null}}", "is 'null'; minisd"),
    "parameterization empty": (b"model: {params: {parameterization: }}", "is ''; minisd knows"),
    "parameterization x0": (b"model: {params: {parameterization: x0}}", "is 'x0'; minisd knows"),
    "parameterization list": (b"model: {params: {parameterization: [v]}}", "minisd knows eps and"),
    "parameterization V": (b"model: {params: {parameterization: V}}", "is 'V'; minisd knows eps"),
    "EDM of sgm": (SGM.replace("VScaling", "EDMScaling").encode(), "is 'EDMScaling'"),
    "sgm without it": (b"model: {params: {denoiser_config: {target: x}}}", "is ''; minisd knows"),
    "other betas": (V.replace("0.00085", "0.0015").encode(), "linear_start is '0.0015', not 0"),
    "betas of nothing": (V.replace("0.00085", "null").encode(), "linear_start is 'null', not"),
    "other scale": ((V + "    scale_factor: 1.0\n").encode(), "scale_factor is '1.0', not 0.18215"),
    "other timesteps": ((V + "    timesteps: 500\n").encode(), "timesteps is '500', not 1000"),
}


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """An SD2 file whose rule of thumb says epsilon."""
    path = tmp_path_factory.mktemp("sd2") / "m.safetensors"
    return write(path, header(all_shapes(SD2)))


@pytest.fixture(params=[".yaml", ".yml"])
def beside(sd2, request):
    path = sd2.with_suffix(request.param)
    yield path
    path.unlink()


@pytest.mark.parametrize("content", SAYS_V.values(), ids=SAYS_V)
def test_v(content, sd2, beside):
    beside.write_bytes(content)
    found = open_checkpoint(sd2)
    assert found.config == SD2_V and found.prediction_source == f"from {beside}"


@pytest.mark.parametrize("content", SAYS_EPS.values(), ids=SAYS_EPS)
def test_eps(content, sd2, beside):
    beside.write_bytes(content)
    found = open_checkpoint(sd2)
    assert found.config == SD2 and found.prediction_source == f"from {beside}"


@pytest.mark.parametrize("case", NO_CONFIG)
def test_what_is_no_config_is_an_error_by_its_name(case, sd2, beside):
    content, message = NO_CONFIG[case]
    beside.write_bytes(content)
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(sd2)
    text = str(caught.value)
    assert text.startswith(f"{beside}") and "\n" not in text and len(text) < 500
    # The remedy of the sentence: the caller outranks it, and it is not even read.
    assert open_checkpoint(sd2, prediction_type="v_prediction").config == SD2_V


def test_the_config_of_another_file_is_not_read(sd2):
    other = sd2.with_name("other.yaml")
    other.write_bytes(PAGE.encode())
    assert open_checkpoint(sd2).config == SD2
    other.unlink()


def test_numbers_are_numbers_in_any_spelling(tmp_path):
    path = write(tmp_path / "m.safetensors", header(all_shapes(SD1)))
    numbers = "linear_start: 8.5e-4, linear_end: 0.0120, timesteps: 1000, scale_factor: '0.18215'"
    path.with_suffix(".yaml").write_text(f"model: {{params: {{{numbers}, parameterization: v}}}}")
    assert open_checkpoint(path).config.schedule.prediction_type == "v_prediction"


def test_no_scalar_becomes_an_object(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {params: {a: 1, b: 2001-01-01, c: yes, d: ~, e: .inf, f: 0x10, g: ''}}")
    params = ldm_yaml.read_params(path)
    assert params == load(path.read_bytes(), BaseLoader)["model"]["params"]
    assert all(type(value) is str for value in params.values())


def test_random_texts_are_rejected_or_read_without_another_error(tmp_path):
    path, draw = tmp_path / "a.yaml", random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            path.write_text("".join(draw.choices("model:params \n-{}[]\"'\\v#&*!|>%@", k=60)))
            with pytest.raises(WeightError, match="a.yaml"):
                ldm_yaml.read_params(path)


# In other places too: a file in which nothing is understood is no answer.
FOREIGN = {
    "model_index.json": [b"{}", b'{"error": "Repository not found"}', b'{"_class_name": null}'],
    "scheduler/scheduler_config.json": [b"{}", b'{"error": "Entry not found"}'],
    "unet/config.json": [b"{}"],
    "vae/config.json": [b"{}"],
    "text_encoder/config.json": [b"{}"],
    "tokenizer/vocab.json": [b"{}", b'{"error": "Entry not found"}'],
    "tokenizer/merges.txt": [b"", b"404: Not Found", b"#version: 0.2\n", PAGE.encode()],
}


@pytest.mark.parametrize("file, content", [
    (file, content) for file, contents in FOREIGN.items() for content in contents])
def test_a_folder_with_a_foreign_file_is_an_error(file, content, tmp_path):
    small_model(SMALL).save(tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(WeightError, match=str(tmp_path / "model")):
        minisd.load(tmp_path / "model", device="cpu")
