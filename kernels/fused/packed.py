"""Convolutions and matrix products whose weights lie in the order that the library wants.

The readable model's parameters become views of these weights, so that both models together hold
each weight once; where oneDNN packs, its copy comes on top.

On a GPU that is channels_last. On a CPU it is oneDNN's blocked order for one size of input: torch's
own calls reorder the weights every time, which at 256x256 takes longer than the convolutions of
SD1.5 themselves. torch.compile packs weights with the same operators on a CPU; where they do not
apply (not float32, no oneDNN), torch's usual calls run.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Weights (C_out, C_in, ...) below each other: (the sum of C_out, C_in).

    Where they are parameters, each becomes a view of its rows: no weight is kept twice.
    """
    if len(weights) == 1:
        return weights[0].detach().flatten(1)
    matrix = torch.cat([weight.detach().flatten(1) for weight in weights])
    for weight, rows in zip(weights, matrix.split([len(weight) for weight in weights])):
        _replace(weight, rows.view(weight.shape))
    return matrix


def _replace(weight: Tensor, same: Tensor) -> None:
    """The same values in another place or order, for the readable model that owns the weight."""
    if isinstance(weight, nn.Parameter):
        weight.data = same


def packs(x: Tensor) -> bool:
    """Whether oneDNN's blocked order applies."""
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return onednn and x.device.type == "cpu" and x.dtype == torch.float32


class Conv(nn.Module):
    """A 3x3 convolution, or a transposed 4x4 one that doubles, with a padding of 1 and no bias.

    ``weight`` is given as torch's functions want it. It is packed for the size of the input when
    that size is first seen or changes, and kept in that one form.
    """

    def __init__(self, weight: Tensor, stride: int = 1, transposed: bool = False):
        super().__init__()
        self.weight = nn.Buffer(weight.detach().contiguous(memory_format=torch.channels_last))
        _replace(weight, self.weight.detach())
        self.stride, self.transposed = stride, transposed
        self.size: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, w), channels_last -> the same of another size."""
        if not packs(x):
            conv = F.conv_transpose2d if self.transposed else F.conv2d
            return conv(x, self.weight, stride=self.stride, padding=1)
        if x.shape != self.size:
            self._pack(x.shape)
        where = ([1, 1], [self.stride] * 2, [1, 1], 1)
        if self.transposed:
            return torch.ops.mkldnn._convolution_transpose_pointwise(
                x, self.weight, None, where[0], [0, 0], *where[1:], "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, None, *where, "none", [], "")

    def _pack(self, size: torch.Size) -> None:
        own = self.weight  # read once: another thread may pack it meanwhile
        weight = own.to_dense() if own.is_mkldnn else own
        if self.transposed:
            if own.is_mkldnn:
                weight = weight.transpose(0, 1).contiguous()  # oneDNN swaps the first two axes
            self.weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                weight, [1, 1], [0, 0], [self.stride] * 2, [1, 1], 1, list(size))
        else:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, [1, 1], [self.stride] * 2, [1, 1], 1, list(size))
        self.size = size


class Linear(nn.Module):
    """x W^T + b; W is packed for the number of rows when that is first seen or changes."""

    def __init__(self, *weights: Tensor, bias: Tensor | None = None):
        """weights (C_out, C_in, ...), also of 1x1 convolutions, one below the other; bias (the sum
        of C_out,)."""
        super().__init__()
        self.weight = nn.Buffer(joined(weights))
        self.bias = None if bias is None else nn.Buffer(bias.detach())
        self.rows: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C_in) -> (..., C_out)."""
        flat = x.flatten(0, -2)
        if not packs(x):
            return F.linear(flat, self.weight, self.bias).unflatten(0, x.shape[:-1])
        if len(flat) != self.rows:
            own = self.weight
            weight = own.to_dense() if own.is_mkldnn else own
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, len(flat))
            self.rows = len(flat)
        y = torch.ops.mkldnn._linear_pointwise(flat, self.weight, self.bias, "none", [], "")
        return y.unflatten(0, x.shape[:-1])

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """total + x W^T, in place; there must be no bias."""
        if packs(x):
            return total.add_(self(x))
        total.flatten(0, -2).addmm_(x.flatten(0, -2), self.weight.T)
        return total
