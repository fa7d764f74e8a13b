"""A whole denoise step around the fused UNet: constants are computed once, a GPU replays a graph.

On a GPU a step is one graph per batch, size and number of tensors that the sampler keeps
(graph.py); prompts, guidance, samplers and their ladders change only the contents of its input
buffers.

Guidance and every sampler's step are linear in x, what is remembered, the UNet's predictions and
the noise, so a step ends in weighted sums of these; the weights of all steps are a table, computed
once from the readable step.

B latents, M contexts (B or 2B), C channels, h w height and width of the latent, K tensors of the
sampler: x and those that it remembers
"""

from collections.abc import Sequence
from functools import partial

import torch
from minisd_kernels.fused import graph as graphs
from minisd_kernels.fused.unet import FusedUNet
from torch import Tensor

from minisd.samplers.sampler import draws
from minisd.steps import guided


def weights(coefficients: Tensor, guidance_scale: float) -> Tensor:
    """The table of a sampler (calls, K + 1, K + 2) with guidance folded in: the weights of the K
    tensors, of the unconditional prediction (unless the scale is 1), of the conditional one, and of
    the noise (unless no call draws any)."""
    kept, prediction, noise = coefficients.split([coefficients.shape[1] - 1, 1, 1], dim=2)
    halves = [1.0] if guidance_scale == 1.0 else [1.0 - guidance_scale, guidance_scale]
    predictions = [prediction * half for half in halves]
    return torch.cat([kept, *predictions, *[noise] * any(draws(coefficients))], dim=2)


def advance(unet: FusedUNet, state: Tensor, times: Tensor, weights: Tensor, noise: Tensor | None,
            guidance: Tensor | None, extra: Tensor | None, *prompt: Tensor) -> Tensor:
    """One step, from the state (K + 1, B, C, h, w) to the next; its last tensor is x_0."""
    x = state[0]
    inputs = x if extra is None else torch.cat([x, extra], dim=1)
    if times.dim() > 1:  # classes, in which the halves of guidance may differ
        inputs = inputs.repeat(len(times) // len(x), 1, 1, 1)                # (M, C, h, w)
    predictions = unet.step(inputs.to(times), times, prompt)                 # (M, C, h, w)
    if guidance is not None:  # rescaled, which is not linear
        predictions = guided(predictions.to(x), *guidance)                   # (B, C, h, w)
    terms = [state[:-1].flatten(0, 1), predictions, *([] if noise is None else [noise])]
    terms = torch.cat(terms).unflatten(0, (weights.shape[1], len(x)))        # (n, B, C, h, w)
    return (weights[:, :, None, None, None, None] * terms).sum(dim=1)        # (K + 1, B, C, h, w)


class Steps:
    """The denoise steps of one image or batch: ``state = steps(state, i)`` is the i-th."""

    @torch.no_grad()
    def __init__(self, unet: FusedUNet, context: Tensor, timesteps: Sequence[float],
                 table: Tensor, extra: Tensor | None = None, noisy: bool = False,
                 guidance: Sequence[float] | None = None, class_vector: Tensor | None = None,
                 timestep_cond: Tensor | None = None):
        """context (M, L, D); timesteps in the order of the calls, and the `weights` of each;
        ``extra``: the further channels of an inpainting UNet, (B, 5, h, w); ``noisy``: whether the
        table has a column of noise; ``guidance``: scale and rescale, where it has one column of
        predictions for two contexts; ``class_vector`` (M, n) or (M,): as the UNet's;
        ``timestep_cond``: as the UNet's, of one image."""
        self.unet, self.noisy = unet, noisy
        at = torch.tensor(timesteps, dtype=torch.float32, device=context.device)
        if class_vector is None:
            self.times = unet.times(at, None, timestep_cond)                 # (S, all widths)
        else:
            m, each = len(class_vector), [len(at)] + [1] * (class_vector.dim() - 1)
            times = unet.times(at.repeat_interleave(m), class_vector.repeat(each))
            self.times = times.unflatten(0, (-1, m))                         # (S, M, all widths)
        state = torch.promote_types(context.dtype, torch.float32)
        self.table = table.to(context.device, state)
        self.guidance = None if guidance is None else torch.tensor(
            guidance, dtype=torch.float64, device="cpu").to(self.table)
        self.fixed: tuple[Tensor | None, *tuple[Tensor, ...]] = extra, *unet.prompt(context)

    @torch.no_grad()
    def __call__(self, state: Tensor, i: int, noise: Tensor | None = None) -> Tensor:
        """The state (K + 1, B, C, h, w), in float32 or more, to the next; ``noise`` (B, C, h, w) at
        a call that draws."""
        if self.noisy and noise is None:  # one graph serves the other calls too
            noise = torch.zeros_like(state[0])
        changing = state, self.times[i], self.table[i], noise, self.guidance
        if not graphs.records(state):
            return advance(self.unet, *changing, *self.fixed)
        extra, *prompt = self.fixed
        nones = noise is None, self.guidance is None, extra is None
        size = *state.shape, state.dtype, *prompt[0].shape[:2], self.times.dim(), *nones
        return self.unet.graphs(("step", *size), partial(advance, self.unet), changing, self.fixed)
