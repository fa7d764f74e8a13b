"""LayerNorm and GEGLU as the bench sees them: inputs, the exact result, the kernel, and its peers.

B items, L rows of each, C channels (of GEGLU: of one half)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from minisd_kernels.ops import geglu as geglu_file, launch, layer_norm as layer_norm_file
from torch import Tensor

from bench.group_norm import Compiler

EPS = 1e-5


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor,
                     residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(LayerNorm of the sum, the sum); what torch.compile is given."""
    s = x + shift if residual is None else x + shift + residual
    return F.layer_norm(s, weight.shape, weight, bias, EPS), s


def eager_geglu(h: Tensor) -> Tensor:
    """As diffusers has it."""
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


class LayerNorm(NamedTuple):
    """One size of LayerNorm, with a bias in front of it, and a residual or none."""

    model: str
    batch: int
    length: int
    channels: int
    calls: int
    residual: bool

    kernel = "layer_norm"
    rate = "GB/s"
    pixels = property(lambda self: self.length)

    @property
    def label(self) -> str:
        sizes = f"{self.batch}x{self.length}x{self.channels}"
        return f"{self.model} {sizes}{' + residual' * self.residual}"

    def cost(self, itemsize: int) -> launch.Cost:
        elements = self.batch * self.length * self.channels
        return layer_norm_file.cost(elements, itemsize, self.residual, shift=True)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x (B, L, C), weight, bias and shift (C,), and a residual (B, L, C): off-centre noise."""
        randn = partial(torch.randn, device=device, dtype=dtype)
        size = self.batch, self.length, self.channels
        x = -2.3 + 0.5 * randn(size)
        rows = 1 + 0.5 * randn(self.channels), 0.5 * randn(self.channels), randn(self.channels)
        return (x, *rows, randn(size)) if self.residual else (x, *rows)

    def exact(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return eager_layer_norm(*(x.double() for x in inputs))

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor,
             residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layer_norm_file.layer_norm(x, weight, bias, EPS, residual, shift)

    yardstick = by_torch = staticmethod(eager_layer_norm)

    def peers(self, device: torch.device, compiler: Compiler) -> dict[str, Callable | str]:
        return {"eager": eager_layer_norm,
                "compiled": partial(compiler, "compiled", eager_layer_norm)}


class Geglu(NamedTuple):
    """One size of GEGLU."""

    model: str
    batch: int
    length: int
    channels: int
    calls: int

    kernel = "geglu"
    rate = "GB/s"
    pixels = property(lambda self: self.length)

    @property
    def label(self) -> str:
        return f"{self.model} {self.batch}x{self.length}x{self.channels}"

    def cost(self, itemsize: int) -> launch.Cost:
        return geglu_file.cost(self.batch * self.length * self.channels, itemsize)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """h (B, L, 2C): off-centre noise."""
        size = self.batch, self.length, 2 * self.channels
        return -0.3 + 2 * torch.randn(size, device=device, dtype=dtype),

    def exact(self, h: Tensor) -> Tensor:
        return eager_geglu(h.double())

    def ours(self, h: Tensor) -> Tensor:
        return geglu_file.geglu(h)

    yardstick = by_torch = staticmethod(eager_geglu)

    def peers(self, device: torch.device, compiler: Compiler) -> dict[str, Callable | str]:
        return {"eager": eager_geglu, "compiled": partial(compiler, "compiled", eager_geglu)}
