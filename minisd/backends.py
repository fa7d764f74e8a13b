"""Which functions compute attention and norms, and whether the networks are repacked around them.

These are two questions and two arguments of `minisd.load`. ``ops`` names the functions: "torch",
"reference", "triton" (the kernels, which raise where they do not take a call), "auto", or an `Ops`
of the caller's own. ``fused`` says whether the steps and the decoding run on repacked copies of the
UNet and of the VAE's decoder (minisd_kernels.fused.unet).

This is the only file that imports minisd_kernels, and only inside functions: minisd works without.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minisd.config import UNetConfig
from minisd.models.ops import REFERENCE, TORCH, Ops
from minisd.models.unet import UNet
from minisd.models.vae import VAE

if TYPE_CHECKING:
    from minisd_kernels.fused.decoder import Fused

NAMED = {"torch": TORCH, "reference": REFERENCE}
NOT_ASKED = "the kernels were not asked for"


@dataclass(frozen=True)
class Backend:
    """What the two arguments mean on a device, and why the functions are not kernels."""

    ops: Ops
    fused: bool = False
    why: str = NOT_ASKED
    asked: tuple[str | Ops, bool | None] | None = None

    def at(self, device: torch.device, dtype: torch.dtype) -> "Backend":
        """What the same arguments mean elsewhere; raises as `resolve` does."""
        return self if self.asked is None else resolve(*self.asked, device, dtype)


def resolve(ops: str | Ops, fused: bool | None, device: torch.device,
            dtype: torch.dtype) -> Backend:
    """The functions and the networks for a model of that dtype on that device.

    "auto" is the kernels on a GPU where they are proven, with torch's function for a call that a
    kernel does not take; elsewhere it is torch's: code that never ran on a kind of GPU is not the
    default there. ``fused`` None is True where the kernels are proven and ``ops`` is "auto" or the
    caller's own. ``ops`` "fused" is short for fused=True, with the kernels on a GPU and with
    torch's functions on a CPU.

    Raises ValueError or TypeError for anything else, and ValueError for kernels that cannot run.
    """
    asked = (ops, fused)
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"fused must be True, False or None, not {fused!r}")
    if isinstance(ops, Ops):
        proven = fused is None and not _not_proven(device, dtype)
        return Backend(ops, proven or bool(fused), asked=asked)
    if not isinstance(ops, str) or ops not in ("auto", *NAMED, "triton", "fused"):
        raise ValueError("ops must be one of auto, torch, reference, triton, fused, or an Ops, "
                         f"not {ops!r}")
    if ops in NAMED:
        return Backend(NAMED[ops], bool(fused), asked=asked)
    if ops == "auto":
        why = _not_proven(device, dtype)
        chosen = TORCH if why else _kernels_or_torch()
        return Backend(chosen, not why if fused is None else bool(fused), why, asked)
    if ops == "fused" and fused is False:
        raise ValueError('ops="fused" and fused=False contradict each other')
    why = _no_kernels(device, dtype)
    if why and (ops == "triton" or device.type != "cpu"):
        raise ValueError(f'ops="{ops}" cannot be had: {why}')
    return Backend(TORCH if why else kernels(), ops == "fused" or bool(fused), why, asked)


def _no_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot run a model of that dtype there at all; empty if they can."""
    try:
        from minisd_kernels.ops.attention import refusal
        from minisd_kernels.ops.launch import DTYPES
    except ModuleNotFoundError as error:
        # Not the extra minisd[kernels]: pip would look for a minisd on the package index.
        where = "triton, on Linux" if error.name == "triton" else "., in a clone of minisd"
        return f"no module named {error.name}: pip install {where}"
    except (ImportError, OSError) as error:  # an installation of Triton that is broken
        return f"triton cannot be imported: {error}"
    x = torch.empty(1, 1, 8, dtype=torch.float32, device=device)
    if why := refusal(x, x, x, heads=1):
        return why
    if dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype)[6:]}"
    return ""


def _not_proven(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels are not the default there; empty if they are."""
    if why := _no_kernels(device, dtype):
        return why
    from minisd_kernels.ops.attention import _kernel
    from minisd_kernels.ops.launch import interpreted
    from minisd_kernels.proof import proven

    if interpreted(_kernel):  # with TRITON_INTERPRET set
        return "the kernels are interpreted, which is for tests"
    name = torch.cuda.get_device_name(device)
    return proven(torch.cuda.get_device_capability(device), name)


@dataclass(frozen=True)
class Preferred:
    """A kernel where it takes the call, and torch's function where it does not."""

    kernel: Callable
    refusal: Callable[..., str | None]
    other: Callable

    def __call__(self, *args, **options):
        refused = self.refusal(*args, **options)
        return (self.other if refused else self.kernel)(*args, **options)


def _families() -> dict[str, tuple[Callable, Callable[..., str | None]]]:
    """Each function's kernel and its refusal: why it does not take a call."""
    from minisd_kernels.ops import (
        attention as flash_attention,
        geglu,
        group_norm as group_norm_silu,
        layer_norm,
    )

    def attention(q, k, v, heads, causal=False):
        return flash_attention.refusal(q, k, v, heads)

    def group_norm(x, weight, bias, groups, eps, silu, shift=None, residual=None,
                   return_sum=False):
        into = return_sum if isinstance(return_sum, Tensor) else None
        return group_norm_silu.refusal(x, weight, bias, groups, shift, residual, into)

    def norm(x, weight, bias, eps, residual=None, shift=None):
        return layer_norm.refusal(x, weight, bias, residual, shift)

    return {
        "attention": (flash_attention.flash_attention, attention),
        "group_norm_silu": (group_norm_silu.group_norm_silu, group_norm),
        "layer_norm": (layer_norm.layer_norm, norm),
        "geglu": (geglu.geglu, geglu.refusal),
    }


def kernels() -> Ops:
    """The Triton kernels. Raises ModuleNotFoundError without triton."""
    return Ops(**{name: kernel for name, (kernel, _) in _families().items()})


def _kernels_or_torch() -> Ops:
    return Ops(**{name: Preferred(kernel, refusal, getattr(TORCH, name))
                  for name, (kernel, refusal) in _families().items()})


# --- what takes which call -----------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of an op: its sizes, the implementation it took, and why that was not a kernel."""

    function: str
    sizes: str
    took: str
    why: str


def coverage(config: UNetConfig, backend: Backend, height: int, width: int, dtype: torch.dtype,
             batch: int = 2) -> list[Call]:
    """Every call that one forward of the UNet, readable or repacked, makes of its ops, in order.

    ``height`` and ``width`` are those of the latent; ``batch`` is 2 for one image with guidance.
    The UNet is built and run without memory (torch's "meta" device): this takes milliseconds for a
    model of any size, and needs no GPU.
    """
    calls: list[Call] = []
    ops = watch(backend, calls)
    with torch.no_grad(), torch.device("meta"):
        unet: Callable[..., Tensor] = UNet(config, ops).to(dtype)
        if backend.fused:
            from minisd_kernels.fused.unet import FusedUNet

            unet = FusedUNet(unet, ops)
        x = torch.empty(batch, config.in_channels, height, width, dtype=dtype)
        context = torch.empty(batch, 77, config.cross_attention_dim, dtype=dtype)
        n = config.projection_class_embeddings_input_dim
        classes = torch.empty(batch, dtype=torch.int64) if n is None else torch.empty(batch, n)
        unet(x, torch.empty(batch), context, classes)
    return calls


def watch(backend: Backend, calls: list[Call]) -> Ops:
    """The same ops, adding every call to ``calls``."""
    def noted(name: str, *args, **options):
        function = getattr(backend.ops, name)
        if isinstance(function, Preferred):
            why = function.refusal(*args, **options) or ""
            function = function.other if why else function.kernel
        else:
            why = backend.why
        took = implementation(function)
        sizes = SIZES[name](*args, **options)
        calls.append(Call(name, sizes, took, "" if took == "triton" else why))
        # A function of the caller's own need not run without data, as here: torch's stands in.
        return (function if took in KNOWN else getattr(TORCH, name))(*args, **options)

    return Ops(**{f.name: partial(noted, f.name) for f in fields(Ops)})


KNOWN = ("torch", "reference", "triton")


def implementation(function: Callable) -> str:
    """What a function of an `Ops` is: one of KNOWN, or its own name if it is the caller's."""
    for name, ops in NAMED.items():
        if function in (getattr(ops, f.name) for f in fields(Ops)):
            return name
    module = getattr(function, "__module__", "")
    own = getattr(function, "__qualname__", type(function).__qualname__)
    return "triton" if module.startswith("minisd_kernels.") else f"{module}.{own}"


def _attention_sizes(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> str:
    return f"{heads} heads of {q.shape[2] // heads}, {q.shape[1]}x{k.shape[1]}"


def _group_norm_sizes(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                      silu: bool, *more: object, **options: object) -> str:
    return f"{x.shape[1]} at {'x'.join(map(str, x.shape[2:]))}" + ", SiLU" * silu


def _row_sizes(x: Tensor, *more: object, **options: object) -> str:
    return f"{x.shape[-1]} in {x.shape[:-1].numel()} rows"


SIZES: dict[str, Callable[..., str]] = {
    "attention": _attention_sizes, "group_norm_silu": _group_norm_sizes,
    "layer_norm": _row_sizes, "geglu": _row_sizes,
}


# --- the repacked networks of a model ------------------------------------------------------------


class Repacked:
    """The repacked UNet and decoder of a model, made when first asked for.

    It is a cache: made again when the networks or their weights have changed, empty in a copy and
    in a pickle. Threads take turns. A change that torch does not count, through ``weight.data``, is
    not seen: clear it then.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._key: tuple = ()
        self._made: Fused | None = None

    def __call__(self, unet: UNet, vae: VAE, ops: Ops) -> "Fused":
        from minisd_kernels.fused.decoder import Fused

        with self._lock:
            if self._made is None or self._key != _key(unet, vae.decoder, ops):
                self._made = None
                # Outside the caller's mode, because it outlives the call.
                with torch.inference_mode(False), torch.no_grad():
                    self._made = Fused(unet, vae, ops)
                self._key = _key(unet, vae.decoder, ops)
            return self._made

    def clear(self) -> None:
        """Forget them and free their memory."""
        with self._lock:
            self._made, self._key = None, ()

    def __deepcopy__(self, memo: dict) -> "Repacked":
        return Repacked()

    def __reduce__(self) -> tuple:
        return Repacked, ()


def _key(*given: object) -> tuple:
    """Differs where a network is another one or one of its weights has been changed."""
    networks = [each for each in given if isinstance(each, nn.Module)]
    weights = (p for network in networks for p in network.parameters())
    versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights]
    return (*map(id, given), *versions)
