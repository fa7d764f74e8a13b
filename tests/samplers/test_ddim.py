"""The schedule and the step equal diffusers' DDIMScheduler with the official settings."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from reference_models import ddim_step, error, official_scheduler, published_scheduler, randn

from minisd.config import PREDICTION_TYPES, ScheduleConfig
from minisd.samplers import SAMPLERS, schedule

ABAR = schedule.alphas_cumprod(ScheduleConfig())


def timesteps(spacing: str, steps: int) -> list[float]:
    return [level.t for level in schedule.SPACINGS[spacing](steps, ABAR.tolist())]


def test_alphas_cumprod():
    assert ABAR.dtype == torch.float64 and ABAR.shape == (1000,)
    assert (ABAR.diff() < 0).all()
    # The two ends, as CompVis/stable-diffusion registers them.
    assert ABAR[0].item() == pytest.approx(0.99915, abs=1e-9)
    assert ABAR[999].item() == pytest.approx(0.0046601, rel=1e-5)
    official = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert error(ABAR, official.alphas_cumprod) <= 1e-6  # its table is float32


def test_every_number_of_steps():
    scheduler = official_scheduler(ScheduleConfig())
    for steps in range(1, 1000):
        visited = timesteps("leading", steps)
        scheduler.set_timesteps(steps)
        assert visited == scheduler.timesteps.tolist()
        assert len(visited) == steps and visited[-1] == 1
    assert timesteps("leading", 1000) == list(range(999, -1, -1))  # diffusers has t = 1000 here


ZERO_SNR = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                          timestep_spacing="trailing")


def test_zero_terminal_snr():
    abar = schedule.alphas_cumprod(ZERO_SNR)
    assert abar[999] == 0 and abar[0] == ABAR[0]
    assert abar[998].item() == pytest.approx(1.96789e-7, rel=1e-5)
    official = published_scheduler(ZERO_SNR)
    assert error(abar, official.alphas_cumprod) <= 1e-6
    with pytest.raises(ValueError, match="zero terminal SNR needs a model that predicts v"):
        schedule.alphas_cumprod(replace(ZERO_SNR, prediction_type="epsilon"))


def test_trailing_timesteps():
    """diffusers' are sums of fractions, which give one timestep too many, -1, for 62 numbers of
    steps, and round a half the other way for 49. They are ours where the steps divide 1000."""
    scheduler = published_scheduler(ZERO_SNR)
    longer, rounded = 0, 0
    for steps in range(1, 1001):
        visited = timesteps("trailing", steps)
        assert len(set(visited)) == steps and visited[0] == 999 and visited[-1] >= 0
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        longer += len(theirs) > steps
        rounded += visited != theirs and len(theirs) == steps
        assert visited == theirs or 1000 % steps
    assert (longer, rounded) == (62, 49)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_trailing_steps_end_without_noise(steps):
    scheduler = published_scheduler(ZERO_SNR)
    scheduler.alphas_cumprod = schedule.alphas_cumprod(ZERO_SNR)
    scheduler.set_timesteps(steps)
    visited = timesteps("trailing", steps)
    ladder = SAMPLERS["ddim"].ladder("trailing", steps, schedule.alphas_cumprod(ZERO_SNR).tolist())
    abars = [level.abar for level in ladder.levels]
    assert abars[0] == 0.0 and abars[-1] == 1.0
    x = theirs = randn(2, 4, 3, 3)
    for i, t in enumerate(visited):
        prediction = randn(2, 4, 3, 3, seed=i + 1)
        theirs = scheduler.step(prediction, t, theirs).prev_sample
        x = ddim_step(x, prediction, abars[i], abars[i + 1], "v_prediction")
        assert error(x, theirs) <= 1e-12


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50, 333, 999])
def test_step(steps, eta, prediction_type):
    scheduler = official_scheduler(ScheduleConfig(prediction_type=prediction_type))
    scheduler.set_timesteps(steps)
    visited = timesteps("leading", steps)
    x, prediction, noise = (randn(3, 4, 5, 7, seed=seed) for seed in range(3))
    x = 3 * x  # beyond 1: nothing is clipped
    for i in {0, steps // 2, steps - 1}:
        t, t_next = visited[i], visited[i + 1] if i + 1 < steps else 0
        theirs = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise if eta else None)
        abar, abar_next = ABAR[t].item(), ABAR[t_next].item()
        ours = ddim_step(x, prediction, abar, abar_next, prediction_type, eta, noise)
        assert error(ours, theirs.prev_sample) <= 1e-10
        x0, _ = schedule.predicted_x0_eps(x, prediction, abar, prediction_type)
        assert error(x0, theirs.pred_original_sample) <= 1e-10


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
    scheduler = official_scheduler(ScheduleConfig())
    x0, noise = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    for t in (0, 1, 500, 999):
        theirs = scheduler.add_noise(x0, noise, torch.tensor([t, t]))
        assert error(schedule.add_noise(x0, noise, ABAR[t].item()), theirs) <= 1e-12
