"""The noise schedule: how much noise there is at each timestep, and what x_t is made of.

Training mixed a clean latent x_0 with Gaussian noise eps (Ho et al. 2020, eq. 4):

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

where abar_t (alpha-bar) falls from almost 1 to almost 0 as t grows.

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239;
Salimans & Ho 2022, https://arxiv.org/abs/2202.00512 (v).
"""

from typing import TypeVar

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
    # Zero terminal SNR (Lin et al. 2023, algorithm 1): r = sqrt(abar) is shifted and stretched so
    # that the last timestep is noise alone and the first is as it was.
    r = abar.sqrt()
    return ((r - r[-1]) * r[0] / (r[0] - r[-1])).square()


def timesteps(
    num_inference_steps: int, num_train_timesteps: int = 1000, spacing: str = "leading",
) -> list[int]:
    """The timesteps to visit, the noisiest first: exactly ``num_inference_steps`` of them.

    "leading", with offset 1, as the official scripts have it: multiples of a whole stride, plus 1.
    So sampling starts from pure noise at a t that is less than 999: 50 steps begin at 981, 30 at
    958 and 1 step at 1, where the model expects almost no noise. Lin et al. 2023,
    https://arxiv.org/abs/2305.08891, section 3.3, call this a flaw; the official models are used
    with it. With 1000 steps there is no room for the offset, and they are 999 .. 0.

    "trailing", which they propose, begins at 999 and goes down by 1000 / steps, rounded. Models of
    few steps and those of zero terminal SNR need it.
    """
    if spacing == "trailing":
        n, steps = num_train_timesteps, num_inference_steps
        return [round(n - k * n / steps) - 1 for k in range(steps)]
    stride = num_train_timesteps // num_inference_steps
    offset = 0 if num_inference_steps == num_train_timesteps else 1
    return [i * stride + offset for i in reversed(range(num_inference_steps))]


def abars(every: list[float], timesteps: list[int], spacing: str = "leading") -> list[float]:
    """abar_t of the timesteps, and of what comes after the last: with "leading" spacing the noise
    level of timestep 0, a little noise, as the official models are sampled; else no noise, 1."""
    last = every[0] if spacing == "leading" else 1.0
    return [every[t] for t in timesteps] + [last]


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
