"""One call of the UNet, spelled out: its prediction, guidance, and the sampler's step.

The loop in pipeline.py asks one object for the next state, and does not know which: this one, or
the fused one of minisd_kernels, which computes the same on a repacked UNet.

B latents, M contexts (B, or 2B with guidance), h w height and width of the latent, K tensors of the
sampler: x and those that it remembers
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from minisd.samplers import schedule
from minisd.samplers.sampler import Sampler, coefficients, draws


def first_state(sampler: Sampler, x: Tensor) -> Tensor:
    """x (B, 4, h, w) -> the state (K + 1, B, 4, h, w): x, what the sampler remembers, which is
    nothing yet, and room for the predicted x_0."""
    return torch.cat([x[None], x.new_zeros(sampler.memory + 1, *x.shape)])


@dataclass(frozen=True)
class Steps:
    """The steps of a call: ``state = steps(state, i, noise)`` is the i-th."""

    unet: Callable[..., Tensor]
    context: Tensor          # (M, 77, D): with guidance the negative prompts, then the prompts
    extra: Tensor | None     # (B, 5, h, w), what an inpainting UNet sees beside x
    sampler: Sampler
    prediction_type: str
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    told: Mapping[str, Tensor] = field(default_factory=dict)  # further arguments of the UNet

    @cached_property
    def coefficients(self) -> Tensor:
        """Every call as a matrix, see samplers/sampler.py."""
        return coefficients(self.sampler, self.prediction_type)

    @property
    def draws(self) -> list[bool]:
        """Whether each call draws noise."""
        return draws(self.coefficients)

    def __call__(self, state: Tensor, i: int, noise: Tensor | None = None) -> Tensor:
        """The state (K + 1, B, 4, h, w) at the i-th call -> the next; ``noise`` where it draws."""
        x, *past, _ = state
        level = self.sampler.shown[i]
        prediction = self.predict(x, level.t)                                # (B, 4, h, w)
        x0, eps = schedule.predicted_x0_eps(x, prediction, level.abar, self.prediction_type)
        x, remembered = self.sampler.step(
            i, x, x0, eps, tuple(past), 0.0 if noise is None else noise)
        return torch.stack([x, *remembered, x0])                             # (K + 1, B, 4, h, w)

    def predict(self, x: Tensor, t: float) -> Tensor:
        """The UNet's prediction for x (B, 4, h, w), with guidance where there are two contexts."""
        inputs = x if self.extra is None else torch.cat([x, self.extra], dim=1)
        # Guidance compares what the UNet says with the prompt and with the negative prompt, which
        # may be empty. Both go through it side by side, so the batch is twice as large.
        inputs = inputs.repeat(len(self.context) // len(x), 1, 1, 1)         # (M, ..., h, w)
        # A fraction of a timestep needs its digits; Apple's GPUs have no float64.
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        times = torch.full((len(inputs),), t, dtype=wide, device=x.device)
        prediction = self.unet(inputs.to(self.context), times, self.context, **self.told).to(x)
        if len(prediction) == len(x):
            return prediction
        return guided(prediction, self.guidance_scale, self.guidance_rescale or None)


def guided(predictions: Tensor, scale: float | Tensor, rescale: float | Tensor | None) -> Tensor:
    """Predictions (2B, 4, h, w) without and with the prompts -> (B, 4, h, w)."""
    # Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6,
    # where s = 1 + w):  eps = eps_uncond + s (eps_cond - eps_uncond)
    uncond, cond = predictions.chunk(2)                                      # (B, 4, h, w)
    both = uncond + scale * (cond - uncond)
    if rescale is None:
        return both
    # A large scale makes the prediction vary more than those it was trained on. Lin et al. 2023,
    # https://arxiv.org/abs/2305.08891, eq. 15 and 16, give a share of it cond's deviation again.
    std_cond, std_both = (y.std(dim=(1, 2, 3), keepdim=True) for y in (cond, both))
    return rescale * (std_cond / std_both) * both + (1 - rescale) * both
