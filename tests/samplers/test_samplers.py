"""Every sampler equals diffusers', over all x of a call, when it is given diffusers' own levels.

The float32 casts of diffusers are lifted (official_samplers.py). The model is a nonlinear function
of x and t, so that a slip at one call shows in all that follow.
"""

import math

import pytest
import torch
from official_samplers import (
    ABARS,
    Ladder,
    Level,
    draws,
    ladder_of,
    official,
    official_run,
    run,
    toy,
    worst,
)
from small_models import randn

from minisd.config import PREDICTION_TYPES, ScheduleConfig
from minisd.samplers import SAMPLERS, ddim, lms, named, schedule, web_ui_name
from minisd.samplers.sampler import coefficients

X = randn(2, 4, 3, 3)
STEPS = (1, 2, 3, 5, 10, 20, 50)
BOUND = 1e-10
KINDS = pytest.mark.parametrize("kind", PREDICTION_TYPES, ids=["eps", "v"])
KARRAS, EXPONENTIAL = dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True)
# Our sampler, its eta, diffusers' scheduler with its settings, and the error allowed.
PEERS = {
    "ddim": ("ddim", 0.0, "DDIMScheduler", {}, BOUND),
    "ddim, eta 0.5": ("ddim", 0.5, "DDIMScheduler", {}, BOUND),
    "ddim, eta 1": ("ddim", 1.0, "DDIMScheduler", {}, BOUND),
    "euler": ("euler", 0.0, "EulerDiscreteScheduler", {}, BOUND),
    **{f"euler {spacing}": ("euler", 0.0, "EulerDiscreteScheduler", dict(timestep_spacing=spacing),
                            BOUND) for spacing in ("leading", "trailing")},
    "euler karras": ("euler", 0.0, "EulerDiscreteScheduler", KARRAS, BOUND),
    "euler exponential": ("euler", 0.0, "EulerDiscreteScheduler", EXPONENTIAL, BOUND),
    "euler_a": ("euler_a", 1.0, "EulerAncestralDiscreteScheduler", {}, BOUND),
    "ddpm": ("ddpm", 1.0, "DDPMScheduler", {}, 4e-10),  # its variance is at least 1e-20
    **{f"dpmpp_2m {spacing}": ("dpmpp_2m", 0.0, "DPMSolverMultistepScheduler",
                               dict(timestep_spacing=spacing), BOUND)
       for spacing in ("linspace", "leading", "trailing")},
    "dpmpp_2m karras": ("dpmpp_2m", 0.0, "DPMSolverMultistepScheduler", KARRAS, BOUND),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", 1.0, "DPMSolverMultistepScheduler",
                     dict(algorithm_type="sde-dpmsolver++"), BOUND),
    "unipc": ("unipc", None, "UniPCMultistepScheduler", {}, BOUND),
    "unipc karras": ("unipc", None, "UniPCMultistepScheduler", KARRAS, BOUND),
    "heun": ("heun", None, "HeunDiscreteScheduler", {}, BOUND),
    "heun karras": ("heun", None, "HeunDiscreteScheduler", KARRAS, BOUND),
    "lms": ("lms", None, "LMSDiscreteScheduler", {}, BOUND),
    "lms karras": ("lms", None, "LMSDiscreteScheduler", KARRAS, BOUND),
    "plms": ("plms", None, "PNDMScheduler", {}, BOUND),
    "lcm": ("lcm", None, "LCMScheduler", {}, 5e-6),  # its boundary weights are float32
    "tcd": ("tcd", 0.3, "TCDScheduler", {}, BOUND),
}


@KINDS
@pytest.mark.parametrize("peer", PEERS)
def test_equal_to_diffusers(peer, kind):
    name, eta, theirs, settings, bound = PEERS[peer]
    for steps in STEPS:
        if name == "plms" and (kind == "v_prediction" or steps == 1):
            continue  # see the faults below
        scheduler = official(theirs, steps, prediction_type=kind, **settings)
        options = dict(eta=eta) if theirs in ("DDIMScheduler", "TCDScheduler") else {}
        ladder = ladder_of(scheduler)
        want = official_run(scheduler, X, **options)
        got = run(SAMPLERS[name](ladder, eta), want[0], kind)
        seen = got if len(got) == len(want) else [got[0], got[-1]]
        assert worst(seen, want if len(got) == len(want) else [want[0], want[-1]]) <= bound, steps


@pytest.mark.parametrize("name", ["euler", "euler_a", "ddpm"])
def test_euler_and_ddpm_are_ddim(name):
    assert SAMPLERS[name].function is ddim.ddim


@KINDS
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_is_linear_and_changes_nothing(name, kind):
    """The matrix of each call, applied to random tensors, is the step."""
    ladder = SAMPLERS[name].ladder(SAMPLERS[name].spacing, 5, ABARS)
    sampler = SAMPLERS[name](ladder)
    table = coefficients(sampler, kind)
    assert table.shape == (sampler.calls, sampler.memory + 2, sampler.memory + 3)
    tensors = [randn(3, 4, seed=seed) for seed in range(sampler.memory + 3)]
    before = [tensor.clone() for tensor in tensors]
    x, *past, prediction, noise = tensors
    for i, level in enumerate(sampler.shown[:-1]):
        x0, eps = schedule.predicted_x0_eps(x, prediction, level.abar, kind)
        after, remembered = sampler.step(i, x, x0, eps, tuple(past), noise)
        found = torch.einsum("rc,cij->rij", table[i], torch.stack(tensors))
        want = torch.stack([after, *remembered, x0])
        assert (found - want).abs().max() <= 1e-12 * want.abs().max()
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_is_sampled_or_cannot_be(name):
    zero = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    abars = schedule.alphas_cumprod(zero).tolist()
    row, finite = SAMPLERS[name], False
    try:
        sampler = row(row.ladder("trailing", 4, abars))
        finite = coefficients(sampler, "v_prediction").isfinite().all()
    except ZeroDivisionError:
        pass
    assert finite == (name not in ("heun", "lms", "plms", "dpm2", "dpmpp_2s"))
    # Between levels and at the end of a ladder noise alone counts as abar 2^-24.
    assert coefficients(row(row.ladder("karras", 4, abars)), "v_prediction").isfinite().all()


# --- ladders -------------------------------------------------------------------------------------


def test_the_levels_of_karras():
    """Computed by hand for 10 steps."""
    levels = schedule.karras(10, ABARS)
    assert [round(level.ratio, 4) for level in levels] == [
        14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292]
    assert [round(level.t, 2) for level in levels] == [
        999, 916.28, 815.04, 687.15, 523.2, 327.15, 145.94, 40.86, 6.73, 0]


@pytest.mark.parametrize("spacing", schedule.SPACINGS)
def test_ladders_go_down(spacing):
    for steps in (1, 2, 7, 50):
        ladder = SAMPLERS["euler"].ladder(spacing, steps, ABARS)
        abars = [level.abar for level in ladder.levels]
        assert ladder.steps == steps and abars == sorted(set(abars)) and abars[-1] == 1
        assert ladder[steps].t is None
        assert spacing == "leading" or ladder[0].t == pytest.approx(999, abs=1e-9)


def test_the_levels_of_lcm():
    assert [level.t for level in schedule.lcm(4, ABARS)] == [999, 759, 499, 259]
    assert len(schedule.lcm(50, ABARS)) == 50
    with pytest.raises(ValueError, match="at most 50"):
        schedule.lcm(51, ABARS)
    assert [level.t for level in schedule.lcm(3, ABARS[:20])] == [19, 13, 6]  # of few timesteps
    with pytest.raises(ValueError, match="at most 20"):
        schedule.lcm(21, ABARS[:20])


def test_only_ddim_and_plms_end_at_timestep_0():
    ends = {name: row.ladder("leading", 4, ABARS)[4].abar for name, row in SAMPLERS.items()}
    assert {name for name, abar in ends.items() if abar != 1} == {"ddim", "plms"}
    assert ends["ddim"] == ends["plms"] == ABARS[0]


def test_names_of_the_web_ui():
    assert named("DPM++ 2M Karras") == ("dpmpp_2m", "karras", None) == named("dpm++ 2m karras")
    assert named("Euler a") == ("euler_a", "linspace", None) and named("ddim").spacing == "leading"
    assert named("DPM++ 2S a") == ("dpmpp_2s", "linspace", 1.0) and named("DPM++") is None
    assert web_ui_name("dpmpp_2m", "karras", 0.0) == "DPM++ 2M Karras"
    assert web_ui_name("dpm2", "karras", 1.0) == "DPM2 a Karras"
    assert web_ui_name("euler", "trailing", 0.0) is None


# --- what diffusers does wrong -------------------------------------------------------------------


def test_pndm_averages_v(kind="v_prediction"):
    """diffusers' PNDM averages the last v, and splits the mean by the newest level: of first order.
    The slopes of eps, averaged, are of higher order."""
    fine = run(SAMPLERS["plms"](SAMPLERS["plms"].ladder("leading", 1000, ABARS)), X, kind)[-1]
    ours, theirs = [], []
    for steps in (20, 40):
        ladder = SAMPLERS["plms"].ladder("leading", steps, ABARS)
        ours.append(worst([run(SAMPLERS["plms"](ladder), X, kind)[-1]], [fine]))
        scheduler = official("PNDMScheduler", steps, prediction_type=kind)
        theirs.append(worst([official_run(scheduler, X)[-1]], [fine]))
    assert theirs[1] > 3 * ours[1]


def test_ddim_with_gaps():
    """diffusers steps to t - 1000 // S, which is the next timestep only where S divides 1000."""
    errors = {}
    for steps in (48, 50):
        scheduler = official("DDIMScheduler", steps, timestep_spacing="trailing",
                             set_alpha_to_one=True)
        sampler = SAMPLERS["ddim"](ladder_of(scheduler))
        errors[steps] = worst(run(sampler, X, "epsilon"), official_run(scheduler, X))
    assert errors[50] <= BOUND and errors[48] > 1e-3


def test_lms_begun_late():
    """diffusers takes order min(index + 1, 4) with one slope, where image to image begins."""
    scheduler = official("LMSDiscreteScheduler", 20)
    ladder = ladder_of(scheduler)
    late = Ladder(ladder.levels[3:], ladder.alphas_cumprod)
    theirs = official_run(scheduler, X, start=3)
    ours = run(lms.lms(late), theirs[0], "epsilon")
    euler = run(ddim.ddim(late), theirs[0], "epsilon")
    assert worst(ours[:2], euler[:2]) <= BOUND and worst(theirs[:2], euler[:2]) > 1e-3


@pytest.mark.parametrize("name, theirs", [
    ("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler"),
    ("heun", "HeunDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    ("unipc", "UniPCMultistepScheduler")])
def test_begun_at_a_later_level(name, theirs):
    """As image to image begins: the sampler of the last levels of a ladder."""
    scheduler, start = official(theirs, 20), 8
    ladder = ladder_of(scheduler)
    late = Ladder(ladder.levels[start:], ladder.alphas_cumprod)
    want = official_run(scheduler, X, start=2 * start if name == "heun" else start)
    assert worst(run(SAMPLERS[name](late), want[0], "epsilon"), want) <= BOUND


def on_ode(name: str, steps: int) -> torch.Tensor:
    """Down the levels of Karras et al., without the last jump to no noise."""
    sampler = SAMPLERS[name](Ladder(schedule.karras(steps + 1, ABARS), ABARS), 0.0)
    return run(sampler, X, "epsilon")[-1]


# The order of convergence that each must have at least, measured from 20 to 40 steps.
ORDERS = {"euler": 0.8, "dpmpp_2m": 1.8, "heun": 1.8, "dpm2": 1.8, "dpmpp_2s": 1.8, "unipc": 2.0,
          "lms": 1.8, "plms": 1.8}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    fine = on_ode("unipc", 1000)
    errors = [(on_ode(name, steps) - fine).abs().max().log2() for steps in (20, 40)]
    order = (errors[0] - errors[1]).item()
    assert ORDERS[name] <= order <= (1.3 if name == "euler" else 5), order


def test_level():
    level = Level(5, 0.36)
    assert (level.alpha, level.sigma) == pytest.approx((0.6, 0.8))
    assert level.ratio == pytest.approx(4 / 3) and level.lam == pytest.approx(-0.28768207245)
    assert Level(0, 1.0).lam == float("inf") and Level(9, 0.0).lam == float("-inf")


# --- samplers that diffusers does not have, by k-diffusion's formulas in y = x / alpha -----------


def in_y(name: str, ladder: Ladder, eta: float) -> torch.Tensor:
    """DPM2 and DPM++ 2S, ancestral or not, written apart: sigma is our ratio, y its state."""
    noises, y = draws(X), X / ladder[0].alpha
    for now, after in zip(ladder.levels, ladder.levels[1:]):
        s, s_next = now.ratio, after.ratio
        up = min(s_next, eta * (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5)
        down = (s_next**2 - up**2) ** 0.5

        def denoised(y, level):
            x = y * level.alpha
            return (x - level.sigma * toy(x, level.t)) / level.alpha

        d = denoised(y, now)
        if s_next == 0:
            return d
        if name == "dpm2":
            middle = ladder.at_ratio(math.exp((math.log(s) + math.log(down)) / 2))
            y2 = y + (y - d) / s * (middle.ratio - s)
            y = y + (y2 - denoised(y2, middle)) / middle.ratio * (down - s)
        else:
            t, t_next = -math.log(s), -math.log(down)
            h = t_next - t
            middle = ladder.at_ratio(math.exp(-(t + h / 2)))
            y2 = middle.ratio / s * y - math.expm1(-h / 2) * d
            y = down / s * y - math.expm1(-h) * denoised(y2, middle)
        if up > 0:
            y = y + up * next(noises)
    raise AssertionError("the last level has no noise")


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("name", ["dpm2", "dpmpp_2s"])
def test_two_calls_a_step(name, spacing, eta):
    for steps in STEPS:
        ladder = SAMPLERS[name].ladder(spacing, steps, ABARS)
        ours = run(SAMPLERS[name](ladder, eta), X, "epsilon")
        assert worst(ours[-1:], [in_y(name, ladder, eta)]) <= BOUND, steps
