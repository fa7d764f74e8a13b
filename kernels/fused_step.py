"""A denoise step around the fused UNet, whole: what does not change is made once, and a GPU
replays a graph.

On a GPU a step is one graph for a batch and a size (graphs.py); prompts, guidance and schedules
change only what its input buffers hold.

Guidance and the DDIM update are linear in x, the UNet's answers and fresh noise, so that a step
ends in one weighted sum; the weights of all steps are a table, made once.

B latents, M contexts (B or 2B), C channels, h w height and width of the latent
"""

from functools import partial
from itertools import pairwise

import torch
from minisd_kernels.fused_unet import FusedUNet
from torch import Tensor

from minisd import ddim


def weights(alphas: list[float], prediction_type: str, eta: float, guidance_scale: float
            ) -> list[list[float]]:
    """For each step from one signal share to the next, the weights of x, of the answer without
    the prompt (but with a scale of 1) and with it, and of noise (but with an ``eta`` of 0)."""
    halves = [1.0] if guidance_scale == 1.0 else [1.0 - guidance_scale, guidance_scale]
    table = []
    for a, a_next in pairwise(alphas):
        # A linear function's weight of an input is what it makes of 1 there and 0 elsewhere.
        x, prediction, noise = (
            ddim.step(one[0], one[1], a, a_next, prediction_type, eta, one[2])
            for one in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
        table.append([x, *(prediction * half for half in halves), *([noise] if eta > 0 else [])])
    return table


def advance(unet: FusedUNet, x: Tensor, times: Tensor, weights: Tensor, fresh: Tensor | None,
            extra: Tensor | None, *prompt: Tensor) -> Tensor:
    """One step, from x (B, C, h, w) to the next x."""
    shown = x if extra is None else torch.cat([x, extra], dim=1)
    answers = unet.step(shown.to(times), times, prompt)                      # (M, C, h, w)
    terms = torch.cat([x, answers] if fresh is None else [x, answers, fresh])
    terms = terms.unflatten(0, (len(weights), len(x)))                       # (2 to 4, B, C, h, w)
    return (weights.view(-1, 1, 1, 1, 1) * terms).sum(dim=0)


class Steps:
    """The denoise steps of one picture or batch: ``x = steps(x, i)`` is the i-th."""

    @torch.no_grad()
    def __init__(self, unet: FusedUNet, context: Tensor, timesteps: list[int],
                 table: list[list[float]], extra: Tensor | None = None):
        """context (M, L, D); timesteps as they will be walked, and a row of `weights` for each;
        ``extra``: what an inpainting UNet sees beside x, (B, 5, h, w)."""
        self.unet = unet
        self.times = unet.times(torch.tensor(timesteps, device=context.device))
        state = torch.promote_types(context.dtype, torch.float32)
        self.table = torch.tensor(table, dtype=state, device=context.device)
        self.fixed: tuple[Tensor | None, *tuple[Tensor, ...]] = extra, *unet.prompt(context)

    @torch.no_grad()
    def __call__(self, x: Tensor, i: int, fresh: Tensor | None = None) -> Tensor:
        """Latents x (B, C, h, w), in float32 or more, to the next; ``fresh`` noise is alike."""
        changing = x, self.times[i], self.table[i], fresh
        if x.device.type != "cuda":
            return advance(self.unet, *changing, *self.fixed)
        extra, *prompt = self.fixed
        size = *x.shape, x.dtype, *prompt[0].shape[:2], fresh is None, extra is None
        return self.unet.graphs(("step", *size), partial(advance, self.unet), changing, self.fixed)
