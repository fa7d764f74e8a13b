"""Latent consistency models: each call jumps to x_0, and noise is added for the next one.

Source: Luo et al. 2023, "Latent Consistency Models", https://arxiv.org/abs/2310.04378, algorithm 3;
the boundary weights are eq. 9 of Song et al. 2023, https://arxiv.org/abs/2303.01469, with
sigma_data = 0.5 and time counted tenfold, as in the authors' code.
"""

from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder


def lcm(ladder: Ladder) -> Sampler:
    """For models and LoRAs that were distilled for it."""
    def step(i, x, x0, eps, past, noise):
        now, after = ladder[i], ladder[i + 1]
        # f(x, t) = c_skip x + c_out x_0, which is x at t = 0:
        # c_skip = 0.5^2 / ((10 t)^2 + 0.5^2),  c_out = 10 t / sqrt((10 t)^2 + 0.5^2)
        s = 10 * now.t / 0.5
        consistent = x / (s**2 + 1) + s / (s**2 + 1) ** 0.5 * x0
        return after.alpha * consistent + after.sigma * noise, past

    return Sampler(ladder.levels, step)
