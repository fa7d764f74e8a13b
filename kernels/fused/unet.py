"""The readable UNet, repacked: the same function with less memory traffic and fewer launches.

It is built from a loaded UNet; nothing is trained or approximated. It differs in:

  layout      Feature maps are channels_last from end to end, so rows for attention are a view.
  pending     A block does not add up its result: it returns (x, shift, residual), and the next norm
              adds them in its own pass. A bias, a time embedding or a residual costs no launch.
  skips       The next norm also writes the sum to its place in the concatenation on the way up, so
              `cat` has nothing to copy.
  packing     One matrix for q, k and v; one for k and v of the prompt; one for all time embeddings.
  once        Keys and values of a prompt (`prompt`) are the same at every step, and time embeddings
              (`times`) for every image: both are computed once and given to `step`.
  prefix      Until the first cross-attention both halves of guidance are equal: `step` takes B
              latents and 2B contexts, and doubles the batch there.
  phases      Nearest-neighbour doubling and a 3x3 convolution are one transposed 4x4 convolution
              with stride 2: each output pixel reads 2x2 inputs, 4/9 of the work.

B latents, M contexts (B or 2B), C channels, h w height and width, L = h*w rows, D context width
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from minisd_kernels.fused.blocks import Attn, Down, Norm, Pending, Res, Up, bias_of, of_kind
from minisd_kernels.fused.graph import Graphs
from minisd_kernels.fused.packed import Conv, joined
from torch import Tensor, nn

from minisd.models.ops import Ops, add_up
from minisd.models.transformer import SpatialTransformer
from minisd.models.unet import Downsample, ResBlock, UNet, Upsample

Pair = tuple[Res, Attn | None]  # a res block, and the attention after it where there is one


class FusedUNet:
    """Called like the readable UNet, or through `prompt`, `times` and `step`, which repeat no work.

    ``ops`` compute the norms, the attentions and GEGLU.
    """

    @torch.no_grad()
    def __init__(self, unet: UNet, ops: Ops):
        self.config = unet.config
        self.graphs = Graphs()  # recorded steps, by size; clear it to free their memory
        blocks = of_kind(ResBlock, unet.modules())
        res = {m: Res(m, ops) for m in blocks}
        attn = {m: Attn(m, ops) for m in of_kind(SpatialTransformer, unet.modules())}
        self.attentions = [*attn.values()]

        self.time = unet.time
        self.time_weight = joined([m.time_emb_proj.weight for m in blocks])
        self.time_widths = [m.conv1.out_channels for m in blocks]
        self.time_bias = torch.cat([m.time_emb_proj.bias + bias_of(m.conv1) for m in blocks])
        self.conv_in = nn.utils.convert_conv2d_weight_memory_format(
            unet.conv_in, torch.channels_last)
        self.norm_out = Norm(unet.conv_norm_out, True, ops)
        self.conv_out = Conv(unet.conv_out.weight)
        self.conv_out_bias = bias_of(unet.conv_out).view(-1, 1, 1)

        def layers(level: nn.Module) -> list[Pair]:
            """The res blocks of a level, and of the middle, each with the attention after it."""
            resnets = of_kind(ResBlock, level.modules())
            attentions = of_kind(SpatialTransformer, level.modules())
            return [(res[r], attn.get(a)) for r, a in zip_longest(resnets, attentions)]

        # The way down to the first block of the middle: each of these writes its input as a skip.
        self.down: list[Pair | Down] = []
        for level in unet.down_blocks:
            self.down += layers(level)
            self.down += [Down(m) for m in of_kind(Downsample, level.modules())]
        first, (self.middle, _) = layers(unet.mid_block)
        self.down.append(first)
        self.up = [(layers(level), [Up(m.conv) for m in of_kind(Upsample, level.modules())])
                   for level in unet.up_blocks]
        # The channels of x and its skip together, in the order in which the skips are made.
        widths = [m.norm1.num_channels for m in of_kind(ResBlock, unet.up_blocks.modules())]
        self.joined = widths[::-1]

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, context: Tensor, class_vector: Tensor | None = None,
                 timestep_cond: Tensor | None = None) -> Tensor:
        """Latents (B, 4, h, w), timesteps (B,), context (B or 2B, L, D), class vectors, as many as
        contexts -> predictions, as many."""
        if class_vector is not None:  # the halves of guidance may differ from the first block on
            m = len(class_vector) // len(x)
            x, t = x.repeat(m, 1, 1, 1), t.repeat(m)
        times = self.times(t, class_vector, timestep_cond)
        times = times.repeat(len(context) // len(times), 1)
        return self.step(x, times, self.prompt(context))

    @torch.no_grad()
    def prompt(self, context: Tensor) -> list[Tensor]:
        """Keys and values (M, L, 2C) of every cross-attention, from the context (M, L, D); (M, L,
        4C) where there are two such attentions in a block."""
        return [layer.kv(context) for layer in self.attentions]

    @torch.no_grad()
    def times(self, t: Tensor, class_vector: Tensor | None = None,
              timestep_cond: Tensor | None = None) -> Tensor:
        """What every res block adds at timesteps t (S,), side by side: a row per timestep.

        ``class_vector`` (S, n) or (S,) and ``timestep_cond`` (1 or S, n) as the readable UNet's."""
        time = F.silu(self.time(t, class_vector, timestep_cond))             # (S, 1280)
        return F.linear(time, self.time_weight, self.time_bias)              # (S, all widths)

    @torch.no_grad()
    def step(self, x: Tensor, times: Tensor, prompt: Sequence[Tensor]) -> Tensor:
        """x (B, 4, h, w), times (one row, or (M, ...)), prompt of M -> predictions (M, 4, h, w)."""
        m, each_prompt = len(prompt[0]), iter(prompt)
        each_time = iter(times.split(self.time_widths, dim=-1))
        x = x.contiguous(memory_format=torch.channels_last)
        s: Pending = Pending(F.conv2d(x, self.conv_in.weight, padding=1), self.conv_in.bias, None)
        skips = []
        for layer, width in zip(self.down, self.joined):
            joined = s.x.new_empty(m, *s.x.shape[2:], width).permute(0, 3, 1, 2)
            own = joined[: len(s.x), width - s.x.shape[1] :]                 # (B or M, C, h, w)
            skips.append((joined, own))
            if isinstance(layer, Down):
                s = layer(s, own)
                continue
            s = self._pair(layer, s, each_time, each_prompt, own)
            if len(s.x) > len(own):  # the halves of guidance differ from here: copy earlier skips
                for joined, own in skips:
                    joined[len(own) :, -own.shape[1] :] = own
        s = self.middle(s, next(each_time))
        for pairs, upsamplers in self.up:
            for pair in pairs:
                joined, _ = skips.pop()
                add_up(s.x, s.shift, s.residual, joined[:, : s.x.shape[1]])
                s = self._pair(pair, Pending(joined, None, None), each_time, each_prompt)
            for upsample in upsamplers:
                s = upsample(s, skips[-1][0].shape[2:])
        y, _ = self.norm_out(s)
        return self.conv_out(y) + self.conv_out_bias                         # (M, 4, h, w)

    @staticmethod
    def _pair(pair: Pair, s: Pending, times: Iterator[Tensor], prompt: Iterator[Tensor],
              into: Tensor | None = None) -> Pending:
        """A res block, and the attention after it where there is one, with the next of each."""
        (res, attention), time = pair, next(times)
        s = res(s, time if time.dim() == 1 else time[: len(s.x)], into)
        return s if attention is None else attention(s, next(prompt))
