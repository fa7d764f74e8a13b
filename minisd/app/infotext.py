"""The text that AUTOMATIC1111's web UI began and other Stable Diffusion programs read and write.

    a red heart, (shiny:1.2)
    Negative prompt: blur
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: "a, b", Version: v1.9

A PNG has it under "parameters". Nothing in the prompts is escaped, so a line of a prompt can look
like one of the other two. Source: create_infotext and parse_generation_parameters of
https://github.com/AUTOMATIC1111/stable-diffusion-webui.
"""

import json
import re
from pathlib import PurePath

NEGATIVE = "Negative prompt:"
# Where readers cut, anywhere in a line or at its start. CLIP reads small letters only, so that in
# small letters a prompt with these words is the same prompt, and nobody cuts it.
MARKERS = re.compile(rf"{NEGATIVE}|^Steps: ", re.MULTILINE)
# A value with a comma, a colon or a line break is in quotes, as JSON; one is in braces. A key is
# short: without the limit a long line without colons would take the square of its length.
FIELD = re.compile(
    r'(\w[\w /-]{0,59}): *("(?:[^"\\]|\\.)*"(?= *,| *$)|\{[^{}]*\}(?= *,| *$)|[^,]*)')
MAX_TEXT = 8 * 2**20
FEWEST = 3  # fields of a last line that is no part of a prompt
NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")
NUMBERS = {
    "Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed",
    "Denoising strength": "strength", "Eta DDIM": "eta", "Eta": "eta",
}
NAMES = {"Sampler": "sampler", "Spacing": "spacing", "Model": "model"}


def write(settings: dict) -> str:
    """The text of an image that was made with these settings."""
    size = settings.get("width"), settings.get("height")
    version = settings.get("version")
    from minisd.samplers import web_ui_name  # here, because a usage error need not wait for torch

    sampler, spacing = settings.get("sampler", "ddim"), settings.get("spacing", "leading")
    eta = settings.get("eta")
    name = "DDIM" if (sampler, spacing) == ("ddim", "leading") else web_ui_name(
        sampler, spacing, eta)
    fields = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": name or sampler,
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": None if None in size else f"{size[0]}x{size[1]}",
        "Model": PurePath(settings.get("model") or "").name.removesuffix(".safetensors"),
        "Denoising strength": settings.get("strength"),
        "Eta DDIM": eta if sampler == "ddim" else None,
        "Eta": None if name or sampler == "ddim" else eta,
        "Spacing": None if name else spacing,
        "Version": version and f"minisd {version}",
    }
    lines = [_unmarked(settings.get("prompt") or "")]
    if settings.get("negative_prompt"):
        lines.append(f"{NEGATIVE} {_unmarked(settings['negative_prompt'])}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v not in (None, "")))
    return "\n".join(lines).encode(errors="backslashreplace").decode().strip()


def read(text: str) -> dict:
    """The settings in a text, under our names; "others" has the fields that we have no name for.

    ValueError for what is no such text.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"its parameters have {len(text):,} characters; {MAX_TEXT:,} are read")
    _check_no_json(text)
    *lines, last = text.strip().split("\n")
    fields = {key.strip(): _unquoted(value.strip()) for key, value in FIELD.findall(last)}
    if len(fields) < FEWEST:
        lines, fields = [*lines, last], {}
    prompt, negative = _prompts(lines)
    settings: dict = {
        "program": _program(fields), "prompt": prompt, "negative_prompt": negative,
        **{ours: _number(fields.pop(key)) for key, ours in NUMBERS.items() if key in fields},
        **{ours: fields.pop(key) for key, ours in NAMES.items() if key in fields},
    }
    if size := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", fields.get("Size", "")):
        settings |= {"width": int(size[1]), "height": int(size[2])}
        del fields["Size"]
    return settings | ({"others": fields} if fields else {})


def _unmarked(prompt: str) -> str:
    return MARKERS.sub(lambda found: found[0].lower(), prompt)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def _unquoted(value: str) -> str:
    try:
        text = json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value
    return text if isinstance(text, str) else value


def _prompts(lines: list[str]) -> tuple[str, str]:
    """The prompt, and what follows in the first line that begins so."""
    lines = [line.strip() for line in lines]
    starts = (i for i, line in enumerate(lines) if line.startswith(NEGATIVE))
    start = next(starts, len(lines))
    negative = [line.removeprefix(NEGATIVE).strip() for line in lines[start:]]
    return "\n".join(lines[:start]).strip(), "\n".join(negative).strip()


def _number(text: str) -> str | int | float:
    """The number that a text is; the text itself where it is none, or an endless one."""
    found = NUMBER.fullmatch(text)
    if not found:
        return text
    return float(text) if found[1] else int(text)


def _program(fields: dict[str, str]) -> str:
    """Which program wrote the fields. Most say only "Version", the first one with a number."""
    version = fields.get("Version", "")
    if "App" in fields:
        return f"{fields['App']} {version}".strip()
    if re.fullmatch(r"v?\d[\w.+-]*", version):
        return f"AUTOMATIC1111's web UI {version}"
    if re.fullmatch(r"f\d[\w.+-]*", version):
        return f"Forge {version}"
    return version or "unknown, in the form of AUTOMATIC1111's web UI"


def _check_no_json(text: str) -> None:
    """Fooocus and SwarmUI write objects under the same name. A prompt may begin with { too."""
    try:
        other = text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        other = False
    if other:
        raise ValueError("its parameters are JSON, of a program that minisd does not read")
