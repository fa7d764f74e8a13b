"""Arguments of a call, of loading and of the command line: values that are wrong, and the words."""

import re
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from row import Row

from minisd.errors import ImageError

NAN, INF = float("nan"), float("inf")
IMAGE = Image.new("RGB", (64, 64))
SHAPE = (1, 4, 16, 16)
START = ["--image", "start.png"]


class Line(NamedTuple):
    """The command line that says the same, and its words if they are others."""

    argv: list[str]
    said: str = ""
    code: int = 2


def x(*argv: str, said: str = "", code: int = 2) -> Line:
    return Line(["x", *argv], said, code)


STEPS, SEEDS = "from 1 to 1000", "from 0 to 4294967295"
FINITE, ETA, STRENGTH = "must be finite", "must be from 0 to 1", "above 0 and at most 1"

# Arguments; the exact type of the error; words of its message, which name the argument; the line.
CALLS: list[tuple] = [
    ({"prompt": None}, ValueError, "prompt", Line([], "arguments are required: prompt")),
    ({"prompt": 123}, TypeError, "prompt must be a string, not int"),
    ({"prompt": b"a"}, TypeError, "prompt must be a string, not bytes"),
    ({"prompt": []}, ValueError, "prompt is an empty list"),
    ({"prompt": ["a", None]}, TypeError, r"prompt\[1\] must be a string, not NoneType"),
    ({"prompt": "ab\ud800"}, ValueError, "prompt has a lone surrogate.* at position 2",
     Line(["ab\ud800"])),
    ({"prompt": "x\udcff"}, ValueError, "prompt has a lone surrogate.* at position 1",
     Line(["x\udcff"])),
    ({"prompt": ["a", "\udfff"]}, ValueError, r"prompt\[1\] has a lone .* at position 0"),
    ({"negative_prompt": "ab\ud800"}, ValueError, "negative_prompt has .* position 2",
     x("-n", "ab\ud800")),
    ({"negative_prompt": "y\udcff"}, ValueError, "negative_prompt has a lone surrogate",
     x("-n", "y\udcff")),
    ({"negative_prompt": 3}, TypeError, "negative_prompt"),
    ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, ValueError, "2 prompts but 1 negative"),
    *(({"num_inference_steps": v}, ValueError,
       "num_inference_steps must be an integer from 1 to 1000", line)
      for v, line in [
          (0, x("--steps", "0", said=STEPS)), (-1, x("--steps", "-1", said=STEPS)),
          (2.5, x("--steps", "2.5", said=r"2\.5")), ("3", None), (True, None),
          (1001, x("--steps", "1001", said=STEPS))]),
    *(({"guidance_scale": v}, ValueError, "guidance_scale must be a finite number", line)
      for v, line in [
          (NAN, x("--guidance", "nan", said=FINITE)), (INF, x("--guidance", "inf", said=FINITE)),
          (-INF, x("--guidance=-inf", said=FINITE)), ("7", None), (True, None), (10**400, None)]),
    ({"height": 0}, ValueError, "nearest valid: 4", x("--size", "64x0")),
    ({"height": 7}, ValueError, "nearest valid: 4 or 8", x("--size", "64x7")),
    ({"width": 0}, ValueError, "width must be a multiple of 4", x("--size", "0x64")),
    ({"width": -64}, ValueError, "nearest valid: 4"),
    ({"width": 64.0}, ValueError, "nearest valid: 64"),
    ({"width": 10**6}, ValueError, r"from 4 to 8192 pixels.*nearest valid: 8192\)",
     x("--size", "1000000x64")),
    ({"width": 10**20}, ValueError, r"nearest valid: 8192\)", x("--size", f"{10**20}x64")),
    ({"width": 10**400}, ValueError, r"nearest valid: 8192\)"),
    ({"width": NAN}, ValueError, r"nearest valid: 4\)"),
    ({"width": "64"}, ValueError, "width must be a multiple of 4"),
    ({"height": True}, ValueError, "height must be a multiple of 4"),
    *(({"seed": v}, ValueError, f"seed must be an integer {SEEDS}", line)
      for v, line in [
          (-1, x("--seed", "-1", said=SEEDS)), (2**32, x("--seed", "4294967296", said=SEEDS)),
          (1.5, x("--seed", "1.5", said=r"1\.5")), ("7", None), (True, None)]),
    ({"seed": 2**32 - 1, "num_images_per_prompt": 2}, ValueError, "past 4294967295",
     x("--seed", "4294967295", "--count", "2", said="past the last seed, 4294967295")),
    ({"seed": [1, 2]}, ValueError, "1 images but 2 seeds"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "either seed or generator"),
    ({"generator": [torch.Generator()] * 2, "seed": None}, ValueError,
     "1 images but 2 generators"),
    ({"generator": 7, "seed": None}, TypeError, "generator must be a torch.Generator"),
    *(({"eta": v}, ValueError, "eta must be a finite number from 0 to 1",
       x("--eta", str(v), said=ETA)) for v in (NAN, -1, 2)),
    *(({"strength": v, "image": IMAGE}, ValueError, "strength must be a finite number",
       x(*START, "--strength", str(v), said=STRENGTH)) for v in (NAN, 1.5, -0.5)),
    ({"strength": 0, "image": IMAGE}, ValueError, "strength 0 of 2 steps leaves none",
     x("--strength", "0", "--image", "none.png", said=STRENGTH)),
    ({"strength": 0.4, "image": IMAGE}, ValueError, "must be at least 1",
     x(*START, "--strength", "0.01")),
    ({"strength": 0.5}, ValueError, "strength needs the image",
     x("--strength", "0.5", said="need --image")),
    ({"mask_image": IMAGE}, ValueError, "mask_image needs the image",
     x("--mask", "start.png", said="need --image")),
    ({"image": IMAGE, "latents": torch.zeros(SHAPE)}, ValueError, "either image or latents"),
    ({"image": IMAGE, "mask_image": IMAGE, "strength": 0.5, "latents": torch.zeros(SHAPE)},
     ValueError, "either image or latents"),
    ({"callback_on_step_end": 5}, TypeError, "callback_on_step_end must be a function, not int"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, ValueError, r"latents must be \(1, 4, 16, 16\)"),
    ({"latents": torch.zeros(SHAPE, dtype=torch.long)}, ValueError, "floating-point"),
    ({"latents": torch.full(SHAPE, NAN)}, ValueError, "not finite"),
    ({"latents": np.zeros(SHAPE)}, TypeError, "latents must be a tensor"),
    ({"prompt_embeds": torch.zeros(1, 77, 20)}, ValueError, "either prompt or prompt_embeds"),
    *(({"prompt": None, "prompt_embeds": torch.zeros(shape)}, ValueError, "prompt_embeds must be")
      for shape in ((1, 77, 9), (77, 20), (0, 77, 20))),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt",
     x("--count", "0", said="from 1 to 100000")),
    ({"output_type": "gif"}, ValueError, "output_type must be one of pil, pt, np, latent"),
    ({"image": 3}, TypeError, "an image is a path or a PIL image, not int"),
    ({"image": "text.png"}, ImageError, "text.png is not an image", x("--image", "text.png")),
    *(({"image": "start.png", name: "https://example.com/a.png"}, ImageError,
       "is an address: download", x(*START, f"--{option}", "https://example.com/a.png"))
      for name, option in (("image", "image"), ("mask_image", "mask"))),
    ({"image": "none.png"}, FileNotFoundError, "none.png", x("--image", "none.png", code=3)),
    ({"image": "."}, IsADirectoryError, r"'\.'", x("--image", ".", said=r"^\.: ", code=5)),
    ({"stepps": 3}, TypeError, "stepps", x("--stepps", "3", said="--stepps")),
]
CALLBACKS = [  # what a callback returns, type, words
    (5, TypeError, "a callback must return a dict or None, not int"),
    ({"latents": None}, TypeError, "latents must be a tensor"),
    ({"latents": torch.zeros(1, 4, 2, 2)}, ValueError, "latents must be"),
]
DEVICE, DTYPE = "device must be auto or one of .*cpu", "dtype must be auto or one of float16"
LOADS: list[tuple] = [  # arguments of minisd.load, type, words, line
    *(({"device": v}, ValueError, DEVICE, line) for v, line in [
        ("gpu", x("--device", "gpu")), ("cuda:99", x("--device", "cuda:99")),
        ("cpu:7", x("--device", "cpu:7")), (3.5, None), (None, None)]),
    *(({"dtype": v}, ValueError, DTYPE, line) for v, line in [
        ("int8", x("--dtype", "int8")), ("float", x("--dtype", "float")), (torch.int32, None),
        (None, None), (16, None)]),
    ({"ops": "fast"}, ValueError, "ops must be one of auto, .*'fast'", x("--ops", "fast")),
    *(({"tile": v}, ValueError, "tile must be an integer from 1", line) for v, line in [
        (0, x("--tile", "0", said="from 1 to 8192")), (-1, None), (2.5, None), ("64", None),
        (True, None)]),
]
USAGE = [  # wrong only on the command line
    Line(["a", "red", "heart"], "red heart"),
    x("--step", "3", said="--step"),
    x("--size", "512", said="like 512x512"),
    x("--size", "512x-8", said="like 512x512"),
    x("-o", "a.jpg", said="only PNG"),
    x("-o", "none/a.png", said="none is not a folder", code=5),
    Line(["info"], "FILE"),
    Line(["info", "start.png"], "start.png"),  # a PNG without settings
    Line(["info", "none.png"], "none.png", 3),
    Line(["download"], "NAME"),
    Line(["words", "more"], "more"),
]


def name(value: object) -> str:
    """An id without memory addresses: pytest-xdist needs the same id in every process."""
    return re.sub(r" at 0x\w+", "", str(value))[:60]


def row(arguments: dict, kind: type, words: str, line: Line | None = None,
        where: str = "call") -> Row:
    argv, said, code = line or (None, "", 0)
    return Row(what=name(arguments), kind=kind, words=words, line=argv, said=said, code=code,
               **{where: arguments})


ROWS = [
    *(row(*call) for call in CALLS),
    *(Row(what=f"a callback returns {changes}"[:60], kind=kind, words=words, late=True,
          call={"callback_on_step_end": lambda *_, changes=changes: changes})
      for changes, kind, words in CALLBACKS),
    *(row(*load, where="load") for load in LOADS),
    *(Row(what=" ".join(argv), line=argv, said=said, code=code) for argv, said, code in USAGE),
]
