"""What minisd/WALKTHROUGH.md says is so: its numbers and images, and the answers to its exercises.
"""

import re
from math import pi

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import walkthrough
from PIL import Image

import minisd
from minisd.models.ops import split_heads
from minisd.models.unet import timestep_embedding
from minisd.samplers import ddim, schedule
from minisd.steps import Steps, first_state

TEXT = walkthrough.PAGE.read_text()


@pytest.fixture(scope="module")
def made():
    """The names and the page after all blocks have run."""
    with torch.no_grad():  # leaving it undoes what the first block sets
        return walkthrough.filled(TEXT)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def here(made):
    """The names as attributes."""
    return type("Names", (), {name: staticmethod(value) if callable(value) else value
                              for name, value in made[0].items() if not name.startswith("__")})


def numbers(row: str) -> list[float]:
    return [float(n) for n in re.findall(r"(?<= )-?\d+\.\d+(?= )", row)]


def test_every_number(made):
    """To three digits, or 0.003 of what is about 1: other processors add in another order."""
    said, found = (walkthrough.rows_of(page) for page in (TEXT, made[1]))
    assert len(said) == len(found) >= 40
    for a, b in zip(said, found):
        assert a.split("|")[:3] == b.split("|")[:3]  # the expression and the shape
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-3, abs=3e-3)


def test_the_constants_are_those_of_the_traps(made):
    assert TEXT.split("<!-- traps -->")[1] == made[1].split("<!-- traps -->")[1]


@pytest.mark.parametrize("name", ["forward", "words", "steps", "latent"])
def test_the_images(name, made):
    shipped = Image.open(walkthrough.IMAGES / f"{name}.png")
    found = np.asarray(getattr(walkthrough, name)(made[0]), dtype=float)
    assert np.abs(np.asarray(shipped, dtype=float) - found).mean() < 1


def test_it_draws_the_image_of_a_call(here):
    image = minisd.load(device="cpu")(here.prompt, seed=0, output_type="pt", progress=False).images
    assert (image - here.image).abs().max() < 2 / 255


@pytest.mark.filterwarnings("ignore:this model was not taught")
def test_exercise_1(here):
    """Case and white space do not count, a comma is a piece, and "redheart" is no known word."""
    ids = here.sd.tokenizer(["a red heart", "A  RED heart", "a red, heart", "a redheart"])
    assert [torch.equal(ids[0], row) for row in ids] == [True, True, False, False]


def test_exercise_2(here):
    swapped = here.prompt.replace("red", "-").replace("blue", "red").replace("-", "blue")
    ids = here.sd.tokenizer([here.prompt, swapped])
    bags = here.embeddings.token_embedding(ids).sum(1)
    assert torch.allclose(*bags, atol=1e-5)
    assert (here.sd.text_encoder(ids).sum(1).diff(dim=0)).abs().max() > 100


def test_exercise_3(here):
    """Those from "blue" on, position 6: the encoder is causal, so the others do not see it."""
    green = here.sd.text_encoder(here.sd.tokenizer([here.prompt.replace("blue", "green")]))
    changed = (green[0] - here.context[1]).abs().amax(1) > 1e-4
    assert changed.tolist() == [False] * 6 + [True] * 71


def test_exercise_4(here):
    """The numbers are laid out row by row, and a row of the large latent is twice as long."""
    large = torch.randn(1, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(large.flatten()[: here.x_T.numel()], here.x_T.flatten())
    assert torch.equal(large[0, 0, 0, :16], here.x_T[0, 0, 0])
    assert torch.equal(large[0, 0, 0, 16:], here.x_T[0, 0, 1])


def test_exercise_5(here):
    """At t = 354 both weights are the root of a half."""
    assert (here.abar - 0.5).abs().argmin() == 354
    assert here.abar[354].item() == pytest.approx(0.5, abs=1e-3)


def test_exercise_6():
    """Nine. The slow ones tell apart timesteps that are far from each other, where the fast ones
    have gone round many times and look alike."""
    a, b = (timestep_embedding(torch.tensor([t]), 48)[0] for t in (500, 501))
    assert ((a - b).abs() > 0.1).sum() == 9
    assert (2 * pi, 2 * pi * 10000 ** (23 / 24)) == pytest.approx((6.28, 42807), rel=1e-3)


def test_exercise_7(here):
    """By 0.44 times its standard deviation: what the prompt asks for is decided at the bottom,
    where it is to be comes by the skips."""
    x, left = here.middle, [0 * skip for skip in here.skips]
    for block in here.unet.up_blocks:
        x = block(x, left, here.time, here.context)
    without = here.unet.conv_out(F.silu(here.unet.conv_norm_out(x)))
    change = (without - here.prediction).square().mean().sqrt() / here.prediction.std()
    assert change.item() == pytest.approx(0.44, abs=0.01)


def test_exercise_8(here):
    """The branch hardly changes, for the norm divides the 10 away; the shortcut carries it."""
    block, x = here.unet.down_blocks[0].resnets[0], here.skips[0]
    branch = block.conv1(F.silu(block.norm1(10 * x)))
    assert torch.allclose(branch, here.branch, atol=1e-3)
    change = block(10 * x, here.time) - block(x, here.time)
    assert torch.allclose(change, 9 * block.conv_shortcut(x), atol=1e-3)


def test_exercise_9(here):
    """The fourth head gives "blue" all of every position. Without the padding there is no heart:
    what the UNet reads of the sentence stands there."""
    assert here.shares[1, 3, :, here.pieces.index("blue</w>") + 1].min() > 0.999
    assert here.shares[1, :, :, 9:].sum(-1).mean().item() == pytest.approx(0.68, abs=0.01)
    cut = Steps(here.unet, here.context[:, :9], None, here.sampler, "v_prediction", 7.5)
    state = first_state(here.sampler, here.x_T)
    for i in range(50):
        state = cut(state, i)
    without = (here.sd.vae.decode(state[0]) / 2 + 0.5).clamp(0, 1)
    assert (without - here.image).abs().mean() > 0.2


def test_what_the_maps_show(made):
    """"on" is read where the heart is, "blue" everywhere, and two thirds are the padding's."""
    *words, padding = walkthrough.shares_of_words(made[0])
    share = dict(zip(made[0]["pieces"], words))
    assert max(share, key=lambda piece: share[piece].max()) == "on</w>"
    assert max(share, key=lambda piece: share[piece].min()) == "blue</w>"
    assert padding.mean().item() == pytest.approx(0.69, abs=0.03)


def test_exercise_10(here):
    """x_0 and eps are linear in v and the weights of the two predictions add up to 1, so that
    guiding one guides the others."""
    abar, kind = here.ladder[0].abar, "v_prediction"
    each = [schedule.predicted_x0_eps(here.x_T, v, abar, kind) for v in (here.uncond, here.cond)]
    guided = schedule.predicted_x0_eps(here.x_T, here.guided, abar, kind)
    for uncond, cond, expected in zip(*each, guided):
        assert torch.allclose(uncond + 7.5 * (cond - uncond), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 50])
def test_exercise_11(steps, here):
    """One: x_0 and eps are the same at every level, so that any step is exact."""
    x0, eps = here.x.double(), here.x_T.double()
    ladder = schedule.ladder("trailing", steps, here.abar.tolist())
    x = schedule.add_noise(x0, eps, ladder[0].abar)
    for i in range(steps):
        x, _ = ddim.ddim(ladder).step(i, x, *schedule.predicted_x0_eps(
            x, eps, ladder[i].abar, "epsilon"))
    assert torch.allclose(x, x0, atol=1e-9)


def test_exercise_12(here):
    """3.6 levels of 255 in the mean."""
    back = here.sd.vae.decode(here.sd.vae.encode(2 * here.image - 1)) / 2 + 0.5
    assert 255 * (back.clamp(0, 1) - here.image).abs().mean().item() == pytest.approx(3.6, abs=0.2)


def test_the_mathematics(here):
    """Formulas of the page that stand nowhere else in the code."""
    x0, eps = here.x.double(), here.x_T.double()
    # The way to noise, step by step, has the weights that can be drawn at once.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    weight, variance = 1.0, 0.0
    for beta in betas.tolist():
        weight, variance = (1 - beta) ** 0.5 * weight, (1 - beta) * variance + beta
    assert (weight**2, variance) == pytest.approx((here.abar[-1].item(), 1 - here.abar[-1].item()))
    # DDIM turns x by an angle; and it is Euler's method for dy/dr = eps.
    now, after = here.ladder[0], here.ladder[1]
    x = schedule.add_noise(x0, eps, now.abar)
    v = now.alpha * eps - now.sigma * x0
    delta = torch.acos(torch.tensor([now.alpha, after.alpha], dtype=torch.float64)).diff().neg()
    step, _ = here.sampler.step(0, x, x0, eps)
    assert torch.allclose(torch.cos(delta) * x - torch.sin(delta) * v, step)
    assert torch.allclose(x / now.alpha + (after.ratio - now.ratio) * eps, step / after.alpha)


def test_attention_by_hand_is_the_modules(here):
    """The block of stop 9 stops before the feed-forward layer."""
    tokens, layer = here.tokens + here.heard, here.layer
    x = here.transformer.proj_out((tokens + layer.ff(layer.norm3(tokens))).transpose(1, 2)
                                  .unflatten(2, (4, 4)))
    before = here.unet.mid_block.resnets[0](here.skips[5], here.time)
    assert torch.allclose(before + x, here.transformer(before, here.context), atol=1e-3)
    assert split_heads(torch.zeros(1, 16, 176), 4).shape == here.q[:1].shape
