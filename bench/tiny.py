"""Does the shipped model draw what it is asked? Colours and objects, seen pairs and unseen ones.

    python -m bench.tiny --state DIR --sheet ten.png

``--state`` is the folder of weights/train_tiny.py, which holds the pictures to compare with. The
objects, backgrounds and seeds are fixed by hashes of their names, so that nobody can choose them.

* background: the share of a picture's outermost pixels whose nearest named colour is the asked one.
* object: all objects are put on the asked background and sorted by their distance to the picture
  (squared difference of pixels; an object's nearest skin tone counts). Is the asked one the
  nearest, or among the nearest five?
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import minisd

OBJECTS, STEPS, BATCH = 200, 30, 50
TEN = (
    "a red heart on a blue background", "a red apple on a white background",
    "a rocket on a black background", "a cat face on a green background",
    "a cup of coffee on a pink background", "a sunflower on a purple background",
    "a slice of pizza on a teal background", "a penguin on an orange background",
    "a guitar on a yellow background", "a light bulb on a gray background",
)  # fmt: skip


def order(text: str) -> bytes:
    return hashlib.sha256(f"bench|{text}".encode()).digest()


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


class Gallery:
    """Every object's pictures, and which of them each drawn one resembles."""

    def __init__(self, state: Path):
        about = json.loads((state / "objects.json").read_text())
        self.rgba = load_file(state / "objects.safetensors")["rgba"]         # (N, 4, 64, 64)
        self.colours = torch.tensor(list(about["backgrounds"].values())).float()
        self.backgrounds, self.objects = list(about["backgrounds"]), about["objects"]
        counts = torch.tensor([len(o["skin_tones"]) for o in self.objects])
        self.owner = torch.arange(len(counts)).repeat_interleave(counts)     # (N,)

    def questions(self, held_out: bool) -> list[tuple[int, int]]:
        """(object, background) pairs, seen in training or not, of the same objects."""
        by_hash = sorted(range(len(self.objects)), key=lambda i: order(self.objects[i]["names"][0]))
        asked = []
        for i in by_hash:
            thing = self.objects[i]
            fits = [b for b in self.backgrounds if (b in thing["held_out"]) == held_out]
            if thing["held_out"]:
                best = min(fits, key=lambda b: order(thing["names"][0] + b))
                asked.append((i, self.backgrounds.index(best)))
        return asked[:OBJECTS]

    def prompt(self, thing: int, background: int) -> str:
        name = article(self.objects[thing]["names"][0])
        return f"{name} on {article(self.backgrounds[background])} background"

    def right_border(self, pixels: Tensor, background: int) -> float:
        """Share of the outermost pixels of (3, 64, 64), 0..255, nearest to the asked colour."""
        sides = pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]
        border = torch.cat(sides, dim=1)                                     # (3, 252)
        nearest = torch.cdist(border.T, self.colours).argmin(dim=1)
        return (nearest == background).float().mean().item()

    def ranks(self, pixels: Tensor, asked: list[tuple[int, int]]) -> Tensor:
        """How many objects are nearer to each picture (B, 3, 64, 64) than the asked one: (B,)."""
        ranks = torch.empty(len(asked), dtype=torch.long)
        for b, colour in enumerate(self.colours):
            mine = torch.tensor([i for i, (_, background) in enumerate(asked) if background == b])
            if not len(mine):
                continue
            alpha = self.rgba[:, 3:].float() / 255
            known = self.rgba[:, :3] + (1 - alpha) * colour[:, None, None]   # (N, 3, 64, 64)
            apart = torch.cdist(pixels[mine].flatten(1), known.flatten(1))   # (b, N)
            nearest = torch.full((len(mine), len(self.objects)), torch.inf)
            nearest.scatter_reduce_(1, self.owner.expand_as(apart), apart, "amin")
            own = nearest.gather(1, torch.tensor([[asked[i][0]] for i in mine]))
            ranks[mine] = (nearest < own).sum(dim=1)
        return ranks


def make(sd: "minisd.StableDiffusion", prompts: list[str]) -> Tensor:
    """Pictures (B, 3, 64, 64), 0..255, with the seeds 0, 1, 2, ..."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = list(range(start, start + len(part)))
        out = sd(part, num_inference_steps=STEPS, seed=seeds, output_type="pt", progress=False)
        parts.append(out.images)
    return torch.cat(parts) * 255


def sheet(pixels: Tensor, columns: int) -> Image.Image:
    rows = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray(rows.round().byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache/minisd/train_tiny")
    parser.add_argument("--model", help="default: the shipped one")
    parser.add_argument("--sheet", type=Path, help="save ten common objects here, as a PNG")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = minisd.load(args.model) if args.model else minisd.load()
    if args.sheet:
        sheet(make(sd, list(TEN)), columns=5).save(args.sheet)
    gallery = Gallery(args.state)
    print("pairs      pictures  background  top 1  top 5  seconds")
    for name, held_out in (("trained", False), ("held out", True)):
        asked, began = gallery.questions(held_out), time.perf_counter()
        pixels = make(sd, [gallery.prompt(*pair) for pair in asked])
        seconds = time.perf_counter() - began
        pairs = zip(pixels, asked, strict=True)
        border = sum(gallery.right_border(p, b) for p, (_, b) in pairs) / len(asked)
        ranks = gallery.ranks(pixels, asked)
        top1, top5 = ((ranks < k).float().mean().item() for k in (1, 5))
        print(f"{name:9} {len(asked):9}  {border:10.1%} {top1:6.1%} {top5:6.1%}  {seconds:7.0f}")


if __name__ == "__main__":
    main()
