"""The aligned shape comments are true: each is compared with the tensor of its statement.

A comment such as `# (B, h*w, C)` ends a statement and gives the shape of its result. Within one
call of a function a letter has one value. The models run at their official sizes on torch's meta
device, so the numbers in comments are checked too.
"""

import ast
import copy
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from reference_models import SMALL, SMALL_DEPTH, SMALL_UNCLIP, randn, small_model

import minisd
from minisd import numpy_sd
from minisd.conditioning.unclip import augmented
from minisd.config import SD1, SD2, VIT_H, VIT_L, X4_LOW_RES, DPTConfig
from minisd.depth_maps import normalised, open_depth_map, prepared
from minisd.models.clip import TextEncoder
from minisd.models.clip_vision import VisionTower
from minisd.models.dpt import DepthEstimator
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.safety import ConceptScores
from minisd.models.tiles import in_tiles
from minisd.models.unet import UNet, guidance_embedding
from minisd.models.vae import VAE

MINISD = Path(minisd.__file__).parent
# The files; and the letters for height and width of an argument x, where nothing binds them later.
MODELS = {MINISD / f"models/{name}.py": letters for name, letters in {
    "ops": "", "clip": "", "clip_vision": "", "safety": "", "transformer": "hw", "unet": "hw",
    "vae": "HW", "bit": "HW", "dpt": "", "tiles": "hw"}.items()}
LOOP = {MINISD / f"{name}.py": "" for name in (
    "pipeline", "steps", "conditioning/start", "conditioning/inpaint", "text/tokenizer",
    "depth_maps", "conditioning/depth",
    "conditioning/upscale", "conditioning/unclip")}


class Line(NamedTuple):
    where: str
    first: int
    last: int
    targets: list[str]  # none for a return
    dims: list[str]


def shape_lines(path: Path) -> list[Line]:
    """The statements of a file that end in a shape comment."""
    source = path.read_text()
    comments = [re.search(r" # \((.*)\)$", text) for text in source.splitlines()]
    return [
        Line(f"{path.name}:{node.end_lineno}", node.lineno, node.end_lineno,
             [n.id for t in getattr(node, "targets", ()) for n in ast.walk(t)
              if isinstance(n, ast.Name)],
             comment[1].split(", "))
        for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Assign, ast.Return))
        if (comment := comments[node.end_lineno - 1])
    ]


def agrees(dim: str, size: int, known: dict[str, int]) -> bool:
    """Whether a dimension of a comment can have that size; binds new letters."""
    if match := re.fullmatch(r"(\d?)([A-Za-z]+)", dim):  # B or 2B
        times = int(match[1] or 1)
        return known.setdefault(match[2], size // times) * times == size
    if "..." in dim or not set(re.findall(r"[A-Za-z]+", dim)) <= known.keys():
        return True
    return math.ceil(eval(dim, {}, known)) == size


def complaint(line: Line, value, known: dict[str, int]) -> str:
    """What is wrong with the comment on a value; empty if it is right."""
    sizes = tuple((value[-1] if isinstance(value, tuple) else value).shape)
    dims = line.dims
    if dims[-1] == "...":
        dims = dims + ["..."] * (len(sizes) - len(dims))
    fits = len(dims) == len(sizes) and all(
        any(agrees(choice, size, known) for choice in dim.split(" or "))
        for dim, size in zip(dims, sizes)
    )
    return "" if fits else f"{line.where}: {line.dims} is {sizes}, where {known}"


def trace(files: dict[Path, str], run) -> list[str]:
    """The faults of the files' shape comments, found while ``run()`` runs."""
    lines = {str(path): shape_lines(path) for path in files}
    letters = {str(path): pair for path, pair in files.items()}
    missed, wrong = {line.where for found in lines.values() for line in found}, []

    def enter(frame, event, arg):
        path = frame.f_code.co_filename
        if path not in lines or frame.f_code.co_name.startswith("<"):
            return None
        x, pending, raised = frame.f_locals.get("x"), None, False
        known = dict(zip(letters[path], x.shape[-2:])) if letters[path] and x is not None else {}

        def finish(returned=None):
            missed.discard(pending.where)
            values = [frame.f_locals[name] for name in pending.targets] or [returned]
            for value in values:
                own = dict(known)
                wrong.append(complaint(pending, value, own))
            if len(values) == 1:  # q, k and v share a comment, but not the number of tokens
                known.update(own)

        def step(frame, event, arg):
            nonlocal pending, raised
            if event == "exception":  # a StopIteration is the end of a loop
                raised = raised or arg[0] is not StopIteration
                return step
            at = frame.f_lineno if event == "line" else -1
            # Since Python 3.12 a comprehension has no frame of its own: when it raises, its line is
            # reported again, when its variables are restored.
            if pending and pending.first <= at <= pending.last:
                return step
            if pending and not raised:
                finish(arg)
            pending = next((x for x in lines[path] if x.first <= at <= x.last), None)
            raised = False
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        run()
    finally:
        sys.settrace(before)
    return [f"{where} was never run" for where in missed] + [text for text in wrong if text]


def test_the_models():
    calls = []
    with torch.device("meta"):
        for config, ops in ((SD1, REFERENCE), (SD2, TORCH)):
            encoder = TextEncoder(replace(config.text, num_hidden_layers=1), ops)
            unet, vae = UNet(config.unet, ops), VAE(config.vae, ops)
            ids, x = torch.zeros(2, 77, dtype=torch.int64), torch.zeros(2, 4, 64, 48)
            context = torch.zeros(2, 77, config.text.hidden_size)
            calls += [(encoder, ids), (unet, x, ids[:, 0], context),
                      (vae.encode, torch.zeros(2, 3, 512, 384)), (vae.decode, x),
                      (vae.moments, torch.zeros(2, 3, 512, 384))]
        unet = UNet(replace(SD1.unet, time_cond_proj_dim=256, num_class_embeds=9), TORCH)
        for config, network in ((VIT_L, ConceptScores), (VIT_H, VisionTower)):
            tower = network(replace(config, num_hidden_layers=1), TORCH)
            calls.append((tower, torch.zeros(2, 3, 224, 224)))
        context = torch.zeros(2, 77, SD1.text.hidden_size)
        calls.append((unet, x, ids[:, 0], context, ids[:, 0], torch.zeros(2, 256)))
        calls.append((DepthEstimator(DPTConfig(), TORCH), torch.zeros(2, 3, 384, 512)))
    calls.append((guidance_embedding, 7.5, 256))
    calls.append((in_tiles, lambda x: x[:, :3].repeat(1, 1, 2, 2), randn(2, 4, 9, 5), 4, 3, 2))
    image = torch.zeros(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    calls.append((TORCH.group_norm_silu, image, torch.ones(8), torch.zeros(8), 4, 1e-5, True))
    assert trace(MODELS, lambda: [f(*args) for f, *args in calls]) == []


def test_the_loop():
    model, inpaint, depth = map(small_model, (
        SMALL, replace(SMALL, unet=replace(SMALL.unet, in_channels=9)), SMALL_DEPTH))
    upscaler = small_model(replace(
        SMALL, unet=replace(SMALL.unet, in_channels=7, num_class_embeds=9),
        low_res_schedule=X4_LOW_RES, max_noise_level=8))
    call = dict(num_images_per_prompt=2, num_inference_steps=2, width=24, height=16, seed=0)
    grey = dict(image=Image.new("RGB", (24, 16)), mask_image=Image.new("L", (24, 16), 255))
    coloured = Image.effect_noise((24, 16), 80).convert("RGB")
    broken = copy.deepcopy(model)
    for part in (broken.text_encoder, broken.unet, broken.vae):
        part.half()
    broken.vae.decoder.conv_out.bias.fill_(float("inf"))

    def run():
        model("a heart", **call, **grey)
        inpaint("a heart", **call, **grey)
        model("a heart", image=grey["image"], **call)
        for either in (model, inpaint):
            either("a heart", **call, **grey, strength=0.5)
        augmented(randn(2, 8), randn(1, 8), randn(1, 8), 100, randn(2, 8))
        model(["a heart", "a boat"], output_type="np", guidance_scale=1.0, **call)
        with pytest.raises(ArithmeticError):
            broken("a heart", **call)
        small_model(SMALL_UNCLIP)(image=grey["image"], **call)
        depth("a heart", depth_map=randn(5, 7), **call)
        depth("a heart", image=coloured, **call)
        upscaler(image=grey["image"], num_inference_steps=2)
        prepared(grey["image"])
        open_depth_map(grey["mask_image"])
        normalised(open_depth_map(randn(2, 1, 5, 7)), (3, 4))

    assert trace(LOOP, run) == []


def test_numpy_sd():
    sd = small_model(SMALL)
    trees = (numpy_sd.tree({name: p.numpy() for name, p in part.state_dict().items()})
             for part in sd.parts.values())
    model = numpy_sd.Model(SMALL, *numpy_sd.read_vocabulary(Path("none")), *trees)
    assert trace({MINISD / "numpy_sd.py": ""}, lambda: numpy_sd.draw(model, "a heart", 1)) == []


def test_a_wrong_comment_is_found(tmp_path):
    path, scope = tmp_path / "wrong.py", {}
    path.write_text("def f(x):\n    y = x.mT  # (B, h, C)\n    return y.flatten(1)  # (B, C, h)\n")
    exec(compile(path.read_text(), str(path), "exec"), scope)
    assert len(trace({path: ""}, lambda: scope["f"](randn(2, 3, 5)))) == 1


@pytest.mark.parametrize("statement", ["x =", "y =", "return"])
def test_a_statement_that_raises_has_no_result(statement, tmp_path):
    path, scope = tmp_path / "raises.py", {}
    path.write_text(f"def f(x):\n    {statement} [1 / 0 for _ in x]  # (B)\n")
    exec(compile(path.read_text(), str(path), "exec"), scope)

    def run():
        with pytest.raises(ZeroDivisionError):
            scope["f"](randn(2, 3, 5))

    assert trace({path: ""}, run) == ["raises.py:2 was never run"]
