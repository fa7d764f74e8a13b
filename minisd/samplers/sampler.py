"""What a sampler is: the levels that the UNet is shown, and one step, linear in every tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minisd.samplers.schedule import Level, predicted_x0_eps

Past: TypeAlias = tuple[Tensor, ...]
# (i, x, x0, eps, past, noise) -> (the next x, what to remember): pure, and linear in every tensor.
# x0 and eps are what the UNet's answer to the i-th call says that x is made of; noise is a fresh
# draw of N(0, I), or 0.0 where its weight is 0.
Step: TypeAlias = Callable[
    [int, Tensor, Tensor, Tensor, Past, Tensor | float], tuple[Tensor, Past]]


@dataclass(frozen=True)
class Sampler:
    """How to go down a ladder.

    Nothing else is written for a sampler: that a call draws noise, and the weights of the fused
    step, follow from `coefficients`.
    """

    shown: Sequence[Level]  # of x at each call of the UNet, and after the last
    step: Step
    memory: int = 0         # how many tensors ``past`` has; zeros at first

    @property
    def calls(self) -> int:
        return len(self.shown) - 1


def coefficients(sampler: Sampler, prediction_type: str) -> Tensor:
    """Every call as a matrix (calls, memory + 2, memory + 3), float64.

    Rows are the next x, what is remembered, and the predicted x_0; columns are x, what was
    remembered, the UNet's prediction and the noise.
    """
    # A column of a linear function is its value at 1 there and 0 elsewhere: at a unit vector.
    x, *past, prediction, noise = torch.eye(sampler.memory + 3, dtype=torch.float64, device="cpu")
    calls = []
    for i, level in enumerate(sampler.shown[:-1]):
        x0, eps = predicted_x0_eps(x, prediction, level.abar, prediction_type)
        after, remembered = sampler.step(i, x, x0, eps, tuple(past), noise)
        calls.append(torch.stack([after, *remembered, x0]))
    return torch.stack(calls)


def draws(coefficients: Tensor) -> list[bool]:
    """Whether each call draws noise: where it has a weight."""
    return coefficients[..., -1].any(dim=1).tolist()
