"""The noise schedule and the DDIM sampler, as pure functions of numbers and tensors.

A clean latent x0 and noise e mix to  x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e,  where a_t falls from
almost 1 to almost 0 as t grows. Sampling walks back: from x_t and what is predicted about it,
estimate x0 and e, and mix them again at the next, smaller noise.

Source: Song et al. 2020, "Denoising Diffusion Implicit Models" (alpha there is a here);
v is from Salimans & Ho 2022.
"""

import torch
from torch import Tensor

from minisd.config import ScheduleConfig


def alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """The share of signal a_t left at each training timestep: (num_train_timesteps,), float64."""
    # The square roots of the betas are evenly spaced ("scaled linear"), not the betas.
    betas = torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps,
        dtype=torch.float64,
    ).square()
    return torch.cumprod(1.0 - betas, dim=0)


def timesteps(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps to visit, noisiest first: exactly ``steps`` of them, 1 .. 1000.

    Evenly spaced from 1 ("leading" spacing with offset 1). With 1000 steps there is no room for
    the offset, and they are 999 .. 0.
    """
    stride = num_train_timesteps // steps
    offset = 0 if steps == num_train_timesteps else 1
    return [i * stride + offset for i in reversed(range(steps))]


def add_noise(x0: Tensor, noise: Tensor, a: float) -> Tensor:
    """x_t of a clean x0: eq. 4 of the DDIM paper."""
    return a**0.5 * x0 + (1.0 - a) ** 0.5 * noise


def split(x: Tensor, prediction: Tensor, a: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that x_t is made of, as the prediction has it."""
    if prediction_type == "v_prediction":
        x0 = a**0.5 * x - (1.0 - a) ** 0.5 * prediction
        noise = a**0.5 * prediction + (1.0 - a) ** 0.5 * x
    else:
        x0 = (x - (1.0 - a) ** 0.5 * prediction) / a**0.5
        noise = prediction
    return x0, noise


def step(
    x: Tensor, prediction: Tensor, a: float, a_next: float, prediction_type: str,
    eta: float = 0.0, noise: Tensor | None = None,
) -> Tensor:
    """From x_t at signal share ``a`` to the next x at ``a_next``: eq. 12 and 16.

    ``eta`` 0 is deterministic, 1 adds as much fresh ``noise`` as DDPM does. At the last step
    ``a_next`` is that of timestep 0, not 1: the official models were sampled so, and x0 is not
    clipped.
    """
    x0, e = split(x, prediction, a, prediction_type)
    sigma = eta * ((1.0 - a_next) / (1.0 - a)) ** 0.5 * (1.0 - a / a_next) ** 0.5
    x = a_next**0.5 * x0 + (1.0 - a_next - sigma**2) ** 0.5 * e
    return x if noise is None else x + sigma * noise
