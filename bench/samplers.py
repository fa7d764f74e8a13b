"""How fast each sampler converges: error against calls of the UNet, on an ODE that is known.

    python -m bench.samplers             # a table; with --out DIR also samplers.png

The model is a smooth function of x and t, the levels are those of Karras et al. without the last
step to no noise, and the error is against 2,000 steps of UniPC, in float64. The order is the slope
from 20 to 40 steps. It says how a sampler behaves where it is exact in the limit, not how good an
image is; weights/recipe/samplers.py measures that with the shipped model.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from minisd.config import ScheduleConfig
from minisd.samplers import SAMPLERS, schedule
from minisd.samplers.schedule import Ladder

# Those that follow the ODE; ddim and ddpm are Euler here, and lcm and tcd follow no ODE.
NAMES = ("euler", "dpmpp_2m", "unipc", "heun", "dpm2", "dpmpp_2s", "lms", "plms")
STEPS = (5, 10, 20, 40, 80)


def model(x: Tensor, t: float) -> Tensor:
    return torch.tanh(0.3 * x + t / 1000)


def end(name: str, steps: int) -> tuple[Tensor, int]:
    """x at the quietest level, and how often the model was asked."""
    abars = schedule.alphas_cumprod(ScheduleConfig()).tolist()
    sampler = SAMPLERS[name](Ladder(schedule.karras(steps + 1, abars), abars), 0.0)
    x = torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    past = (torch.zeros_like(x),) * sampler.memory
    for i, level in enumerate(sampler.shown[:-1]):
        x0, eps = schedule.predicted_x0_eps(x, model(x, level.t), level.abar, "epsilon")
        x, past = sampler.step(i, x, x0, eps, past, 0.0)
    return x, sampler.calls


def measured() -> dict[str, list[tuple[int, float]]]:
    """Sampler -> (calls, error) for each number of steps."""
    exact, _ = end("unipc", 2000)
    found: dict[str, list[tuple[int, float]]] = {}
    for name in NAMES:
        runs = (end(name, steps) for steps in STEPS)
        found[name] = [(calls, (x - exact).abs().max().item()) for x, calls in runs]
    return found


def order(points: list[tuple[int, float]]) -> float:
    """The slope from 20 to 40 steps."""
    (_, before), (_, after) = points[STEPS.index(20)], points[STEPS.index(40)]
    return math.log2(before / after)


def plot(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for name, points in found.items():
        axes.loglog(*zip(*points), marker="o", label=f"{name}, order {order(points):.1f}")
    axes.set(xlabel="calls of the UNet", ylabel="largest error of x",
             title="Convergence on a known ODE, levels of Karras et al.")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    pyplot.savefig(path, dpi=120)
    pyplot.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for samplers.png")
    args = parser.parse_args()
    found = measured()
    print("error after steps", *STEPS, "order", sep="\t")
    for name, points in found.items():
        print(name, *(f"{error:.2g}" for _, error in points), f"{order(points):.2f}", sep="\t")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(found, args.out / "samplers.png")


if __name__ == "__main__":
    main()
