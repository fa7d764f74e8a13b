"""How fast the samplers without noise come near the exact solution of their ODE.

A slip in a weight that parity does not see, or that both sides share, costs an order.
"""

import math
from functools import cache

import pytest
from official_samplers import ABARS, ladder_of, official, official_run, run, toy
from small_models import error, randn
from torch import Tensor

from minisd.config import PREDICTION_TYPES
from minisd.samplers import SAMPLERS, schedule
from minisd.samplers.lms import ADAMS_BASHFORTH, lagrange_integrals
from minisd.samplers.schedule import Ladder

X = randn(2, 4, 3, 3)
STEPS = (10, 20, 40, 80)


def slope(y: Tensor, log_ratio: float, kind: str) -> Tensor:
    """dy / d ln ratio of y = x / alpha: the ratio times eps."""
    level = schedule.at_ratio(math.exp(log_ratio), ABARS)
    x = level.alpha * y
    return level.ratio * schedule.predicted_x0_eps(x, toy(x, level.t), level.abar, kind)[1]


@cache
def exact(kind: str, start: float, end: float) -> Tensor:
    """x at the ratio ``end`` by the method of Runge and Kutta, from X at ``start``."""
    n = 1000
    s, h = math.log(start), math.log(end / start) / n
    y = X * math.hypot(1, start)
    for i in range(n):
        a = s + i * h
        k1 = slope(y, a, kind)
        k2 = slope(y + h / 2 * k1, a + h / 2, kind)
        k3 = slope(y + h / 2 * k2, a + h / 2, kind)
        k4 = slope(y + h * k3, a + h, kind)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y / math.hypot(1, end)


def errors(name: str, kind: str, ladders: list[Ladder]) -> list[float]:
    found = []
    for ladder in ladders:
        x = run(SAMPLERS[name](ladder), X, kind)[-1]
        found.append(error(x, exact(kind, ladder[0].ratio, ladder[-1].ratio)))
    return found


def orders(errors: list[float]) -> list[float]:
    """Each number of steps is twice the one before."""
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]


# From the noisiest level of training to the quietest, without the jump to no noise.
KARRAS = [Ladder(schedule.karras(steps + 1, ABARS), ABARS) for steps in STEPS]


@pytest.mark.parametrize(("name", "kind", "at_20", "low", "high"), [
    ("euler", "epsilon", 1.0, 0.95, 1.05), ("euler", "v_prediction", 0.17, 0.95, 1.05),
    ("dpmpp_2m", "epsilon", 0.048, 1.95, 2.3), ("dpmpp_2m", "v_prediction", 0.028, 1.95, 2.3),
    ("heun", "epsilon", 0.064, 1.95, 2.2), ("heun", "v_prediction", 0.025, 1.95, 2.2),
    ("dpm2", "epsilon", 0.064, 1.95, 2.2), ("dpm2", "v_prediction", 0.015, 1.95, 2.2),
    ("dpmpp_2s", "epsilon", 0.057, 1.9, 2.1), ("dpmpp_2s", "v_prediction", 0.012, 1.9, 2.1),
    ("unipc", "epsilon", 0.017, 3.0, 3.3), ("unipc", "v_prediction", 0.010, 3.0, 3.3),
    # The first steps of lms, of order 1 and 2, make most of its error here with eps.
    ("lms", "epsilon", 0.30, 1.7, 2.1), ("lms", "v_prediction", 0.0096, 2.9, 3.7),
    # Uneven steps cost plms its higher orders; see below.
    ("plms", "epsilon", 0.037, 1.9, 3.3), ("plms", "v_prediction", 0.0082, 1.9, 2.3),
])
def test_orders(name, kind, at_20, low, high):
    found = errors(name, kind, KARRAS)
    assert found[1] == pytest.approx(at_20, rel=0.05)
    assert all(low <= order <= high for order in orders(found))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_plms_is_of_higher_order_where_the_steps_are_even(kind):
    """Of order 3, for its second step, of order 2, is made once; then of order 4 as it fades."""
    ladders = [Ladder([schedule.at_ratio(3 - 2.7 * k / steps, ABARS) for k in range(steps + 1)],
                      ABARS) for steps in STEPS[1:]]
    found = errors("plms", kind, ladders)
    assert found[-1] <= 3e-6
    assert all(order >= 2.7 for order in orders(found))


def test_diffusers_plms_is_of_first_order_with_v():
    """It averages v's of several levels and takes the mean for one at this level; ours averages the
    eps that they stand for. With eps the two are one."""
    ours, theirs = [], []
    for steps in (10, 20, 40):
        scheduler = official("PNDMScheduler", steps, timestep_spacing="leading",
                             prediction_type="v_prediction")
        ladder = ladder_of(scheduler)
        ours += errors("plms", "v_prediction", [ladder])
        expected = exact("v_prediction", ladder[0].ratio, ladder[-1].ratio)
        theirs.append(error(official_run(scheduler, X)[-1], expected))
    assert theirs == pytest.approx([0.30, 0.158, 0.082], rel=0.02)
    assert ours == pytest.approx([0.0196, 0.0080, 0.0025], rel=0.05)
    assert all(order < 1 for order in orders(theirs)) and all(o > 1.2 for o in orders(ours))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_weights_of_lms_are_exact_for_polynomials(n):
    """Of up to n slopes up to degree n - 1; over even steps they are those of Adams-Bashforth."""
    known, end = [2.0, 3.1, 5.3, 9.0][:n], 1.2
    weights = lagrange_integrals(known, end)
    for degree in range(n):
        integral = (end ** (degree + 1) - known[0] ** (degree + 1)) / (degree + 1)
        assert sum(w * ratio**degree for w, ratio in zip(weights, known)) == pytest.approx(integral)
    assert lagrange_integrals([3.0, 4.0, 5.0, 6.0][:n], 2.0) == pytest.approx(
        [-w for w in ADAMS_BASHFORTH[n - 1]])
