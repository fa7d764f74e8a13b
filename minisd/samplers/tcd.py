"""Trajectory consistency distillation: each call jumps along the ODE, and some noise is added.

Source: Zheng et al. 2024, "Trajectory Consistency Distillation", https://arxiv.org/abs/2402.19159,
algorithm 1 (strategic stochastic sampling).
"""

from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder


def tcd(ladder: Ladder, eta: float = 0.3) -> Sampler:
    """``eta``, gamma in the paper: the share of the way to noise alone; 0 is DDIM, 1 jumps to x_0
    at every call. It ends at timestep 0.
    """
    def step(i, x, x0, eps, past, noise):
        after = ladder[i + 1]
        end = ladder.at_timestep(0) if after.t is None else after
        # Down to s = (1 - gamma) t', and up again to t' with fresh noise.
        down = ladder.at_timestep(int((1 - eta) * end.t))
        k = end.alpha / down.alpha
        return k * (down.alpha * x0 + down.sigma * eps) + (1 - k**2) ** 0.5 * noise, past

    return Sampler(ladder.levels, step)
