"""What the page of `minisd explain` is made of: texts, numbers and pictures as HTML.

A picture is a PNG inside the page. Nothing in a text can be markup, and nothing in it is hidden.
"""

import base64
import html
import io
import shlex
from collections.abc import Sequence

import numpy as np
from PIL import Image

from minisd.samplers.schedule import Level

THUMBNAIL = 192  # pixels: the largest side of a picture that is not the result
SPREAD = 3.0     # latents and contexts are grey from minus this, black, to this, white
DARKEST = 0.12   # how bright an image is where nothing lights it


def text(text: str) -> str:
    """A text as HTML. What cannot be seen, or turns the direction of writing, becomes its code."""
    return html.escape("".join(map(_seen, text)))


def _seen(c: str) -> str:
    return c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}"


def shell(word: str) -> str:
    """A word of a command line, as bash reads it, with such codes where it needs them."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(map(_seen, escaped))}'"


def head(number: int, title: str, function: str, path: str) -> str:
    return (f'<h2><span>{number}</span> {title}</h2>\n<p class="by">Computed by '
            f"<code>{function}</code> in <code>minisd/{path}</code></p>")


def table(rows: dict[str, np.ndarray]) -> str:
    """The shape, mean and standard deviation of each array, as torch computes it."""
    lines = "".join(
        f'<tr><th scope="row">{name}</th>'
        f'<td class="whole">{" &times; ".join(map(str, x.shape))}</td>'
        f"<td>mean {x.mean():.4f}, standard deviation {x.std(ddof=1):.4f}</td></tr>"
        for name, x in rows.items())
    return f"<table>{lines}</table>"


def img(image: Image.Image, alt: str, style: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    of = f' class="{style}"' if style else ""
    return f'<img{of} src="data:image/png;base64,{data}" alt="{text(alt)}">'


def figure(image: Image.Image, alt: str, caption: str, style: str = "") -> str:
    return f"<figure>{img(small(image), alt, style)}<figcaption>{caption}</figcaption></figure>"


def small(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def channels(latent: np.ndarray, name: str) -> str:
    """A grey picture of each channel of a latent (C, h, w)."""
    figures = "".join(
        figure(grey(channel), f"Channel {i} of {name}",
               f"channel {i}<br>mean {channel.mean():.2f}, sd {channel.std():.2f}", "cells")
        for i, channel in enumerate(latent))
    return f'<div class="grid small">{figures}</div>'


# --- from numbers to colours ---------------------------------------------------------------------


def grey(x: np.ndarray) -> Image.Image:
    return Image.fromarray(_levels((x / SPREAD + 1) / 2))


def warm(x: np.ndarray) -> Image.Image:
    """Numbers from 0 to 1 as black, red, yellow, white."""
    return Image.fromarray(_levels(np.stack([3 * x, 3 * x - 1, 3 * x - 2], axis=-1)))


def stretched(x: np.ndarray) -> np.ndarray:
    """The same from 0, the least, to 1, the most."""
    return (x - x.min()) / max(float(x.max() - x.min()), 1e-12)


def lit(image: Image.Image, light: np.ndarray) -> Image.Image:
    """The image, as bright as the light (h, w) is there, from 0 to 1."""
    image = small(image)
    spread = Image.fromarray(light.astype(np.float32)).resize(
        image.size, Image.Resampling.BICUBIC)
    bright = DARKEST + (1 - DARKEST) * np.asarray(spread).clip(0, 1)
    return Image.fromarray(_levels(np.asarray(image) / 255 * bright[..., None]))


def _levels(x: np.ndarray) -> np.ndarray:
    return (255 * x.clip(0, 1)).round().astype(np.uint8)


# --- the schedule --------------------------------------------------------------------------------

LEFT, RIGHT, TOP, BOTTOM = 30, 390, 14, 170


def curves(abars: Sequence[float], visited: Sequence[Level], circled: Sequence[Level]) -> str:
    """sqrt(abar) and sqrt(1 - abar) from the last timestep to 0, and the levels visited, as SVG."""
    last = len(abars) - 1

    def at(t: float, value: float) -> tuple[float, float]:
        return (round(LEFT + (RIGHT - LEFT) * (last - t) / last, 1),
                round(BOTTOM - (BOTTOM - TOP) * value, 1))

    def line(kind: str, levels: Sequence[tuple[float, float]]) -> str:
        points = " ".join(f"{x},{y}" for x, y in (at(t, value) for t, value in levels))
        return f'<polyline class="{kind}" points="{points}"/>'

    all_levels = [Level(t, abars[t]) for t in (*range(last, 0, -max(last // 100, 1)), 0)]
    noise = line("noise", [(level.t, level.sigma) for level in all_levels])
    signal = line("signal", [(level.t, level.alpha) for level in all_levels])
    ticks = "".join(f'<path class="visited" d="M{at(level.t, 0)[0]},{BOTTOM} v7"/>'
                    for level in visited)
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for level in circled
                   for x, y in (at(level.t, level.alpha), at(level.t, level.sigma)))
    labels = "".join(f'<text x="{at(t, 0)[0]}" y="192" text-anchor="middle">{t}</text>'
                     for t in (last, last * 3 // 4, last // 2, last // 4, 0))
    return f"""<svg viewBox="0 0 400 214" role="img" aria-labelledby="curves">
<title id="curves">As t falls to 0, the share of the image grows and that of noise falls</title>
<path class="axis" d="M{LEFT},{TOP} V{BOTTOM} H{RIGHT}"/>{ticks}{noise}{signal}{dots}
<text x="24" y="{TOP + 4}" text-anchor="end">1</text>
<text x="24" y="{BOTTOM}" text-anchor="end">0</text>{labels}
<text x="210" y="209" text-anchor="middle">timestep t</text>
<text class="noise" x="44" y="40">noise: &radic;(1 &minus; &alpha;&#772;)</text>
<text class="signal" x="44" y="128">image: &radic;&alpha;&#772;</text></svg>"""
