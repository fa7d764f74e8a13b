"""The few functions that a kernel may replace: attention, and GroupNorm followed by SiLU.

Every model is built with an `Ops`, a record of functions that have one meaning and several bodies:
`REFERENCE` writes the formula out, `TORCH` says the same through torch's own fused calls. Two
models with different ops live side by side; there is no global switch.

B batch, L tokens (q queries, k keys), H heads, d channels per head, C channels, G groups
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Ops:
    """One body for each replaceable function.

    ``attention(q, k, v, heads, causal=False)``: softmax(q k^T / sqrt(d)) v for every head.
    q (B, Lq, H*d); k and v (B, Lk, H*d); returns (B, Lq, H*d). ``causal`` hides later keys.

    ``group_norm_silu(x, weight, bias, groups, eps, silu)``: x (B, C, ...) normalised over each of
    ``groups`` runs of channels, scaled and shifted per channel, then SiLU if asked; same shape.
    """

    name: str
    attention: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor]

    def norm(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        """GroupNorm with the layer's weights."""
        return self.group_norm_silu(
            x, layer.weight, layer.bias, layer.num_groups, layer.eps, silu=False
        )

    def norm_silu(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        """GroupNorm with the layer's weights, then SiLU."""
        return self.group_norm_silu(
            x, layer.weight, layer.bias, layer.num_groups, layer.eps, silu=True
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H*d) -> (B, H, L, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, H*d)."""
    return x.transpose(1, 2).flatten(2)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False
) -> Tensor:
    """Attention Is All You Need (Vaswani et al. 2017), eq. 1, for each head."""
    dtype = q.dtype
    # In half precision q k^T reaches past 65504 in SD2 at 768x768, and the picture turns black.
    q, k, v = (_at_least_float32(split_heads(x, heads)) for x in (q, k, v))  # (B, H, L, d)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                    # (B, H, Lq, Lk)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return merge_heads(scores.softmax(dim=-1) @ v).to(dtype)                 # (B, Lq, H*d)


def reference_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Group Normalization (Wu & He 2018), eq. 1 and 6; SiLU is y * sigmoid(y)."""
    grouped = _at_least_float32(x).unflatten(1, (groups, -1)).flatten(2)     # (B, G, C/G*...)
    mean = grouped.mean(dim=-1, keepdim=True)                                # (B, G, 1)
    # The mean of centred squares: E[x^2] - E[x]^2 loses every digit when the mean is large.
    variance = (grouped - mean).square().mean(dim=-1, keepdim=True)          # (B, G, 1)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)        # (B, C, ...)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    y = y * weight.view(per_channel) + bias.view(per_channel)
    return (y * y.sigmoid() if silu else y).to(x.dtype)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """The same through scaled_dot_product_attention, which never stores the scores."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))                     # (B, H, L, d)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def torch_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """The same through torch's group_norm; its result is ours, so SiLU may overwrite it."""
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y, inplace=not y.requires_grad) if silu else y


REFERENCE = Ops("reference", reference_attention, reference_group_norm_silu)
TORCH = Ops("torch", torch_attention, torch_group_norm_silu)


def choose(name: str) -> Ops:
    """The ops of that name; "auto" is "torch". Raises ValueError where there is none."""
    bodies = {"auto": TORCH, "torch": TORCH, "reference": REFERENCE}
    if name in ("triton", "fused"):
        raise ValueError(
            f'ops="{name}" needs the Triton kernels, which this version of minisd does not have; '
            'use "torch" or "reference"'
        )
    if name not in bodies:
        raise ValueError(f"ops must be one of {', '.join(bodies)}, not {name!r}")
    return bodies[name]
