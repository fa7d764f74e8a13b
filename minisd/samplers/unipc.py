"""UniPC: a step of DPM++ 2M, corrected when the next call tells what x_0 is there.

Source: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
Diffusion Models", https://arxiv.org/abs/2302.04867, algorithms 1 and 2 of order 2, for x_0, with
B(h) = exp(h) - 1 (called bh2). Its predictor is then DPM++ 2M.
"""

from minisd.samplers.dpm_solver import dpmpp_2m
from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder


def unipc(ladder: Ladder) -> Sampler:
    """The corrector asks for no further call: it uses the x_0 of the call that comes anyway."""
    predictor = dpmpp_2m(ladder)

    def corrected(i, x0, past):
        """x at the i-th level, from the corrected x one level before (``start``), the x_0 there
        and, from the third call on, the x_0 another level before."""
        start, x0_1, x0_2 = past
        now, before = ladder[i], ladder[i - 1]
        b = 1 - now.ratio / before.ratio                                     # 1 - exp(-h)
        if i == 1:
            slope = (x0 - x0_1) / 2
        else:
            # The weights that make the sum exact for an x_0 of second degree in lambda (eq. 5).
            h = now.lam - before.lam
            r = (ladder[i - 2].lam - before.lam) / h
            b1 = (1 - b / h) / b
            b2 = 2 * (1 / 2 - b1 * b / h) / b
            w = (b1 - b2) / (1 - r)
            slope = w * (x0_2 - x0_1) / r + (b1 - w) * (x0 - x0_1)
        return now.sigma / before.sigma * start + now.alpha * b * (x0_1 + slope)

    def step(i, x, x0, eps, past, noise):
        # x_0 is that of the x that the UNet saw, not of the corrected one.
        if i > 0:
            x = corrected(i, x0, past)
        after, _ = predictor.step(i, x, x0, eps, past[1:], noise)
        return after, (x, x0, past[1])

    return Sampler(ladder.levels, step, memory=3)
