"""The options of the command line, each right on its own; the library checks sizes and names."""

import argparse
import os
import re
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import minisd
from minisd import images
from minisd.app import streams

LAST_SEED = 2**32 - 1
CONFIG_HELP = "for a .safetensors file of unusual sizes: a diffusers folder that says them"

# The options that are arguments of the model's call, by the names there.
CALL = {
    "negative": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale",
    "guidance_rescale": "guidance_rescale", "sampler": "sampler", "spacing": "spacing",
    "eta": "eta", "strength": "strength", "noise_level": "noise_level",
}
# The same for those that are files with an image, and what opens it.
IMAGES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "image": ("image", images.open_image), "mask": ("mask_image", images.open_mask),
    "depth_map": ("depth_map", partial(images.open_grey, what="the depth map")),
}

OTHER_COMMANDS = """\
other commands:
  minisd info FILE      the settings in an image, also in one of AUTOMATIC1111's web UI or ComfyUI,
                        or the layout, version and dtype of a checkpoint
  minisd download NAME  fetch official weights, or a VAE
  minisd words          list the words that the shipped model knows
  minisd explain PROMPT draw an image, and write a page that explains how: minisd explain --help
to draw the word itself: minisd -- info

exit codes: 2 usage and images, 3 weights and missing paths, 4 memory, 5 disk or folder, 1 else"""


class Parser(argparse.ArgumentParser):
    """argparse, with errors as exceptions and no guessing at shortened options."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None):
        super().__init__(prog, description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        streams.say(message, file)  # for --help and --version


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a line that draws; ValueError where they do not go together."""
    parser = _drawing_parser()
    args = parser.parse_args(argv)
    if args.image is None and (args.mask is not None or args.strength is not None):
        parser.error("--mask and --strength need --image")
    if (args.seed or 0) + args.count - 1 > LAST_SEED:
        parser.error(f"--seed plus --count goes past the last seed, {LAST_SEED}")
    return args


def _drawing_parser() -> Parser:
    parser = Parser(
        prog="minisd",
        description="Text to image with Stable Diffusion 1 and 2.",
        epilog=OTHER_COMMANDS,
    )
    option = parser.add_argument
    _say_what(option)
    option("-o", "--output", help="a name ending in .png, or a folder (default: minisd-SEED.png);"
           " with --count, heart.png becomes heart-00000.png and so on, and without a name"
           " they are 00000-SEED.png and so on")
    _say_how(option)
    option("--count", type=_number(int, lambda n: 1 <= n <= 100_000, "from 1 to 100000"),
           default=1, help="how many images (default: %(default)s); each takes the next seed")
    option("--ops", default="auto", help="torch, its fused calls; reference, the formulas written"
           " out; triton, the GPU kernels; fused; or auto (default: %(default)s)")
    option("--tile", type=_number(int, lambda n: 1 <= n <= 8192, "from 1 to 8192"), metavar="N",
           help="decode in tiles of N cells of the latent, 64 for 512 pixels in the official"
           " models: less memory, not exact (default: no tiles); an upscaling model, whose cells"
           " are the pixels of --image, draws in tiles too")
    option("--image", help="an image to start from; without --size its own size is kept. An"
           " upscaling model makes it 4 times as large, and takes no --size; an unCLIP model draws"
           " variations of it, of the size that it was trained on")
    option("--depth-map", metavar="FILE", help="for a depth model: an image in grey, larger is"
           " nearer, of any size and range (default: made of --image)")
    option("--mask", help="where to repaint --image: light is repainted, dark and transparent are"
           " kept")
    option("--strength", type=_number(float, lambda s: 0 < s <= 1, "above 0 and at most 1"),
           help="how far to leave --image (default: 0.8; with --mask 1)")
    option("--noise-level", type=_number(int, lambda n: n >= 0, "0 or more"), metavar="N",
           help="how much noise is added to what the model is shown of --image. An upscaling model:"
           " 0 to 350, more redraws more detail (default: 20); an unCLIP model: 0 to 999, more is"
           " less like it (default: 0)")
    option("--guidance-rescale", metavar="SHARE", type=_number(
        float, lambda r: 0 <= r <= 1, "from 0 to 1"),
        help="how much of the contrast that guidance adds is taken back; 0.7 for models of zero"
        " terminal SNR (default: 0)")
    option("--preview", metavar="FILE", help="a PNG that shows the image so far, written again"
           " every few steps")
    option("--eta", type=_number(float, lambda e: 0 <= e <= 1, "from 0 to 1"),
           help="noise added in each step, from none to as much as DDPM (default: the"
           " sampler's own)")
    option("--safety-checker", metavar="FOLDER", help="the folder of Stable Diffusion 1's"
           " safety checker: warns of each image that it flags, and notes it in the PNG")
    option("--watermark", metavar="TEXT", help="hide TEXT in the pixels, as the scripts of Stable"
           " Diffusion did (default: none): from 256x256 pixels on; often lost in bright colours,"
           " and in a JPEG of quality 90")
    option("--version", action="version", version=f"minisd {minisd.__version__}")
    return parser


def explaining_parser() -> Parser:
    """Of `minisd explain`, which draws one image from noise."""
    parser = Parser("minisd explain", "Draw an image, and write a page that explains how: every "
                    "stage, with the numbers and pictures of this very run.")
    option = parser.add_argument
    _say_what(option)
    option("-o", "--output", help="a name ending in .html, or a folder (default:"
           " minisd-SEED.html)")
    _say_how(option)
    parser.set_defaults(count=1)
    return parser


def _say_what(option: Callable[..., Any]) -> None:
    """Declare what is drawn, and by which model."""
    option("prompt", help='what to draw, in quotes; "" for nothing')
    option("-m", "--model", help="a .safetensors file, a diffusers folder, or the NAME that"
           " `minisd download` has fetched (default: the shipped tiny model)")
    option("--config", metavar="FOLDER", help=CONFIG_HELP)
    option("--vae", help="a VAE to use instead of the model's own: a file, a folder, or a NAME")
    option("--prediction-type", metavar="TYPE",
           help="epsilon or v_prediction, whatever the model's file says")
    option("-n", "--negative", default="", help="what to keep out (default: nothing)")


def _say_how(option: Callable[..., Any]) -> None:
    """Declare how an image is drawn from noise."""
    option("--steps", type=_number(int, lambda n: 1 <= n <= 1000, "from 1 to 1000"),
           help="steps of the sampler, 1 to 1000; some models have a number of their own"
           " (default: 50)")
    option("--guidance", type=_number(float, lambda g: abs(g) < float("inf"), "finite"),
           help="how closely to follow the prompt; 1 is off; some models have a number of their own"
           " (default: 7.5)")
    option("--seed", type=_number(int, lambda n: 0 <= n <= LAST_SEED, f"from 0 to {LAST_SEED}"),
           help="where the noise comes from (default: drawn and told)")
    option("--size", type=_size, metavar="WxH",
           help="in pixels (default: what the model was trained on)")
    option("--sampler", metavar="NAME", help="ddim, euler, euler_a, ddpm, dpmpp_2m, dpmpp_2m_sde,"
           " dpmpp_2s, unipc, heun, lms, plms, dpm2, lcm, tcd, or a name such as"
           ' "DPM++ 2M Karras" (default: the model\'s own)')
    option("--spacing", help="which timesteps it visits: leading, trailing, linspace, karras,"
           " exponential or lcm (default: the sampler's own)")
    option("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    option("--dtype", default="auto", help="float32, float16, bfloat16 or float64"
           " (default: %(default)s: float16 on a GPU, float32 on a CPU)")
    option("--overwrite", action="store_true", help="replace existing files")
    option("--quiet", action="store_true", help="no progress bar")


def call_arguments(args: argparse.Namespace) -> dict:
    """The arguments of the model's call that were given, but for the prompt, seed and images."""
    given = vars(args)
    call = {name: given.get(option) for option, name in CALL.items()}
    call["width"], call["height"] = args.size or (None, None)
    return {name: value for name, value in call.items() if value is not None}


def image_files(args: argparse.Namespace) -> dict[str, str]:
    """Option -> file, of the images that are given."""
    given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in IMAGES}
    return {option: path for option, path in given.items() if path is not None}


def opened_images(args: argparse.Namespace) -> dict:
    """The arguments of the call that are images."""
    given = ((name, use, getattr(args, option)) for option, (name, use) in IMAGES.items())
    return {name: use(path) for name, use, path in given if path is not None}


def names(args: argparse.Namespace, ending: str) -> list[tuple[Path, int]]:
    """The (path, seed) of every image or page to make."""
    first = secrets.randbelow(LAST_SEED - args.count + 2) if args.seed is None else args.seed
    return [(_path(args, index, first + index, ending), first + index)
            for index in range(args.count)]


def _path(args: argparse.Namespace, index: int, seed: int, ending: str) -> Path:
    output = "." if args.output is None else args.output
    if os.path.isdir(output) or output.endswith(("/", os.sep)):
        name = f"minisd-{seed}" if args.count == 1 else f"{index:05d}-{seed}"
        return Path(output, name + ending)
    path = Path(output)
    return path if args.count == 1 else path.with_name(f"{path.stem}-{index:05d}{path.suffix}")


def again(args: argparse.Namespace, seed: int) -> list[str]:
    """The command line that draws the image of a page of `minisd explain`."""
    size = args.size and "{}x{}".format(*args.size)
    given = {
        "--model": args.model, "--config": args.config, "--vae": args.vae,
        "--prediction-type": args.prediction_type, "--negative": args.negative or None,
        "--steps": args.steps, "--guidance": args.guidance, "--seed": seed, "--size": size,
        "--sampler": args.sampler, "--spacing": args.spacing,
        "--device": None if args.device == "auto" else args.device,
        "--dtype": None if args.dtype == "auto" else args.dtype, "--output": "image.png",
    }
    # With = because a value can begin with a dash. So can the prompt, and then -- is before it.
    said = [f"{option}={value}" for option, value in given.items() if value is not None]
    return ["minisd", *said, *["--"] * args.prompt.startswith("-"), args.prompt]


N = TypeVar("N", int, float)


def _number(kind: type[N], is_valid: Callable[[N], bool], expected: str) -> Callable[[str], N]:
    def parse(text: str) -> N:
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} must be {expected}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls the type in its messages
    return parse


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} must be WIDTHxHEIGHT, like 512x512")
    return int(match[1]), int(match[2])
