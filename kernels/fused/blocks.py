"""The blocks of the readable UNet and decoder, repacked; unet.py says what they do otherwise.

B latents, M contexts (B or 2B), C channels, h w height and width, L = h*w rows, D context width
"""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from minisd_kernels.fused.packed import Conv, Linear
from torch import Tensor, nn

from minisd.models import vae
from minisd.models.ops import Ops, add_up
from minisd.models.transformer import GEGLU, SpatialTransformer, TransformerBlock
from minisd.models.unet import Downsample, ResBlock

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
    """SpatialTransformer: self-attention, cross-attention and feed-forward, each with its sum.

    Where both attentions read the prompt, the prompt's matrix has the second one's rows first.
    """

    def __init__(self, module: SpatialTransformer, ops: Ops):
        super().__init__()
        (block,) = of_kind(TransformerBlock, module.transformer_blocks)
        self.ops, self.heads, self.only_cross = ops, block.attn1.heads, block.only_cross
        self.norm = Norm(module.norm, False, ops)
        self.norms = nn.ModuleList([block.norm1, block.norm2, block.norm3])
        self.proj_in = Linear(module.proj_in.weight)
        one, two = block.attn1, block.attn2
        (out1,), (out2,) = (of_kind(nn.Linear, attn.to_out) for attn in (one, two))
        own, prompt = [one.to_q.weight], [two.to_k.weight, two.to_v.weight]
        (prompt if self.only_cross else own).extend([one.to_k.weight, one.to_v.weight])
        self.qkv, self.kv = Linear(*own), Linear(*prompt)
        self.out1 = Linear(out1.weight)
        self.q = Linear(two.to_q.weight)
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
        q, *both = self.qkv(y).chunk(1 if self.only_cross else 3, dim=-1)    # (B, L, C)
        k, v, *both1 = prompt.chunk(4 if self.only_cross else 2, dim=-1)     # (M, 77, C)
        n = len(prompt) // len(x)  # 2 where the two halves of guidance differ from here
        if self.only_cross:
            q, both = q.repeat(n, 1, 1), both1                               # (M, L, C)
        h2 = self.out1(attention(q, *both, self.heads))                      # (B or M, L, C)
        if n > 1:
            x = feature_map(rows(x).repeat(n, 1, 1), x)                      # (M, C, h, w)
            h = h.repeat(n, 1, 1)                                            # (M, L, C)
            h2 = h2.repeat(len(h) // len(h2), 1, 1)                          # (M, L, C)
        y, h = self._norm(1, h2, h)
        h2 = self.out2(attention(self.q(y), k, v, self.heads))               # (M, L, C)
        y, h = self._norm(2, h2, h)
        h = self.narrow.add_to(h, self.ops.geglu(self.widen(y)))             # (M, L, C)
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
