"""One denoise step, spelled out: the UNet's prediction, guidance, and the sampler's step.

The loop in pipeline.py asks one object for the next x, and does not know which: this one, or the
fused one of minisd_kernels, which computes the same on a repacked UNet.

B latents, M contexts (B, or 2B with guidance), h w height and width of the latent
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.samplers import ddim


@dataclass(frozen=True)
class Steps:
    """The denoise steps of a call: ``x = steps(x, i, noise)`` is the i-th."""

    unet: Callable[[Tensor, Tensor, Tensor], Tensor]
    context: Tensor          # (M, 77, D): with guidance the negative prompts, then the prompts
    extra: Tensor | None     # (B, 5, h, w), what an inpainting UNet sees beside x
    timesteps: list[int]     # the noisiest first
    abars: list[float]       # of the timesteps, and of what comes after the last
    prediction_type: str
    guidance_scale: float
    eta: float

    def __call__(self, x: Tensor, i: int, noise: Tensor | None = None) -> Tensor:
        """x (B, 4, h, w) at the i-th timestep -> x at the next; ``noise`` if eta is not 0."""
        prediction = self.predict(x, self.timesteps[i])                      # (B, 4, h, w)
        return ddim.step(x, prediction, self.abars[i], self.abars[i + 1], self.prediction_type,
                         self.eta, noise)

    def predict(self, x: Tensor, t: int) -> Tensor:
        """The UNet's prediction for x (B, 4, h, w), with guidance unless its scale is 1."""
        inputs = x if self.extra is None else torch.cat([x, self.extra], dim=1)
        # Guidance compares what the UNet says with the prompt and with the negative prompt, which
        # may be empty. Both go through it side by side, so the batch is twice as large.
        inputs = inputs.repeat(len(self.context) // len(x), 1, 1, 1)         # (M, 4 or 9, h, w)
        times = torch.full((len(inputs),), t, device=x.device)
        prediction = self.unet(inputs.to(self.context), times, self.context).to(x)
        if self.guidance_scale == 1.0:
            return prediction
        # Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6,
        # where s = 1 + w):  eps = eps_uncond + s (eps_cond - eps_uncond)
        uncond, cond = prediction.chunk(2)                                   # (B, 4, h, w)
        return uncond + self.guidance_scale * (cond - uncond)
