"""The VAE's decoder, repacked like the fused UNet and from the same parts; and both together.

unet.py describes the differences: layout, pending sums, one matrix for q, k and v, and
doubling in phases. The last saves most here: 386 of 2515 GFLOP.

B latents, C channels, h w height and width of the latent, L = h*w rows
"""

import torch
import torch.nn.functional as F
from minisd_kernels.fused import graph as graphs, steps as fused_step
from minisd_kernels.fused.blocks import Norm, Pending, Res, Up, bias_of, feature_map, of_kind, rows
from minisd_kernels.fused.graph import Graphs
from minisd_kernels.fused.packed import Conv, Linear
from minisd_kernels.fused.unet import FusedUNet
from torch import Tensor, nn

from minisd import steps as readable_steps
from minisd.models.ops import Ops
from minisd.models.unet import UNet
from minisd.models.vae import VAE, Attention, Decoder, ResBlock, Upsample


class DecoderRes(nn.Module):
    """ResBlock; only its own bias follows the first convolution."""

    def __init__(self, block: ResBlock, ops: Ops):
        super().__init__()
        self.block, self.shift = Res(block, ops), nn.Buffer(bias_of(block.conv1))

    def forward(self, s: Pending) -> Pending:
        return self.block(s, self.shift)


class DecoderAttn(nn.Module):
    """Attention of one head over all positions, added to its input."""

    def __init__(self, module: Attention, ops: Ops):
        super().__init__()
        self.norm, self.attention = Norm(module.group_norm, False, ops), ops.attention
        (out,), three = of_kind(nn.Linear, module.to_out), (module.to_q, module.to_k, module.to_v)
        self.qkv = Linear(*(m.weight for m in three), bias=torch.cat([m.bias for m in three]))
        self.out = Linear(out.weight, bias=out.bias)

    def forward(self, s: Pending) -> Pending:
        y, x = self.norm(s)
        q, k, v = self.qkv(rows(y)).chunk(3, dim=-1)                         # (B, L, C)
        return Pending(feature_map(self.out(self.attention(q, k, v, 1)), x), None, x)


class FusedDecoder(nn.Module):
    """The same function as a VAE's ``decoder``: latents (B, 4, h, w) -> images (B, 3, H, W).

    On a GPU a decoding is one graph per size.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, ops: Ops):
        super().__init__()
        self.conv_in = nn.utils.convert_conv2d_weight_memory_format(
            decoder.conv_in, torch.channels_last)
        first, second = of_kind(ResBlock, decoder.mid_block.resnets)
        (attention,) = of_kind(Attention, decoder.mid_block.attentions)
        self.blocks = nn.Sequential(
            DecoderRes(first, ops), DecoderAttn(attention, ops), DecoderRes(second, ops))
        for level in decoder.up_blocks:
            self.blocks.extend(DecoderRes(m, ops) for m in of_kind(ResBlock, level.modules()))
            self.blocks.extend(Up(m.conv, odd=False) for m in of_kind(Upsample, level.modules()))
        self.norm_out = Norm(decoder.conv_norm_out, True, ops)
        self.conv_out = Conv(decoder.conv_out.weight)
        self.bias = nn.Buffer(bias_of(decoder.conv_out).view(-1, 1, 1))
        self.graphs = Graphs()

    def forward(self, latent: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and latent.requires_grad
        if wanted or not graphs.records(latent):
            return self._decode(latent)
        return self.graphs(("decode", *latent.shape, latent.dtype), self._decode, [latent])

    def _decode(self, latent: Tensor) -> Tensor:
        x = latent.contiguous(memory_format=torch.channels_last)
        y, _ = self.norm_out(self.blocks(
            Pending(F.conv2d(x, self.conv_in.weight, padding=1), self.conv_in.bias, None)))
        return self.conv_out(y) + self.bias                                  # (B, 3, H, W)


class Fused:
    """The repacked networks of a model, with one cache of graphs: its steps and its decoder."""

    def __init__(self, unet: UNet, vae: VAE, ops: Ops):
        self.unet, self.decoder = FusedUNet(unet, ops), FusedDecoder(vae.decoder, ops)
        self.decoder.graphs = self.unet.graphs

    def steps(self, readable: readable_steps.Steps) -> fused_step.Steps:
        """The same denoise steps by the repacked UNet."""
        coefficients, scale = readable.coefficients, readable.guidance_scale
        guidance = (scale, readable.guidance_rescale) if readable.guidance_rescale else None
        cond = readable.told.get("timestep_cond")
        return fused_step.Steps(
            self.unet, readable.context, [level.t for level in readable.sampler.shown[:-1]],
            fused_step.weights(coefficients, 1.0 if guidance else scale), readable.extra,
            any(readable.draws), guidance, readable.told.get("class_vector"),
            None if cond is None else cond[:1])
