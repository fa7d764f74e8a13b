"""The page of `minisd explain`: a watched drawing as one HTML file that needs nothing else.

Each section has a stage of the computation: what it is, its numbers and pictures in this run, and
the function that computes it.
"""

import base64
import html
import io
import shlex
from importlib import resources

import numpy as np
from PIL import Image

import minisd
from minisd.app.explain import Run, Token, over_all_sizes
from minisd.samplers import SAMPLERS

THUMBNAIL = 192   # pixels: the largest side of a picture on the way
SPREAD = 3.0      # latents and contexts are grey from minus this, black, to this, white
PAPERS = {
    "Rombach et al. 2022, latent diffusion: Stable Diffusion itself": "2112.10752",
    "Sennrich et al. 2016, byte pair encoding": "1508.07909",
    "Radford et al. 2021, CLIP": "2103.00020",
    "Ho et al. 2020, denoising diffusion": "2006.11239",
    "Song et al. 2020, DDIM": "2010.02502",
    "Salimans and Ho 2022, the prediction of v": "2202.00512",
    "Ho and Salimans 2022, classifier-free guidance": "2207.12598",
    "Hertz et al. 2022, Prompt-to-Prompt": "2208.01626",
    "Tang et al. 2022, What the DAAM": "2210.04885",
}


def page(run: Run, command: list[str]) -> str:
    """The HTML. ``command`` is the line that draws the same image again."""
    sections = {
        "Tokens": _tokens, "Context": _context, "Noise": _noise, "Schedule": _schedule,
        "Steps": _steps, "Guidance": _guidance, "Attention": _attention, "Image": _image,
    }
    links = "".join(f'<li><a href="#{name.lower()}">{i}. {name}</a></li>'
                    for i, name in enumerate(sections, 1))
    parts = "".join(f'<section id="{name.lower()}">{section(run, i)}</section>\n'
                    for i, (name, section) in enumerate(sections.items(), 1))
    prompt = run.settings["prompt"]
    style = resources.files("minisd.app").joinpath("explain.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(prompt) or 'An empty prompt'}: how Stable Diffusion drew it</title>
<style>
{style}</style>
</head>
<body>
<header>
{_img(run.image, f"The image drawn from the prompt: {prompt}")}
<div>
<h1>{_quoted(prompt) if prompt else 'An empty prompt'}</h1>
<p class="lead">How Stable Diffusion made this image out of noise, stage by stage. Every number and
every picture on this page was taken from the very run that drew it.</p>
<nav aria-label="Stages"><ol>{links}</ol></nav>
</div>
</header>
<main>
{parts}{_again(run, command)}
</main>
</body>
</html>
"""


# --- the sections --------------------------------------------------------------------------------


def _tokens(run: Run, number: int) -> str:
    length, used = run.contexts.shape[1], len(run.tokens)
    chips, word = "", None
    for i, token in enumerate(run.tokens):
        joined = token.word is not None and token.word == word
        chips += "" if joined else "</li><li>" if chips else "<li>"
        chips += _chip(token, "start" if i == 0 else "end")
        word = token.word
    cut = f" {run.cut} more tokens of the prompt did not fit and were left out." if run.cut else ""
    return f"""{_head(number, "Words become numbers", "Tokenizer.__call__", "text/tokenizer.py")}
<p>A network computes with numbers. Byte pair encoding cuts the prompt, in small letters, into
pieces that are frequent in ordinary text, and each piece has a fixed number, its id. A frequent word is one piece, a
rare one several; <code>&lt;/w&gt;</code> marks the end of a word.</p>
<ul class="tokens">{chips}</li></ul>
<p>The text encoder always reads {length} positions: {used} are taken here, with a marker for the
start and one for the end, and {length - used} are padding.{cut}</p>"""


def _chip(token: Token, marker: str) -> str:
    text = marker if token.word is None and not token.text else token.text
    return (f'<span class="token"><b><bdi>{_text(text)}</bdi></b>'
            f"<code>{_text(token.symbol)}</code><i>{token.id}</i></span>")


def _context(run: Run, number: int) -> str:
    *negative, cond = run.contexts
    rows = [("the prompt", cond)]
    if negative:
        said = run.settings["negative_prompt"]
        rows.append(("the negative prompt" if said else "the empty prompt", negative[0]))
    cells = "".join(f"<tr><th>{name}</th><td>{_shape(x)}</td><td>{_stats(x)}</td></tr>"
                    for name, x in rows)
    positions, width = cond.shape
    told = ("The second row is for guidance, which comes below."
            if negative else "This run has no guidance, so it needs no second prompt.")
    return f"""{_head(number, "Numbers become meaning", "TextEncoder.forward", "models/clip.py")}
<p>A transformer turns the {positions} ids into {positions} vectors of {width} numbers each. The
vector of a token depends on the tokens before it, so that "red" and "heart" become "a red heart".
These vectors, the context, are all that the rest of the model is told of the prompt. {told}</p>
<table>{cells}</table>
<figure class="wide">{_img(_grey(cond), f"The context as a grey image of {positions} rows",
"cells")}<figcaption>The context of the prompt: a row for each position, from the start marker
down to the last padding, and a column for each number, from {-SPREAD:g} (black) to {SPREAD:g}
(white).</figcaption></figure>"""


def _noise(run: Run, number: int) -> str:
    channels, height, width = run.noise.shape
    f = run.plan.width // width
    return f"""{_head(number, "It begins with noise", "Noise.draw", "conditioning/start.py")}
<p>The model does not paint pixels. It works on a latent: {channels} channels of {width} by {height}
cells, of which each stands for {f} by {f} pixels. At first it is pure noise,
x<sub>T</sub>: random numbers of mean 0 and standard deviation 1. The seed, here
{run.settings["seed"]}, decides which, so the same seed gives the same image.</p>
<table><tr><th>x<sub>T</sub></th><td>{_shape(run.noise)}</td><td>{_stats(run.noise)}</td></tr></table>
{_channels(run.noise, "x_T")}"""


def _schedule(run: Run, number: int) -> str:
    levels = run.plan.sampler.shown[:-1]
    settings, total = run.settings, len(run.plan.ladder.alphas_cumprod)
    visited = f"{levels[0].t:g}" + (f" to {levels[-1].t:g}" if len(levels) > 1 else "")
    return f"""{_head(number, "How much noise there is when", "alphas_cumprod",
                      "samplers/schedule.py")}
<p>The model was trained on latents x<sub>0</sub> of real images, mixed with noise &epsilon; in
{total} strengths, the timesteps t = 0 to {total - 1}:</p>
<p class="formula">x<sub>t</sub> = &radic;<span>a&#772;</span><sub>t</sub> x<sub>0</sub> +
&radic;(1 &minus; <span>a&#772;</span><sub>t</sub>) &epsilon;</p>
<p>The curves are the two factors. To draw is to go from left to right, from noise to image. This
run stops at {len(levels)} of the timesteps, t = {visited}, which are the short lines at the
bottom: the sampler is {_text(settings["sampler"])}, with {_text(settings["spacing"])} spacing. The
circles are what the next section shows.</p>
{_curves(run)}"""


def _steps(run: Run, number: int) -> str:
    plan = run.plan
    function = SAMPLERS[plan.chosen.sampler].function
    what = "a mixture of both called v" if plan.config.schedule.prediction_type == "v_prediction" \
        else "the noise in it"
    noisy = "".join(_figure(
        moment.x, f"The noisy latent at timestep {moment.level.t:g}, decoded",
        f"<b>t {moment.level.t:.4g}</b><br>image {moment.level.alpha:.2f}, "
        f"noise {moment.level.sigma:.2f}") for moment in run.moments)
    predicted = "".join(_figure(
        moment.x0, f"The predicted image at timestep {moment.level.t:g}",
        f"call {moment.i + 1} of {plan.sampler.calls}") for moment in run.moments)
    return f"""{_head(number, "The noise is taken away", "Steps.__call__", "steps.py")}
<p>In each step the UNet gets the noisy latent x<sub>t</sub>, the timestep and the context, and
predicts {what}. So one knows what it takes the finished latent to be, the predicted x<sub>0</sub>
(<code>predicted_x0_eps</code>). The sampler moves x<sub>t</sub> a small way towards it
(<code>{function.__name__}</code> in <code>{_path(function.__module__)}</code>), and asks again.</p>
<div class="scroll"><h3>What the UNet sees: x<sub>t</sub></h3><div class="row">{noisy}</div>
<h3>What it takes the image to be: the predicted x<sub>0</sub></h3>
<div class="row">{predicted}</div></div>
<p>Both rows are decoded to pixels, as in the last section. At first, with almost nothing to see,
the best guess is a blur: something like the mean of all images that fit the prompt. The less noise
is left, the fewer images fit, and the sharper the guess.</p>"""


def _guidance(run: Run, number: int) -> str:
    head = _head(number, "The prompt is made to count", "guided", "steps.py")
    scale = run.plan.guidance_scale
    if not run.plan.guided:
        why = ("its guidance scale is 1" if scale == 1.0 else
               f"this model was trained to be told the guidance scale, {scale:g}, as a number")
        return f"""{head}
<p>Usually the UNet is asked twice in each step, with the prompt and without, and the difference is
made larger. This run has no guidance, because {why}: the UNet is asked once.</p>"""
    without = "the negative prompt" if run.settings["negative_prompt"] else "an empty prompt"
    most = max(float(moment.change.max()) for moment in run.moments) or 1.0
    rows = "".join(f'<h3>t {moment.level.t:.4g}</h3><div class="row">' + "".join((
        _figure(moment.halves[0], f"Prediction with {without}", f"with {without}"),
        _figure(moment.halves[1], "Prediction with the prompt", "with the prompt"),
        _figure(_warm(moment.change / most), "Where the two differ",
                f"where they differ: {moment.change.mean():.3f} on average", "cells"),
        _figure(moment.x0, "Prediction with guidance", f"with guidance {scale:g}"),
    )) + "</div>" for moment in run.moments[::2])
    return f"""{head}
<p>In each step the UNet is asked twice: with {without}, and with the prompt. What the prompt
changes is taken {scale:g} times (classifier-free guidance):</p>
<p class="formula">uncond + {scale:g} (cond &minus; uncond)</p>
<p>The pictures are the predicted x<sub>0</sub> of each answer, decoded. Those where they differ
have a square for each cell of the latent: black where the prompt changes nothing, and the brighter
the more it does (the distance over the channels; white is {most:.3f}).</p>
<div class="scroll">{rows}</div>"""


def _attention(run: Run, number: int) -> str:
    head = _head(number, "Where each word is looked at", "Attention.forward",
                 "models/transformer.py")
    shares = over_all_sizes(run.maps)                                        # (77, h, w)
    sizes = " and ".join(f"{w} by {h}" for h, w in run.maps)
    words = _words(run.tokens)
    figures = "".join(_word_map(run, shares, text, positions) for text, positions in words)
    shown = f'<div class="grid">{figures}</div>' if words else (
        "<p>This prompt has no word.</p>")
    return f"""{head}
<p>In the UNet's cross-attention each place of the image reads from the 77 vectors of the context,
from each as much as softmax(q k<sup>T</sup> / &radic;d) says: shares that add up to 1. Here they
are averaged over all heads, layers and steps, for the half with the prompt, as in
<a href="https://arxiv.org/abs/2208.01626">Prompt-to-Prompt</a> and
<a href="https://arxiv.org/abs/2210.04885">DAAM</a>. This model has cross-attention at {sizes}
places.</p>
{shown}
<p>The image is lit where the word is read most, and dark where least, for each word by itself; below
it are the numbers, and the map of each size as it is. A map says where a word is read, which need
not be where its thing is drawn: the vector of a word also knows the words before it.</p>
<h3>Who is read how much</h3>
{_bars(run, shares, words)}
<p>The markers and the padding have vectors too. Much of what is read usually comes from them,
above all from the start marker, which knows nothing of the prompt: a place to look at where no word
is needed.</p>"""


def _words(tokens: list[Token]) -> list[tuple[str, list[int]]]:
    """The words of the prompt, each with its positions."""
    found: dict[int | None, list[int]] = {}
    for position, token in enumerate(tokens[1:-1], 1):
        found.setdefault(token.word, []).append(position)
    return [("".join(dict.fromkeys(tokens[i].text for i in where)), where)
            for where in found.values()]


def _word_map(run: Run, shares: np.ndarray, text: str, positions: list[int]) -> str:
    share = shares[positions].sum(axis=0)
    low, high = float(share.min()), float(share.max())
    levels = "".join(_img(_warm(_stretched(each[positions].sum(axis=0))),
                          f"Attention to {text} at {w} by {h} places", "cells")
                     for (h, w), each in run.maps.items())
    return f"""<figure>{_img(_lit(run.image, _stretched(share)), f"Where {text} is looked at")}
<figcaption><b><bdi>{_text(text)}</bdi></b><br>{low:.1%} to {high:.1%}</figcaption>
<div class="pair">{levels}</div></figure>"""


def _bars(run: Run, shares: np.ndarray, words: list[tuple[str, list[int]]]) -> str:
    mean, used = shares.mean(axis=(1, 2)), len(run.tokens)
    rows = [("<i>start marker</i>", mean[0]),
            *((f"<bdi>{_text(text)}</bdi>", mean[where].sum()) for text, where in words),
            ("<i>end marker</i>", mean[used - 1]), ("<i>padding</i>", mean[used:].sum())]
    most = max(value for _, value in rows)
    return '<table class="bars">' + "".join(
        f'<tr><th>{name}</th><td>{value:.1%}</td><td><span class="bar" '
        f'style="width:{100 * value / most:.1f}%"></span></td></tr>' for name, value in rows
    ) + "</table>"


def _image(run: Run, number: int) -> str:
    channels, height, width = run.latent.shape
    plan = run.plan
    return f"""{_head(number, "The latent becomes an image", "VAE.decode", "models/vae.py")}
<p>After the last step the latent holds the image, {channels} numbers for each of its {width} by
{height} cells. The decoder of the variational autoencoder, which learned to get images back from
such numbers, turns it into {plan.width} by {plan.height} pixels of red, green and blue.</p>
<table><tr><th>latent</th><td>{_shape(run.latent)}</td><td>{_stats(run.latent)}</td></tr></table>
{_channels(run.latent, "the final latent")}
<figure class="wide" style="max-width:32rem">{_img(run.image, "The finished image")}<figcaption>The
finished image, {plan.width} by {plan.height} pixels.</figcaption></figure>"""


def _again(run: Run, command: list[str]) -> str:
    s = run.settings
    rows = {
        "prompt": s["prompt"], "negative prompt": s["negative_prompt"], "seed": s["seed"],
        "size": f"{s['width']}x{s['height']}", "steps": s["num_inference_steps"],
        "guidance": f"{s['guidance_scale']:g}", "sampler": s["sampler"], "spacing": s["spacing"],
        "model": s["model"], "prediction": s["prediction_type"],
        "computed on": f"{run.where}, {run.seconds:.1f} s with these pictures",
    }
    cells = "".join(f"<tr><th>{name}</th><td><bdi>{_text(str(value))}</bdi></td></tr>"
                    for name, value in rows.items())
    papers = "".join(f'<li><a href="https://arxiv.org/abs/{number}">{_text(name)}</a></li>'
                     for name, number in PAPERS.items())
    return f"""<section id="again"><h2>Draw it again</h2>
<p>This line draws the same image:</p>
<pre><code>{_text(" ".join(map(_shell, command)))}</code></pre>
<table>{cells}</table>
<h3>The papers</h3><ul>{papers}</ul></section>
<footer><p>Made by minisd {minisd.__version__}, Stable Diffusion rewritten to be read: the functions
named on this page are a few lines each.</p></footer>"""


# --- the parts of a page -------------------------------------------------------------------------


def _text(text: str) -> str:
    """A text as HTML. What cannot be seen, or turns the direction of writing, becomes its code."""
    return html.escape("".join(map(_seen, text)))


def _seen(c: str) -> str:
    return c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}"


def _quoted(text: str) -> str:
    return f"&ldquo;<bdi>{_text(text)}</bdi>&rdquo;"


def _shell(word: str) -> str:
    """A word of a command line, for bash, with such codes where it needs them."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(map(_seen, escaped))}'"


def _head(number: int, title: str, function: str, path: str) -> str:
    return (f"<h2><span>{number}</span> {title}</h2>\n<p class=\"by\">Computed by "
            f"<code>{function}</code> in <code>minisd/{path}</code></p>")


def _path(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _shape(x: np.ndarray) -> str:
    return " &times; ".join(map(str, x.shape))


def _stats(x: np.ndarray) -> str:
    return f"mean {x.mean():.4f}, standard deviation {x.std():.4f}"


def _img(image: Image.Image, alt: str, style: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    of = f' class="{style}"' if style else ""
    return (f'<img{of} src="data:image/png;base64,{data}" width="{image.width}" '
            f'height="{image.height}" alt="{_text(alt)}">')


def _figure(image: Image.Image, alt: str, caption: str, style: str = "") -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return f"<figure>{_img(image, alt, style)}<figcaption>{caption}</figcaption></figure>"


def _channels(latent: np.ndarray, name: str) -> str:
    figures = "".join(
        _figure(_grey(channel), f"Channel {i} of {name}",
                f"channel {i}<br>mean {channel.mean():.2f}, sd {channel.std():.2f}", "cells")
        for i, channel in enumerate(latent))
    return f'<div class="grid small">{figures}</div><p></p>'


def _levels(values: np.ndarray) -> np.ndarray:
    return (255 * values.clip(0, 1)).round().astype(np.uint8)


def _grey(x: np.ndarray) -> Image.Image:
    return Image.fromarray(_levels((x / SPREAD + 1) / 2))


def _warm(share: np.ndarray) -> Image.Image:
    """Numbers from 0 to 1 as black, red, yellow, white."""
    return Image.fromarray(_levels(np.stack([3 * share, 3 * share - 1, 3 * share - 2], axis=-1)))


def _stretched(x: np.ndarray) -> np.ndarray:
    """From 0, the least, to 1, the most."""
    return (x - x.min()) / max(float(x.max() - x.min()), 1e-12)


def _lit(image: Image.Image, share: np.ndarray) -> Image.Image:
    """The image, dark where the share is 0 and as it is where it is 1."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    light = Image.fromarray(share.astype(np.float32)).resize(
        image.size, Image.Resampling.BICUBIC)
    bright = 0.12 + 0.88 * np.asarray(light).clip(0, 1)
    return Image.fromarray(_levels(np.asarray(image) / 255 * bright[..., None]))


def _curves(run: Run) -> str:
    """The two factors over the timesteps, and which ones are visited, as SVG."""
    abars = np.asarray(run.plan.ladder.alphas_cumprod)
    last = len(abars) - 1
    left, right, top, bottom = 30, 390, 14, 170

    def at(t: float, value: float) -> str:
        x = left + (right - left) * (last - t) / last
        return f"{x:.1f},{bottom - (bottom - top) * value:.1f}"

    ts = np.linspace(last, 0, 101).round().astype(int)
    signal = " ".join(at(t, abars[t] ** 0.5) for t in ts)
    noise = " ".join(at(t, (1 - abars[t]) ** 0.5) for t in ts)
    ticks = "".join(f'<path class="visited" d="M{at(level.t, 0)} l0,7"/>'
                    for level in run.plan.sampler.shown[:-1])
    dots = "".join('<circle cx="{}" cy="{}" r="3"/>'.format(*at(m.level.t, value).split(","))
                   for m in run.moments for value in (m.level.alpha, m.level.sigma))
    labels = "".join(f'<text x="{at(t, 0).split(",")[0]}" y="192" text-anchor="middle">{t}</text>'
                     for t in (last, last * 3 // 4, last // 2, last // 4, 0))
    return f"""<svg viewBox="0 0 400 214" role="img" aria-labelledby="curves">
<title id="curves">The share of the image grows and that of the noise falls as t goes to 0</title>
<path class="axis" d="M{left},{top} V{bottom} H{right}"/>{ticks}
<polyline class="noise" points="{noise}"/><polyline class="signal" points="{signal}"/>{dots}
<text x="24" y="{top + 4}" text-anchor="end">1</text>
<text x="24" y="{bottom}" text-anchor="end">0</text>{labels}
<text x="210" y="209" text-anchor="middle">timestep t</text>
<text class="noise" x="44" y="30">noise, &radic;(1 &minus; a&#772;)</text>
<text class="signal" x="384" y="34" text-anchor="end">image, &radic;a&#772;</text></svg>"""
