"""What a denoise step and a decoding launch and move, counted, from the formulas to the graph.

    python -m bench.launches            # prints a table
    python -m bench.launches --write    # and adds it to bench/results/launches.csv

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
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from minisd_kernels.fused.decoder import FusedDecoder
from minisd_kernels.fused.steps import Steps, advance
from minisd_kernels.fused.unet import FusedUNet
from minisd_kernels.ops import attention as flash_attention, launch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import record
from bench.models import GUIDANCE
from minisd import steps as readable_steps
from minisd.backends import kernels
from minisd.config import SD1, SD2_V, Config
from minisd.models.ops import REFERENCE, TORCH, Ops
from minisd.models.unet import UNet
from minisd.models.vae import Decoder
from minisd.samplers import schedule

MODELS = {"SD1.5, 512x512": (SD1, 64), "SD2.1, 768x768": (SD2_V, 96)}
COLUMNS = ["model", "rung", "launches", "bytes", "flops", "torch", "triton", "commit", "date"]
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
OVERWRITTEN = {"copy_", "fill_", "zero_"}  # what these change, they do not read
OPS = {"reference": REFERENCE, "torch": TORCH, "triton": kernels()}


class Count(NamedTuple):
    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*map(sum, zip(self, other)))


def moved(tensors: list) -> int:
    """Bytes of the distinct tensors: a view counts what it shows, an expanded one what is there."""
    sizes = {}
    for x in tensors:
        if isinstance(x, Tensor):
            elements = 1
            for n, stride in zip(x.shape, x.stride()):
                elements *= n if stride or not n else 1
            key = x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype
            sizes[key] = elements * x.itemsize
    return sum(sizes.values())


class Launches(TorchDispatchMode):
    """Inside, every launch is added to ``total``, and by name to ``names``."""

    def __init__(self):
        super().__init__()
        self.total, self.names = Count(), Counter()
        self.within = _AsOnGPU(), mock.patch.object(launch, "run", self._run)

    def __enter__(self) -> "Launches":
        for each in self.within:
            each.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for each in self.within[::-1]:
            each.__exit__(*error)

    def add(self, name: str, count: Count) -> None:
        self.total += count
        self.names[name] += count.launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in FREE:
            read = args[1:] if name in OVERWRITTEN else args
            read = [read, {k: v for k, v in kwargs.items() if k != "out"}]
            size = moved(pytree.tree_leaves(read)) + moved(pytree.tree_leaves(out))
            self.add(name, Count(1, size, _flops(name, args, kwargs, out)))
        return out

    def _run(self, calls: list[launch.Call]) -> None:
        for call in calls:
            if call.args[0].device.type != "meta":
                raise ValueError("launches are counted on meta tensors only")
            flops = 0
            if call.kernel in (flash_attention._kernel, flash_attention._sliced_kernel):
                q, k = call.args[:2]
                flops = 4 * q.numel() * k.shape[1]
            # A tensor that a kernel is given but never looks at is one of the others, given twice.
            self.add(call.kernel.__name__, Count(1, moved(call.args), flops))


class _AsOnGPU(TorchFunctionMode):
    """On "meta" scaled_dot_product_attention would fall apart into its formula, and convolutions
    forget channels_last."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.conv_transpose2d):
            if args[0].is_contiguous(memory_format=torch.channels_last):
                out = torch.empty_like(out, memory_format=torch.channels_last)
        return out


def _flops(name: str, args: tuple, kwargs: dict, out) -> int:
    """By torch's own table, in which a product in place is the product."""
    formula = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
    return formula(*args, **kwargs, out_val=out) if formula else 0


class Step:
    """One denoise step of one picture with guidance, on "meta", as the model's loop takes it."""

    def __init__(self, config: Config, side: int, dtype: torch.dtype = torch.float16):
        self.config, self.dtype, self.timesteps = config, dtype, [981]
        with torch.device("meta"):
            self.x = torch.empty(1, config.unet.in_channels, side, side)
            self.context = torch.empty(2, 77, config.unet.cross_attention_dim, dtype=dtype)

    def unet(self, ops: Ops) -> UNet:
        with torch.device("meta"):
            return UNet(self.config.unet, ops).to(self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def count(self, step: Callable[[Tensor], Tensor]) -> Launches:
        """Of ``step(x)``, the next x; what was made before is not counted."""
        with torch.device("meta"), Launches() as launches:
            step(self.x)
        return launches

    def readable(self, unet: UNet) -> Callable[[Tensor], Tensor]:
        """As the loop asks it."""
        abars = schedule.alphas_cumprod(self.config.schedule)[[1, 0]].tolist()
        steps = readable_steps.Steps(unet, self.context, None, self.timesteps, abars,
                                     self.config.schedule.prediction_type, GUIDANCE, 0.0)
        return lambda x: steps(x, 0)

    def steps(self, fused: FusedUNet) -> Steps:
        return Steps(fused, self.context, self.timesteps, [[1.0, 1.0 - GUIDANCE, GUIDANCE]])

    def anew(self, fused: FusedUNet) -> Callable[[Tensor], Tensor]:
        """Prompt and times at every step."""
        return lambda x: self.steps(fused)(x, 0)

    @torch.no_grad()
    def once(self, fused: FusedUNet) -> Callable[[Tensor], Tensor]:
        steps = self.steps(fused)
        return lambda x: steps(x, 0)

    @torch.no_grad()
    def replay(self, fused: FusedUNet) -> tuple[Callable[[Tensor], Tensor], Count]:
        """What surrounds the replay of a graph, as `fused_step.Graph` has it; and the replay."""
        steps = self.steps(fused)
        given = [self.x, steps.times[0], steps.table[0]]
        buffers = [x.clone() for x in given]
        with Launches() as inside:
            out = advance(fused, *buffers, None, *steps.fixed)

        def step(x: Tensor) -> Tensor:
            for mine, one in zip(buffers, [x, *given[1:]]):
                mine.copy_(one)
            return out.clone()
        return step, inside.total._replace(launches=1)


def rungs(config: Config, side: int) -> Iterator[tuple[str, Count]]:
    """From the slowest to the fastest: its name, and what one step takes."""
    step = Step(config, side)
    if importlib.util.find_spec("diffusers"):
        from bench.official import official_unet, quiet

        quiet()
        with torch.device("meta"):
            theirs = official_unet(config.unet, side).to(step.dtype).eval().requires_grad_(False)
        theirs.forward = lambda *args, forward=theirs.forward: forward(*args).sample
        yield "diffusers eager", step.count(step.readable(theirs)).total
    for name, ops in OPS.items():
        yield f'ops="{name}"', step.count(step.readable(step.unet(ops))).total
    for name, ops in {"torch": TORCH, "triton": kernels()}.items():
        fused = FusedUNet(step.unet(TORCH), ops)
        yield f"fused UNet, {name} bodies", step.count(step.anew(fused)).total
    yield "prompt and times made once", step.count(step.once(fused)).total
    around, graph = step.replay(fused)
    yield "one graph", step.count(around).total + graph


@torch.no_grad()
def decodings(config: Config, side: int) -> Iterator[tuple[str, Count]]:
    """The same of the VAE's decoder."""
    with torch.device("meta"):
        latent = torch.empty(1, config.vae.latent_channels, side, side, dtype=torch.float16)
        decoders = {f'ops="{name}"': Decoder(config.vae, ops).half() for name, ops in OPS.items()}
        for name, ops in {"torch": TORCH, "triton": kernels()}.items():
            fused = FusedDecoder(Decoder(config.vae, TORCH).half(), ops)
            decoders[f"fused decoder, {name} bodies"] = fused
    for name, decoder in decoders.items():
        with Launches() as launches:
            decoder(latent)
        yield name, launches.total


def table(rows: list[dict]) -> str:
    """For people."""
    lines = [f"{'':32}{'launches':>10}{'GB moved':>10}{'GFLOP':>10}"]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [model] + [
            f"  {row['rung']:30}{row['launches']:10}{row['bytes'] / 1e9:10.2f}"
            f"{row['flops'] / 1e9:10.1f}" for row in rows if row["model"] == model]
    return "\n".join(lines)


COUNTED = {"": rungs, ", decoding": decodings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="add to bench/results/launches.csv")
    args = parser.parse_args()
    record.refuse_two_trees()
    machine = record.machine(torch.device("cpu"), interpreted=False)
    rows = [{key: machine[key] for key in COLUMNS if key in machine}
            | {"model": name + of, "rung": rung, **count._asdict()}
            for name, model in MODELS.items() for of, counted in COUNTED.items()
            for rung, count in counted(*model)]
    print(table(rows))
    if args.write:
        record.append(record.ROOT / "bench" / "results" / "launches.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
