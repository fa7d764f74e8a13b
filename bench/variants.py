"""Every variant of every kernel that Stable Diffusion launches, as the compiler would see it.

Not a second list of constants: every size of bench/shapes.py in both layouts, both UNets and the
VAE's decoder repacked, the text encoder, and some sizes in bfloat16 and float32 are planned on
tensors without memory, and what would be launched is kept.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from minisd_kernels.fused.decoder import FusedDecoder
from minisd_kernels.fused.unet import FusedUNet
from minisd_kernels.ops import attention as flash_attention, launch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import minisd
from bench import inside, shapes, tune
from minisd.backends import kernels
from minisd.config import SD1, SD2_V, Config
from minisd.models.ops import TORCH
from minisd.models.unet import UNet
from minisd.models.vae import Decoder

META = torch.device("meta")
ANY_GPU = GPUTarget("cuda", 90, 32)  # what a launch is specialised on is the same for all


class Variant(NamedTuple):
    """``sizes`` names every constant, every flag, and every number not divisible by 16."""

    kernel: str
    dtype: str
    sizes: str
    warps: int
    stages: int

    @property
    def attention(self) -> bool:
        return self.kernel.startswith("attention")


class ChannelsLast(TorchFunctionMode):
    """Inside, convolutions answer in channels_last, as on a GPU; on "meta" they would in NCHW."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.conv_transpose2d):
            out = out.contiguous(memory_format=torch.channels_last)
        return out


def fused_step(config: Config, side: int, batch: int = 1) -> None:
    """One forward of the repacked UNet, of so many images with guidance."""
    with META:
        unet = UNet(config.unet, TORCH).half().requires_grad_(False)
    unet = FusedUNet(unet, kernels())
    with META, ChannelsLast():
        x = torch.empty(batch, config.unet.in_channels, side, side, dtype=torch.float16)
        context = torch.empty(2 * batch, 77, config.unet.cross_attention_dim, dtype=torch.float16)
        unet(x, torch.empty(batch), context)


def fused_decode(config: Config, side: int) -> None:
    """One image by the repacked decoder."""
    with META:
        decoder = Decoder(config.vae, TORCH).half().requires_grad_(False)
    decoder = FusedDecoder(decoder, kernels())
    with META, ChannelsLast():
        decoder(torch.empty(1, config.vae.latent_channels, side, side, dtype=torch.float16))


def text_attention() -> None:
    x = torch.empty(2, 77, SD1.text.hidden_size, dtype=torch.float16, device=META)
    flash_attention.flash_attention(x, x, x, SD1.text.num_attention_heads, causal=True)


def work() -> Iterator[Callable[[], object]]:
    """All that is planned."""
    norms = [norm._replace(channels_last=last)
             for norm in shapes.group_norms("SD1.5")[:1] for last in (False, True)]
    some = [*shapes.SELF_ATTENTION, *shapes.CROSS_ATTENTION, *shapes.VAE_ATTENTION, *norms]
    for dtype, cases in ((torch.float16, shapes.full()), (torch.bfloat16, some),
                         (torch.float32, some)):
        for case in cases:
            yield functools.partial(case.ours, *case.inputs(META, dtype))
    for config, side in ((SD1, 64), (SD2_V, 96)):
        yield functools.partial(fused_step, config, side)
        yield functools.partial(fused_decode, config, side)
    yield text_attention


def readable(config: Config, side: int) -> None:
    """One step and one decoding of the readable model by the kernels, and both of its prompts."""
    ops = kernels()
    with META:
        unet = UNet(config.unet, ops).half().requires_grad_(False)
        unet(torch.empty(2, config.unet.in_channels, side, side).half(), torch.empty(2),
             torch.empty(2, 77, config.unet.cross_attention_dim).half())
        decoder = Decoder(config.vae, ops).half().requires_grad_(False)
        decoder(torch.empty(1, config.vae.latent_channels, side, side).half())
        for batch in (1, 2):
            x = torch.empty(batch, 77, config.text.hidden_size).half()
            ops.attention(x, x, x, config.text.num_attention_heads, causal=True)


def everything() -> Iterator[Callable[[], object]]:
    """All that `python -m bench.everything` launches but for its tests, whose sizes are small."""
    yield from work()
    for dtype in (torch.bfloat16, torch.float32):
        for case in shapes.full():
            yield functools.partial(case.ours, *case.inputs(META, dtype))
    yield from (functools.partial(case._padded, *case.inputs(META, torch.float16))
                for case in shapes.full() if case.kernel == "attention")
    shipped = minisd.load(device="cpu").config
    for config in (SD1, SD2_V, shipped):
        side = config.sample_size // config.vae.downscale
        yield functools.partial(readable, config, side)
        yield from (functools.partial(fused_step, config, side, batch) for batch in (1, 4, 16))
        yield functools.partial(fused_decode, config, side)
    yield from (functools.partial(changed, change) for change in inside.CHANGES if change.compiles)
    for key, mine in tune.served(shapes.sd1(), torch.float16).items():
        for setting in tune.candidates(key, META):
            yield functools.partial(tuned, key, setting, mine)


def changed(change: inside.Change) -> None:
    with change.made(None):
        fused_step(SD1, 64)
        fused_decode(SD1, 64)


def tuned(key: tuple, setting: NamedTuple, cases: list) -> None:
    with tune.using(key, setting):
        for case in cases:
            case.ours(*case.inputs(META, torch.float16))


def planned(plans: Iterator[Callable[[], object]]) -> list[launch.Call]:
    """What would be launched. A size that a plan refuses has nothing to launch."""
    calls: list[launch.Call] = []
    with mock.patch.object(launch, "run", calls.extend), torch.no_grad():
        for plan in plans:
            with contextlib.suppress(ValueError):
                plan()
    return calls


@functools.cache
def variants(all_of: Callable[[], Iterator] = work) -> dict[Variant, launch.Call]:
    """Every variant, and a launch of it."""
    return {variant(call): call for call in planned(all_of())}


def source(call: launch.Call, gpu: GPUTarget) -> tuple[ASTSource, dict]:
    """What Triton would compile at that launch on that GPU, and with which options.

    By the private parts of JITFunction.run: what it reads off the arguments (a 1 becomes a
    constant, a multiple of 16 is noted) is read off here by the same code.
    """
    backend, kernel = make_backend(gpu), call.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, found, _ = bind(*call.args, **call.constants)
    given = dict(num_warps=call.num_warps, num_stages=call.num_stages, enable_fp_fusion=True)
    options, *parts = kernel._pack_args(backend, given, arguments, found, None)
    return ASTSource(kernel, *parts), options.__dict__


def variant(call: launch.Call) -> Variant:
    seen, _ = source(call, ANY_GPU)
    words = []
    for i, (name, kind) in enumerate(seen.signature.items()):
        value = seen.constants.get((i,))
        if kind == "constexpr" and value is not False:
            words.append(name if value is True else f"{name}={value}")
        elif kind in ("i32", "i64") and not seen.attrs.get((i,)):
            words.append(f"{name}:{kind}")
    module = call.kernel.__module__.rpartition(".")[2]
    dtype = str(call.args[0].dtype).removeprefix("torch.")
    return Variant(module + call.kernel.__name__, dtype, " ".join(words), call.num_warps,
                   call.num_stages)


def chosen(targets: list[str], full: str) -> list[tuple[Variant, str]]:
    """What is compiled in a minute: on ``full`` every attention in float16, and of all else the
    widest of those that differ in numbers alone; elsewhere the widest of each, in float16."""
    calls = variants()
    kinds, widest = {}, {}
    for v in sorted(calls, key=lambda v: next(iter(calls[v].constants.values()))):  # d, or channels
        half = v.dtype == "float16"
        kind = v.sizes if v.attention and half else re.sub(r"=\d+", "", v.sizes)
        kinds[v.kernel, v.dtype, kind] = v
        if half:
            widest[v.kernel, "ONE_TILE" in v.sizes] = v
    return ([(v, target) for v in widest.values() for target in targets if target != full]
            + [(v, full) for v in kinds.values()])
