"""The command line: a prompt in, PNG files out, one sentence when something is wrong."""

import argparse
import hashlib
import io
import json
import os
import secrets
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TextIO

import minisd
from minisd import files, images
from minisd.app import png
from minisd.app.options import LAST_SEED, Parser, parse

# By class name and most specific class first, so that a usage error need not import torch.
EXIT_CODES = {
    "ValueError": 2,
    "ArithmeticError": 2,  # an image that is not finite
    "WeightError": 3,
    "HubError": 3,
    "FileNotFoundError": 3,
    "MemoryError": 4,
    "OutOfMemoryError": 4,  # torch's, a RuntimeError
    "OSError": 5,
    "KeyboardInterrupt": 130,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; None means ``sys.argv``."""
    if argv is None:
        argv = sys.argv[1:]
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a file name must not end the run
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.filterwarnings("ignore", module="PIL")  # an image that is bad is an error
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
    """Make images one at a time, so that an interruption keeps those that are finished."""
    args = parse(argv)
    call = _call_arguments(args)
    record = _record(args, call)
    plan, names = [], _names(args)
    files.remove_leftovers(names[0][0].parent)
    for path, seed in names:
        if _is_made(path, seed, args, record):
            print(f"{path}  seed {seed}  (kept: made before with these settings)", flush=True)
        else:
            png.check_writable(path, args.overwrite)
            plan.append((path, seed))
    if not plan:
        return
    if args.image is not None:
        call["image"] = images.open_image(args.image)
    if args.mask is not None:
        call["mask_image"] = images.open_mask(args.mask)
    # Not above: a usage error need not wait for torch.
    from minisd.checkpoints import checkpoint
    from minisd.request import Request

    weights = {"vae": args.vae, "prediction_type": args.prediction_type}
    config = checkpoint.open_checkpoint(args.model, **weights).config
    Request(prompt=args.prompt, **call).plan(config)  # a bad argument, before any weight is read
    sd = minisd.load(args.model, device=args.device, dtype=args.dtype, ops=args.ops,
                     tile=args.tile, **weights)
    for path, seed in plan:
        out = sd(args.prompt, seed=seed, progress=False if args.quiet else None, **call)
        assert isinstance(out.images, list)
        png.save(out.images[0], path, out.settings[0] | record, args.overwrite)
        print(f"{path}  seed {seed}", flush=True)


def info(argv: list[str]) -> None:
    """Say what a file is: an image's settings as JSON, or a checkpoint in four lines."""
    parser = Parser(prog="minisd info", description=info.__doc__)
    parser.add_argument("file", metavar="FILE", help="a PNG, a .safetensors file or a folder")
    file = parser.parse_args(argv).file
    if file.lower().endswith(".png"):
        print(json.dumps(png.read_settings(file), indent=2, ensure_ascii=False))
        return
    from minisd.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(file)
    print(f"layout      {checkpoint.layout}")
    print(f"version     {checkpoint.config.name}")
    counts = (f"{dtype} ({count:,} tensors)" for dtype, count in checkpoint.dtypes.items())
    print(f"dtype       {', '.join(counts)}")
    schedule = checkpoint.config.schedule
    zero = ", zero-terminal SNR" if schedule.rescale_betas_zero_snr else ""
    print(f"prediction  {schedule.prediction_type}{zero} ({checkpoint.prediction_source})")


def download(argv: list[str]) -> None:
    """Fetch official weights from the Hugging Face Hub, and print the folder they are in."""
    from minisd.checkpoints import hub

    parser = Parser(prog="minisd download", description=download.__doc__)
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(hub.KNOWN)}, or owner/name")
    name = parser.parse_args(argv).name
    print(hub.download(name, log=lambda line: print(line, file=sys.stderr)))


def words(argv: list[str]) -> None:
    """List the words that the shipped model knows, one a line."""
    Parser(prog="minisd words", description=words.__doc__).parse_args(argv)
    known = resources.files("minisd_weights") / "tiny" / "words.txt"
    try:
        print(known.read_text(encoding="utf-8"), end="", flush=True)
    except BrokenPipeError:  # `minisd words | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "info": info, "download": download, "words": words,
}


def _call_arguments(args: argparse.Namespace) -> dict:
    """The arguments of the model's call that were given, but for the prompt, seed and images."""
    width, height = args.size or (None, None)
    call = {
        "negative_prompt": args.negative,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "eta": args.eta,
        "strength": args.strength,
        "width": width,
        "height": height,
    }
    return {name: value for name, value in call.items() if value is not None}


def _record(args: argparse.Namespace, call: dict) -> dict:
    """What a PNG remembers beside the model's settings; known before the model is loaded."""
    paths = "\n".join(os.path.abspath(path) for path in (args.model, args.vae) if path)
    weights = {"vae": _last_name(args.vae), "prediction_type": args.prediction_type,
               "tile": args.tile}
    return {
        "model": _last_name(args.model) or "tiny",
        "image": _last_name(args.image),
        "mask": _last_name(args.mask),
        "asked": call | {key: value for key, value in weights.items() if value is not None},
        # Tells models of one name apart, and does not tell where they lie.
        "paths": hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest()[:12],
        "version": minisd.__version__,
    }


def _last_name(path: str | None) -> str | None:
    return path and os.path.basename(os.path.abspath(path))


def _names(args: argparse.Namespace) -> list[tuple[Path, int]]:
    """The (path, seed) of every image to make."""
    first = secrets.randbelow(LAST_SEED - args.count + 2) if args.seed is None else args.seed
    return [(_path(args, index, first + index), first + index) for index in range(args.count)]


def _path(args: argparse.Namespace, index: int, seed: int) -> Path:
    output = "." if args.output is None else args.output
    if os.path.isdir(output) or output.endswith(("/", os.sep)):
        name = f"minisd-{seed}.png" if args.count == 1 else f"{index:05d}-{seed}.png"
        return Path(output, name)
    path = Path(output)
    return path if args.count == 1 else path.with_name(f"{path.stem}-{index:05d}{path.suffix}")


def _is_made(path: Path, seed: int, args: argparse.Namespace, record: dict) -> bool:
    """Whether this very image is there already; so an interrupted run can be repeated."""
    if args.overwrite or args.image is not None or not path.is_file():
        return False
    try:
        made = png.read_settings(path)
    except (OSError, ValueError):
        return False
    wanted = {**record, "prompt": args.prompt, "seed": seed}
    # What was asked for may have been the default before, but what was asked before is no default.
    asked, before = wanted.pop("asked"), made.pop("asked", None) or {}
    wanted |= {key: value for key, value in asked.items() if value != before.get(key)}
    return before.keys() <= asked.keys() and all(made.get(k) == v for k, v in wanted.items())


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


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    print(f"minisd: warning: {' '.join(str(message).split())}", file=sys.stderr)

