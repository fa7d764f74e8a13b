"""The settings in images, ours as other programs read them and theirs as we do."""

import json
import random
from pathlib import Path

import pytest
import torch
from command_line import fails
from hypothesis import given, settings as effort, strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager
from test_image import SETTINGS

from minisd.app import comfyui, infotext
from minisd.app.cli import main
from minisd.app.png import read_any_settings, read_settings, save
from minisd.errors import ImageError
from minisd.text.tokenizer import Tokenizer

PIXEL = Image.new("RGB", (1, 1))
TOKENIZER = Tokenizer.clip(0)


def info(capsys, path) -> dict:
    assert main(["info", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def image(path: Path, late: bool = False, **texts: str) -> Path:
    """A PNG with these texts, ahead of the pixels or behind them."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_itxt(name, text)
    PIXEL.save(path, pnginfo=chunks)
    if late:
        data = path.read_bytes()
        start, stop, end = data.index(b"iTXt") - 4, data.index(b"IDAT") - 4, data.index(b"IEND") - 4
        path.write_bytes(data[:start] + data[stop:end] + data[start:stop] + data[end:])
    return path


# What we write


ODD_PROMPTS = [
    "a red heart", "a, b, (c:1.2), [d], <lora:x:1>", 'said "red", \\ and \'blue\'',
    "first line\nsecond line\n\nfourth", "Negative prompt: green", "heart\nNegative prompt: green",
    "a heart Negative prompt: green, Negative prompt: blue", "Steps: 1, Sampler: x, Seed: 2",
    "a heart\nSteps: 1, Sampler: x, CFG scale: 3, Seed: 2", "ein Herz äöü 愛 ❤️ \u202eright",
    "a: b, c: d, e: f", "", "  spaces  ", "tab\tand\rreturn", "{\"a\": 1}",
]


def small(prompt: str) -> str:
    """A prompt without what a reader must not see, and as readers strip it."""
    lines = prompt.replace("Negative prompt:", "negative prompt:").strip().split("\n")
    lines = ["s" + line[1:] if line.startswith("Steps: ") else line for line in lines]
    return "\n".join(line.strip() for line in lines)


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_sd_parsers_reads_what_we_write(tmp_path, prompt):
    made = SETTINGS | {"prompt": prompt, "negative_prompt": f"{prompt} blur", "seed": 2**32 - 1,
                       "model": "v1-5.safetensors", "strength": 0.75, "version": "0.2.0"}
    save(PIXEL, tmp_path / "a.png", made)
    read = ParserManager().parse(tmp_path / "a.png")
    (sampler,) = read.samplers
    assert read.generator.value == "AUTOMATIC1111" and sampler.name == "DDIM"
    assert sampler.parameters == {"cfg_scale": "7.5", "seed": "4294967295", "steps": "20"}
    assert sampler.model.name == "v1-5"
    assert read.metadata == {"Size": "64x48", "Denoising strength": "0.75", "Eta DDIM": "0.0",
                             "Version": "minisd 0.2.0"}
    # It strips the whole and not each line.
    for prompts, wanted in ((read.full_prompt, prompt),
                            (read.full_negative_prompt, f"{prompt} blur")):
        assert small(prompts) == small(wanted)
    assert read_settings(tmp_path / "a.png") == made


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_we_read_what_we_write(prompt):
    made = SETTINGS | {"prompt": prompt, "negative_prompt": f"{prompt} blur", "version": "0.2.0",
                       "model": 'odd, "name": \\', "strength": 0.5}
    assert infotext.read(infotext.write(made)) == {
        "program": "minisd 0.2.0", "prompt": small(prompt), "negative_prompt": small(
            f"{prompt} blur"), "num_inference_steps": 20, "guidance_scale": 7.5, "seed": 7,
        "sampler": "DDIM", "model": 'odd, "name": \\', "width": 64, "height": 48, "strength": 0.5,
        "eta": 0.0, "others": {"Version": "minisd 0.2.0"}}


# Neither are separators to the tokenizer, and strip() takes them.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f"))
WORDS = st.lists(st.sampled_from([
    "Negative prompt:", "Steps: ", "\n", "a", " ", ",", '"', "Negative prompt: ", "\n\n"]))


@pytest.mark.filterwarnings("ignore:the prompt is")
@effort(max_examples=300, deadline=None)
@given(prompt=TEXT | WORDS.map("".join), negative=TEXT | WORDS.map("".join))
def test_any_prompt_comes_back_as_the_same_tokens(prompt, negative):
    read = infotext.read(infotext.write(SETTINGS | {"prompt": prompt, "negative_prompt": negative}))
    for text, back in ((prompt, read["prompt"]), (negative, read["negative_prompt"])):
        assert torch.equal(TOKENIZER(back), TOKENIZER(text))
    assert read["seed"] == 7 and read["width"] == 64


def test_what_is_not_known_is_left_out():
    assert infotext.write({"prompt": "x"}) == "x\nSampler: DDIM"
    assert infotext.write({"prompt": None, "seed": None, "width": 64, "version": ""}) == (
        "Sampler: DDIM")


# AUTOMATIC1111's text


LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768"
A1111 = [
    (f"a cat, (b:1.2)\nNegative prompt: blur\nfog\n{LINE}, Model hash: 45dee52b, Model: v1-5,"
     " Version: v1.9.4",
     {"program": "AUTOMATIC1111's web UI v1.9.4", "prompt": "a cat, (b:1.2)",
      "negative_prompt": "blur\nfog", "num_inference_steps": 20, "sampler": "Euler a",
      "guidance_scale": 7, "seed": 1, "width": 512, "height": 768, "model": "v1-5",
      "others": {"Model hash": "45dee52b", "Version": "v1.9.4"}}),
    (f'a\n{LINE}, Model: "a, b: c", Lora hashes: "x: 1, y: 2", Hashes: {{"a": "1", "b": "2"}}',
     {"model": "a, b: c", "others": {"Lora hashes": "x: 1, y: 2",
                                     "Hashes": '{"a": "1", "b": "2"}'}}),
    (f"a\n{LINE}, Denoising strength: 0.35, Version: f2.0.1v1.10.1-previous-313",
     {"program": "Forge f2.0.1v1.10.1-previous-313", "strength": 0.35}),
    (f"a\n{LINE}, App: SD.Next, Version: 3ad0a1e", {"program": "SD.Next 3ad0a1e"}),
    (f"a\n{LINE}, Version: ComfyUI", {"program": "ComfyUI"}),
    (f"a\n{LINE}", {"program": "unknown, in the form of AUTOMATIC1111's web UI"}),
    ("only a prompt", {"prompt": "only a prompt", "negative_prompt": ""}),
    (f"Negative prompt: all\n{LINE}", {"prompt": "", "negative_prompt": "all"}),
    (f"a\r\nNegative prompt: b\r\n{LINE}\r\n", {"prompt": "a", "negative_prompt": "b"}),
    (f"{{red|blue}} cat\n{LINE}", {"prompt": "{red|blue} cat"}),
    ("a\nSteps: 1" + "0" * 5000 + ", Sampler: x, Seed: one",
     {"num_inference_steps": "1" + "0" * 5000, "seed": "one"}),
    ('a\nSteps: 1, Sampler: "open, Seed: 3, Model: "\\ud800"', {"seed": 3, "model": "\ud800"}),
]


@pytest.mark.parametrize("text, wanted", A1111)
def test_the_text_of_automatic1111(text, wanted):
    read = infotext.read(text)
    assert {name: read[name] for name in wanted} == wanted


def test_info_of_an_image_of_automatic1111(tmp_path, capsys):
    text, wanted = A1111[0]
    for late in (False, True):
        assert info(capsys, image(tmp_path / "a.png", late, parameters=text)) == wanted
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    for suffix in (".jpg", ".jpeg", ".webp", ".JPG"):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        PIXEL.save(tmp_path / f"a{suffix}", exif=exif)
        assert info(capsys, tmp_path / f"a{suffix}") == wanted


# ComfyUI's graphs


def graph(**changes: dict) -> dict:
    """Text to image, as ComfyUI's own example; a change replaces inputs of a node, or adds one."""
    nodes = {
        "3": ("KSampler", {"seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "euler",
                           "scheduler": "normal", "denoise": 1.0, "model": ["4", 0],
                           "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}),
        "4": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5.safetensors"}),
        "5": ("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}),
        "6": ("CLIPTextEncode", {"text": "a bottle", "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "watermark", "clip": ["4", 1]}),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
    }
    made = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    for name, inputs in changes.items():
        node = made.setdefault(name.strip("n"), {"class_type": "Custom", "inputs": {}})
        node["class_type"] = inputs.pop("class_type", node["class_type"])
        node["inputs"] |= inputs
    return made


PLAIN = {"program": "ComfyUI", "prompt": "a bottle", "negative_prompt": "watermark", "seed": 5,
         "num_inference_steps": 20, "guidance_scale": 8.0, "sampler": "euler",
         "scheduler": "normal", "denoise": 1.0, "model": "v1-5.safetensors"}
CONTROLNET = {"positive": ["6", 0], "negative": ["7", 0], "control_net": ["11", 0],
              "image": ["12", 0]}
SECOND = {"steps": 4, "cfg": 1, "positive": ["6", 0], "negative": ["7", 0], "noise_seed": 9}
GRAPHS = [
    ({}, {}),
    ({"n3": {"positive": ["10", 0], "negative": ["10", 1]}, "n10": CONTROLNET}, {}),
    ({"n3": {"model": ["10", 0]}, "n10": {"model": ["4", 0], "lora_name": "x"}}, {}),
    ({"n6": {"text": ["10", 0]}, "n10": {"string": "from elsewhere"}},
     {"prompt": "from elsewhere"}),
    ({"n3": {"seed": ["10", 0]}, "n10": {"value": 77}}, {"seed": 77}),
    ({"n3": {"positive": ["10", 0]},
      "n10": {"conditioning_1": ["6", 0], "conditioning_2": ["7", 0]}},
     {"prompt": "a bottle\nwatermark"}),
    ({"n3": {"negative": ["10", 0]}, "n10": {"class_type": "ConditioningZeroOut",
                                             "conditioning": ["6", 0]}}, {"negative_prompt": None}),
    ({"n10": SECOND}, {"other_samplers": [{
        "prompt": "a bottle", "negative_prompt": "watermark", "seed": 9, "num_inference_steps": 4,
        "guidance_scale": 1}]}),
    # Not as it should be: what cannot be read is left out.
    ({"n3": {"positive": ["10", 0]}, "n10": {"conditioning": ["11", 0]},
      "n11": {"conditioning": ["10", 0]}}, {"prompt": None}),
    ({"n3": {"seed": ["3", 0]}}, {"seed": None}),
    ({"n3": {"seed": ["none", 0], "positive": ["none", 0], "model": []}},
     {"seed": None, "prompt": None, "model": None}),
    ({"n3": {"seed": "5", "steps": True, "cfg": float("nan"), "sampler_name": 3, "denoise": {}}},
     {"seed": None, "num_inference_steps": None, "guidance_scale": None, "sampler": None,
      "denoise": None}),
    ({"n3": {"cfg": float("inf"), "positive": "a text itself", "negative": [["7"], 0]}},
     {"guidance_scale": None, "prompt": None, "negative_prompt": None}),
    ({"n6": {"text": "\ud800"}}, {"prompt": "\ud800"}),
]


@pytest.mark.parametrize("changes, wanted", GRAPHS)
def test_graphs_of_comfyui(tmp_path, capsys, changes, wanted):
    text = json.dumps(graph(**json.loads(json.dumps(changes))))
    read = info(capsys, image(tmp_path / "a.png", prompt=text, workflow="{}"))
    assert read == {name: value for name, value in (PLAIN | wanted).items() if value is not None}


def test_a_number_beyond_all_is_left_out():
    text = json.dumps(graph()).replace('"cfg": 8.0', '"cfg": 1e999')
    assert comfyui.read_prompt(text) == {name: value for name, value in PLAIN.items()
                                         if name != "guidance_scale"}


def drawn() -> dict:
    """The same graph as its editor keeps it."""
    def node(number, kind, values, **inputs):
        ends = [{"name": name, "type": "X", "link": link} for name, link in inputs.items()]
        return {"id": number, "type": kind, "mode": 0, "inputs": ends, "widgets_values": values}

    return {"nodes": [
        node(7, "CLIPTextEncode", ["watermark"], clip=5),
        node(6, "CLIPTextEncode", ["a bottle"], clip=3),
        node(3, "KSampler", [5, "randomize", 20, 8.0, "euler", "normal", 1.0],
             model=1, positive=4, negative=6, latent_image=2, seed=None),
        node(4, "CheckpointLoaderSimple", ["v1-5.safetensors"]),
        node(9, "SaveImage", {"not": "a list"}),
    ], "links": [[1, 4, 0, 3, 0, "MODEL"], [3, 4, 1, 6, 0, "CLIP"], [5, 4, 1, 7, 0, "CLIP"],
                 [4, 6, 0, 3, 1, "CONDITIONING"], [6, 7, 0, 3, 2, "CONDITIONING"], None, [9]],
        "version": 0.4}


def test_a_graph_as_it_was_drawn(tmp_path, capsys):
    assert info(capsys, image(tmp_path / "a.png", workflow=json.dumps(drawn()))) == PLAIN
    silent = drawn()
    silent["nodes"][2]["mode"] = 4
    fails(["info", str(image(tmp_path / "a.png", workflow=json.dumps(silent)))], 2,
          "no KSampler")


def test_sd_parsers_reads_the_same_graph(tmp_path):
    texts = {"prompt": json.dumps(graph()), "workflow": '{"links": [[1, 4, 0, 3, 0, "MODEL"],'
             '[4, 6, 0, 3, 1, "CONDITIONING"], [6, 7, 0, 3, 2, "CONDITIONING"]]}'}
    theirs = ParserManager().parse(image(tmp_path / "a.png", **texts))
    ours = read_any_settings(tmp_path / "a.png")
    (sampler,) = theirs.samplers
    assert (theirs.full_prompt, theirs.full_negative_prompt) == (
        ours["prompt"], ours["negative_prompt"])
    assert (sampler.name, sampler.model.name) == (ours["sampler"], ours["model"])
    assert sampler.parameters["seed"] == ours["seed"]


# What cannot be read


@pytest.mark.parametrize("texts, words", [
    ({}, "carries no settings of minisd, AUTOMATIC1111's web UI or ComfyUI"),
    ({"Comment": "a cat", "Software": "x"}, "carries no settings of minisd, AUTOMATIC1111"),
    ({"parameters": "", "prompt": " "}, "carries no settings of minisd, AUTOMATIC1111"),
    ({"parameters": '{"sui_image_params": {}}'}, "JSON, of a program that minisd does not read"),
    ({"parameters": "x" * 9_000_000}, "its parameters have 9,000,000 characters"),
    ({"prompt": "a cat"}, "not readable JSON"),
    ({"prompt": "[" * 100_000}, "not readable JSON"),
    ({"prompt": '{"a":' * 100_000}, "not readable JSON"),
    ({"prompt": '{"3": ' + "1" * 5000 + "}"}, "not readable JSON"),
    ({"prompt": "[]"}, "not a JSON object"),
    ({"prompt": "{}"}, "no KSampler"),
    ({"prompt": '{"3": {"class_type": "KSampler", "inputs": [1]}}'}, "no KSampler"),
    ({"prompt": json.dumps(graph(n3={"steps": 1}))[:-9]}, "not readable JSON"),
    ({"prompt": '"' + "x" * 5_000_000 + '"'}, "characters; "),
    ({"prompt": json.dumps({str(i): {"inputs": {}} for i in range(10_001)})}, "nodes; "),
    ({"workflow": '{"nodes": 3, "links": {"a": 1}}'}, "no KSampler"),
    ({"workflow": '{"nodes": [[], {}, {"id": [], "type": {}, "inputs": [3, {}]}]}'}, "no KSampler"),
    ({"workflow": '{"nodes": [{"id": ' + "[" * 900 + "]" * 900 + "}]}"}, "no KSampler"),
    ({"prompt": '{"3": {"inputs": {"a": [' + "[" * 900 + "]" * 900 + ", 0]}}}"}, "no KSampler"),
    ({"minisd": "[]", "prompt": "{"}, "carries no settings of minisd"),
])
def test_one_sentence(tmp_path, capsys, texts, words):
    path = image(tmp_path / "a.png", **texts)
    fails(["info", str(path)], 2, str(path), words)


def test_one_sentence_for_other_files(tmp_path, capsys):
    PIXEL.save(tmp_path / "a.jpg")
    fails(["info", str(tmp_path / "a.jpg")], 2, "a.jpg carries no settings")
    (tmp_path / "b.webp").write_bytes(b"RIFF")
    fails(["info", str(tmp_path / "b.webp")], 2, "b.webp is not an image")
    fails(["info", "https://example.com/a.png"], 2, "is an address: download the image")
    fails(["info", str(tmp_path / "none.png")], 3, "none.png")


def test_the_best_of_several_texts_is_read(tmp_path, capsys):
    parameters = f"from the text\n{LINE}"
    texts = {"prompt": json.dumps(graph()), "parameters": parameters}
    assert info(capsys, image(tmp_path / "a.png", **texts))["prompt"] == "from the text"
    texts |= {"minisd": '{"prompt": "ours"}'}
    assert info(capsys, image(tmp_path / "a.png", **texts)) == {"prompt": "ours"}
    texts |= {"minisd": "damaged", "parameters": "{}"}
    assert info(capsys, image(tmp_path / "a.png", **texts)) == PLAIN


HOSTILE = [
    "a" * 2_000_000, "ab:" * 700_000, 'ab:"' * 500_000, 'ab: "' + '\\"' * 900_000,
    " " * 2_000_000 + "x", "\n" * 2_000_000, "ab:{" * 500_000, "Negative prompt:" * 120_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:9])
def test_no_text_takes_the_square_of_its_length(text):
    """It would be days."""
    infotext.read(f"a\n{text}")
    infotext.write({"prompt": text})


def test_no_graph_takes_long_or_grows():
    """Circles, a fan, and as many samplers as fit."""
    inputs = {"positive": ["0", 0], "negative": ["0", 0], "steps": 1, "cfg": 1, "model": ["0", 0],
              "text": "x" * 1_000_000, **{f"text{i}": [str(i), 0] for i in range(9000)}}
    nodes = {"0": {"inputs": inputs}}
    nodes |= {str(i): {"inputs": {"positive": [str(i - 1), 0], "steps": 1, "cfg": 1,
                                  "text": [str(i + 1), 0]}} for i in range(1, 9000)}
    read = comfyui.read_prompt(json.dumps(nodes))
    assert len(read["other_samplers"]) == comfyui.MAX_SAMPLERS - 1
    assert len(json.dumps(read)) < 20 * 2**20


PIECES = [*'"{}[],:\\0159-. \n\t', "null", "true", "NaN", "Infinity", "-1e999", "\\ud800",
          "9" * 5000, "[" * 2000, '"inputs"', '"3"', "Negative prompt:", "Steps: ", '["3", 0]',
          "\0", "愛"]


def damaged(text: str, draw: random.Random) -> str:
    for _ in range(draw.choice([0, 1, 1, 2, 9])):
        place, size = draw.randrange(len(text) + 1), draw.choice([0, 1, 1, 4, 60])
        piece = draw.choice([*PIECES, text[draw.randrange(len(text) + 1):][:size]])
        text = text[:place] + piece + text[place + draw.choice([0, size]):]
    return text


@pytest.mark.parametrize("name, text, cases", [
    ("parameters", A1111[0][0], 1500), ("parameters", A1111[1][0], 500),
    ("prompt", json.dumps(graph(n10=CONTROLNET, n11=SECOND)), 1500),
    ("workflow", json.dumps(drawn()), 1500), ("minisd", json.dumps(SETTINGS), 300),
])
def test_a_damaged_text_is_json_or_one_sentence(tmp_path, name, text, cases):
    draw, outcomes = random.Random(0), set()
    for _ in range(cases):
        path = image(tmp_path / "a.png", **{name: damaged(text, draw)})
        try:
            json.dumps(read_any_settings(path), allow_nan=name == "minisd")
            outcomes.add("read")
        except ImageError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            outcomes.add("rejected")
    assert outcomes == ({"read"} if name == "parameters" else {"read", "rejected"})


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_comment_is_json_or_one_sentence(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111[0][0].encode("utf-16-be")
    for suffix in (".jpg", ".webp"):
        path, draw, read = tmp_path / f"a{suffix}", random.Random(0), 0
        PIXEL.save(path, exif=exif)
        whole = path.read_bytes()
        for _ in range(1000):
            data = bytearray(whole)
            for _ in range(draw.choice([1, 2, 5])):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(data[:draw.choice([len(data), len(data), draw.randrange(len(data))])])
            try:
                json.dumps(read_any_settings(path), allow_nan=False)
                read += 1
            except ImageError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert 0 < read < 1000
