"""Heun's method of second order: two calls a step, and the mean of the slopes at its two ends.

Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1. They step in
y = x / alpha, whose derivative by the ratio sigma / alpha is eps.
"""

from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder


def heun(ladder: Ladder) -> Sampler:
    """The last step, to no noise, is one of Euler's with one call."""
    first, *inner, last = ladder.levels
    shown = [first, *(level for level in inner for _ in range(2)), last]

    def step(i, x, x0, eps, past, noise):
        now, after = ladder[i // 2], ladder[i // 2 + 1]
        if i % 2 == 0:
            # Euler's step to where the second call is, and half of it for the result.
            half = x / now.alpha + (after.ratio - now.ratio) / 2 * eps
            return after.alpha * x0 + after.sigma * eps, (after.alpha * half,)
        return past[0] + after.alpha * (after.ratio - now.ratio) / 2 * eps, past

    return Sampler(shown, step, memory=1)
