"""Who computes an op: our kernels, their peers, a function of the caller's own.

A provider is a function with the signature of a field of `minisd.Ops`. Peers are charged for no
copy that they do not need: those of attention may return (B, H, L, d), and torch's GroupNorm on a
GPU gives NCHW whatever it reads.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from minisd_kernels.ladder import (
    attention_1_naive,
    attention_2_tiled,
    attention_3_online,
    attention_4_split,
    group_norm_1_two_passes,
    group_norm_2_one_pass,
    group_norm_3_fused,
)
from minisd_kernels.ops import attention as flash, launch
from minisd_kernels.ops.launch import Norm, Tile
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Case
from minisd.backends import kernels
from minisd.models.ops import REFERENCE, TORCH, split_heads

OURS = "minisd"
MAX_AUTOTUNE_CASE = "SD1.5 2x320x64x64 silu channels_last"  # it takes too long for more than one


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, heads: int, causal=False) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
        return F.scaled_dot_product_attention(*(split_heads(x, heads) for x in (q, k, v)))


def padded_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal=False) -> Tensor:
    """Our kernel with d padded to one power of two, as in the Triton tutorial's attention."""
    d = q.shape[2] // heads
    width = triton.next_power_of_2(d)
    if width == d or d > flash.WIDEST_IN_PIECES:
        raise ValueError(f"d {d} has no padded variant")
    if why := flash.refusal(q, k, v, heads):
        raise ValueError(why)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    call = flash.plan(q, k, v, out, heads, d**-0.5, causal, "ieee")
    if "BLOCK_D1" not in call.constants:
        raise ValueError(f"{q.dtype} takes the sliced kernel, which has no pieces to pad")
    launch.run([call._replace(constants=call.constants | dict(BLOCK_D1=width, BLOCK_D2=0))])
    return out


def eager_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                     silu: bool) -> Tensor:
    """The two calls that everyone writes."""
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None,
                     shift: Tensor) -> tuple[Tensor, Tensor]:
    s = x + shift if residual is None else x + shift + residual
    return F.layer_norm(s, weight.shape, weight, bias, eps), s


def eager_geglu(h: Tensor) -> Tensor:
    """As diffusers has it."""
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


def liger(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    y = LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, eps)
    return F.silu(y) if silu else y


def compiled(function: Callable, mode: str | None = None) -> Callable:
    """By torch.compile, one kernel a size."""
    return lambda *args: _compile(function, mode)(*args)


@cache
def _compile(function: Callable, mode: str | None) -> Callable:
    # Past its limit torch would go on uncompiled and say nothing.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


PEERS: dict[str, dict[str, Callable]] = {
    "attention": {
        "sdpa default": partial(sdpa, ""),
        **{f"sdpa {name}": partial(sdpa, name)
           for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")},
        "minisd padded": padded_attention},
    "group_norm_silu": {
        "eager": eager_group_norm, "compiled": compiled(eager_group_norm), "liger": liger,
        "compiled max-autotune": compiled(eager_group_norm, "max-autotune-no-cudagraphs")},
    "layer_norm": {"eager": eager_layer_norm, "compiled": compiled(eager_layer_norm)},
    "geglu": {"eager": eager_geglu, "compiled": compiled(eager_geglu)},
}


# The rungs of kernels/ladder, at a few sizes: the first one is slow, and stores all scores. Where
# they do not fit into memory, its row says so.
LADDER: dict[str, dict[str, Callable]] = {
    "attention": {
        "ladder 1 naive": attention_1_naive.attention,
        "ladder 2 tiled": attention_2_tiled.attention,
        "ladder 3 online": attention_3_online.attention,
        "ladder 4 split": attention_4_split.attention},
    "group_norm_silu": {
        "ladder 1 two passes": group_norm_1_two_passes.group_norm_silu,
        "ladder 2 one pass": group_norm_2_one_pass.group_norm_silu,
        "ladder 3 fused": group_norm_3_fused.group_norm_silu},
}
LADDER_CASES = {
    "SD1.5 2x8x4096x4096x40", "SD1.5 2x8x1024x1024x80", "SD1.5 2x320x64x64 silu nchw",
    "tiny 1x2x3x131x40", "tiny 1x6x5x5 silu nchw",
}


def peers(case: Case, device: torch.device) -> dict[str, Callable]:
    """By name; on a CPU also the implementations of `minisd.Ops`."""
    found = PEERS[case.op] | (LADDER[case.op] if case.label in LADDER_CASES else {})
    if case.label != MAX_AUTOTUNE_CASE:
        found.pop("compiled max-autotune", None)
    if device.type == "cpu":
        found |= {"torch": getattr(TORCH, case.op), "reference": getattr(REFERENCE, case.op)}
    return found


def own(text: str) -> tuple[str, str, Callable]:
    """(op, name, function) of "op=module:function"."""
    op, _, name = text.partition("=")
    module, _, function = name.partition(":")
    if op not in PEERS or not module or not function:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not OP=MODULE:FUNCTION with an OP of {', '.join(PEERS)}")
    try:
        return op, name, getattr(importlib.import_module(module), function)
    except Exception as failure:  # of the module, too
        raise argparse.ArgumentTypeError(f"{name} cannot be imported: {failure}") from None


@contextmanager
def using(key: tuple[str, int], setting: Tile | Norm) -> Iterator[None]:
    """Inside, plans for ``key`` take that setting, also where another one was measured."""
    measured = {row: setting for row in launch.MEASURED if row[1:] == key}
    with patch.dict(launch.DEFAULT, {key: setting}), patch.dict(launch.MEASURED, measured):
        yield


def tuned(key: tuple[str, int], setting: Tile | Norm, op: str, *args, **options):
    """Our kernel with a setting: a provider."""
    with using(key, setting):
        return getattr(kernels(), op)(*args, **options)
