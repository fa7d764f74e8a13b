"""Does the suite see mutations that look almost right, where no parity test looks?

    python -m tests.long.mutants            # all; some minutes
    python -m tests.long.mutants --only seed

Each row is one mutation of one line in a copy of the package; the tests named beside it must fail.
The constants of the model have theirs in models/traps.py, which the suite itself runs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# file, tests, the line as it is, the line mutated
MUTANTS = [
    ("checks", "calls refusals", "if isinstance(value, bool) or not isinstance(value, Real):",
     "if not isinstance(value, Real):"),
    ("checks", "calls refusals", "not low <= number <= high:  # nan",
     "not low < number <= high:  # nan"),
    ("tasks", "calls refusals", "left = int(share * steps)", "left = round(share * steps)"),
    ("tasks", "calls refusals", "if left == 0:", "if left < 0:"),
    ("request", "calls refusals", "(not has_mask or strength != 1)",
     "(not has_mask and strength != 1)"),
    ("checks", "calls refusals", "not multiple <= number <= MAX_SIDE",
     "not 0 <= number <= MAX_SIDE"),
    ("checks", "calls refusals", "math.floor(value / multiple), math.ceil(value / multiple)",
     "math.floor(value / multiple), math.floor(value / multiple)"),
    ("request", "calls refusals", "if (texts is None) == (count is None):",
     "if texts is None and count is None:"),
    ("request", "calls refusals", "1 if isinstance(r.negative_prompt, (list, tuple)) else count",
     "count"),
    ("text/tokenizer", "calls refusals tokenizer", '"[\\ud800-\\udfff]", text):',
     '"[\\ud800-\\udbff]", text):'),
    ("tasks", "doors", "scale = checks.side(\"height\", height, f, usual) / image.height",
     "scale = checks.side(\"height\", height, f, usual) / image.width"),
    ("tensors", "calls refusals", "if value.shape[1:] != shape or len(value) == 0:",
     "if value.shape[1:] != shape:"),
    ("tensors", "calls refusals", "latents_of(changes[\"latents\"], tuple(latents.shape)).to(",
     "changes[\"latents\"].to("),
    ("seeds", "calls refusals", "return [first + i for i in range(count)]",
     "return [first for i in range(count)]"),
    ("seeds", "calls refusals", "first + count - 1 > MAX_SEED", "first + count > MAX_SEED"),
    ("seeds", "calls refusals", "if len(seed) != count:", "if len(seed) < count:"),
    ("request", "calls refusals", "ladder.levels[-left - 1 :]", "ladder.levels[: left + 1]"),
    ("conditioning/start", "parity determinism", "dtype=torch.float32) for g in",
     "dtype=self.like.dtype) for g in"),
    ("conditioning/inpaint", "calls refusals",
     "return (1 - self.mask) * self.image + self.mask * image", "return image"),
    ("pixels", "parity determinism", "latents.split(1)", "latents.split(2)"),
    ("pixels", "calls refusals determinism",
     "if vae.quant_conv.weight.dtype == inputs[0].dtype:", "if True:"),
    ("text/tokenizer", "tokenizer", "return encoding.ids[:room]", "return encoding.ids[-room:]"),
    ("text/tokenizer", "tokenizer", "room = self.length - 2", "room = self.length - 1"),
    ("text/tokenizer", "tokenizer", "normalizers.NFC(), normalizers.Lowercase()",
     "normalizers.Lowercase()"),
    ("text/tokenizer", "tokenizer", "dropped = prompt[encoding.offsets[room][0] :]",
     "dropped = prompt[encoding.offsets[room - 1][0] :]"),
    ("text/tokenizer", "tokenizer",
     "ids = torch.full((len(prompts), self.length), self.pad_token_id",
     "ids = torch.full((len(prompts), self.length), self.eos_token_id"),
    ("checkpoints/safetensors_file", "refusals safetensors_file fuzz", "if tensor.start != end:",
     "if tensor.start < end:"),
    ("checkpoints/safetensors_file", "refusals safetensors_file fuzz", "    if end != size:",
     "    if end > size:"),
    ("checkpoints/safetensors_file", "refusals safetensors_file fuzz",
     "type(v) is int and 0 <= v < limit", "isinstance(v, int) and 0 <= v < limit"),
    ("checkpoints/json_file", "refusals safetensors_file fuzz",
     "if len(result) < len(pairs):", "if False:"),
    ("checkpoints/safetensors_file", "refusals safetensors_file checkpoint",
     "shape=shape, start=s, stop=s + size)",
     "shape=shape, start=self.start, stop=self.start + size)"),
    ("checkpoints/safetensors_file", "refusals safetensors_file",
     "if tensor.numel() and not all(extreme.isfinite()",
     "if tensor.numel() and not any(extreme.isfinite()"),
    ("checkpoints/safetensors_file", "refusals safetensors_file",
     "if file.readinto(raw) != len(raw):", "if not file.readinto(raw):"),
    ("checkpoints/checkpoint", "refusals safetensors_file", "for name in want if name not in have]",
     "for name in want if name in have]"),
    ("checkpoints/checkpoint", "refusals safetensors_file checkpoint",
     "if parameter in places[part]:", "if False:"),
    ("checkpoints/folder", "refusals checkpoint", "!= sorted(rows.items()):",
     "< sorted(rows.items()):"),
    ("checkpoints/folder", "refusals", r'r"\w[\w.-]*\.safetensors", shard',
     r'r".*\.safetensors", shard'),
    ("checkpoints/folder", "checkpoint refusals", 'for variant in ("", ".fp16"):',
     'for variant in (".fp16", ""):'),
    ("checkpoints/safetensors_file", "headers", "        if len(text) > MAX_ENTRIES:",
     "        if len(data) > MAX_ENTRIES:"),
    ("checkpoints/safetensors_file", "headers", "for each in (left, metadata) if",
     "for each in (metadata,) if"),
    ("checkpoints/prediction", "recognise", "    if (path.parent / SCHEDULER).is_file():",
     "    if False:"),
    ("checkpoints/prediction", "recognise",
     'guess = "v_prediction" if std > TELLTALE_STD else "epsilon"',
     'guess = "epsilon"'),
    ("checkpoints/prediction", "prediction", 'rescale_betas_zero_snr=True, timestep_spacing=',
     'timestep_spacing='),
    ("checkpoints/prediction", "prediction", "if said.prediction_type not in PREDICTION_TYPES:",
     "if False:"),
    ("checkpoints/scheduler_config", "prediction",
     "schedule.rescale_betas_zero_snr and schedule.prediction_type", "schedule.prediction_type"),
    ("checkpoints/ldm_yaml", "sidecars", 'or key == "<<" or key in mapping:', "or key in mapping:"),
    ("checkpoints/ldm_yaml", "sidecars", 'word = "eps" if word is None else word',
     'word = word or "eps"'),
    ("checkpoints/ldm_yaml", "sidecars", "    if not isinstance(params, dict):",
     "    if params is None:"),
    ("checkpoints/json_file", "spellings", "if type(value) not in types or not",
     "if not isinstance(value, types) or not"),
    ("checkpoints/diffusers_config", "spellings", '"dual_cross_attention": (False, None)',
     '"dual_cross_attention": (False,)'),
    ("checkpoints/names", "as_found", r'(?<![^.])(_orig_mod|module)\.', r'(_orig_mod|module)\.'),
    ("images", "image", "    return image if turn is None else image.transpose(turn)",
     "    return image"),
    ("images", "image", "(white / 255)", "(white / 256)"),
    ("images", "image", 'backdrop="white"', 'backdrop="black"'),
    ("images", "masks", 'backdrop="black"', 'backdrop="white"'),
    ("images", "pictures", "levels = 255 - levels", "pass"),
    ("image_files", "masks", "min(scale * key, 255)", "key"),
    ("image_files", "pictures", "(None if copy == data else copy)", "copy"),
    ("image_files", "pictures", '        image.info["exif"] = exif', "        pass"),
    ("errors", "masks requests_without_effect", "sys._getframe(1), 2", "sys._getframe(1), 1"),
    ("images", "image save", ".mul(255).round().byte()", ".mul(255).byte()"),
    ("images", "image", ">= 0.5).float()", ">= 0.49).float()"),
    ("files", "save", "if os.path.lexists(path) and not overwrite:",
     "if os.path.exists(path) and not overwrite:"),
    ("files", "save", "        os.fsync(file.fileno())\n", ""),
    ("files", "save", "        path.unlink(missing_ok=True)", "        pass"),
    ("app/infotext", "save", 'if settings.get("negative_prompt"):', "if False:"),
    ("app/infotext", "infotext", "lambda found: found[0].lower()", "lambda found: found[0]"),
    ("app/comfyui", "infotext", "if name == side or", "if name in (\"positive\", \"negative\") or"),
    ("app/comfyui", "infotext", "type(value) in types and _is_finite(value)",
     "type(value) in types"),
    ("app/streams", "streams", "    os.close(number)", "    pass"),
    ("app/streams", "streams", "            os.close(nowhere)", "            pass"),
    ("app/cli", "streams", "        streams.open_missing()", "        pass"),
    ("checkpoints/hub", "hub", 'or _weights(VAE_WEIGHTS["vae"], os.listdir(folder))', "or True"),
    ("checkpoints/hub", "hub", "    if kind != VAE:", "    if False:"),
    ("memory", "memory", "count * (1 + guided) * (", "count * ("),
    ("memory", "memory", "part = h * w if tile is None else", "part = h * w if True else"),
    ("models/tiles", "vae tiny", "tent(part.shape[2], x)[:, None] * tent(part.shape[3], x)",
     "tent(part.shape[3], x)[:, None] * tent(part.shape[2], x)"),
    ("models/tiles", "vae", "4 * (length - side) // (3 * side)", "(length - side) // side"),
]


def killed(file: str, tests: str, right: str, wrong: str, tree: Path) -> bool:
    """Whether the tests fail with the mutation in the copy; a tree is whole again afterwards."""
    path = tree / "minisd" / f"{file}.py"
    source = path.read_text()
    if source.count(right) != 1:
        raise SystemExit(f"{file}.py has {source.count(right)} times, not once: {right}")
    path.write_text(source.replace(right, wrong))
    try:
        names = [next((tree / "tests").rglob(f"test_{name}.py")) for name in tests.split()]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-xq", "-p",
                   "no:cacheprovider", *names]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode > 1:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 1
    finally:
        path.write_text(source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows with this in them")
    args = parser.parse_args()
    rows = [row for row in MUTANTS if args.only in " ".join(row)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", "__pycache__", "*.csv", "*.png")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for row in rows:
            dead = killed(*row, tree)
            file, _, right, wrong = row
            print("killed  " if dead else "SURVIVED", f"{file}: {right} -> {wrong}", flush=True)
            survivors += [] if dead else [row]
    print(f"{len(rows) - len(survivors)} of {len(rows)} killed")
    return min(len(survivors), 1)


if __name__ == "__main__":
    raise SystemExit(main())
