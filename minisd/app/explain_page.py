"""The page of `minisd explain`: a watched drawing as one HTML file that needs nothing else.

Each section is a stage of the computation: what it does, its numbers and pictures in this run, and
the function that computes it.
"""

from importlib import resources
from string import Template

import numpy as np

import minisd
from minisd.app import explain_html as html
from minisd.app.explain import Run, Token, over_all_sizes
from minisd.samplers import SAMPLERS

PAPERS = {
    "Rombach et al. 2022: latent diffusion, which Stable Diffusion is": "2112.10752",
    "Sennrich et al. 2016: byte pair encoding": "1508.07909",
    "Radford et al. 2021: CLIP, the text encoder": "2103.00020",
    "Ho et al. 2020: denoising diffusion": "2006.11239",
    "Song et al. 2020: DDIM, a sampler": "2010.02502",
    "Ho and Salimans 2022: classifier-free guidance": "2207.12598",
    "Hertz et al. 2022: Prompt-to-Prompt, maps of cross-attention": "2208.01626",
    "Tang et al. 2022: What the DAAM, the maps of a whole drawing": "2210.04885",
}


def page(run: Run, command: list[str]) -> str:
    """The HTML. ``command`` is the line that draws the same image again."""
    sections = {
        "Tokens": _tokens, "Context": _context, "Noise": _noise, "Schedule": _schedule,
        "Steps": _steps, "Guidance": _guidance, "Attention": _attention, "Image": _image,
    }
    links = "".join(f'<li><a href="#{name.lower()}">{i}. {name}</a></li>'
                    for i, name in enumerate(sections, 1))
    parts = "".join(f'<section id="{name.lower()}">\n{section(run, i)}\n</section>\n'
                    for i, (name, section) in enumerate(sections.items(), 1))
    prompt = run.settings["prompt"]
    title = html.text(prompt) or "The empty prompt"
    template = Template(resources.files("minisd.app").joinpath("explain.html").read_text("utf-8"))
    return template.substitute(
        title=title, heading=f"&ldquo;<bdi>{title}</bdi>&rdquo;" if prompt else title,
        image=html.img(run.image, f"The image that was drawn: {prompt}"), links=links,
        sections=parts + _again(run, command), version=minisd.__version__)


def _tokens(run: Run, number: int) -> str:
    length, used = run.contexts.shape[1], len(run.tokens)
    groups, word = [], None
    for token in run.tokens:
        if token.word is None or token.word != word:
            groups.append("")
        groups[-1] += _chip(token)
        word = token.word
    chips = "".join(f"<li>{group}</li>" for group in groups)
    cut = f" The prompt had {run.cut} more, which were left out." if run.cut else ""
    return f"""{html.head(number, "Words become numbers", "Tokenizer.__call__",
                          "text/tokenizer.py")}
<p>A network computes with numbers. So the prompt is cut into tokens, and each token has a number,
its id. A frequent word is one token. A rare one is made of several, which byte pair encoding finds;
<code>&lt;/w&gt;</code> marks the end of a word.</p>
<ul class="tokens">{chips}</ul>
<p>The text encoder always reads {length} tokens. Here {used} are taken, two of them by the markers
of start and end. The other {length - used} are padding.{cut}</p>"""


def _chip(token: Token) -> str:
    return (f'<span class="token"><b><bdi>{html.text(token.text)}</bdi></b>'
            f"<code>{html.text(token.symbol)}</code><i>{token.id}</i></span>")


def _context(run: Run, number: int) -> str:
    *negative, cond = run.contexts
    positions, width = cond.shape
    rows = {"the prompt": cond}
    if negative:
        rows[_without(run)] = negative[0]
    told = ("The second row is for guidance, which comes below." if negative
            else "This run has no guidance, which would need a second context.")
    return f"""{html.head(number, "Numbers get a meaning", "TextEncoder.forward",
                          "models/clip.py")}
<p>A transformer turns the {positions} ids into {positions} vectors of {width} numbers. The vector
of a token depends on the tokens before it, so that a heart in &ldquo;a red heart&rdquo; is another
one than in &ldquo;a broken heart&rdquo;. These vectors, the context, are all that the rest of the
model learns of the prompt. {told}</p>
{html.table(rows)}
<figure class="wide">{html.img(html.grey(cond), "The context of the prompt in grey", "cells")}
<figcaption>The context of the prompt: a row for each position, from the start marker to the last
padding, and a column for each number, from {-html.SPREAD:g} (black) to {html.SPREAD:g}
(white).</figcaption></figure>"""


def _noise(run: Run, number: int) -> str:
    channels, height, width = run.noise.shape
    f = run.plan.width // width
    return f"""{html.head(number, "It begins with noise", "Noise.draw", "conditioning/start.py")}
<p>The model does not work on pixels but on a latent, which is smaller: {channels} channels of
{width} by {height} cells, each for {f} by {f} pixels. At first it is noise, x<sub>T</sub>: random
numbers of mean 0 and standard deviation 1. The seed, {run.settings["seed"]}, says which, so the
same seed gives the same image again.</p>
{html.table({"x<sub>T</sub>": run.noise})}
{html.channels(run.noise, "the noise")}"""


def _schedule(run: Run, number: int) -> str:
    visited, total = run.plan.sampler.shown[:-1], len(run.plan.ladder.alphas_cumprod)
    span = f"from {visited[0].t:.4g} to {visited[-1].t:.4g}"
    return f"""{html.head(number, "How much noise there is when", "alphas_cumprod",
                          "samplers/schedule.py")}
<p>In training, latents x<sub>0</sub> of real images were mixed with noise &epsilon;, in {total}
strengths. They are numbered by the timestep t, from 0, almost no noise, to {total - 1}, almost
nothing else:</p>
<p class="formula">x<sub>t</sub> = &radic;&alpha;&#772;<sub>t</sub> x<sub>0</sub> +
&radic;(1 &minus; &alpha;&#772;<sub>t</sub>) &epsilon;</p>
<p>The curves are the two factors. A drawing goes from left to right, from noise to an image, and
not every timestep is needed: this run asks the UNet at {len(visited)}, {span}, which are the short
lines at the bottom. The sampler is {html.text(run.settings["sampler"])}, and its spacing
{html.text(run.settings["spacing"])}. The circles are what the next two sections show.</p>
{html.curves(run.plan.ladder.alphas_cumprod, visited, [each.level for each in run.moments])}"""


def _steps(run: Run, number: int) -> str:
    plan = run.plan
    step = SAMPLERS[plan.chosen.sampler].function
    predicts = ("v, a mixture of the noise and the image"
                if plan.config.schedule.prediction_type == "v_prediction" else "the noise in it")
    noisy = "".join(html.figure(
        each.x, f"The noisy latent at timestep {each.level.t:.4g}, decoded",
        f"<b>t {each.level.t:.4g}</b><br>image {each.level.alpha:.2f}, "
        f"noise {each.level.sigma:.2f}") for each in run.moments)
    predicted = "".join(html.figure(
        each.x0, f"The predicted image at timestep {each.level.t:.4g}",
        f"<b>t {each.level.t:.4g}</b><br>call {each.i + 1} of {plan.sampler.calls}")
        for each in run.moments)
    return f"""{html.head(number, "The noise is taken away", "Steps.__call__", "steps.py")}
<p>The UNet (<code>UNet.forward</code> in <code>minisd/models/unet.py</code>) gets the noisy latent
x<sub>t</sub>, the timestep and the context, and predicts {predicts}. From that follows what it
takes the finished latent to be, the predicted x<sub>0</sub> (<code>predicted_x0_eps</code>). The
sampler goes a small step towards it (<code>{step.__name__}</code> in
<code>{step.__module__.replace(".", "/")}.py</code>), and the UNet is asked again.</p>
<div class="scroll"><h3>What the UNet is shown: x<sub>t</sub></h3><div class="row">{noisy}</div>
<h3>What it takes the image to be: the predicted x<sub>0</sub></h3>
<div class="row">{predicted}</div></div>
<p>Both are decoded to pixels, as in section 8. At first there is almost nothing to see in
x<sub>t</sub>, and the prediction is a guess at what the prompt may mean. The less noise is left,
the more is settled, from the large shapes to the details.</p>"""


def _guidance(run: Run, number: int) -> str:
    head = html.head(number, "The prompt is made to count", "guided", "steps.py")
    scale, without = run.plan.guidance_scale, _without(run)
    if not run.plan.guided:
        why = ("the guidance scale is 1" if scale == 1.0 else "this model is told the guidance "
               f"scale, {scale:g}, as one more number, and does by itself what follows from it")
        return f"""{head}
<p>Usually the UNet is asked twice in each step, with the prompt and without it, and the difference
is made larger. This run has no guidance of that kind, because {why}: the UNet is asked once.</p>"""
    rows = "".join(f'<h3>t {each.level.t:.4g}</h3><div class="four">' + "".join((
        html.figure(each.halves[0], f"Prediction with {without}", f"with {without}"),
        html.figure(each.halves[1], "Prediction with the prompt", "with the prompt"),
        html.figure(html.warm(each.change / max(float(each.change.max()), 1e-12)),
                    "Where the two differ", "how far apart they are: "
                    f"{each.change.mean():.2f} on average, {each.change.max():.2f} at most",
                    "cells"),
        html.figure(each.x0, "Prediction with guidance", f"with guidance {scale:g}"),
    )) + "</div>" for each in run.moments if each.halves)
    return f"""{head}
<p>In each step the UNet is asked twice, with {without} and with the prompt. What the prompt changes
is taken {scale:g} times. This is classifier-free guidance:</p>
<p class="formula">prediction = uncond + {scale:g} (cond &minus; uncond)</p>
<p>Shown is the predicted x<sub>0</sub> that follows from each answer. The third picture has a
square for each cell of the latent, which is the brighter the more the prompt changes there (the
distance of the two over the channels). It matters most at first; later x<sub>t</sub> itself shows
what the image is to be, and the answer without the prompt is nearly the same.</p>
{rows}"""


def _without(run: Run) -> str:
    return "the negative prompt" if run.settings["negative_prompt"] else "an empty prompt"


def _attention(run: Run, number: int) -> str:
    shares = over_all_sizes(run.maps)                                        # (77, h, w)
    sizes = ", ".join(f"{w}x{h}" for h, w in run.maps)
    figures = "".join(_word_map(run, shares, *word) for word in run.words)
    shown = (f'<div class="grid">{figures}</div>' if run.words
             else "<p>This prompt has no words, so there are no maps.</p>")
    return f"""{html.head(number, "Where each word is read", "Attention.forward",
                          "models/transformer.py")}
<p>This is how the prompt gets into the image: in the UNet's cross-attention, each place reads from
the {len(shares)} vectors of the context. It takes from each the share
<span class="whole">softmax(q k<sup>T</sup> / &radic;d)</span>, and the shares of a place add up
to 1. The maps below are the mean over all heads, layers and steps, with the prompt, as in
<a href="https://arxiv.org/abs/2208.01626">Prompt-to-Prompt</a> and
<a href="https://arxiv.org/abs/2210.04885">DAAM</a>. This model reads the prompt at these sizes:
{sizes}.</p>
{shown}
<p>The image is bright where the word is read most, and dark where it is read least; the shares are
written below, and under them are the maps of each size. They show where a word is read, which need
not be where its thing is drawn, because the vector of a word knows the words before it, too.</p>
<h3>How much is read from what</h3>
{_bars(run, shares)}
<p>The markers and the padding have vectors like the words. That of the start marker is the same for
all prompts, so it tells nothing. Those of the end marker and the padding know the whole prompt,
because all words are before them.</p>"""


def _word_map(run: Run, shares: np.ndarray, word: str, positions: list[int]) -> str:
    share = shares[positions].sum(axis=0)                                    # (h, w)
    sizes = "".join(
        html.img(html.warm(html.stretched(each[positions].sum(axis=0))),
                 f"How much {word} is read at {w}x{h} places", "cells")
        for (h, w), each in run.maps.items())
    return f"""<figure>
{html.img(html.lit(run.image, html.stretched(share)), f"Where {word} is read")}
<figcaption><b><bdi>{html.text(word)}</bdi></b><br>
{share.min():.1%} to {share.max():.1%}</figcaption>
<div class="sizes">{sizes}</div></figure>"""


def _bars(run: Run, shares: np.ndarray) -> str:
    mean, used = shares.mean(axis=(1, 2)), len(run.tokens)
    rows = [("<i>start marker</i>", mean[0]),
            *((f"<bdi>{html.text(word)}</bdi>", mean[where].sum()) for word, where in run.words),
            ("<i>end marker</i>", mean[used - 1]), ("<i>padding</i>", mean[used:].sum())]
    most = max(share for _, share in rows)
    lines = "".join(
        f'<tr><th scope="row">{name}</th><td>{share:.1%}</td><td><span class="bar" '
        f'style="width:{100 * share / most:.1f}%"></span></td></tr>' for name, share in rows)
    return f'<table class="bars">{lines}</table>'


def _image(run: Run, number: int) -> str:
    channels, height, width = run.latent.shape
    plan = run.plan
    return f"""{html.head(number, "The latent becomes an image", "VAE.decode", "models/vae.py")}
<p>After the last step the latent is finished: {channels} numbers for each of {width} by {height}
cells. The decoder of the variational autoencoder has learned to make images of such latents. It
turns this one into {plan.width} by {plan.height} pixels of red, green and blue.</p>
{html.table({"the latent": run.latent})}
{html.channels(run.latent, "the finished latent")}
<figure class="wide result">{html.img(run.image, "The finished image")}
<figcaption>The finished image, {plan.width} by {plan.height} pixels.</figcaption></figure>"""


def _again(run: Run, command: list[str]) -> str:
    s = run.settings
    rows = {
        "prompt": s["prompt"], "negative prompt": s["negative_prompt"], "seed": s["seed"],
        "size": f"{s['width']}x{s['height']}", "steps": s["num_inference_steps"],
        "guidance": f"{s['guidance_scale']:g}", "sampler": f"{s['sampler']}, {s['spacing']}",
        "model": f"{s['model']}, {s['prediction_type']}",
        "computed on": f"{run.where}, in {run.seconds:.1f} s with these pictures",
    }
    cells = "".join(f'<tr><th scope="row">{name}</th><td><bdi>{html.text(str(value))}</bdi></td>'
                    "</tr>" for name, value in rows.items() if value != "")
    papers = "".join(f'<li><a href="https://arxiv.org/abs/{number}">{name}</a></li>'
                     for name, number in PAPERS.items())
    return f"""<section id="again">
<h2>Draw it again</h2>
<p>This command draws the same image:</p>
<pre><code>{html.text(" ".join(map(html.shell, command)))}</code></pre>
<table>{cells}</table>
<h3>Read on</h3>
<ul>{papers}</ul>
</section>"""
