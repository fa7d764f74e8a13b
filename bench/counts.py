"""What a denoise step and a decoding launch and move, counted, from the formulas to the graph.

    python -m bench.counts            # prints a table
    python -m bench.counts --write    # and adds it to bench/results/launches.csv

One step is one picture with guidance, in float16: the UNet on both contexts, guidance and the DDIM
update. The decoding is the VAE's, of one picture. They run without memory (torch's "meta" device),
so this takes seconds and needs no GPU.

A launch is a call into aten that computes (views and allocations do not), or one Triton kernel.
Bytes are those of the distinct tensors that each launch reads and writes, once each. FLOPs are
those of convolutions, matrix products and attention, 2 for a multiply-add.

A count is no time. On a GPU one aten call may be more than one kernel (GroupNorm is three, a
convolution with a bias is two, and cuDNN may change the layout around it), so rows of aten calls
are a lower bound; the rows of Triton kernels are exact but for what is left of aten in them. What a
kernel reads twice from the cache is counted once. scaled_dot_product_attention counts as its flash
form. Needs triton.
"""

import argparse
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from minisd_kernels.fused.decoder import FusedDecoder
from minisd_kernels.fused.steps import Steps, weights
from minisd_kernels.fused.unet import FusedUNet
from minisd_kernels.ops import attention as flash_attention, launch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import harness
from bench.models import GUIDANCE, official_unet, quiet
from minisd import steps as readable_steps
from minisd.backends import kernels
from minisd.config import SD1, SD2_V, Config
from minisd.models.clip import TextEncoder
from minisd.models.ops import REFERENCE, TORCH, Ops
from minisd.models.unet import UNet, zero_classes
from minisd.models.vae import Decoder
from minisd.samplers import SAMPLERS, schedule
from minisd.samplers.sampler import coefficients
from minisd.samplers.schedule import Ladder

META = torch.device("meta")
MODELS = {"SD1.5, 512x512": SD1, "SD2.1, 768x768": SD2_V}
DECODING = ", decoding"
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
OVERWRITTEN = {"copy_", "fill_", "zero_"}  # what these change, they do not read
OPS = {"reference": REFERENCE, "torch": TORCH, "triton": kernels()}
Forward = Callable[[], object]  # on "meta"


# --- forwards -------------------------------------------------------------------------------------


class AsOnGPU(TorchFunctionMode):
    """On "meta" scaled_dot_product_attention would fall apart into its formula, and convolutions
    forget the layout. With cuDNN it is channels_last if the input's or the weight's is (torch's
    aten/src/ATen/native/ConvUtils.h)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.conv_transpose2d):
            if torch.channels_last in map(suggest_memory_format, args[:2]):
                out = torch.empty_like(out, memory_format=torch.channels_last)
        return out


def network(kind: Callable[..., nn.Module], *args) -> nn.Module:
    with META:
        return kind(*args).half().eval().requires_grad_(False)


class Step:
    """One denoise step of ``batch`` pictures with guidance, as the model's loop takes it."""

    def __init__(self, config: Config, batch: int = 1, sampler: str = "ddim"):
        self.config, self.sampler = config, SAMPLERS[sampler](self.ladder(sampler, config))
        size, channels = config.sample_size // config.vae.downscale, config.vae.latent_channels
        with META:
            self.x = torch.empty(batch, channels, size, size)
            self.extra = torch.empty(batch, config.unet.in_channels - channels, size, size)
            self.extra = self.extra if self.extra.numel() else None
            self.context = torch.empty(2 * batch, 77, config.unet.cross_attention_dim).half()
            self.classes = zero_classes(config.unet, 2 * batch)

    @staticmethod
    def ladder(sampler: str, config: Config) -> Ladder:
        abars = schedule.alphas_cumprod(config.schedule).tolist()
        return SAMPLERS[sampler].ladder("linspace", 3, abars)

    def readable(self, unet: nn.Module) -> Forward:
        told = {} if self.classes is None else {"class_vector": self.classes}
        steps = readable_steps.Steps(unet, self.context, self.extra, self.sampler,
                                     self.config.schedule.prediction_type, GUIDANCE,
                                     told=told)
        return partial(steps, readable_steps.first_state(self.sampler, self.x), 0)

    def steps(self, fused: FusedUNet) -> Steps:
        """Here the prompt's keys and values and the time embeddings are made."""
        table = weights(coefficients(self.sampler, self.config.schedule.prediction_type), GUIDANCE)
        return Steps(fused, self.context, [981], table, self.extra, class_vector=self.classes)

    def once(self, fused: FusedUNet) -> Forward:
        return partial(self.steps(fused), readable_steps.first_state(self.sampler, self.x), 0)

    def anew(self, fused: FusedUNet) -> Forward:
        return lambda: self.once(fused)()

    def around(self, fused: FusedUNet) -> Forward:
        """What surrounds the replay of a graph (kernels/fused/graph.py): inputs are copied into its
        buffers, and the result out of its memory."""
        steps = self.steps(fused)
        state = readable_steps.first_state(self.sampler, self.x)
        given = [state, steps.times[0], steps.table[0]]
        return lambda: [torch.empty_like(x).copy_(x) for x in given] + [state.clone()]


def decoding(config: Config, decoder: nn.Module) -> Forward:
    size = config.sample_size // config.vae.downscale
    latent = torch.empty(1, config.vae.latent_channels, size, size, device=META).half()
    return partial(decoder, latent)


def readable(config: Config, ops: Ops) -> list[Forward]:
    """A step, a decoding, and the prompt with the negative prompt and alone."""
    encoder = network(TextEncoder, config.text, ops)
    prompts = [torch.zeros(n, 77, dtype=torch.long, device=META) for n in (2, 1)]
    return [Step(config).readable(network(UNet, config.unet, ops)),
            decoding(config, network(Decoder, config.vae, ops)),
            *(partial(encoder, prompt) for prompt in prompts)]


def fused(config: Config, ops: Ops, batches: Iterable[int] = (1,)) -> list[Forward]:
    """A step of each batch, and a decoding, by the repacked networks."""
    unet = FusedUNet(network(UNet, config.unet, TORCH), ops)
    decoder = FusedDecoder(network(Decoder, config.vae, TORCH), ops)
    return [Step(config, batch).anew(unet) for batch in batches] + [decoding(config, decoder)]


# --- launches -------------------------------------------------------------------------------------


class Count(NamedTuple):
    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*map(sum, zip(self, other)))


class Launches(TorchDispatchMode):
    """Inside, every call into aten is added to ``total``, and by name to ``names``."""

    def __init__(self):
        super().__init__()
        self.total, self.names = Count(), Counter()
        self.calls: list[launch.Call] = []  # of kernels

    def add(self, name: str, size: int, flops: int) -> None:
        self.total += Count(1, size, flops)
        self.names[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            read = args[1:] if name in OVERWRITTEN else args
            read = [read, {k: v for k, v in kwargs.items() if k != "out"}]
            # By torch's own table, in which a product in place is the product.
            formula = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            self.add(name, moved(read) + moved(out), flops)
        return out

    def run(self, calls: list[launch.Call]) -> None:
        """In the place of `launch.run`."""
        self.calls += calls
        for call in calls:
            if call.args[0].device.type != "meta":
                raise ValueError("launches are counted on meta tensors only")
            flops = 0
            if call.kernel in (flash_attention._kernel, flash_attention._sliced_kernel):
                q, k = call.args[:2]
                flops = 4 * q.numel() * k.shape[1]
            # A tensor that a kernel is given but never looks at is one of the others, given twice.
            self.add(call.kernel.__name__, moved(call.args), flops)


def moved(tensors) -> int:
    """Bytes of the distinct tensors: a view counts what it shows, an expanded one what is there."""
    sizes = {}
    for x in pytree.tree_leaves(tensors):
        if isinstance(x, Tensor):
            elements = math.prod(n for n, stride in zip(x.shape, x.stride()) if stride or not n)
            key = x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype
            sizes[key] = elements * x.itemsize
    return sum(sizes.values())


def counted(forward: Forward) -> Launches:
    """What was made before is not counted."""
    seen = Launches()
    with torch.no_grad(), AsOnGPU(), mock.patch.object(launch, "run", seen.run), seen:
        forward()
    return seen


def planned(forwards: Iterable[Forward]) -> list[launch.Call]:
    """What the kernels would launch in these."""
    return [call for forward in forwards for call in counted(forward).calls]


# --- the table ------------------------------------------------------------------------------------


def rungs(config: Config) -> Iterator[tuple[str, str, Count]]:
    """What is counted (nothing: a step), who computes it, from the slowest to the fastest, and what
    it takes."""
    step = Step(config)
    if importlib.util.find_spec("diffusers"):
        quiet()
        theirs = network(official_unet, config.unet, step.x.shape[-1])
        theirs.forward = lambda *args, forward=theirs.forward: forward(*args).sample
        yield "", "diffusers eager", counted(step.readable(theirs)).total
    for name, ops in OPS.items():
        once, decode, *_ = readable(config, ops)
        yield "", f'ops="{name}"', counted(once).total
        yield DECODING, f'ops="{name}"', counted(decode).total
    for name in ("torch", "triton"):
        once, decode = fused(config, OPS[name])
        yield "", f"fused UNet, {name} bodies", counted(once).total
        yield DECODING, f"fused decoder, {name} bodies", counted(decode).total
    unet = FusedUNet(network(UNet, config.unet, TORCH), OPS["triton"])
    yield "", "prompt and times made once", (inside := counted(step.once(unet)).total)
    yield "", "one graph", inside._replace(launches=1) + counted(step.around(unet)).total


def table(rows: list[dict]) -> str:
    """For people."""
    lines = [f"{'':32}{'launches':>10}{'GB moved':>10}{'GFLOP':>10}"]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [model] + [
            f"  {row['rung']:30}{row['launches']:10}{row['bytes'] / 1e9:10.2f}"
            f"{row['flops'] / 1e9:10.1f}" for row in rows if row["model"] == model]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="add to bench/results/launches.csv")
    args = parser.parse_args(argv)
    machine = harness.machine(torch.device("cpu"))
    rows = harness.Rows(harness.RESULTS if args.write else None, machine)
    rows.add("launches", *({"model": name + of, "rung": rung, **count._asdict()}
                           for name, config in MODELS.items()
                           for of, rung, count in rungs(config)))
    print(table(rows.all))


if __name__ == "__main__":
    main()
