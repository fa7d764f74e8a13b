"""Measure how few calls of the UNet each sampler needs with the shipped model.

    python -m weights.recipe.samplers --state DIR --out DIR

For each sampler and number of calls: how often the object asked for is the nearest to the image,
and the PSNR of the image against the scene asked for, over some trained pairs; evaluate.py says
what these are. lcm is for models that were distilled for it, and shows here what it does without.
"""

import argparse
import csv
from pathlib import Path

import torch

import minisd
from weights.recipe.evaluate import Evaluation, Gallery, psnr
from weights.recipe.scenes import STATE, catalogue

SAMPLERS = ("DDIM", "Euler", "DPM++ 2M Karras", "DPM++ 2M", "UniPC", "Heun", "LCM")
CALLS = (2, 3, 5, 8, 10, 15, 20, 30, 50)


def figures(evaluation: Evaluation, count: int, sampler: str, calls: int) -> dict[str, float]:
    """Top 1 in percent and PSNR in decibels, with that many calls of the UNet at most."""
    gallery = evaluation.gallery
    asked = gallery.questions(False, count)
    right = torch.cat([gallery.place(gallery.first[[i]], (0, 0, 1), b) for i, b in asked])
    steps = (calls + 1) // 2 if sampler == "Heun" else calls  # it asks twice a step
    pixels = evaluation.make([gallery.prompt(pair) for pair in asked], sampler=sampler,
                             num_inference_steps=steps)
    ranks = gallery.ranks(pixels, asked)
    return {"top 1, %": round(100 * (ranks < 1).float().mean().item(), 1),
            "PSNR, dB": round(psnr(pixels, right).mean().item(), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=STATE / "cpu")
    parser.add_argument("--things", type=int, default=512, help="number of objects in training")
    parser.add_argument("--count", type=int, default=50, help="images a figure")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--out", type=Path, help="write samplers.csv here")
    args = parser.parse_args()
    sd = minisd.load()
    catalogue(args.state, sd.config.sample_size, args.things)
    gallery = Gallery(args.state, sd.device)
    evaluation = Evaluation(sd, gallery, args.count, {"guidance_scale": args.guidance})
    rows = []
    for sampler in SAMPLERS:
        for calls in CALLS:
            found = figures(evaluation, args.count, sampler, calls)
            rows.append({"sampler": sampler, "calls": calls, **found})
            print(*rows[-1].values(), sep="  ", flush=True)
    if args.out is not None:
        with open(args.out / "samplers.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
