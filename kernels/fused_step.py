"""The fused UNet asked once a step: what does not change is made once, and a GPU replays a graph.

A step of SD1.5 is some four hundred launches of a few microseconds each, and Python cannot issue
them as fast as a GPU runs them. A CUDA graph records them once for a batch and a size and replays
them as one; prompts, guidance and schedules change only what its input buffers hold. Guidance and
the DDIM update stay outside, where a reader finds them: some thirteen small launches, which are
issued while the graph still runs, since nothing waits for it.

B latents, M contexts (B or 2B), C channels, h w height and width of the latent
"""

import torch
from torch import Tensor

from minisd_kernels.fused_unet import FusedUNet


class Graph:
    """One recorded step, for one batch and size, with buffers of its own."""

    def __init__(self, unet: FusedUNet, x: Tensor, times: Tensor, prompt: list):
        self.x, self.times = x.clone(), times.clone()
        self.prompt = [(k.clone(), v.clone()) for k, v in prompt]
        self.holds = prompt
        inputs = (self.x, self.times, self.prompt)
        # Once outside the graph: the first call compiles kernels and lets libraries choose theirs.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            unet.step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = unet.step(*inputs)

    def replay(self, x: Tensor, times: Tensor, prompt: list) -> Tensor:
        """The prediction (M, 4, h, w), in a buffer that the next replay overwrites."""
        self.x.copy_(x)
        self.times.copy_(times)
        if prompt is not self.holds:
            for (k, v), (new_k, new_v) in zip(self.prompt, prompt):
                k.copy_(new_k)
                v.copy_(new_v)
            self.holds = prompt
        self.graph.replay()
        return self.out


class Steps:
    """The UNet's answers for one picture or batch: ``steps(x, i)`` at the i-th timestep."""

    @torch.no_grad()
    def __init__(self, unet: FusedUNet, context: Tensor, timesteps: list[int]):
        """context (M, L, D); timesteps as they will be walked."""
        self.unet = unet
        self.prompt = unet.prompt(context)
        self.times = unet.times(torch.tensor(timesteps, device=context.device))

    @torch.no_grad()
    def __call__(self, x: Tensor, i: int) -> Tensor:
        """Latents (B, C, h, w) -> predictions (M, 4, h, w); on a GPU valid until the next call."""
        if x.device.type != "cuda":
            return self.unet.step(x, self.times[i], self.prompt)
        size = (*x.shape, len(self.prompt[0][0]))
        graphs = self.unet.graphs
        if size not in graphs:
            graphs[size] = Graph(self.unet, x, self.times[i], self.prompt)
        return graphs[size].replay(x, self.times[i], self.prompt)
