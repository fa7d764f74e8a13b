"""The command line: a prompt in, PNG files out, one sentence when something is wrong."""

import argparse
import hashlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

import minisd
from minisd import files, images
from minisd.app import options, png, streams, watermark

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
PREVIEW_EVERY = 5  # calls of the UNet
# What the command line calls an argument of the library where its sentences begin with one.
# Those that name one further on have both spellings.
OPTIONS = {
    "negative_prompt": "--negative", "num_inference_steps": "--steps", "width": "--size",
    "height": "--size", "guidance_scale": "--guidance", "mask_image": "--mask",
    "prediction_type": "--prediction-type", "ops": "--ops", "sampler": "--sampler",
    "spacing": "--spacing", "guidance_rescale": "--guidance-rescale", "eta": "--eta",
    "watermark": "--watermark", "safety_checker": "--safety-checker",
    "noise_level": "--noise-level",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; None means ``sys.argv``."""
    if argv is None:
        argv = sys.argv[1:]
        streams.open_missing()
        sys.stderr = streams.Tolerant(sys.stderr)  # for the bars of libraries, too
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
                _tell(traceback.format_exc().rstrip())
            code = _exit_code(error)
            _tell(f"minisd: error: {_sentence(error, code)}")
            return code
    return 0


def draw(argv: list[str]) -> None:
    """Make images one at a time, so that an interruption keeps those that are finished."""
    args = options.parse(argv)
    call = options.call_arguments(args)
    record = _record(args, call)
    plan, names = [], options.names(args, ".png")
    files.remove_leftovers(names[0][0].parent)
    for path, seed in names:
        if _is_made(path, seed, args, record):
            _print(f"{path}  seed {seed}  (kept: made before with these settings)")
        else:
            png.check_writable(path, args.overwrite)
            plan.append((path, seed))
    if not plan:
        return
    if args.preview is not None:
        png.check_writable(args.preview, args.overwrite or _is_preview(args.preview))
        taken = [("--output", path) for path, _ in plan]
        taken += [("--image", args.image), ("--mask", args.mask)]
        for option, path in taken:
            if path is not None and Path(args.preview).resolve() == Path(path).resolve():
                raise ValueError(f"--preview and {option} are both {args.preview}")
    if args.image is not None:
        call["image"] = images.open_image(args.image)
    if args.mask is not None:
        call["mask_image"] = images.open_mask(args.mask)
    # Not above: a usage error need not wait for torch.
    from minisd.checkpoints import checkpoint
    from minisd.request import Request

    weights = _weights(args)
    config = checkpoint.open_checkpoint(args.model, **weights).config
    # A bad argument, before any weight is read.
    asked = Request(prompt=args.prompt, **call).plan(config)
    hidden = None if args.watermark is None else args.watermark.encode(errors="surrogateescape")
    if hidden is not None:
        watermark.check((asked.width, asked.height), len(hidden))
    sd = minisd.load(args.model, device=args.device, dtype=args.dtype, ops=args.ops,
                     tile=args.tile, safety_checker=args.safety_checker, **weights)
    for path, seed in plan:
        call |= {"seed": seed, "progress": False if args.quiet else None}
        if args.preview is None:
            out = sd(args.prompt, **call)
        else:
            out = _previewed(sd.stream(args.prompt, **call), args.preview)
        (image,) = out.images
        if hidden is not None:
            image = watermark.embed(image, hidden)
        flags = {} if out.nsfw is None else {"nsfw": out.nsfw[0]}
        png.save(image, path, out.settings[0] | record | flags, args.overwrite)
        if out.nsfw == [True]:
            _tell(f"minisd: warning: the safety checker flags {path}")
        _print(f"{path}  seed {seed}")


def _previewed(steps: Iterator[Any], path: str) -> Any:
    """The result of the steps; on the way the image so far is written there."""
    for step in steps:
        if step.i % PREVIEW_EVERY == 0:
            (so_far,) = step.output().images
            png.save(so_far, path, {}, overwrite=True)
    return step.output()


def _is_preview(path: str) -> bool:
    """Whether it is an earlier preview, as an interrupted run leaves it: an image of no settings.
    """
    try:
        return png.read_settings(path) == {}
    except (OSError, ValueError):
        return False


def info(argv: list[str]) -> None:
    """Say what a file is: an image's settings as JSON, or a checkpoint in five lines."""
    parser = options.Parser(prog="minisd info", description=info.__doc__)
    parser.add_argument("file", metavar="FILE", help="a PNG, JPEG or WebP image of minisd, "
                        "AUTOMATIC1111's web UI or ComfyUI; or what --model takes")
    parser.add_argument("--config", metavar="FOLDER", help=options.CONFIG_HELP)
    args = parser.parse_args(argv)
    if args.file.lower().endswith(tuple(png.READABLE)):
        _print(json.dumps(png.read_any_settings(args.file), indent=2, ensure_ascii=False))
        return
    from minisd.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(args.file, config=args.config)
    counts = (f"{dtype} ({count:,} tensors)" for dtype, count in checkpoint.dtypes.items())
    schedule = checkpoint.config.schedule
    zero = ", zero terminal SNR" if schedule.rescale_betas_zero_snr else ""
    _print(f"layout      {checkpoint.layout}")
    kind = checkpoint.config.kind
    _print(f"version     {checkpoint.config.name}" + f", {kind}" * (kind != "text to image"))
    _print(f"dtype       {', '.join(counts)}")
    _print(f"prediction  {schedule.prediction_type}{zero} ({checkpoint.prediction_source})")
    config = checkpoint.config
    _print(f"sampler     {schedule.sampler}, {schedule.timestep_spacing} timesteps, steps "
           f"{config.num_inference_steps}, guidance {config.guidance_scale:g}")


def download(argv: list[str]) -> None:
    """Fetch weights from the Hugging Face Hub, and print the folder they are in."""
    from minisd.checkpoints import hub

    parser = options.Parser(prog="minisd download", description=download.__doc__)
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(hub.KNOWN)}, or owner/name of a "
                        "model or of a VAE alone")
    _print(str(hub.download(parser.parse_args(argv).name, log=_tell)))


def words(argv: list[str]) -> None:
    """List the words that the shipped model knows, one a line."""
    options.Parser(prog="minisd words", description=words.__doc__).parse_args(argv)
    known = resources.files("minisd_weights") / "tiny" / "words.txt"
    _print(known.read_text(encoding="utf-8").rstrip())


def explain(argv: list[str]) -> None:
    """Draw an image, and write a page that explains how."""
    args = options.explaining_parser().parse_args(argv)
    ((path, seed),) = options.names(args, ".html")
    if path.suffix.lower() != ".html":
        raise ValueError(f"{path}: the page is HTML, so its name must end in .html")
    files.check_writable(path, args.overwrite)
    from minisd.app import explain_page
    from minisd.app.explain import WordMaps, watched
    from minisd.checkpoints import checkpoint
    from minisd.request import Request

    weights = _weights(args)
    config = checkpoint.open_checkpoint(args.model, **weights).config
    if config.kind != "text to image":
        raise ValueError(f"this is an {config.kind} model, and explain is for text to image")
    call = options.call_arguments(args) | {"seed": seed, "progress": False if args.quiet else None}
    plan = Request(prompt=args.prompt, **call).plan(config)
    words = WordMaps()
    sd = minisd.load(args.model, device=args.device, dtype=args.dtype, ops=words.ops, fused=False,
                     **weights)
    run = watched(sd, words, args.prompt, plan, **call)
    page = explain_page.page(run, options.again(args, seed))
    with files.written_whole(path, args.overwrite) as temporary, open(
            temporary, "x", encoding="utf-8") as file:
        file.write(page)
        file.flush()
        os.fsync(file.fileno())
    _print(f"{path}  seed {seed}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "info": info, "download": download, "words": words, "explain": explain,
}


def _weights(args: argparse.Namespace) -> dict:
    """What is said of the weights beside where they are."""
    return {"config": args.config, "vae": args.vae, "prediction_type": args.prediction_type}


def _record(args: argparse.Namespace, call: dict) -> dict:
    """What a PNG remembers beside the model's settings; known before the model is loaded."""
    given = filter(None, (args.model, args.vae, args.config))
    paths = "\n".join(os.path.abspath(path) for path in given)
    weights = {"vae": _last_name(args.vae), "config": _last_name(args.config),
               "prediction_type": args.prediction_type, "tile": args.tile,
               "safety_checker": _last_name(args.safety_checker)}
    return {
        "model": _last_name(args.model) or "tiny",
        "image": _last_name(args.image),
        "mask": _last_name(args.mask),
        "watermark": args.watermark,
        "asked": call | {key: value for key, value in weights.items() if value is not None},
        # Tells models of one name apart, and does not tell where they lie.
        "paths": hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest()[:12],
        "version": minisd.__version__,
    }


def _last_name(path: str | None) -> str | None:
    return path and os.path.basename(os.path.abspath(path))


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
    # A PNG has the sampler by our name, and one of the web UI's says the spacing and eta too.
    if before.get("sampler") not in (None, asked.get("sampler")):
        return False
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
    first = re.match(r"(\w+)[ =]", text)
    if code == 2 and first and first[1] in OPTIONS:  # a missing path can have such a name
        text = f"{OPTIONS[first[1]]}: {text}"
    return text if code > 1 else f"{type(error).__name__}: {text} (--debug shows where)"


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    _tell(f"minisd: warning: {' '.join(str(message).split())}")


def _print(text: str) -> None:
    streams.say(f"{text}\n", sys.stdout)


def _tell(text: str) -> None:
    streams.Tolerant(sys.stderr).write(f"{text}\n")

