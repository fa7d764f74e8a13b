"""Attention as the bench sees it: inputs, the exact result, the kernel, and its peers.

The peers get q, k and v as (B, H, L, d) views of the same memory, and what they return is not
copied back into (B, L, H*d): they are charged for no copy that they do not need.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from minisd_kernels.ops import attention as flash, launch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisd.models.ops import REFERENCE, TORCH, split_heads

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


class Attention(NamedTuple):
    """One size of attention, of which a forward of ``model`` makes ``calls``.

    ``packed``: q, k and v are slices of one projection; k and v alone where there are other keys.
    """

    model: str
    batch: int
    heads: int
    queries: int
    keys: int
    d: int
    calls: int
    packed: bool = False

    kernel = "attention"
    rate = "TFLOP/s"
    pixels = property(lambda self: self.queries)

    @property
    def label(self) -> str:
        sizes = f"{self.batch}x{self.heads}x{self.queries}x{self.keys}x{self.d}"
        return f"{self.model} {sizes}{' packed' * self.packed}"

    def cost(self, itemsize: int) -> launch.Cost:
        return flash.cost(self.batch, self.queries, self.keys, self.heads, self.d, itemsize)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q (B, Lq, H*d), k and v (B, Lk, H*d): off-centre noise."""
        width = self.heads * self.d
        q = -2.3 + 0.5 * torch.randn(self.batch, self.queries, width, device=device, dtype=dtype)
        kv = 0.7 + torch.randn(self.batch, self.keys, 2 * width, device=device, dtype=dtype)
        if not self.packed:
            return q, *(x.contiguous() for x in kv.chunk(2, -1))
        if self.queries == self.keys:
            return torch.cat([q, kv], -1).chunk(3, -1)
        return q, *kv.chunk(2, -1)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The reference in float64, one head at a time: the scores of all would not fit."""
        out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
        for item in range(self.batch):
            for head in range(self.heads):
                at = (slice(item, item + 1), slice(None), slice(head * self.d, (head + 1) * self.d))
                out[at] = REFERENCE.attention(*(x[at].double() for x in (q, k, v)), 1)
        return out

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.flash_attention(q, k, v, self.heads)

    def by_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return TORCH.attention(q, k, v, self.heads)

    yardstick = by_torch

    def by_reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return REFERENCE.attention(q, k, v, self.heads)

    def peers(self, device: torch.device, compiler: Callable) -> dict[str, Callable | str]:
        """Name -> call; a string is why there is none."""
        peers: dict[str, Callable | str] = {"sdpa default": self._sdpa}
        for name in BACKENDS:
            peers[f"sdpa {name}"] = partial(self._pinned, getattr(SDPBackend, name))
        peers["minisd padded"] = self._padded
        if device.type == "cpu":
            peers |= {"torch": self.by_torch, "reference": self.by_reference}
        return peers

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(split_heads(x, self.heads) for x in (q, k, v)))

    def _pinned(self, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return self._sdpa(q, k, v)

    def _padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Our kernel with d padded to one power of two, as in the Triton tutorial's attention."""
        width = triton.next_power_of_2(self.d)
        if width == self.d or self.d > flash.WIDEST_IN_PIECES:
            raise ValueError(f"d {self.d} has no padded variant")
        if why := flash.refusal(q, k, v, self.heads):
            raise ValueError(why)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        call = flash.plan(q, k, v, out, self.heads, self.d**-0.5, False, "ieee")
        if "BLOCK_D1" not in call.constants:
            raise ValueError(f"{q.dtype} takes the sliced kernel, which has no pieces to pad")
        launch.run([call._replace(constants=call.constants | dict(BLOCK_D1=width, BLOCK_D2=0))])
        return out
