"""DPM-Solver-2: two calls a step, the second at the middle of the step in lambda.

Source: Lu et al. 2022, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in
Around 10 Steps", https://arxiv.org/abs/2206.00927, algorithm 1, in the form of k-diffusion: it
steps in y = x / alpha, whose derivative by the ratio sigma / alpha is eps.
"""

from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder, Level


def dpm2(ladder: Ladder, eta: float = 0.0) -> Sampler:
    """``eta`` 1 is "DPM2 a", ancestral: a step down to less noise than asked for, then fresh noise.
    """
    shown = with_midpoints(ladder, eta)

    def step(i, x, x0, eps, past, noise):
        now, middle, after = ladder[i // 2], shown[i | 1], ladder[i // 2 + 1]
        if after.sigma == 0:  # the last step has one call
            return x0, past
        down, up = ancestral(now, after, eta)
        if i % 2 == 0:  # a step of DDIM to the middle, and the x that the second call begins from
            return middle.alpha * x0 + middle.sigma * eps, (x,)
        # y' = y + (down - ratio) eps(middle) + up noise
        y = past[0] / now.alpha + (down - now.ratio) * eps + up * noise
        return after.alpha * y, past

    return Sampler(shown, step, memory=1)


def ancestral(now: Level, after: Level, eta: float) -> tuple[float, float]:
    """The ratio to step down to, and that of the noise to add: their squares add up to after's."""
    # up = eta ratio' sqrt(1 - (ratio' / ratio)^2)
    up = eta * after.ratio * (1 - (after.ratio / now.ratio) ** 2) ** 0.5
    return (after.ratio**2 - up**2) ** 0.5, up


def with_midpoints(ladder: Ladder, eta: float) -> list[Level]:
    """The levels, and between two of them the middle in lambda; none before the end without noise,
    which is infinitely far."""
    shown = [ladder[0]]
    for now, after in zip(ladder.levels, ladder.levels[1:]):
        down, _ = ancestral(now, after, eta)
        shown += [ladder.at_ratio((now.ratio * down) ** 0.5)] if after.sigma > 0 else []
        shown.append(after)
    return shown
