"""DPM-Solver++: the two solvers of second order that people use most.

The probability-flow ODE in lambda = ln(alpha / sigma) has one part that is linear in x and is
solved exactly, and one in x_0, which is approximated by a polynomial.

Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
Models", https://arxiv.org/abs/2211.01095. exp(-h) there, for a step h in lambda, is the ratio
sigma / alpha after the step over that before it.
"""

from minisd.samplers.dpm2 import ancestral, with_midpoints
from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder


def dpmpp_2m(ladder: Ladder, eta: float = 0.0) -> Sampler:
    """DPM++ 2M, algorithm 2: x_0 at the middle of the step, from this call's and the last one's.

    ``eta`` 1 is 2M SDE, the same for the diffusion SDE (section 5, eq. 21), which adds noise.
    """
    def step(i, x, x0, eps, past, noise):
        now, after = ladder[i], ladder[i + 1]
        if after.sigma == 0:  # h is infinite, and x_0 is all that is left
            return x0, past
        decay = after.ratio / now.ratio                                      # exp(-h)
        middle = x0
        if i > 0:
            r = (now.lam - ladder[i - 1].lam) / (after.lam - now.lam)
            middle = x0 + (x0 - past[0]) / (2 * r)
        # x' = sigma'/sigma exp(-eta h) x + alpha' (1 - exp(-(1 + eta) h)) x_0(middle)
        #      + sigma' sqrt(1 - exp(-2 eta h)) noise
        x = (after.sigma / now.sigma * decay**eta * x
             + after.alpha * (1 - decay ** (1 + eta)) * middle
             + after.sigma * (1 - decay ** (2 * eta)) ** 0.5 * noise)
        return x, (x0,)

    return Sampler(ladder.levels, step, memory=1)


def dpmpp_2s(ladder: Ladder, eta: float = 0.0) -> Sampler:
    """DPM++ 2S, algorithm 1: two calls a step, the second at the middle of the step in lambda.

    ``eta`` 1 is "DPM++ 2S a", ancestral as in k-diffusion: a step down to less noise than asked
    for, then fresh noise.
    """
    shown = with_midpoints(ladder, eta)

    def step(i, x, x0, eps, past, noise):
        now, middle, after = ladder[i // 2], shown[i | 1], ladder[i // 2 + 1]
        if after.sigma == 0:
            return x0, past
        down, up = ancestral(now, after, eta)
        if i % 2 == 0:  # a step of DDIM to the middle, and the x that the second call begins from
            return middle.alpha * x0 + middle.sigma * eps, (x,)
        # y' = exp(-h) y + (1 - exp(-h)) x_0(middle), in y = x / alpha
        decay = down / now.ratio
        y = decay / now.alpha * past[0] + (1 - decay) * x0 + up * noise
        return after.alpha * y, past

    return Sampler(shown, step, memory=1)
