"""The few functions that a kernel may replace: attention, and GroupNorm followed by SiLU.

Every model is built with an `Ops`, a record of functions. There are several implementations of one
meaning: `REFERENCE` writes the formula out, `TORCH` says the same through torch's own fused calls,
and the Triton kernels of minisd_kernels are the third. Two models with different ops live side by
side; there is no global switch. An op that was asked for by name runs or raises; only "auto" may
choose, and `watch` notes which implementation every call took.

B batch, L tokens (q queries, k keys), H heads, d channels per head, C channels, G groups
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Ops:
    """One implementation of each replaceable function.

    ``attention(q, k, v, heads, causal=False)``: softmax(q k^T / sqrt(d)) v for every head.
    q (B, Lq, H*d); k and v (B, Lk, H*d); returns (B, Lq, H*d). ``causal`` hides later keys.

    ``group_norm_silu(x, weight, bias, groups, eps, silu)``: x (B, C, ...) normalised over each of
    ``groups`` runs of channels, scaled and shifted per channel, then SiLU if asked; same shape.
    """

    name: str
    attention: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor]
    why: str = ""  # why none of them is a kernel; empty where they may be

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
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """y = (x - mean_g) / sqrt(var_g + eps) * weight + bias for each group g; SiLU is y sigmoid(y).

    Wu & He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494, eq. 1, 2 and 6.
    """
    grouped = _at_least_float32(x).unflatten(1, (groups, -1)).flatten(2)     # (B, G, C/G*...)
    mean = grouped.mean(dim=-1, keepdim=True)                                # (B, G, 1)
    # The mean of centred squares: E[x^2] - E[x]^2 loses every digit when the mean is large.
    variance = (grouped - mean).square().mean(dim=-1, keepdim=True)          # (B, G, 1)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)        # (B, C, ...)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    y = y * weight.view(per_channel) + bias.view(per_channel)
    return (y * y.sigmoid() if silu else y).to(x.dtype)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """The same by scaled_dot_product_attention, which never stores q k^T."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))                     # (B, H, L, d)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def torch_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """The same by torch's group_norm. SiLU overwrites its result, which nobody else has."""
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y, inplace=not y.requires_grad) if silu else y


OTHERS = "the kernels were not asked for"
REFERENCE = Ops("reference", reference_attention, reference_group_norm_silu, OTHERS)
TORCH = Ops("torch", torch_attention, torch_group_norm_silu, OTHERS)


def choose(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Ops:
    """The ops of that name for a model of that dtype on that device. Raises ValueError where
    there are none.

    "auto" is the kernels on a GPU where they are proven, with torch's where a kernel does not take
    a call, and a repacked UNet as for "fused"; elsewhere it is torch's. Code that never ran on a
    kind of GPU is not the default there.
    "fused" means that the UNet is repacked as well (minisd_kernels.fused_unet): with the kernels on
    a GPU, with torch's functions on a CPU.
    """
    if name in ("triton", "fused"):
        why = _no_kernels(device, dtype)
        if why and name == "fused" and device.type == "cpu":
            return replace(TORCH, name=name, why=why)
        if why:
            raise ValueError(f'ops="{name}" cannot be had: {why}')
        return replace(_kernels(), name=name)
    if name == "auto":
        why = _no_kernels(device, dtype) or _not_proven(device)
        return replace(TORCH, why=why) if why else _kernels_or_torch()
    named = {"torch": TORCH, "reference": REFERENCE}
    if name not in named:
        raise ValueError(f"ops must be one of auto, torch, reference, triton, fused, not {name!r}")
    return named[name]


def _no_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot run a model of that dtype there at all; empty if they can."""
    try:
        from minisd_kernels.flash_attention import refusal
        from minisd_kernels.launch import DTYPES
    except ModuleNotFoundError as error:
        return f"no module named {error.name}; pip install 'minisd[kernels]' brings it, on Linux"
    x = torch.empty(1, 1, 8, dtype=torch.float32, device=device)
    if why := refusal(x, x, x, heads=1):
        return why
    if dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype)[6:]}"
    return ""


def _not_proven(device: torch.device) -> str:
    from minisd_kernels.flash_attention import _kernel
    from minisd_kernels.launch import interpreted
    from minisd_kernels.proof import proven

    if interpreted(_kernel):  # with TRITON_INTERPRET set
        return "the kernels are interpreted, which is for tests"
    name = torch.cuda.get_device_name(device)
    return proven(torch.cuda.get_device_capability(device), name)


def _kernels() -> Ops:
    from minisd_kernels.flash_attention import flash_attention
    from minisd_kernels.group_norm_silu import group_norm_silu

    return Ops("triton", flash_attention, group_norm_silu)


def _refusal(function: str, *args) -> str | None:
    """Why the kernel of that function does not take a call; None if it does."""
    from minisd_kernels import flash_attention, group_norm_silu

    family = {"attention": flash_attention, "group_norm_silu": group_norm_silu}[function]
    return family.refusal(*args)


def _kernels_or_torch() -> Ops:
    """A kernel wherever it takes the call, torch where it does not."""
    kernels = _kernels()

    def attention(q, k, v, heads, causal=False):
        ops = TORCH if _refusal("attention", q, k, v, heads) else kernels
        return ops.attention(q, k, v, heads, causal=causal)

    def group_norm_silu(x, weight, bias, groups, eps, silu):
        ops = TORCH if _refusal("group_norm_silu", x, weight, bias, groups) else kernels
        return ops.group_norm_silu(x, weight, bias, groups, eps, silu)

    return Ops("auto", attention, group_norm_silu)


@dataclass(frozen=True)
class Call:
    """One call of an op: its sizes, the implementation it took, and why it was not a kernel."""

    function: str
    sizes: str
    took: str
    why: str


def watch(ops: Ops, calls: list[Call]) -> Ops:
    """The same ops, adding every call to ``calls``."""

    def note(function, sizes, *args):
        why = ops.why or _refusal(function, *args) or ""
        plain = "torch" if ops.name == "auto" else ops.name
        calls.append(Call(function, sizes, plain if why else "triton", why))

    def attention(q, k, v, heads, causal=False):
        sizes = f"{heads} heads of {q.shape[2] // heads}, {q.shape[1]}x{k.shape[1]}"
        note("attention", sizes, q, k, v, heads)
        return ops.attention(q, k, v, heads, causal=causal)

    def group_norm_silu(x, weight, bias, groups, eps, silu):
        sizes = f"{x.shape[1]} at {'x'.join(map(str, x.shape[2:]))}" + ", SiLU" * silu
        note("group_norm_silu", sizes, x, weight, bias, groups)
        return ops.group_norm_silu(x, weight, bias, groups, eps, silu)

    return Ops(ops.name, attention, group_norm_silu)
