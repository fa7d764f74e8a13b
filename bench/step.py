"""One UNet step of full-size Stable Diffusion 1.5, ours and diffusers', in turns in one process.

    python -m bench.step --ops fused --size 256 --rounds 15 --threads 2

A step is what one picture with guidance asks: a latent for two prompts. Both models share one set
of random float32 weights (3.4 GB). Prints each one's median seconds and the quartiles of the ratio
ours/theirs, pair by pair; run it on a quiet machine.
"""

import argparse
import platform
import statistics
import time

import diffusers
import torch
from minisd_kernels.bodies import PLAIN
from minisd_kernels.fused_unet import FusedUNet

from bench.official import official_unet
from minisd.config import SD1
from minisd.ops import TORCH
from minisd.unet import UNet


def build() -> tuple[UNet, diffusers.UNet2DConditionModel]:
    """Our SD1 UNet and diffusers', with the same random weights."""
    with torch.device("meta"):
        ours = UNet(SD1.unet, TORCH)
        theirs = official_unet(SD1.unet)
    weights = {}
    for name, p in ours.state_dict().items():
        weights[name] = torch.randn(p.shape) * (0.02 if p.dim() > 1 else 0.1)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    for model in (ours, theirs):
        model.load_state_dict(weights, strict=True, assign=True)
    return ours.eval(), theirs.eval()


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", choices=("torch", "fused"), default="torch")
    parser.add_argument("--size", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed pairs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    ours, theirs = build()
    x = torch.randn(1, 4, args.size // 8, args.size // 8)
    twice, t, context = torch.cat([x, x]), torch.tensor([500, 500]), torch.randn(2, 77, 768)
    run_ours = lambda: ours(twice, t, context)  # noqa: E731
    if args.ops == "fused":
        fused = FusedUNet(ours, PLAIN)
        times, prompt = fused.times(t[:1])[0], fused.prompt(context)
        run_ours = lambda: fused.step(x, times, prompt)  # noqa: E731
    run_theirs = lambda: theirs(twice, t, context).sample  # noqa: E731
    error = (run_ours() - run_theirs()).abs().max() / run_theirs().abs().max()  # and a warm-up

    pairs = []
    for i in range(args.rounds):  # who goes first alternates too
        if i % 2:
            a = seconds(run_ours)
            b = seconds(run_theirs)
        else:
            b = seconds(run_theirs)
            a = seconds(run_ours)
        pairs.append((a, b))
    low, middle, high = statistics.quantiles((a / b for a, b in pairs), n=4)
    print(f"SD1.5 UNet, {args.size}x{args.size}, guidance, float32, {args.threads} threads, "
          f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()}")
    print(f"{args.ops:9} {statistics.median(a for a, _ in pairs):.3f} s per step (median)")
    print(f"diffusers {statistics.median(b for _, b in pairs):.3f} s per step (median)")
    print(f"ratio     {middle:.3f} (quartiles {low:.3f} to {high:.3f}; {args.rounds} pairs); "
          f"relative error {error:.1e}")


if __name__ == "__main__":
    main()
