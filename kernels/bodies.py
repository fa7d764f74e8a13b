"""The four functions of the fused UNet, in plain torch and as Triton kernels.

A CPU runs `PLAIN`, and the kernels are compared with it; `triton_bodies` are the kernels. Both have
the same meaning and signature, so the code of the fused UNet is the same for either.

B batch, C channels, G groups, L rows
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Bodies(NamedTuple):
    """``attention(q, k, v, heads)``, ``group_norm_silu(x, weight, bias, groups, eps, silu, shift,
    residual, return_sum)``, ``layer_norm(x, weight, bias, eps, residual, shift)`` and ``geglu(h)``,
    as in the kernel files of these names."""

    attention: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor | tuple[Tensor, Tensor]]
    layer_norm: Callable[..., tuple[Tensor, Tensor]]
    geglu: Callable[..., Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head; all (B, L, H*d)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def add_up(
    x: Tensor, shift: Tensor | None, residual: Tensor | None, into: Tensor | None = None,
) -> Tensor:
    """x + shift + residual, x (B, C, h, w), shift (C,) or (B, C); into ``into`` if given."""
    if shift is not None:
        total = torch.add(x, shift.reshape(-1, x.shape[1], 1, 1), out=into)
        return total if residual is None else total.add_(residual)
    if residual is not None:
        return torch.add(x, residual, out=into)
    return x if into is None else into.copy_(x)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    shift: Tensor | None = None, residual: Tensor | None = None,
    return_sum: bool | Tensor = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm of x + shift + residual, then SiLU if asked; x (B, C, h, w)."""
    s = add_up(x, shift, residual, return_sum if isinstance(return_sum, Tensor) else None)
    # Mean and variance of each channel, then of a group: torch's own GroupNorm on a CPU computes
    # E[x^2] - E[x]^2 in channels_last, which is wrong in the first digit at a mean of 1000.
    rows = s.permute(0, 2, 3, 1).flatten(1, 2)                               # (B, L, C)
    mean = rows.mean(1, keepdim=True)                                        # (B, 1, C)
    var = (rows - mean).square_().mean(1)                                    # (B, C)
    var, mean = (m.view(len(s), groups, -1) for m in (var, mean))            # (B, G, C/G)
    spread, centre = torch.var_mean(mean, dim=2, correction=0, keepdim=True)
    scale = (var.mean(2, keepdim=True) + spread + eps).rsqrt()               # (B, G, 1)
    scale = scale * weight.view(groups, -1)                                  # (B, G, C/G)
    offset = bias.view(groups, -1) - centre * scale
    scale, offset = (m.view(*s.shape[:2], 1, 1) for m in (scale, offset))    # (B, C, 1, 1)
    y = torch.addcmul(offset, s, scale)
    y = F.silu(y, inplace=True) if silu else y
    return y if return_sum is False else (y, s)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of s, s), s = x + shift + residual; x (..., C), shift (C,)."""
    s = x if shift is None else x + shift
    if residual is not None:
        s = s + residual if shift is None else s.add_(residual)
    return F.layer_norm(s, weight.shape, weight, bias, eps), s


def geglu(h: Tensor) -> Tensor:
    """The first half of h (..., 2C) times the GELU of the second."""
    value, gate = h.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


PLAIN = Bodies(attention, group_norm_silu, layer_norm, geglu)


def triton_bodies() -> Bodies:
    """The kernels. Raises ModuleNotFoundError without triton."""
    from minisd_kernels.flash_attention import flash_attention
    from minisd_kernels.geglu import geglu
    from minisd_kernels.group_norm_silu import group_norm_silu
    from minisd_kernels.layer_norm import layer_norm

    return Bodies(flash_attention, group_norm_silu, layer_norm, geglu)
