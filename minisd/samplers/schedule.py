"""The noise schedule: how much noise there is at each timestep, and which levels a call visits.

Training mixed a clean latent x_0 with Gaussian noise eps (Ho et al. 2020, eq. 4):

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    x_t = alpha x_0 + sigma eps,  alpha = sqrt(abar_t),  sigma = sqrt(1 - abar_t)

where abar_t (alpha-bar) falls from almost 1 to almost 0 as t grows. A call goes down a ladder of
such levels; which ones is the choice of the `SPACINGS`.

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239;
Salimans & Ho 2022, https://arxiv.org/abs/2202.00512 (v); Karras et al. 2022, "Elucidating the
Design Space of Diffusion-Based Generative Models", https://arxiv.org/abs/2206.00364; Lin et al.
2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
https://arxiv.org/abs/2305.08891.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from minisd.config import ScheduleConfig

# The functions below are linear in these, and work on latents of any shape or on numbers.
X = TypeVar("X", Tensor, float)


def alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """abar_t = prod (1 - beta_s) over s = 0 .. t: (num_train_timesteps,), float64.

    Raises ValueError for zero terminal SNR with a model that predicts eps: of noise alone it says
    nothing about x_0.
    """
    # The square roots of the betas are evenly spaced ("scaled linear"), not the betas.
    betas = torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps,
        dtype=torch.float64, device="cpu",
    ).square()
    abar = torch.cumprod(1.0 - betas, dim=0)
    if not config.rescale_betas_zero_snr:
        return abar
    if config.prediction_type == "epsilon":
        raise ValueError("zero terminal SNR needs a model that predicts v, and this one predicts "
                         "epsilon")
    # Zero terminal SNR (Lin et al., algorithm 1): r = sqrt(abar) is shifted and stretched so that
    # the last timestep is noise alone and the first is as it was.
    r = abar.sqrt()
    return ((r - r[-1]) * r[0] / (r[0] - r[-1])).square()


class Level(NamedTuple):
    """How noisy x is: x = alpha x_0 + sigma eps, with alpha^2 + sigma^2 = 1.

    x has variance 1 at every level, so nothing scales what the UNet reads. Karras et al. and their
    followers keep y = x / alpha instead; what they call sigma is ``ratio`` here.
    """

    t: float  # what the UNet is told; None after the last step, where it is not asked
    abar: float

    @property
    def alpha(self) -> float:
        return self.abar**0.5

    @property
    def sigma(self) -> float:
        return (1.0 - self.abar) ** 0.5

    @property
    def ratio(self) -> float:
        """sigma / alpha, infinite for noise alone."""
        return self.sigma / self.alpha if self.abar > 0 else math.inf

    @property
    def lam(self) -> float:
        """lambda = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
        return -math.log(self.ratio) if self.abar < 1 else math.inf


# --- the spacings: (number of steps, abar of every timestep) -> the levels, the noisiest first ---


def leading(steps: int, abars: Sequence[float]) -> list[Level]:
    """Multiples of a whole stride, plus 1, as the official scripts have it.

    So sampling starts from pure noise at a t that is less than 999: 50 steps begin at 981, 30 at
    958 and 1 step at 1, where the model expects almost no noise. Lin et al., section 3.3, call this
    a flaw; the official models are used with it. With 1000 steps there is no room for the offset,
    and they are 999 .. 0.
    """
    stride = len(abars) // steps
    offset = 0 if steps == len(abars) else 1
    return [Level(t, abars[t]) for t in (i * stride + offset for i in reversed(range(steps)))]


def trailing(steps: int, abars: Sequence[float]) -> list[Level]:
    """From 999 down by 1000 / steps, rounded (Lin et al., table 2). Models of few steps and those
    of zero terminal SNR need it."""
    n = len(abars)
    return [Level(t, abars[t]) for t in (round(n - k * n / steps) - 1 for k in range(steps))]


def linspace(steps: int, abars: Sequence[float]) -> list[Level]:
    """Evenly from 999 to 0, fractions included, as in k-diffusion; 1 step is at 999."""
    return [at_timestep(t, abars) for t in _evenly(len(abars) - 1, 0, steps)]


def karras(steps: int, abars: Sequence[float]) -> list[Level]:
    """Karras et al., eq. 5, with rho = 7: evenly in ratio^(1/7), between the noisiest level of
    training and the quietest."""
    low, high = (math.exp(log / 7) for log in _log_ratios(abars)[[0, -1]].tolist())
    return [at_ratio(root**7, abars) for root in _evenly(high, low, steps)]


def exponential(steps: int, abars: Sequence[float]) -> list[Level]:
    """Evenly in the logarithm of the ratio."""
    low, high = _log_ratios(abars)[[0, -1]].tolist()
    return [at_ratio(math.exp(log), abars) for log in _evenly(high, low, steps)]


LCM_STEPS = 50


def lcm(steps: int, abars: Sequence[float]) -> list[Level]:
    """Some of the 50 timesteps 19, 39 .. 999 of a latent consistency model's training (Luo et al.
    2023, https://arxiv.org/abs/2310.04378): 4 steps are 999, 759, 499 and 259."""
    most = min(LCM_STEPS, len(abars))
    if steps > most:
        raise ValueError(f"num_inference_steps must be at most {most} with spacing 'lcm', "
                         f"not {steps}")
    stride = len(abars) // most
    trained = [i * stride - 1 for i in range(most, 0, -1)]
    visited = (trained[k * most // steps] for k in range(steps))
    return [Level(t, abars[t]) for t in visited]


SPACINGS: dict[str, Callable[[int, Sequence[float]], list[Level]]] = {
    "leading": leading, "trailing": trailing, "linspace": linspace, "karras": karras,
    "exponential": exponential, "lcm": lcm,
}


@dataclass(frozen=True)
class Ladder:
    """The levels of a call, the noisiest first. The last is where x ends: the UNet never sees it.

    A sampler that needs a level between them takes it from ``alphas_cumprod``.
    """

    levels: list[Level]
    alphas_cumprod: Sequence[float]  # abar of every timestep of training

    def __getitem__(self, i: int) -> Level:
        return self.levels[i]

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def at_ratio(self, ratio: float) -> Level:
        return at_ratio(ratio, self.alphas_cumprod)

    def at_timestep(self, t: float) -> Level:
        return at_timestep(t, self.alphas_cumprod)


def ladder(spacing: str, steps: int, alphas_cumprod: Sequence[float], end: float = 1.0) -> Ladder:
    """A ladder of ``steps`` steps down to ``end``, an abar: 1 is no noise."""
    last = Level(None, end)  # type: ignore[arg-type]
    return Ladder([*SPACINGS[spacing](steps, alphas_cumprod), last], alphas_cumprod)


def at_timestep(t: float, abars: Sequence[float]) -> Level:
    """The level of a timestep; between two of them the logarithm of the ratio is linear in t."""
    if t == int(t):
        return Level(int(t), abars[int(t)])
    log_ratio = np.interp(t, np.arange(len(abars)), _log_ratios(abars))
    return Level(t, 1 / (1 + math.exp(2 * log_ratio)))


def at_ratio(ratio: float, abars: Sequence[float]) -> Level:
    """The level of a ratio sigma / alpha; its timestep as in `at_timestep`, within training's."""
    t = np.interp(math.log(ratio), _log_ratios(abars), np.arange(len(abars)))
    return Level(float(t), 1 / (1 + ratio**2))


def _evenly(high: float, low: float, steps: int) -> list[float]:
    """Numbers from high to low, both included; one is high."""
    return [high - k * (high - low) / max(steps - 1, 1) for k in range(steps)]


def _log_ratios(abars: Sequence[float]) -> np.ndarray:
    """ln(sigma / alpha) of every timestep; of noise alone that of abar 2^-24, as in diffusers."""
    abar = np.maximum(abars, 2.0**-24)
    return np.log((1 - abar) / abar) / 2


# --- what x is made of ---------------------------------------------------------------------------


def add_noise(x0: X, noise: X, abar: float) -> X:
    """A draw of q(x_t | x_0): x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
    return abar**0.5 * x0 + (1.0 - abar) ** 0.5 * noise


def predicted_x0_eps(x: X, prediction: X, abar: float, prediction_type: str) -> tuple[X, X]:
    """The predicted x_0 and eps that x_t is made of; ``prediction`` is the UNet's answer.

    A model of type "v_prediction" was trained to predict v = sqrt(abar) eps - sqrt(1 - abar) x_0.
    """
    if prediction_type == "v_prediction":
        x0 = abar**0.5 * x - (1.0 - abar) ** 0.5 * prediction
        eps = abar**0.5 * prediction + (1.0 - abar) ** 0.5 * x
    else:
        x0 = (x - (1.0 - abar) ** 0.5 * prediction) / abar**0.5
        eps = prediction
    return x0, eps
