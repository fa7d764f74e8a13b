"""Every attention, norm and GEGLU of Stable Diffusion, and how often a forward calls it.

A case is one size of one function of `minisd.Ops`: its inputs, what it is called with, the exact
result, and the least work. SD1.5 is at 512x512 and SD2.1 at 768x768, batch 2 (one image with
guidance: uncond and cond); the VAE decodes one image of 512x512. A test counts them in the models.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from minisd_kernels.ops import attention, geglu, group_norm, launch, layer_norm
from torch import Tensor

from minisd.models.ops import REFERENCE

EPS = 1e-5  # of LayerNorm
CONTEXT = 77  # tokens of a prompt
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """``calls``: how often a forward of ``model`` makes this call."""

    model: str
    batch: int
    op: ClassVar[str]  # a field of minisd.Ops
    rate: ClassVar[str] = "GB/s"

    def call(self, function: Callable[..., Result], *inputs: Tensor) -> Result:
        """A function with the signature of the field ``op``, with these inputs."""
        return function(*inputs)

    def exact(self, *inputs: Tensor) -> Result:
        """The formula in float64."""
        return self.call(getattr(REFERENCE, self.op), *(x.double() for x in inputs))


@dataclass(frozen=True)
class Attention(Case):
    """``packed``: q, k and v are slices of one projection; where there are other keys, k and v."""

    heads: int
    queries: int
    keys: int
    d: int
    calls: int
    packed: bool = False

    op = "attention"
    rate = "TFLOP/s"
    pixels = property(lambda self: self.queries)

    @property
    def label(self) -> str:
        sizes = f"{self.batch}x{self.heads}x{self.queries}x{self.keys}x{self.d}"
        return f"{self.model} {sizes}{' packed' * self.packed}"

    def cost(self, itemsize: int) -> launch.Cost:
        return attention.cost(self.batch, self.queries, self.keys, self.heads, self.d, itemsize)

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

    def call(self, function: Callable[..., Result], *inputs: Tensor) -> Result:
        return function(*inputs, self.heads)

    def exact(self, *inputs: Tensor) -> Tensor:
        """One head at a time: the scores of all would not fit."""
        out = torch.empty(inputs[0].shape, dtype=torch.float64, device=inputs[0].device)
        for item in range(self.batch):
            for head in range(self.heads):
                at = (slice(item, item + 1), slice(None), slice(head * self.d, (head + 1) * self.d))
                out[at] = REFERENCE.attention(*(x[at].double() for x in inputs), 1)
        return out


@dataclass(frozen=True)
class GroupNorm(Case):
    channels: int
    side: int
    silu: bool
    calls: int
    channels_last: bool = False
    groups: int = 32

    op = "group_norm_silu"
    pixels = property(lambda self: self.side**2)

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "nchw"

    @property
    def label(self) -> str:
        sizes = f"{self.batch}x{self.channels}x{self.side}x{self.side}"
        return f"{self.model} {sizes}{' silu' * self.silu} {self.layout}"

    def cost(self, itemsize: int) -> launch.Cost:
        return group_norm.cost(self.batch * self.channels * self.side**2, itemsize, self.silu)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x (B, C, h, w), weight and bias (C,): off-centre noise."""
        randn = partial(torch.randn, device=device, dtype=dtype)
        x = -2.3 + 0.5 * randn(self.batch, self.side, self.side, self.channels)
        x = x.permute(0, 3, 1, 2)                                            # (B, C, h, w)
        x = x if self.channels_last else x.contiguous()
        return x, 1 + 0.5 * randn(self.channels), 0.5 * randn(self.channels)

    def call(self, function: Callable[..., Result], *inputs: Tensor) -> Result:
        """In the UNet res blocks have SiLU and 1e-5, transformers neither."""
        return function(*inputs, self.groups, 1e-5 if self.silu else 1e-6, self.silu)

    def exact(self, x: Tensor, *affine: Tensor) -> Tensor:
        """An item at a time, to save memory."""
        return torch.cat([super(GroupNorm, self).exact(item, *affine) for item in x.split(1)])


@dataclass(frozen=True)
class LayerNorm(Case):
    """With a bias in front of it, and a residual or none."""

    length: int
    channels: int
    calls: int
    residual: bool

    op = "layer_norm"
    pixels = property(lambda self: self.length)

    @property
    def label(self) -> str:
        sizes = f"{self.batch}x{self.length}x{self.channels}"
        return f"{self.model} {sizes}{' + residual' * self.residual}"

    def cost(self, itemsize: int) -> launch.Cost:
        elements = self.batch * self.length * self.channels
        return layer_norm.cost(elements, itemsize, self.residual, shift=True)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x (B, L, C), weight, bias and shift (C,), and a residual (B, L, C): off-centre noise."""
        randn = partial(torch.randn, device=device, dtype=dtype)
        size = self.batch, self.length, self.channels
        x = -2.3 + 0.5 * randn(size)
        rows = 1 + 0.5 * randn(self.channels), 0.5 * randn(self.channels), randn(self.channels)
        return (x, *rows, randn(size)) if self.residual else (x, *rows)

    def call(self, function: Callable[..., Result], *inputs: Tensor) -> Result:
        x, weight, bias, shift, *residual = inputs
        return function(x, weight, bias, EPS, *(residual or [None]), shift)


@dataclass(frozen=True)
class Geglu(Case):
    """``channels``: of one half."""

    length: int
    channels: int
    calls: int

    op = "geglu"
    pixels = property(lambda self: self.length)

    @property
    def label(self) -> str:
        return f"{self.model} {self.batch}x{self.length}x{self.channels}"

    def cost(self, itemsize: int) -> launch.Cost:
        return geglu.cost(self.batch * self.length * self.channels, itemsize)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """h (B, L, 2C): off-centre noise."""
        size = self.batch, self.length, 2 * self.channels
        return -0.3 + 2 * torch.randn(size, device=device, dtype=dtype),


SELF_ATTENTION = [
    Attention("SD1.5", 2, 8, 4096, 4096, 40, calls=5),
    Attention("SD1.5", 2, 8, 1024, 1024, 80, calls=5),
    Attention("SD1.5", 2, 8, 256, 256, 160, calls=5),
    Attention("SD1.5", 2, 8, 64, 64, 160, calls=1),
    Attention("SD2.1", 2, 5, 9216, 9216, 64, calls=5),
    Attention("SD2.1", 2, 10, 2304, 2304, 64, calls=5),
    Attention("SD2.1", 2, 20, 576, 576, 64, calls=5),
    Attention("SD2.1", 2, 20, 144, 144, 64, calls=1),
]
CROSS_ATTENTION = [replace(case, keys=CONTEXT) for case in SELF_ATTENTION]
VAE_ATTENTION = [Attention("VAE", 1, 1, 4096, 4096, 512, calls=1)]

BLOCKS = [(case.model, case.batch, case.queries, case.heads * case.d, case.calls)
          for case in SELF_ATTENTION]  # transformer blocks: L, C, and their number
# Two of a block's three norms follow a residual sum: x + attention(x).
LAYER_NORMS = [LayerNorm(*sizes, calls * (1 + residual), residual)
               for *sizes, calls in BLOCKS for residual in (False, True)]
GEGLUS = [Geglu(*sizes, 4 * channels, calls) for *sizes, channels, calls in BLOCKS]

SIDES = {"SD1.5": 64, "SD2.1": 96}  # of the latent
UNET_NORMS = [  # channels, how often the side was halved, calls with SiLU, calls without
    (320, 0, 8, 5), (640, 0, 2, 0), (960, 0, 1, 0),
    (320, 1, 1, 0), (640, 1, 6, 5), (960, 1, 1, 0), (1280, 1, 1, 0), (1920, 1, 1, 0),
    (640, 2, 1, 0), (1280, 2, 6, 5), (1920, 2, 1, 0), (2560, 2, 2, 0),
    (1280, 3, 11, 1), (2560, 3, 3, 0),
]
VAE_NORMS = [  # channels, side, calls with SiLU, calls without
    (512, 64, 10, 1), (512, 128, 6, 0), (512, 256, 1, 0), (256, 256, 5, 0), (256, 512, 1, 0),
    (128, 512, 6, 0),
]


def group_norms(model: str) -> list[GroupNorm]:
    """The GroupNorms of one forward of "SD1.5", "SD2.1" or "VAE", in NCHW."""
    if model == "VAE":
        batch, rows = 1, VAE_NORMS
    else:
        batch, rows = 2, [(c, SIDES[model] >> level, *calls) for c, level, *calls in UNET_NORMS]
    return [GroupNorm(model, batch, channels, side, silu, calls)
            for channels, side, *both in rows for silu, calls in zip((True, False), both) if calls]


def layouts(norms: list[GroupNorm]) -> list[GroupNorm]:
    """In channels_last, the only layout of the fused model, and in NCHW."""
    return [replace(norm, channels_last=last) for last in (True, False) for norm in norms]


def attentions(cases: list[Attention]) -> list[Attention]:
    """With q, k and v apart, then in one projection."""
    return [replace(case, packed=packed) for case in cases for packed in (False, True)]


def full() -> list[Case]:
    """All, the most important first, because time may run out."""
    every = [
        *attentions(SELF_ATTENTION[:1]), *attentions(CROSS_ATTENTION[:1]),
        *layouts(group_norms("SD1.5")), *LAYER_NORMS[:2], *GEGLUS[:1],
        *attentions(SELF_ATTENTION[1:]), *attentions(CROSS_ATTENTION[1:]), *VAE_ATTENTION,
        *LAYER_NORMS[2:], *GEGLUS[1:], *layouts(group_norms("SD2.1")), *layouts(group_norms("VAE")),
    ]
    return sorted(every, key=lambda case: case.model == "SD2.1")


def sd1() -> list[Case]:
    """Those of an image by SD1.5."""
    return [case for case in full() if case.model in ("SD1.5", "VAE")]


def small() -> list[Case]:
    """Small enough for a CPU: SD1.5 at 16x16 and 8x8."""
    return [case for case in full() if case.model == "SD1.5" and case.pixels <= 256]


def tiny() -> list[Case]:
    """For Triton's interpreter: every kernel and every branch of it, at sizes that take seconds."""
    return [
        Attention("tiny", 2, 2, 37, 37, 40, calls=2, packed=True),  # one tile, two pieces
        Attention("tiny", 1, 2, 3, 131, 40, calls=1),  # more than one tile, ragged
        Attention("tiny", 1, 1, 20, 37, 512, calls=1, packed=True),  # sliced
        GroupNorm("tiny", 1, 6, 5, True, calls=2, groups=2),  # 3 channels a group: no power of two
        GroupNorm("tiny", 2, 6, 5, False, calls=1, channels_last=True, groups=2),
        GroupNorm("tiny", 1, 4, 91, True, calls=1, channels_last=True, groups=1),  # three launches
        LayerNorm("tiny", 1, 7, 40, calls=1, residual=False),
        LayerNorm("tiny", 2, 5, 12, calls=1, residual=True), Geglu("tiny", 2, 5, 20, calls=1),
    ]
