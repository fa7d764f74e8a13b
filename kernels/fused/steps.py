"""A whole denoise step around the fused UNet: constants are computed once, a GPU replays a graph.

On a GPU a step is one graph per batch and size (graph.py); prompts, guidance and schedules change
only the contents of its input buffers.

Guidance and the DDIM update are linear in x, the UNet's predictions and the noise, so a step ends
in one weighted sum; the weights of all steps are a table, computed once.

B latents, M contexts (B or 2B), C channels, h w height and width of the latent
"""

from functools import partial
from itertools import pairwise

import torch
from minisd_kernels.fused import graph as graphs
from minisd_kernels.fused.unet import FusedUNet
from torch import Tensor

from minisd.samplers import ddim


def weights(abars: list[float], prediction_type: str, eta: float, guidance_scale: float
            ) -> list[list[float]]:
    """A row for each step from one abar (alpha-bar) to the next: the weights of x, of the
    unconditional prediction (unless the scale is 1), of the conditional one, and of the noise
    (unless ``eta`` is 0)."""
    halves = [1.0] if guidance_scale == 1.0 else [1.0 - guidance_scale, guidance_scale]
    table = []
    for abar, abar_next in pairwise(abars):
        # The weight of an input of a linear function is its value at 1 there and 0 elsewhere.
        x, prediction, noise = (
            ddim.step(one[0], one[1], abar, abar_next, prediction_type, eta, one[2])
            for one in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
        table.append([x, *(prediction * half for half in halves), *([noise] if eta > 0 else [])])
    return table


def advance(unet: FusedUNet, x: Tensor, times: Tensor, weights: Tensor, noise: Tensor | None,
            extra: Tensor | None, *prompt: Tensor) -> Tensor:
    """One step, from x (B, C, h, w) to the next x."""
    inputs = x if extra is None else torch.cat([x, extra], dim=1)
    predictions = unet.step(inputs.to(times), times, prompt)                 # (M, C, h, w)
    terms = torch.cat([x, predictions] if noise is None else [x, predictions, noise])
    terms = terms.unflatten(0, (len(weights), len(x)))                       # (2 to 4, B, C, h, w)
    return (weights.view(-1, 1, 1, 1, 1) * terms).sum(dim=0)


class Steps:
    """The denoise steps of one image or batch: ``x = steps(x, i)`` is the i-th."""

    @torch.no_grad()
    def __init__(self, unet: FusedUNet, context: Tensor, timesteps: list[int],
                 table: list[list[float]], extra: Tensor | None = None):
        """context (M, L, D); timesteps in the order of the steps, and a row of `weights` for each;
        ``extra``: the further channels of an inpainting UNet, (B, 5, h, w)."""
        self.unet = unet
        self.times = unet.times(torch.tensor(timesteps, device=context.device))
        state = torch.promote_types(context.dtype, torch.float32)
        self.table = torch.tensor(table, dtype=state, device=context.device)
        self.fixed: tuple[Tensor | None, *tuple[Tensor, ...]] = extra, *unet.prompt(context)

    @torch.no_grad()
    def __call__(self, x: Tensor, i: int, noise: Tensor | None = None) -> Tensor:
        """Latents x (B, C, h, w), in float32 or more, to the next; ``noise`` has the same form."""
        changing = x, self.times[i], self.table[i], noise
        if not graphs.records(x):
            return advance(self.unet, *changing, *self.fixed)
        extra, *prompt = self.fixed
        size = *x.shape, x.dtype, *prompt[0].shape[:2], noise is None, extra is None
        return self.unet.graphs(("step", *size), partial(advance, self.unet), changing, self.fixed)
