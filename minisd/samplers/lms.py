"""Linear multistep methods: the slope over a step, extrapolated from up to four calls.

Both step in y = x / alpha, whose derivative by the ratio sigma / alpha is eps. lms integrates the
polynomial through the last slopes exactly, whatever the levels. plms takes the weights that are
right for even steps (Adams-Bashforth), as the first Stable Diffusion did.

Sources: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
https://arxiv.org/abs/2202.09778, eq. 12 (plms); k-diffusion's sample_lms.
"""

import numpy as np

from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder

ADAMS_BASHFORTH = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


def lms(ladder: Ladder) -> Sampler:
    """Of order 4, after three steps of lower order."""
    def step(i, x, x0, eps, past, noise):
        now, after, slopes = ladder[i], ladder[i + 1], (eps, *past)
        known = [ladder[i - j].ratio for j in range(min(i + 1, len(slopes)))]
        y = x / now.alpha
        for weight, slope in zip(lagrange_integrals(known, after.ratio), slopes):
            y = y + weight * slope
        return after.alpha * y, slopes[:3]

    return Sampler(ladder.levels, step, memory=3)


def lagrange_integrals(known: list[float], end: float) -> list[float]:
    """The integral from known[0] to ``end`` of each polynomial that is 1 at one of the ``known``
    and 0 at the others."""
    places = [ratio - known[0] for ratio in known]  # from known[0], lest digits cancel
    integrals = []
    for j, own in enumerate(places):
        others = places[:j] + places[j + 1 :]
        polynomial = np.atleast_1d(np.poly(others)) / np.prod([own - other for other in others])
        integrals.append(float(np.polyval(np.polyint(polynomial), end - known[0])))
    return integrals


def plms(ladder: Ladder) -> Sampler:
    """Of order 4. The first step is one of Heun's method, with a second call at the next level,
    whose slope is not remembered.

    The slopes are of eps, for a model that predicts v too. The first scripts took v for eps, and
    diffusers averages v, which is of first order only.
    """
    first, *rest = ladder.levels
    shown = [first, *rest[:1], *rest] if ladder.steps > 1 else ladder.levels

    def step(i, x, x0, eps, past, noise):
        now, after = ladder[max(i - 1, 0)], ladder[max(i, 1)]
        if i == 0:  # Euler's step, and half of it for the result of the second call
            half = x / now.alpha + (after.ratio - now.ratio) / 2 * eps
            return after.alpha * x0 + after.sigma * eps, (eps, half, 0 * eps)
        if i == 1:
            y = past[1] + (after.ratio - now.ratio) / 2 * eps
            return after.alpha * y, (past[0], 0 * eps, 0 * eps)
        y, slopes = x / now.alpha, (eps, *past)
        for weight, slope in zip(ADAMS_BASHFORTH[min(i, 4) - 1], slopes):
            y = y + (after.ratio - now.ratio) * weight * slope
        return after.alpha * y, slopes[:3]

    return Sampler(shown, step, memory=3)
