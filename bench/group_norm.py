"""GroupNorm and SiLU as the bench sees it: inputs, the exact result, the kernel, and its peers.

torch's own GroupNorm on a GPU writes NCHW whatever it reads. Its result is not copied back into
channels_last: the peers are charged for no copy that they do not need.
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from minisd_kernels.ops import group_norm as kernel, launch
from torch import Tensor

from minisd.models.ops import REFERENCE, TORCH

HEADLINE = ("SD1.5", 320, 64, True, True)
MODES = {"compiled": "default", "compiled max-autotune": "max-autotune-no-cudagraphs"}


def eager(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
) -> Tensor:
    """The two calls that everyone writes; what torch.compile is given."""
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


class Compiler:
    """torch.compile, size by size, until ``seconds`` of compiling are spent."""

    def __init__(self, seconds: float):
        self.left = seconds
        self.seen: set[tuple] = set()
        # A kernel a size. Past the limit torch would go on uncompiled and say nothing.
        torch._dynamo.config.recompile_limit = 1000
        torch._dynamo.config.accumulated_recompile_limit = 1000
        self.functions: dict[tuple, Callable] = {}

    def __call__(self, name: str, function: Callable, *args) -> Tensor | tuple[Tensor, ...]:
        """The function of these arguments, compiled as ``name``, a key of MODES."""
        size = (name, function, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x
                                  for x in args))
        if (name, function) not in self.functions:
            self.functions[name, function] = torch.compile(
                function, mode=MODES[name], dynamic=False, fullgraph=True)
        call = self.functions[name, function]
        if size in self.seen:
            return call(*args)
        if self.left <= 0:
            raise RuntimeError("the budget for compiling is spent (--compile-minutes)")
        start = time.monotonic()
        y = call(*args)
        self.left -= time.monotonic() - start
        self.seen.add(size)
        return y


class GroupNorm(NamedTuple):
    """One size of GroupNorm, of which a forward of ``model`` makes ``calls``."""

    model: str
    batch: int
    channels: int
    side: int
    silu: bool
    calls: int
    channels_last: bool = False
    groups: int = 32

    kernel = "group_norm_silu"
    rate = "GB/s"
    pixels = property(lambda self: self.side**2)

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "nchw"

    @property
    def label(self) -> str:
        sizes = f"{self.batch}x{self.channels}x{self.side}x{self.side}"
        return f"{self.model} {sizes}{' silu' * self.silu} {self.layout}"

    @property
    def rest(self) -> tuple[int, float, bool]:
        """groups, eps and silu. In the UNet res blocks have SiLU and 1e-5, transformers neither."""
        return self.groups, 1e-5 if self.silu else 1e-6, self.silu

    def cost(self, itemsize: int) -> launch.Cost:
        return kernel.cost(self.batch * self.channels * self.side**2, itemsize, self.silu)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x (B, C, h, w), weight and bias (C,): off-centre noise."""
        randn = partial(torch.randn, device=device, dtype=dtype)
        x = -2.3 + 0.5 * randn(self.batch, self.side, self.side, self.channels)
        x = x.permute(0, 3, 1, 2)                                            # (B, C, h, w)
        x = x if self.channels_last else x.contiguous()
        return x, 1 + 0.5 * randn(self.channels), 0.5 * randn(self.channels)

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The reference in float64, an item at a time."""
        affine = weight.double(), bias.double()
        return torch.cat([REFERENCE.group_norm_silu(item.double(), *affine, *self.rest)
                          for item in x.split(1)])

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernel.group_norm_silu(x, weight, bias, *self.rest)

    def by_torch(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return TORCH.group_norm_silu(x, weight, bias, *self.rest)

    def yardstick(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """torch in NCHW: in channels_last on a CPU it takes E[x^2] - E[x]^2 and loses digits."""
        return self.by_torch(x.contiguous(), weight, bias)

    def by_reference(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return REFERENCE.group_norm_silu(x, weight, bias, *self.rest)

    def peers(self, device: torch.device, compiler: Compiler) -> dict[str, Callable | str]:
        """Name -> call; a string is why there is none."""
        peers: dict[str, Callable | str] = {"eager": lambda *args: eager(*args, *self.rest)}
        modes = list(MODES)
        if (self.model, self.channels, self.side, self.silu, self.channels_last) != HEADLINE:
            modes.remove("compiled max-autotune")  # it takes too long for more than one size
        peers |= {mode: partial(self._compiled, compiler, mode) for mode in modes}
        peers["liger"] = self._liger if _has_liger() else "liger_kernel is not installed"
        if device.type == "cpu":
            peers |= {"torch": self.by_torch, "reference": self.by_reference}
        return peers

    def _compiled(self, compiler: Compiler, mode: str, *args: Tensor) -> Tensor:
        return compiler(mode, eager, *args, *self.rest)

    def _liger(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction

        groups, eps, silu = self.rest
        y = LigerGroupNormFunction.apply(x, weight, bias, self.channels, groups, eps)
        return F.silu(y) if silu else y


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
