"""Every sampler equals diffusers' scheduler of that name, or the algorithm that it is of.

The scheduler's own levels are given to ours, for diffusers chooses some of them otherwise; its
casts to float32 are lifted (see official_samplers.py). So all x on the way agree to 1e-10.
"""

import math

import diffusers
import pytest
import torch
from official_samplers import (
    ABARS,
    CLASSES,
    SPACINGS,
    STEPS,
    ladder_of,
    official,
    official_run,
    run,
    toy,
    worst,
)
from small_models import error, randn

from minisd.config import PREDICTION_TYPES, ScheduleConfig
from minisd.samplers import SAMPLERS, schedule
from minisd.samplers.dpm2 import dpm2
from minisd.samplers.sampler import coefficients
from minisd.samplers.schedule import Ladder, Level

X = randn(2, 4, 3, 3)
SDE = dict(algorithm_type="sde-dpmsolver++")
# Our sampler, its eta, diffusers' class and the spacings to compare at.
CASES = [
    ("ddim", 0.0, "DDIMScheduler", {}, "leading"),
    ("ddim", 0.5, "DDIMScheduler", {}, "leading"),
    ("ddim", 1.0, "DDIMScheduler", {}, "leading"),
    ("euler", None, "EulerDiscreteScheduler", {}, "linspace leading trailing karras exponential"),
    ("euler_a", None, "EulerAncestralDiscreteScheduler", {}, "linspace leading trailing"),
    ("ddpm", None, "DDPMScheduler", {}, "leading"),
    ("dpmpp_2m", None, "DPMSolverMultistepScheduler", {}, "linspace leading trailing karras"),
    ("dpmpp_2m_sde", None, "DPMSolverMultistepScheduler", SDE, "linspace leading trailing karras"),
    ("unipc", None, "UniPCMultistepScheduler", {}, "linspace leading trailing karras"),
    ("heun", None, "HeunDiscreteScheduler", {}, "linspace karras"),
    ("lms", None, "LMSDiscreteScheduler", {}, "linspace karras"),
    ("dpm2", None, "KDPM2DiscreteScheduler", {}, "linspace karras"),
    ("dpm2", 1.0, "KDPM2AncestralDiscreteScheduler", {}, "linspace karras"),
    ("plms", None, "PNDMScheduler", {}, "leading"),
    ("lcm", None, "LCMScheduler", {}, "lcm"),
    ("tcd", 0.3, "TCDScheduler", {}, "lcm"),
    ("tcd", 0.5, "TCDScheduler", {}, "lcm"),  # half of an odd t is rounded down
    ("tcd", 1.0, "TCDScheduler", {}, "lcm"),
]
PARITY = [pytest.param(name, eta, theirs, config, spacing, kind,
                       id="-".join([name, *([str(eta)] if eta is not None else []), spacing, kind]))
          for name, eta, theirs, config, spacings in CASES for spacing in spacings.split()
          for kind in PREDICTION_TYPES if (name, kind) != ("plms", "v_prediction")]


def options(name: str, eta: float | None) -> dict:
    """What diffusers takes at each step, and not before."""
    return dict(eta=eta) if name in ("ddim", "tcd") else {}


@pytest.mark.parametrize(("name", "eta", "theirs", "config", "spacing", "kind"), PARITY)
def test_every_x_is_diffusers(name, eta, theirs, config, spacing, kind):
    # DDPM ends with noise of weight 1e-10 there, so that its variance has a logarithm.
    bound = 4e-10 if name == "ddpm" else 1e-10
    for steps in STEPS:
        scheduler = official(theirs, steps, prediction_type=kind, **config, **SPACINGS[spacing])
        ours = run(SAMPLERS[name](ladder_of(scheduler), eta), X, kind)
        assert worst(ours, official_run(scheduler, X, **options(name, eta))) <= bound


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "LMSDiscreteScheduler"])
def test_the_lifted_schedulers_are_diffusers(name, monkeypatch):
    """As they are installed they agree to float32's precision. That of LMS would need SciPy."""
    ours = official(name, 20)
    theirs = getattr(diffusers, name).from_config(ours.config)
    theirs.set_timesteps(20)
    names = type(theirs).step.__globals__
    monkeypatch.setitem(names, "randn_tensor", names.get("randn_tensor"))  # put back afterwards
    assert worst(official_run(ours, X), official_run(theirs, X.float())) <= 5e-5


@pytest.mark.parametrize("steps", STEPS)
def test_plms_with_v_is_diffusers_with_the_same_eps(steps):
    """diffusers averages v's (see below), so it is told the eps that they stand for."""
    scheduler = official("PNDMScheduler", steps, timestep_spacing="leading")
    # Its second call is asked as if at the level that it is at: t decides the level here.
    eps = lambda x, t: schedule.predicted_x0_eps(x, toy(x, t), ABARS[t], "v_prediction")[1]
    ours = run(SAMPLERS["plms"](ladder_of(scheduler)), X, "v_prediction")
    assert worst(ours, official_run(scheduler, X, eps)) <= 1e-10


def k_dpmpp_2s(ladder: Ladder, eta: float, kind: str) -> list[torch.Tensor]:
    """DPM-Solver++(2S) with ancestral steps as k-diffusion has it, in y = x / alpha, by its sigma.
    The noise is the same as in `run`."""
    ratios = [level.ratio for level in ladder.levels]
    generator = torch.Generator().manual_seed(1)
    y, seen = X * math.hypot(1, ratios[0]), []

    def denoised(y, ratio, t):
        scale = math.hypot(1, ratio)
        seen.append(y / scale)
        m = toy(seen[-1], t)
        return y - ratio * m if kind == "epsilon" else (y / scale - ratio * m) / scale

    for level, now, after in zip(ladder.levels, ratios, ratios[1:]):
        d = denoised(y, now, level.t)
        if after == 0:
            y = d
            continue
        up = min(after, eta * math.sqrt(after**2 * (now**2 - after**2) / now**2))
        down = math.sqrt(after**2 - up**2)
        h = math.log(now) - math.log(down)
        middle = math.exp(math.log(now) - h / 2)
        y_middle = middle / now * y - math.expm1(-h / 2) * d
        d = denoised(y_middle, middle, ladder.at_ratio(middle).t)
        y = down / now * y - math.expm1(-h) * d
        if up > 0:
            y = y + up * torch.randn(X.shape, generator=generator, dtype=torch.float64)
    return [*seen, y]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_dpmpp_2s_is_k_diffusions(spacing, eta, kind):
    """diffusers has another 2S. There is no copy of k-diffusion's, but its algorithm once more."""
    for steps in STEPS:
        ladder = schedule.ladder(spacing, steps, ABARS)
        ours = run(SAMPLERS["dpmpp_2s"](ladder, eta), X, kind)
        assert worst(ours, k_dpmpp_2s(ladder, eta, kind)) <= 1e-10


def test_euler_euler_a_and_ddpm_are_ddim():
    """One function with other ladders and eta; diffusers' four classes agree on one ladder too."""
    ddim = SAMPLERS["ddim"].function
    assert [name for name, row in SAMPLERS.items() if row.function is ddim] == [
        "ddim", "euler", "euler_a", "ddpm"]
    config = dict(timestep_spacing="leading")
    for eta, others in ((0.0, ["EulerDiscreteScheduler"]),
                        (1.0, ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])):
        scheduler = official("DDIMScheduler", 20, set_alpha_to_one=True, **config)
        expected = official_run(scheduler, X, eta=eta)
        assert worst(run(ddim(ladder_of(scheduler), eta), X, "epsilon"), expected) <= 1e-10
        for other in others:
            assert worst(official_run(official(other, 20, **config), X), expected) <= 4e-10


# --- what holds for every sampler ----------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_coefficients_are_the_steps(name, kind):
    """The matrix times the tensors is the step, which leaves its inputs as they were."""
    row = SAMPLERS[name]
    for eta in (None,) if row.eta is None else (0.0, 0.4, 1.0):
        sampler = row(row.ladder(row.spacing, 6, ABARS), eta)
        table = coefficients(sampler, kind)
        assert table.shape == (sampler.calls, sampler.memory + 2, sampler.memory + 3)
        for i, level in enumerate(sampler.shown[:-1]):
            inputs = randn(sampler.memory + 3, 2, 4, 3, 3, seed=i)
            before = inputs.clone()
            x, *past, m, noise = inputs
            x0, eps = schedule.predicted_x0_eps(x, m, level.abar, kind)
            after, remembered = sampler.step(i, x, x0, eps, tuple(past), noise)
            assert torch.equal(inputs, before)
            again, _ = sampler.step(i, x, x0, eps, tuple(past), noise)
            assert torch.equal(after, again)
            expected = torch.stack([after, *remembered, x0])
            assert error(torch.einsum("rc,c...->r...", table[i], inputs), expected) <= 1e-11


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "eta", "theirs", "config", "spacing", "index"), [
    ("ddim", 0.0, "DDIMScheduler", {}, "leading", 8),
    ("ddim", 1.0, "DDIMScheduler", {}, "leading", 8),
    ("euler", None, "EulerDiscreteScheduler", {}, "linspace", 8),
    ("euler_a", None, "EulerAncestralDiscreteScheduler", {}, "linspace", 8),
    ("heun", None, "HeunDiscreteScheduler", {}, "linspace", 16),
    ("dpmpp_2m", None, "DPMSolverMultistepScheduler", {}, "karras", 8),
    ("dpmpp_2m_sde", None, "DPMSolverMultistepScheduler", SDE, "karras", 8),
    ("unipc", None, "UniPCMultistepScheduler", {}, "linspace", 8),
    ("dpm2", 0.0, "KDPM2DiscreteScheduler", {}, "linspace", 16),
    ("dpm2", 1.0, "KDPM2AncestralDiscreteScheduler", {}, "linspace", 16),
])
def test_image_to_image_is_the_tail_of_the_ladder(name, eta, theirs, config, spacing, index, kind):
    """diffusers' run that begins at the 8th of 20 levels; ``index`` is its place in their list."""
    scheduler = official(theirs, 20, prediction_type=kind, **config, **SPACINGS[spacing])
    ladder = ladder_of(scheduler)
    sampler = SAMPLERS[name](Ladder(ladder.levels[-13:], ladder.alphas_cumprod), eta)
    expected = official_run(scheduler, X, start=index, **options(name, eta))
    assert worst(run(sampler, X, kind), expected) <= 1e-10


# --- zero terminal SNR: noise alone at the first level -------------------------------------------

ZERO = schedule.alphas_cumprod(ScheduleConfig(
    prediction_type="v_prediction", rescale_betas_zero_snr=True)).tolist()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "ddpm", "dpmpp_2m", "dpmpp_2m_sde",
                                  "unipc", "lcm", "tcd"])
def test_zero_terminal_snr(name, steps):
    ladder = SAMPLERS[name].ladder("trailing", steps, ZERO)
    assert ladder[0] == Level(999, 0.0) and ladder[0].ratio == math.inf
    sampler = SAMPLERS[name](ladder)
    assert coefficients(sampler, "v_prediction").isfinite().all()
    assert all(x.isfinite().all() for x in run(sampler, X, "v_prediction"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["heun", "lms", "plms", "dpm2", "dpmpp_2s"])
def test_samplers_in_x_over_alpha_cannot_begin_at_noise_alone(name):
    row = SAMPLERS[name]
    try:
        table = coefficients(row(row.ladder("trailing", 4, ZERO)), "v_prediction")
    except ZeroDivisionError:
        return
    assert not table.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_karras_begins_at_a_little_signal(name):
    """The ratio of noise alone is infinite; the ladders by ratio have 4096 there, as diffusers."""
    ladder = SAMPLERS[name].ladder("karras", 10, ZERO)
    assert ladder[0].ratio == pytest.approx(4096, rel=1e-6) and ladder[0].t == 999
    scheduler = official("EulerDiscreteScheduler", 10, rescale_betas_zero_snr=True,
                         **SPACINGS["karras"])
    assert [level.ratio for level in ladder.levels] == pytest.approx(scheduler.sigmas.tolist(),
                                                                     rel=1e-6)
    assert coefficients(SAMPLERS[name](ladder), "v_prediction").isfinite().all()


# --- where diffusers is not followed -------------------------------------------------------------


def test_diffusers_ddim_leaves_gaps_in_trailing_timesteps():
    """It steps to t - 1000 // steps, which is not the next timestep unless steps divides 1000."""
    config = dict(timestep_spacing="trailing", set_alpha_to_one=True)
    for steps, gaps in ((50, 0), (20, 0), (48, 39), (30, 10)):
        scheduler = official("DDIMScheduler", steps, **config)
        t = scheduler.timesteps.tolist()
        assert sum(now - 1000 // steps != after for now, after in zip(t, t[1:])) == gaps
        ours = run(SAMPLERS["ddim"](ladder_of(scheduler)), X, "epsilon")
        difference = worst(ours, official_run(scheduler, X))
        assert difference <= 1e-10 if gaps == 0 else difference >= 0.02  # 0.11 and 0.026


def test_diffusers_plms_tells_image_to_image_a_wrong_t():
    """It slices a list with one timestep twice: a start at the 8th of 20 levels is at the 7th, has
    a call more, and from the third call on t is a level less than x has."""
    scheduler = official("PNDMScheduler", 20, timestep_spacing="leading")
    ladder = ladder_of(scheduler)
    told = scheduler.timesteps[8:].tolist()
    assert told[:4] == [601, 551, 501, 451] and len(told) == 13
    ours = SAMPLERS["plms"](Ladder(ladder.levels[8:], ladder.alphas_cumprod))
    assert [level.t for level in ours.shown[:4]] == [551, 501, 501, 451]
    # Without any eps x is alpha x_0, so that it shows its level.
    x0 = torch.ones_like(X)
    seen = official_run(scheduler, ABARS[601] ** 0.5 * x0, lambda x, t: 0 * x, start=8)
    assert error(seen[1], ABARS[551] ** 0.5 * x0) <= 1e-12
    assert error(seen[2], ABARS[551] ** 0.5 * x0) <= 1e-12  # and it was told 501
    assert error(seen[-1], x0) >= 0.01
    seen = run(ours, ABARS[551] ** 0.5 * x0, "epsilon", lambda x, t: 0 * x)
    assert all(error(x, level.alpha * x0) <= 1e-12 for x, level in zip(seen, ours.shown))


def test_diffusers_lms_begins_image_to_image_with_too_long_a_step():
    """Its order follows the place in the whole ladder, before there are as many slopes."""
    eps = torch.ones_like(X)
    lengths = []
    for start in (0, 1, 3, 8):
        scheduler = official("LMSDiscreteScheduler", 20, timestep_spacing="linspace")
        now, after = scheduler.sigmas[start : start + 2].tolist()
        seen = official_run(scheduler, 0 * X, lambda x, t: eps, start=start)
        lengths.append(seen[1].mean().item() * math.hypot(1, after) / (after - now))
        ladder = ladder_of(scheduler)
        sampler = SAMPLERS["lms"](Ladder(ladder.levels[start:], ladder.alphas_cumprod))
        ours = run(sampler, 0 * X, "epsilon", lambda x, t: eps)
        assert error(ours[1] * math.hypot(1, after), (after - now) * eps) <= 1e-12
    assert lengths == pytest.approx([1, 1.34, 1.72, 1.85], abs=5e-3)


def test_midpoints_are_in_the_middle_of_lambda():
    ladder = SAMPLERS["dpm2"].ladder("karras", 5, ABARS)
    shown = dpm2(ladder).shown
    assert len(shown) == 10 and shown[::2] == ladder.levels[:-1]
    for i in range(1, 8, 2):
        assert shown[i].lam == pytest.approx((shown[i - 1].lam + shown[i + 1].lam) / 2, abs=1e-12)
