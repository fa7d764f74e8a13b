"""The four functions that a kernel may replace: attention, GroupNorm with SiLU, LayerNorm, GEGLU.

Every model is built with an `Ops`, a record of the four. There are three implementations of one
meaning: `REFERENCE` writes the formulas out, `TORCH` says the same by torch's own fused calls, and
the Triton kernels of minisd_kernels are the third (backends.py). A fourth can be the caller's own:

    sd = minisd.load(ops=dataclasses.replace(TORCH, attention=my_attention))

Two models with different ops live side by side; there is no global switch.

B batch, L tokens (q queries, k keys), H heads, d channels per head, C channels, G groups
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Ops:
    """One implementation of each replaceable function. None changes its arguments.

    ``attention(q, k, v, heads, causal=False)``: softmax(q k^T / sqrt(d)) v for every head.
    q (B, Lq, H*d); k and v (B, Lk, H*d); returns (B, Lq, H*d). ``causal`` hides later keys.

    ``group_norm_silu(x, weight, bias, groups, eps, silu, shift=None, residual=None,
    return_sum=False)``: s = x + shift + residual, (B, C, ...), normalised over each of ``groups``
    runs of channels, scaled and shifted per channel, then SiLU if asked; returns the same shape.
    shift is (C,) or (B, C). ``return_sum`` True returns s as well; a tensor is where to write s.

    ``layer_norm(x, weight, bias, eps, residual=None, shift=None)``: s = x + shift + residual,
    (..., C), normalised over C; returns (the norm, s). shift is (C,).

    ``geglu(h)``: the first half of h (..., 2C) times the GELU of the second; returns (..., C).
    """

    attention: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor | tuple[Tensor, Tensor]]
    layer_norm: Callable[..., tuple[Tensor, Tensor]]
    geglu: Callable[..., Tensor]

    def norm(self, layer: nn.GroupNorm, x: Tensor, silu: bool = False) -> Tensor:
        """GroupNorm with the layer's weights, then SiLU if asked."""
        y = self.group_norm_silu(
            x, layer.weight, layer.bias, layer.num_groups, layer.eps, silu)
        assert isinstance(y, Tensor)
        return y

    def norm_silu(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        """GroupNorm with the layer's weights, then SiLU."""
        return self.norm(layer, x, silu=True)

    def norm_tokens(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """LayerNorm with the layer's weights."""
        return self.layer_norm(x, layer.weight, layer.bias, layer.eps)[0]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H*d) -> (B, H, L, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, H*d)."""
    return x.transpose(1, 2).flatten(2)


def add_up(
    x: Tensor, shift: Tensor | None, residual: Tensor | None, into: Tensor | None = None,
) -> Tensor:
    """x + shift + residual; x (B, C, ...), shift (C,) or (B, C); written to ``into`` if given."""
    if shift is not None:
        total = torch.add(x, shift.view(-1, x.shape[1], *[1] * (x.dim() - 2)), out=into)
        return total if residual is None else total.add_(residual)
    if residual is not None:
        return torch.add(x, residual, out=into)
    return x if into is None else into.copy_(x)


# --- the formulas ---------------------------------------------------------------------------------


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head.

    Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762, eq. 1.
    """
    dtype = q.dtype
    # In half precision q k^T exceeds 65504 in SD2 at 768x768, and the image turns black.
    q, k, v = (_at_least_float32(split_heads(x, heads)) for x in (q, k, v))  # (B, H, L, d)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                    # (B, H, Lq, Lk)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return merge_heads(scores.softmax(dim=-1) @ v).to(dtype)                 # (B, Lq, H*d)


def reference_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    shift: Tensor | None = None, residual: Tensor | None = None,
    return_sum: bool | Tensor = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (s - mean_g) / sqrt(var_g + eps) * weight + bias for each group g; SiLU is y sigmoid(y).

    Wu & He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494, eq. 1, 2, 6 and 7.
    """
    s = add_up(x, shift, residual, return_sum if isinstance(return_sum, Tensor) else None)
    grouped = _at_least_float32(s).unflatten(1, (groups, -1)).flatten(2)     # (B, G, C/G*...)
    mean = grouped.mean(dim=-1, keepdim=True)                                # (B, G, 1)
    # The mean of centred squares: E[x^2] - E[x]^2 loses every digit when the mean is large.
    variance = (grouped - mean).square().mean(dim=-1, keepdim=True)          # (B, G, 1)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(s.shape)        # (B, C, ...)
    per_channel = (1, -1) + (1,) * (s.dim() - 2)
    y = y * weight.view(per_channel) + bias.view(per_channel)
    y = (y * y.sigmoid() if silu else y).to(s.dtype)
    return y if return_sum is False else (y, s)


def reference_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = (s - mean) / sqrt(var + eps) * weight + bias over the channels of each token.

    Ba et al. 2016, "Layer Normalization", https://arxiv.org/abs/1607.06450, eq. 3.
    """
    s = _sum_of_tokens(x, residual, shift)
    rows = _at_least_float32(s)
    mean = rows.mean(dim=-1, keepdim=True)
    variance = (rows - mean).square().mean(dim=-1, keepdim=True)
    y = (rows - mean) / (variance + eps).sqrt() * weight + bias
    return y.to(s.dtype), s


def reference_geglu(h: Tensor) -> Tensor:
    """value * GELU(gate), GELU(g) = g (1 + erf(g / sqrt(2))) / 2: the exact one.

    Shazeer 2020, https://arxiv.org/abs/2002.05202; Hendrycks & Gimpel 2016,
    https://arxiv.org/abs/1606.08415.
    """
    value, gate = (_at_least_float32(half) for half in h.chunk(2, dim=-1))
    return (value * gate * (1 + torch.erf(gate / 2**0.5)) / 2).to(h.dtype)


# --- torch ----------------------------------------------------------------------------------------


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """The same by scaled_dot_product_attention, which never stores q k^T."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))                     # (B, H, L, d)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def torch_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    shift: Tensor | None = None, residual: Tensor | None = None,
    return_sum: bool | Tensor = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same by torch's group_norm. SiLU overwrites its result, which nobody else has."""
    s = add_up(x, shift, residual, return_sum if isinstance(return_sum, Tensor) else None)
    if s.device.type == "cpu" and not s.is_contiguous() and s.dim() == 4:
        y = _channels_last_group_norm(s, weight, bias, groups, eps)
    else:
        y = F.group_norm(s, groups, weight, bias, eps)
    y = F.silu(y, inplace=not y.requires_grad) if silu else y
    return y if return_sum is False else (y, s)


def _channels_last_group_norm(
    s: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    # Mean and variance of each channel, then of a group: torch's own GroupNorm on a CPU computes
    # E[x^2] - E[x]^2 in channels_last, which is wrong in the first digit at a mean of 1000.
    dtype, s = s.dtype, _at_least_float32(s)
    rows = s.permute(0, 2, 3, 1).flatten(1, 2)                               # (B, L, C)
    mean = rows.mean(1, keepdim=True)                                        # (B, 1, C)
    var = (rows - mean).square_().mean(1)                                    # (B, C)
    var, mean = (m.view(len(s), groups, -1) for m in (var, mean))            # (B, G, C/G)
    spread, centre = torch.var_mean(mean, dim=2, correction=0, keepdim=True)
    scale = (var.mean(2, keepdim=True) + spread + eps).rsqrt()               # (B, G, 1)
    scale = scale * weight.view(groups, -1)                                  # (B, G, C/G)
    offset = bias.view(groups, -1) - centre * scale
    scale, offset = (m.view(*s.shape[:2], 1, 1) for m in (scale, offset))    # (B, C, 1, 1)
    return torch.addcmul(offset, s, scale).to(dtype)


def torch_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by torch's layer_norm."""
    s = _sum_of_tokens(x, residual, shift)
    return F.layer_norm(s, weight.shape, weight, bias, eps), s


def torch_geglu(h: Tensor) -> Tensor:
    """The same by torch's gelu."""
    value, gate = h.chunk(2, dim=-1)
    y = F.gelu(gate)  # the exact GELU, not the approximation with tanh
    return y * value if y.requires_grad else y.mul_(value)


def _sum_of_tokens(x: Tensor, residual: Tensor | None, shift: Tensor | None) -> Tensor:
    """x + shift + residual; x and residual (..., C), shift (C,)."""
    s = x if shift is None else x + shift
    if residual is None:
        return s
    return s + residual if shift is None else s.add_(residual)


REFERENCE = Ops(
    reference_attention, reference_group_norm_silu, reference_layer_norm, reference_geglu)
TORCH = Ops(torch_attention, torch_group_norm_silu, torch_layer_norm, torch_geglu)
