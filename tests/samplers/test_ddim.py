"""The schedule, its timesteps and one step equal diffusers' DDIMScheduler."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from official_samplers import official
from small_models import error, randn

from minisd.config import PREDICTION_TYPES, ScheduleConfig
from minisd.samplers import SAMPLERS, schedule
from minisd.samplers.ddim import ddim
from minisd.samplers.schedule import Ladder, Level

ABAR = schedule.alphas_cumprod(ScheduleConfig())


def test_alphas_cumprod():
    assert ABAR.dtype == torch.float64 and ABAR.shape == (1000,)
    assert (ABAR.diff() < 0).all()
    # The two ends, as CompVis/stable-diffusion registers them.
    assert ABAR[0].item() == pytest.approx(0.99915, abs=1e-9)
    assert ABAR[999].item() == pytest.approx(0.0046601, rel=1e-5)
    # As it is, the table of diffusers is of float32.
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert error(ABAR, theirs.alphas_cumprod) <= 1e-6
    assert torch.equal(ABAR, official("DDIMScheduler", 1).alphas_cumprod)


def test_every_number_of_steps():
    scheduler = official("DDIMScheduler", 1)
    abars = ABAR.tolist()
    for steps in range(1, 1000):
        visited = [level.t for level in schedule.leading(steps, abars)]
        scheduler.set_timesteps(steps)
        assert visited == scheduler.timesteps.tolist()
        assert len(visited) == steps and visited[-1] == 1
    # diffusers has t = 1000 here.
    assert [level.t for level in schedule.leading(1000, abars)] == list(range(999, -1, -1))


ZERO_SNR = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def zero_snr_scheduler(steps: int):
    return official("DDIMScheduler", steps, prediction_type="v_prediction",
                    rescale_betas_zero_snr=True, timestep_spacing="trailing",
                    set_alpha_to_one=True)


def test_zero_terminal_snr():
    abar = schedule.alphas_cumprod(ZERO_SNR)
    assert abar[999] == 0 and abar[0] == ABAR[0]
    assert abar[998].item() == pytest.approx(1.96789e-7, rel=1e-5)
    assert error(abar, zero_snr_scheduler(1).alphas_cumprod) <= 1e-14
    with pytest.raises(ValueError, match="zero terminal SNR needs a model that predicts v"):
        schedule.alphas_cumprod(replace(ZERO_SNR, prediction_type="epsilon"))


def test_trailing_timesteps():
    """diffusers' are sums of fractions, which give one timestep too many, -1, for 62 numbers of
    steps, and round a half the other way for 49. They are ours where the steps divide 1000."""
    scheduler, abars = zero_snr_scheduler(1), ABAR.tolist()
    longer, rounded = 0, 0
    for steps in range(1, 1001):
        visited = [level.t for level in schedule.trailing(steps, abars)]
        assert len(set(visited)) == steps and visited[0] == 999 and visited[-1] >= 0
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        longer += len(theirs) > steps
        rounded += visited != theirs and len(theirs) == steps
        assert visited == theirs or 1000 % steps
    assert (longer, rounded) == (62, 49)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_trailing_steps_end_without_noise(steps):
    """Zero SNR is 0 here, not the 2^-24 of diffusers' other schedulers."""
    scheduler = zero_snr_scheduler(steps)
    ladder = SAMPLERS["ddim"].ladder("trailing", steps, schedule.alphas_cumprod(ZERO_SNR).tolist())
    assert ladder[0].abar == 0.0 and ladder[-1].abar == 1.0
    x = theirs = randn(2, 4, 3, 3)
    for i, level in enumerate(ladder.levels[:-1]):
        prediction = randn(2, 4, 3, 3, seed=i + 1)
        theirs = scheduler.step(prediction, level.t, theirs).prev_sample
        x0, eps = schedule.predicted_x0_eps(x, prediction, level.abar, "v_prediction")
        x, _ = ddim(ladder).step(i, x, x0, eps)
        assert error(x, theirs) <= 1e-12


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50, 333, 999])
def test_step(steps, eta, prediction_type):
    scheduler = official("DDIMScheduler", steps, prediction_type=prediction_type)
    ladder = SAMPLERS["ddim"].ladder("leading", steps, ABAR.tolist())
    x, prediction, noise = (randn(3, 4, 5, 7, seed=seed) for seed in range(3))
    x = 3 * x  # beyond 1: nothing is clipped
    for i in {0, steps // 2, steps - 1}:
        t, abar = ladder[i]
        theirs = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise if eta else None)
        x0, eps = schedule.predicted_x0_eps(x, prediction, abar, prediction_type)
        assert error(x0, theirs.pred_original_sample) <= 1e-10
        ours, _ = ddim(ladder, eta).step(i, x, x0, eps, (), noise if eta else 0.0)
        assert error(ours, theirs.prev_sample) <= 1e-10


def test_step_does_not_add_noise_beyond_the_level():
    """With eta 1 all of a step to little noise may be fresh: rounding gives no root of -1e-17."""
    for steps in (1, 2, 999, 1000):
        ladder = SAMPLERS["ddpm"].ladder("leading", steps, ABAR.tolist())
        for i in range(steps):
            after, _ = ddim(ladder, 1.0).step(i, 0.0, 0.0, 1.0, (), 1.0)
            assert isinstance(after, float)
    ladder = Ladder([Level(1, 0.0), Level(None, 0.3)], [0.3, 0.0])  # from noise alone
    assert ddim(ladder, 1.0).step(0, 0.0, 0.0, 1.0, (), 0.0)[0] == 0.0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_split_undoes_add_noise(prediction_type):
    x0, noise = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    for abar in ABAR[::111].tolist():
        x = schedule.add_noise(x0, noise, abar)
        v = abar**0.5 * noise - (1 - abar) ** 0.5 * x0  # Salimans & Ho 2022, eq. in section 4
        prediction = v if prediction_type == "v_prediction" else noise
        found = schedule.predicted_x0_eps(x, prediction, abar, prediction_type)
        assert error(found[0], x0) <= 1e-10
        assert error(found[1], noise) <= 1e-10


def test_add_noise():
    scheduler = official("DDIMScheduler", 1)
    x0, noise = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    for t in (0, 1, 500, 999):
        theirs = scheduler.add_noise(x0, noise, torch.tensor([t, t]))
        assert error(schedule.add_noise(x0, noise, ABAR[t].item()), theirs) <= 1e-12
