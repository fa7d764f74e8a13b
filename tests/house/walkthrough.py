"""Runs the blocks of minisd/WALKTHROUGH.md, fills in its numbers and draws its images.

    python -m tests.house.walkthrough    # writes the page's tables and the images beside it
"""

import re
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import minisd
from minisd.app.explain import WordMaps, decoded
from minisd.images import to_pil
from minisd.samplers import schedule
from tests.models.traps import TRAPS

PAGE = Path(__file__).parents[2] / "minisd" / "WALKTHROUGH.md"
IMAGES = PAGE.with_name("walkthrough")
# A block of Python, a row of a tensor, or a row of the schedule.
PART = re.compile(r"```python\n(?P<block>.*?)```|^\| `(?P<tensor>[^`]+)` \|[^|]*\|[^|]*\|[^|]*\|$"
                  r"|^\| (?P<t>\d+) \|[^|]*\|[^|]*\|[^|]*\|$", re.S | re.M)


def run(page: str) -> tuple[dict, list[str]]:
    """The names that the page's blocks make, and its rows as they should be."""
    names, rows = {}, []
    for part in PART.finditer(page):
        if part["block"]:
            exec(part["block"], names)
        elif part["tensor"]:
            rows.append(row(part["tensor"], eval(part["tensor"], names)))
        else:
            abar = names["abar"][int(part["t"])].item()
            rows.append(f"| {part['t']} | {abar:.4f} | {abar**0.5:.4f} | {(1 - abar)**0.5:.4f} |")
    return names, rows


def row(expression: str, x: Tensor) -> str:
    shape = " x ".join(map(str, x.shape))
    return f"| `{expression}` | {shape} | {x.float().mean():.4f} | {x.float().std():.4f} |"


def rows_of(page: str) -> list[str]:
    return [part[0] for part in PART.finditer(page) if not part["block"]]


def filled(page: str) -> tuple[dict, str]:
    """The names, and the page with the rows as they should be."""
    names, rows = run(page)
    remaining = iter(rows)
    page = PART.sub(lambda part: part[0] if part["block"] else next(remaining), page)
    return names, page.split("<!-- traps -->")[0] + "<!-- traps -->\n" + traps()


def traps() -> str:
    """A table of all lines in tests/models/traps.py, by file."""
    lines = ["| file | the line as it is | why |", "|---|---|---|"]
    for trap in TRAPS:
        path = trap.module.replace(".", "/")
        path += "/__init__.py" if (PAGE.parent / path).is_dir() else ".py"
        code = " ".join(trap.right.split())
        lines.append(f"| [{path}]({path}) | `{code}` | {trap.why} |")
    return "\n".join(lines) + "\n"


# --- the images ----------------------------------------------------------------------------------


def forward(names: dict) -> Image.Image:
    x, eps, abar = names["x"], names["x_T"], names["abar"]
    noised = [schedule.add_noise(x, eps, abar[t].item()) for t in (0, 200, 400, 600, 800, 999)]
    return strip([decoded(names["sd"], x_t) for x_t in noised])


def guidance(names: dict) -> Image.Image:
    return strip([names["sd"](names["prompt"], seed=0, guidance_scale=scale,
                              progress=False).images[0]
                  for scale in (0.0, 1.0, 3.0, 7.5, 15.0)])


def words(names: dict) -> Image.Image:
    return strip([mix(shares, names["image"]) for shares in shares_of_words(names)])


def steps(names: dict) -> Image.Image:
    some = [names["way"][i] for i in (0, 10, 20, 30, 40, 49)]
    return strip(*([decoded(names["sd"], z) for z in row] for row in zip(*some)))


def latent(names: dict) -> Image.Image:
    return strip([grey(channel) for channel in names["x"][0]] + to_pil(names["image"]))


def grey(x: Tensor) -> Image.Image:
    """A channel from its least value, black, to its greatest, white."""
    x = (x - x.min()) / (x.max() - x.min())
    return Image.fromarray((255 * x).byte().numpy()).resize((64, 64), Image.Resampling.NEAREST)


def mix(shares: Tensor, image: Tensor) -> Image.Image:
    """The image, light where the root of the shares (h, w) is large."""
    light = F.interpolate(shares[None, None].sqrt(), size=image.shape[2:], mode="bicubic")
    return to_pil(image * (0.1 + 1.8 * light.clamp(0, 0.5)))[0]


def shares_of_words(names: dict) -> list[Tensor]:
    """The mean share of each word of the prompt, and of the padding, at the lowest level (h, w)."""
    words = WordMaps()
    sd = minisd.load(device="cpu", ops=words.ops, fused=False)
    with ExitStack() as hooks:
        words.watch(sd.unet, hooks)
        sd(names["prompt"], seed=0, progress=False)
    (mean,) = map(torch.from_numpy, words.maps().values())                   # (77, h, w)
    end = 1 + len(names["pieces"])
    return [*mean[1:end], mean[end + 1 :].sum(0)]


def strip(*rows: list[Image.Image]) -> Image.Image:
    """Images side by side, in rows."""
    wide, high = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (wide + 2) - 2, len(rows) * (high + 2) - 2), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (wide + 2), y * (high + 2)))
    return sheet


def main() -> None:
    names, page = filled(PAGE.read_text())
    PAGE.write_text(page)
    IMAGES.mkdir(exist_ok=True)
    for figure in (forward, words, guidance, steps, latent):
        figure(names).save(IMAGES / f"{figure.__name__}.png")


if __name__ == "__main__":
    main()
