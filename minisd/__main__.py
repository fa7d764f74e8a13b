"""The command line: words in, PNG files out, one sentence when something is wrong."""

import argparse
import json
import os
import re
import secrets
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import minisd
from minisd import files, image as pictures

LAST_SEED = 2**32 - 1

# By class name and most specific class first, so that a usage error need not import torch.
EXIT_CODES = {
    "ValueError": 2,
    "ArithmeticError": 2,  # a picture that is not finite
    "WeightError": 3,
    "HubError": 3,
    "FileNotFoundError": 3,
    "MemoryError": 4,
    "OutOfMemoryError": 4,  # torch's, a RuntimeError
    "OSError": 5,
    "KeyboardInterrupt": 130,
}

OTHER_COMMANDS = """\
other commands:
  minisd info FILE      the settings in a PNG, or the layout, version and dtype of a checkpoint
  minisd download NAME  fetch official weights
  minisd words          list the words that the shipped model knows
to draw the word itself: minisd -- info

exit codes: 2 usage and pictures, 3 weights and missing paths, 4 memory, 5 disk or folder, 1 else"""


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; None means ``sys.argv``."""
    if argv is None:
        argv = sys.argv[1:]
        sys.stdout.reconfigure(errors="backslashreplace")  # no file name is worth a lost picture
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if argv and argv[0] in COMMANDS:
                COMMANDS[argv[0]](argv[1:])
            else:
                draw(argv)
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in argv:
                traceback.print_exc()
            code = _exit_code(error)
            print(f"minisd: error: {_sentence(error, code)}", file=sys.stderr)
            return code
    return 0


def draw(argv: list[str]) -> None:
    """Make pictures one at a time, so that an interruption keeps those that are finished."""
    args = _parse(argv)
    call = _call_arguments(args)
    plan, names = [], _names(args)
    files.remove_leftovers(names[0][0].parent)
    for path, seed in names:
        if _is_made(path, seed, args, call):
            print(f"{path}  seed {seed}  (kept: made before with these settings)", flush=True)
        else:
            pictures.check_writable(path, args.overwrite)
            plan.append((path, seed))
    if not plan:
        return
    if args.image is not None:
        call["image"] = pictures.open_image(args.image)
    if args.mask is not None:
        call["mask_image"] = pictures.open_image(args.mask)
    from minisd import arguments, checkpoint  # not above: a usage error need not wait for torch

    config = checkpoint.open_checkpoint(_model(args.model)).config
    arguments.check(config, args.prompt, **call)  # what it refuses, before any weight is read
    sd = minisd.load(_model(args.model), device=args.device, dtype=args.dtype, ops=args.ops)
    for path, seed in plan:
        out = sd(args.prompt, seed=seed, progress=False if args.quiet else None, **call)
        pictures.save(out.images[0], path, out.settings[0] | _record(args), args.overwrite)
        print(f"{path}  seed {seed}", flush=True)


def info(argv: list[str]) -> None:
    """Say what a file is: a picture's settings as JSON, or a checkpoint in four lines."""
    parser = _Parser(prog="minisd info", description=info.__doc__)
    parser.add_argument("file", metavar="FILE", help="a PNG, a .safetensors file or a folder")
    file = parser.parse_args(argv).file
    if file.lower().endswith(".png"):
        print(json.dumps(pictures.read_settings(file), indent=2, ensure_ascii=False))
        return
    from minisd.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(_model(file))
    print(f"layout      {checkpoint.layout}")
    print(f"version     {checkpoint.config.name}")
    counts = (f"{dtype} ({count:,} tensors)" for dtype, count in checkpoint.dtypes.items())
    print(f"dtype       {', '.join(counts)}")
    prediction = checkpoint.config.schedule.prediction_type
    print(f"prediction  {prediction} ({checkpoint.prediction_source})")


def download(argv: list[str]) -> None:
    """Fetch official weights from the Hugging Face Hub, and print the folder they are in."""
    from minisd import hub

    parser = _Parser(prog="minisd download", description=download.__doc__)
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(hub.KNOWN)}, or owner/name")
    name = parser.parse_args(argv).name
    print(hub.download(name, log=lambda line: print(line, file=sys.stderr)))


def words(argv: list[str]) -> None:
    """List the words that the shipped model knows, one a line."""
    _Parser(prog="minisd words", description=words.__doc__).parse_args(argv)
    known = resources.files("minisd_weights") / "tiny" / "words.txt"
    try:
        print(known.read_text(encoding="utf-8"), end="", flush=True)
    except BrokenPipeError:  # `minisd words | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS = {"info": info, "download": download, "words": words}


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as exceptions and no guessing at shortened options."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    """Arguments that are right on their own and together; sizes and names are the library's."""
    parser = _drawing_parser()
    args = parser.parse_args(argv)
    if args.image is None and (args.mask is not None or args.strength is not None):
        parser.error("--mask and --strength need --image")
    if (args.seed or 0) + args.count - 1 > LAST_SEED:
        parser.error(f"--seed plus --count goes past the last seed, {LAST_SEED}")
    return args


def _drawing_parser() -> _Parser:
    parser = _Parser(
        prog="minisd",
        description="Text to image with Stable Diffusion 1 and 2.",
        epilog=OTHER_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("prompt", help="what to draw, in quotes")
    option("-m", "--model", help="a .safetensors file, a diffusers folder, or the NAME that"
           " `minisd download` has fetched (default: the shipped tiny model)")
    option("-n", "--negative", default="", help="what to keep out (default: nothing)")
    option("-o", "--output", help="a name ending in .png, or a folder (default: minisd-SEED.png);"
           " with --count, heart.png becomes heart-00000.png and so on, and without a name"
           " they are 00000-SEED.png and so on")
    option("--steps", type=_number(int, lambda n: 1 <= n <= 1000, "from 1 to 1000"), default=50,
           help="denoising steps, 1 to 1000 (default: %(default)s)")
    option("--guidance", type=_number(float, lambda g: abs(g) < float("inf"), "finite"),
           default=7.5, help="how closely to follow the prompt; 1 is off (default: %(default)s)")
    option("--seed", type=_number(int, lambda n: 0 <= n <= LAST_SEED, f"from 0 to {LAST_SEED}"),
           help="the seed of the first picture; the next takes the next (default: drawn and told)")
    option("--size", type=_size, metavar="WxH", help="in pixels (default: the model's own)")
    option("--count", type=_number(int, lambda n: 1 <= n <= 100_000, "from 1 to 100000"),
           default=1, help="how many pictures (default: %(default)s)")
    option("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    option("--dtype", default="auto", help="float32, float16 or bfloat16 (default: %(default)s:"
           " float16 on a GPU, float32 on a CPU)")
    option("--ops", default="auto", help="torch, its fused calls; reference, the formulas written"
           " out; triton, the GPU kernels; fused; or auto (default: %(default)s)")
    option("--image", help="a picture to start from")
    option("--mask", help="where to repaint --image: light is repainted, dark is kept")
    option("--strength", type=_number(float, lambda s: 0 < s <= 1, "above 0 and at most 1"),
           help="how far to leave --image (default: 0.8; with --mask 1)")
    option("--eta", type=_number(float, lambda e: 0 <= e <= 1, "from 0 to 1"), default=0.0,
           help="noise added in each step: 0 is DDIM, 1 is DDPM (default: %(default)s)")
    option("--overwrite", action="store_true", help="replace existing files")
    option("--quiet", action="store_true", help="no progress bar")
    option("--version", action="version", version=f"minisd {minisd.__version__}")
    return parser


def _number(kind: type, is_valid: Callable, expected: str) -> Callable:
    def parse(text: str) -> int | float:
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


def _call_arguments(args: argparse.Namespace) -> dict:
    """The arguments of the model's call, but for the prompt, the seed and the pictures."""
    call = {
        "negative_prompt": args.negative,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "eta": args.eta,
        "strength": args.strength,
    }
    if args.size:
        call["width"], call["height"] = args.size
    return call


def _model(name: str | None) -> str | None:
    """A path as it is; a short name as the repository that `minisd download` knows by it."""
    from minisd import hub

    return name if name is None or os.path.exists(name) else hub.KNOWN.get(name, name)


def _record(args: argparse.Namespace) -> dict:
    """What a PNG remembers beside the model's settings; known before the model is loaded."""
    return {
        "model": os.path.basename(os.path.abspath(args.model)) if args.model else "tiny",
        "image": args.image and os.path.basename(args.image),
        "mask": args.mask and os.path.basename(args.mask),
        "default_size": args.size is None,
        "version": minisd.__version__,
    }


def _names(args: argparse.Namespace) -> list[tuple[Path, int]]:
    """The (path, seed) of every picture to make."""
    first = secrets.randbelow(LAST_SEED - args.count + 2) if args.seed is None else args.seed
    return [(_path(args, index, first + index), first + index) for index in range(args.count)]


def _path(args: argparse.Namespace, index: int, seed: int) -> Path:
    output = "." if args.output is None else args.output
    if os.path.isdir(output) or output.endswith(("/", os.sep)):
        name = f"minisd-{seed}.png" if args.count == 1 else f"{index:05d}-{seed}.png"
        return Path(output, name)
    path = Path(output)
    return path if args.count == 1 else path.with_name(f"{path.stem}-{index:05d}{path.suffix}")


def _is_made(path: Path, seed: int, args: argparse.Namespace, call: dict) -> bool:
    """Whether this very picture is there already; so an interrupted run can be repeated."""
    if args.overwrite or args.image is not None or not path.is_file():
        return False
    try:
        made = pictures.read_settings(path)
    except (OSError, ValueError):
        return False
    wanted = {**call, **_record(args), "prompt": args.prompt, "seed": seed}
    return all(made.get(key) == value for key, value in wanted.items())


def _exit_code(error: BaseException) -> int:
    if "can't allocate memory" in str(error):  # torch on a CPU: a plain RuntimeError
        return 4
    names = (each.__name__ for each in type(error).__mro__)
    return next((EXIT_CODES[name] for name in names if name in EXIT_CODES), 1)


def _sentence(error: BaseException, code: int) -> str:
    """The error in one line."""
    if code == 130:
        return "interrupted"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if code == 4 and "smaller" not in text:
        return f"{text or 'out of memory'}; a smaller --size needs less"
    return text if code > 1 else f"{type(error).__name__}: {text} (--debug shows where)"


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"minisd: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
