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

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from minisd_kernels.fused.graph import Graphs
from minisd_kernels.fused.packed import Conv, Linear, joined
from torch import Tensor, nn

from minisd.models import vae
from minisd.models.ops import Ops, add_up
from minisd.models.transformer import GEGLU, SpatialTransformer, TransformerBlock
from minisd.models.unet import Downsample, ResBlock, UNet, Upsample, timestep_embedding

Kind = TypeVar("Kind", bound=nn.Module)

# Along one side, each of the four taps of the transposed convolution sums some of the three taps:
# an output pixel at an even place reads two inputs with taps (0 | 1 + 2), at an odd (0 + 1 | 2).
PHASES = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class Pending(NamedTuple):
    """x + shift + residual, not yet added up."""

    x: Tensor                # (B, C, h, w)
    shift: Tensor | None     # (C,) or (B, C)
    residual: Tensor | None  # (B, C, h, w)


def rows(x: Tensor) -> Tensor:
    """(B, C, h, w), channels_last -> (B, h*w, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def feature_map(x: Tensor, like: Tensor) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w) in the size of ``like``, a view."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def of_kind(kind: type[Kind], modules: Iterable[nn.Module]) -> list[Kind]:
    """The modules of one kind, in their order."""
    return [m for m in modules if isinstance(m, kind)]


def bias_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The bias of a layer that has one."""
    assert layer.bias is not None
    return layer.bias.detach()


class Norm(nn.Module):
    """GroupNorm of a pending sum, then SiLU if asked; returns the sum too."""

    def __init__(self, layer: nn.GroupNorm, silu: bool, ops: Ops):
        super().__init__()
        self.weight, self.bias = nn.Buffer(layer.weight.detach()), nn.Buffer(layer.bias.detach())
        self.settings = (layer.num_groups, layer.eps, silu)
        self.function = ops.group_norm_silu

    def forward(self, s: Pending, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
        args = (s.x, self.weight, self.bias, *self.settings)
        if s.shift is None and s.residual is None:
            return cast(Tensor, self.function(*args)), s.x
        both = self.function(*args, s.shift, s.residual, True if into is None else into)
        return cast(tuple[Tensor, Tensor], both)


class Res(nn.Module):
    """ResBlock. What follows its first convolution is one shift: (C,), or a row for each of B."""

    def __init__(self, block: ResBlock | vae.ResBlock, ops: Ops):
        super().__init__()
        self.norm1, self.norm2 = (Norm(n, True, ops) for n in (block.norm1, block.norm2))
        self.conv1, self.conv2 = Conv(block.conv1.weight), Conv(block.conv2.weight)
        self.bias, self.shortcut = nn.Buffer(bias_of(block.conv2)), None
        if isinstance(block.conv_shortcut, nn.Conv2d):
            bias = self.bias + bias_of(block.conv_shortcut)
            self.shortcut = Linear(block.conv_shortcut.weight, bias=bias)

    def forward(self, s: Pending, shift: Tensor, into: Tensor | None = None) -> Pending:
        y, x = self.norm1(s, into)
        y, _ = self.norm2(Pending(self.conv1(y), shift, None))
        h = self.conv2(y)
        if self.shortcut is None:
            return Pending(h, self.bias, x)
        return Pending(h, None, feature_map(self.shortcut(rows(x)), x))


class Attn(nn.Module):
    """SpatialTransformer: self-attention, cross-attention and feed-forward, each with its sum."""

    def __init__(self, module: SpatialTransformer, ops: Ops):
        super().__init__()
        (block,) = of_kind(TransformerBlock, module.transformer_blocks)
        self.ops, self.heads = ops, block.attn1.heads
        self.norm = Norm(module.norm, False, ops)
        self.norms = nn.ModuleList([block.norm1, block.norm2, block.norm3])
        self.proj_in = Linear(module.proj_in.weight)
        one, two = block.attn1, block.attn2
        (out1,), (out2,) = (of_kind(nn.Linear, attn.to_out) for attn in (one, two))
        self.qkv = Linear(one.to_q.weight, one.to_k.weight, one.to_v.weight)
        self.out1 = Linear(out1.weight)
        self.q = Linear(two.to_q.weight)
        self.kv = Linear(two.to_k.weight, two.to_v.weight)
        self.out2 = Linear(out2.weight)
        # The norms add the biases of the products before them.
        biases = [bias_of(layer) for layer in (module.proj_in, out1, out2)]
        self.shifts = nn.Buffer(torch.stack(biases))                         # (3, C)
        (widen,), (narrow,) = of_kind(GEGLU, block.ff.net), of_kind(nn.Linear, block.ff.net)
        self.widen = Linear(widen.proj.weight, bias=widen.proj.bias)
        self.narrow = Linear(narrow.weight)
        # (h + g N^T + b) W^T = (h + g N^T) W^T + W b: the first bias moves into the second.
        bias = bias_of(module.proj_out) + module.proj_out.weight.flatten(1) @ narrow.bias
        self.proj_out = Linear(module.proj_out.weight, bias=bias)

    def forward(self, s: Pending, prompt: Tensor) -> Pending:
        attention = self.ops.attention
        y, x = self.norm(s)
        y, h = self._norm(0, self.proj_in(rows(y)))                          # (B, L, C)
        q, k, v = self.qkv(y).chunk(3, dim=-1)                               # (B, L, C)
        h2 = self.out1(attention(q, k, v, self.heads))                       # (B, L, C)
        if len(prompt) == 2 * len(x):  # from here the two halves of guidance differ
            x = feature_map(rows(x).repeat(2, 1, 1), x)                      # (2B, C, h, w)
            h, h2 = h.repeat(2, 1, 1), h2.repeat(2, 1, 1)                    # (2B, L, C)
        y, h = self._norm(1, h2, h)
        k, v = prompt.chunk(2, dim=-1)                                       # (M, 77, C)
        h2 = self.out2(attention(self.q(y), k, v, self.heads))               # (M, L, C)
        y, h = self._norm(2, h2, h)
        h = self.narrow.add_to(h, self.ops.geglu(self.widen(y)))          # (M, L, C)
        return Pending(feature_map(self.proj_out(h), x), None, x)

    def _norm(self, i: int, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The i-th norm of x + its shift + residual, and the sum."""
        norm = self.norms[i]
        return self.ops.layer_norm(
            x, norm.weight, norm.bias, norm.eps, residual, self.shifts[i])


class Down(nn.Module):
    """Downsample."""

    def __init__(self, module: Downsample):
        super().__init__()
        self.conv = Conv(module.conv.weight, stride=2)
        self.bias = nn.Buffer(bias_of(module.conv))

    def forward(self, s: Pending, into: Tensor) -> Pending:
        return Pending(self.conv(add_up(*s, into)), self.bias, None)


class Up(nn.Module):
    """Doubles height and width in phases; to an odd ``size``, as the readable UNet does."""

    def __init__(self, conv: nn.Conv2d, odd: bool = True):
        """``odd``: whether `forward` may be asked for odd sizes."""
        super().__init__()
        weight, self.bias = conv.weight.detach(), nn.Buffer(bias_of(conv))
        taps = torch.tensor(PHASES, dtype=weight.dtype, device=weight.device)
        phases = torch.einsum("ai,bj,ocij->coab", taps, taps, weight)        # (C, C, 4, 4)
        self.phases = Conv(phases, stride=2, transposed=True)
        self.weight = nn.Buffer(weight) if odd else None

    def forward(self, s: Pending, size: tuple[int, int] | None = None) -> Pending:
        x = add_up(*s)
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            h = self.phases(x)
        else:
            assert self.weight is not None  # because of ``odd``
            h = F.conv2d(F.interpolate(x, size=size, mode="nearest"), self.weight, padding=1)
        return Pending(h.contiguous(memory_format=torch.channels_last), self.bias, None)


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

        self.time_embedding = unet.time_embedding
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
    def __call__(self, x: Tensor, t: Tensor, context: Tensor,
                 timestep_cond: Tensor | None = None) -> Tensor:
        """Latents (B, 4, h, w), timesteps (B,), context (B or 2B, L, D) -> predictions, as many."""
        times = self.times(t, timestep_cond)
        if len(context) == 2 * len(x):
            times = torch.cat([times, times])
        return self.step(x, times, self.prompt(context))

    @torch.no_grad()
    def prompt(self, context: Tensor) -> list[Tensor]:
        """Keys and values (M, L, 2C) of every cross-attention, from the context (M, L, D)."""
        return [layer.kv(context) for layer in self.attentions]

    @torch.no_grad()
    def times(self, t: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        """What every res block adds at timesteps t (S,), side by side: a row per timestep.

        ``timestep_cond`` (1 or S, n) as the readable UNet's."""
        emb = timestep_embedding(t, self.config.block_out_channels[0])       # (S, 320)
        time = F.silu(self.time_embedding(emb.to(self.time_weight), timestep_cond))  # (S, 1280)
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
                add_up(*s, joined[:, : s.x.shape[1]])
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
