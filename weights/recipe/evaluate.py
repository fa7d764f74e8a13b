"""Measure how well a model follows prompts: colours, objects, layouts, skin tones.

    python -m weights.recipe.evaluate --state DIR                     # a line for each figure
    python -m weights.recipe.evaluate --state DIR --sweeps --out DIR  # and curves

``--state`` is the folder of weights/recipe/train.py, which holds the emoji. If it is empty, they
are fetched, which needs npm. Hashes of names choose the prompts, and image i has seed i, so that
none is picked by hand. Images are compared at 64x64 by squared differences of pixels.

* border: the share of an image's outermost pixels whose nearest named colour is the one asked for.
* object: whether the object asked for is the nearest to the image (top 1), or among the nearest
  five (top 5), of all objects on that background in the same layout; each in its nearest skin tone.
* layout, skin tone: whether the one asked for is the nearest of all layouts, or of all skin tones,
  of that object. The (object, background) pairs are held out of training.
* beside: the objects of the left and of the right half, each measured as "object" in its half.
* negative: whether the negative prompt "blue background" moves the border further from blue. Half
  of the images would do so by chance.
* autoencoder: PSNR of objects that it was not trained on, mean of decibels.
* the curves: "object", and PSNR of the image against the scene asked for, over a quarter of the
  trained pairs.

B images, N emoji
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import minisd
from weights.recipe.scenes import HELD_BACK, STATE, article, caption, catalogue, compose

SIZE, BATCH, UNTITLED, NEGATIVE = 64, 50, 50, "blue background"
SINGLE = slice(0, -1)  # the layouts with one object: all but the last
SWEEPS = {
    "guidance_scale": (1, 2, 3, 4, 5, 6, 7.5, 8, 9, 10),
    "num_inference_steps": (5, 10, 15, 20, 30, 50, 100),
}


def order(text: str) -> bytes:
    return hashlib.sha256(f"bench|{text}".encode()).digest()


class Gallery:
    """The emoji of all objects: prompts for them, and which of them an image is nearest to."""

    def __init__(self, state: Path, device: torch.device):
        about = json.loads((state / "objects.json").read_text())
        self.full = load_file(state / "objects.safetensors")["rgba"].to(device)
        self.rgba = F.adaptive_avg_pool2d(self.full.float(), SIZE)           # (N, 4, 64, 64)
        self.colours = torch.tensor(list(about["backgrounds"].values()), device=device).float()
        self.backgrounds, self.objects = list(about["backgrounds"]), about["objects"]
        self.layouts, self.device = about["layouts"], device
        self.first = torch.tensor([o["first"] for o in self.objects], device=device)
        counts = torch.tensor([len(o["skin_tones"]) for o in self.objects], device=device)
        self.owner = torch.arange(len(counts), device=device).repeat_interleave(counts)  # (N,)
        names = [thing["names"][0] for thing in self.objects]
        self.by_hash = sorted(range(len(names)), key=lambda i: order(names[i]))

    def questions(self, held_out: bool, count: int) -> list[tuple[int, int]]:
        """(object, background) pairs, held out of training or not; the objects are the same."""
        asked = []
        for i in self.by_hash:
            thing = self.objects[i]
            fits = [b for b in self.backgrounds if (b in thing["held_out"]) == held_out]
            if thing["held_out"] and len(thing["held_out"]) < len(self.backgrounds):
                best = min(fits, key=lambda b: order(thing["names"][0] + b))
                asked.append((i, self.backgrounds.index(best)))
        return asked[:count]

    def prompt(self, pair: tuple[int, int], layout: str = "{}", *others: int) -> str:
        *things, background = pair[0], *others, pair[1]
        names = [self.objects[thing]["names"][0] for thing in things]
        return caption(layout, names, self.backgrounds[background])

    def place(self, which: Tensor, place: list, background: int) -> Tensor:
        """The emoji ``which`` (B,) at a place, on a named colour: (B, 3, 64, 64) in [-1, 1]."""
        places = torch.tensor([[place]], device=self.device).expand(len(which), 1, 3)
        return compose(self.rgba, which[:, None], places, self.colours[None, background])

    def border(self, pixels: Tensor) -> Tensor:
        """The outermost pixels of (B, 3, 64, 64), as (B, 252, 3) in 0..255."""
        sides = pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, 1:-1, 0], pixels[:, :, 1:-1, -1]
        return (torch.cat(sides, dim=2).transpose(1, 2) + 1) * 127.5         # (B, 252, 3)

    def right_border(self, pixels: Tensor, asked: list[tuple[int, int]]) -> Tensor:
        """The share of each border that has the colour asked for: (B,)."""
        border = self.border(pixels)
        nearest = torch.cdist(border, self.colours.expand(len(border), -1, -1)).argmin(dim=2)
        wanted = torch.tensor([background for _, background in asked], device=self.device)
        return (nearest == wanted[:, None]).float().mean(dim=1)

    def ranks(self, pixels: Tensor, asked: list[tuple[int, int]], layout="{}", slot=0) -> Tensor:
        """How many objects are nearer to each image (B, 3, 64, 64) than the one asked for: (B,).

        With two objects beside each other, only the half of ``slot`` is compared.
        """
        ranks = torch.empty(len(asked), dtype=torch.long)
        halves = len(self.layouts[layout])
        part = slice(slot * SIZE // halves, (slot + 1) * SIZE // halves)
        everything = torch.arange(len(self.rgba), device=self.device)
        for background in sorted({b for _, b in asked}):
            mine = torch.tensor([i for i, (_, b) in enumerate(asked) if b == background])
            known = self.place(everything, self.layouts[layout][slot], background)
            drawn = pixels[mine.to(self.device)]
            apart = torch.cdist(drawn[..., part].flatten(1), known[..., part].flatten(1))  # (b, N)
            nearest = apart.new_full((len(mine), len(self.objects)), torch.inf)
            nearest.scatter_reduce_(1, self.owner.expand_as(apart), apart, "amin")
            own = torch.tensor([[asked[i][0]] for i in mine], device=self.device)
            ranks[mine] = (nearest < nearest.gather(1, own)).sum(dim=1).cpu()
        return ranks

    def chosen(self, pixels: Tensor, background: int, choices: list[tuple[int, list]]) -> int:
        """The index of the (emoji, place) that is nearest to pixels (3, 64, 64)."""
        known = torch.cat([
            self.place(torch.tensor([which], device=self.device), place, background)
            for which, place in choices])
        return (known - pixels).square().sum(dim=(1, 2, 3)).argmin().item()


def psnr(made: Tensor, right: Tensor) -> Tensor:
    """Decibels of each image (B, 3, S, S) in [-1, 1]: (B,)."""
    return -10 * ((made - right) / 2).square().mean(dim=(1, 2, 3)).log10()


class Evaluation:
    """The figures by name, in the order of measurement."""

    def __init__(self, sd: "minisd.StableDiffusion", gallery: Gallery, count: int, settings: dict):
        self.sd, self.gallery, self.count, self.settings = sd, gallery, count, settings
        self.figures = {}

    def make(self, prompts: list[str], **settings) -> Tensor:
        """Images (B, 3, 64, 64) in [-1, 1], with the seeds 0, 1, 2, ..."""
        parts, settings = [], self.settings | settings
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            seeds = list(range(start, start + len(part)))
            out = self.sd(part, seed=seeds, output_type="pt", progress=False, **settings)
            parts.append(F.adaptive_avg_pool2d(out.images.float(), SIZE))
        return torch.cat(parts).to(self.gallery.device) * 2 - 1

    def note(self, name: str, values: Tensor) -> None:
        """Keep and print the mean over the images: a share, or decibels."""
        mean, count = values.float().mean().item(), len(values)
        self.figures[name] = {"mean": round(mean, 4), "pictures": count}
        shown = f"{mean:.2f}" if mean > 1 else f"{mean:.1%}"
        print(f"{name:32} {shown:>6}  of {count}", flush=True)

    def note_ranks(self, name: str, ranks: Tensor) -> None:
        for k in (1, 5):
            self.note(f"{name}, top {k}", ranks < k)

    def pairs(self) -> None:
        for name, held_out in (("trained", False), ("held out", True)):
            asked = self.gallery.questions(held_out, self.count)
            pixels = self.make([self.gallery.prompt(pair) for pair in asked])
            self.note(f"border, {name}", self.gallery.right_border(pixels, asked))
            self.note_ranks(f"object, {name}", self.gallery.ranks(pixels, asked))

    def layouts(self) -> None:
        gallery, names = self.gallery, list(self.gallery.layouts)[SINGLE]
        asked = gallery.questions(True, self.count)
        wanted = [names[1 + i % (len(names) - 1)] for i in range(len(asked))]
        prompts = [gallery.prompt(p, layout) for p, layout in zip(asked, wanted, strict=True)]
        right = []
        for image, (thing, background) in zip(self.make(prompts), asked, strict=True):
            first = gallery.objects[thing]["first"]
            choices = [(first, gallery.layouts[name][0]) for name in names]
            right.append(names[gallery.chosen(image, background, choices)])
        for name in sorted(set(wanted), key=names.index):
            hits = [r == w for r, w in zip(right, wanted, strict=True) if w == name]
            self.note(f"layout, {name}", torch.tensor(hits))

    def skin_tones(self) -> None:
        gallery, hits = self.gallery, []
        asked = gallery.questions(True, len(gallery.objects))
        asked = [p for p in asked if len(gallery.objects[p[0]]["skin_tones"]) == 6]
        asked = asked[: self.count // 2]
        things = [gallery.objects[thing] for thing, _ in asked]
        tones = [thing["skin_tones"][1 + i % 5] for i, thing in enumerate(things)]
        prompts = [gallery.prompt(p, "{}" + tone) for p, tone in zip(asked, tones, strict=True)]
        for i, image in enumerate(self.make(prompts)):
            choices = [(things[i]["first"] + tone, (0, 0, 1)) for tone in range(1, 6)]
            hits.append(gallery.chosen(image, asked[i][1], choices) == i % 5)
        self.note("skin tone", torch.tensor(hits))

    def beside(self) -> None:
        gallery, layout = self.gallery, list(self.gallery.layouts)[-1]
        left = gallery.questions(True, self.count // 2)
        right = [(gallery.by_hash[-1 - i], background) for i, (_, background) in enumerate(left)]
        prompts = [gallery.prompt(p, layout, o) for p, (o, _) in zip(left, right, strict=True)]
        pixels = self.make(prompts)
        ranks = [gallery.ranks(pixels, asked, layout, i) for i, asked in enumerate((left, right))]
        self.note("border, beside", gallery.right_border(pixels, left))
        self.note_ranks("object, beside", torch.cat(ranks))

    def negative(self) -> None:
        gallery = self.gallery
        names = [gallery.objects[i]["names"][0] for i in gallery.by_hash]
        names = [n for n in names if not set(n.split()) & {*gallery.backgrounds, "grey"}][:UNTITLED]
        blue = gallery.colours[gallery.backgrounds.index("blue")]
        apart = []
        for settings in ({}, {"negative_prompt": NEGATIVE}):
            pixels = self.make([article(n) for n in names], **settings)
            apart.append((gallery.border(pixels).mean(dim=1) - blue).norm(dim=1))
        self.note("negative", apart[1] > apart[0])

    @torch.no_grad()
    def autoencoder(self) -> None:
        gallery, vae = self.gallery, self.sd.vae
        first = gallery.first[::HELD_BACK]
        colours = gallery.colours[torch.arange(len(first)) % len(gallery.colours)]
        places = torch.tensor([[(0, 0, 1)]], device=gallery.device).expand(len(first), 1, 3)
        image = compose(gallery.full, first[:, None], places, colours)
        image = image.to(next(vae.parameters()))
        made = vae.decode(vae.encode(image)).clamp(-1, 1)
        self.note("autoencoder, dB", psnr(made.float(), image.float()))

    def measure(self) -> None:
        self.autoencoder()
        self.pairs()
        self.layouts()
        self.skin_tones()
        self.beside()
        self.negative()

    def sweep(self, setting: str) -> dict[float, dict[str, float]]:
        """Figures over a quarter of the trained pairs, by the setting's value."""
        gallery, curves = self.gallery, {}
        asked = gallery.questions(False, self.count // 4)
        prompts = [gallery.prompt(pair) for pair in asked]
        right = torch.cat([gallery.place(gallery.first[[i]], (0, 0, 1), b) for i, b in asked])
        for value in SWEEPS[setting]:
            pixels = self.make(prompts, **{setting: value})
            ranks = gallery.ranks(pixels, asked)
            curves[value] = {
                "top 1, %": 100 * (ranks < 1).float().mean().item(),
                "top 5, %": 100 * (ranks < 5).float().mean().item(),
                "PSNR, dB": psnr(pixels, right).mean().item(),
            }
            shown = (f"{name} {y:.1f}" for name, y in curves[value].items())
            print(f"{setting} {value:<6}", *shown, sep="  ", flush=True)
        return curves


def plot(setting: str, curves: dict[float, dict[str, float]], path: Path) -> None:
    from matplotlib import pyplot

    _, (above, below) = pyplot.subplots(2, sharex=True, figsize=(5, 4), layout="constrained")
    for axes, name in ((above, "top 1, %"), (above, "top 5, %"), (below, "PSNR, dB")):
        axes.plot(list(curves), [f[name] for f in curves.values()], marker="o", label=name)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    above.set(ylim=(0, 103))
    below.set(xlabel=setting)
    pyplot.savefig(path, dpi=120)
    pyplot.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=STATE / "cpu")
    parser.add_argument("--things", type=int, default=512, help="number of objects in training")
    parser.add_argument("--model", help="default: the shipped one")
    parser.add_argument("--count", type=int, default=200, help="images a figure, at most")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sweeps", action="store_true", help="also over guidance and steps")
    parser.add_argument("--out", type=Path, help="write tiny.json and the curves here")
    args = parser.parse_args()
    began = time.perf_counter()
    sd = minisd.load(args.model) if args.model else minisd.load()
    catalogue(args.state, sd.config.sample_size, args.things)
    if {*(args.state / "words.txt").read_text().split()} != sd.tokenizer.words:
        parser.error(f"{args.state} is not the training data of the model")
    gallery = Gallery(args.state, next(sd.vae.parameters()).device)
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    evaluation = Evaluation(sd, gallery, args.count, settings)
    evaluation.measure()
    curves = {setting: evaluation.sweep(setting) for setting in SWEEPS if args.sweeps}
    print(f"{'seconds':32} {time.perf_counter() - began:.0f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record = settings | {"count": args.count, "figures": evaluation.figures, "curves": curves}
        (args.out / "tiny.json").write_text(json.dumps(record, indent=1))
        for setting, points in curves.items():
            plot(setting, points, args.out / f"{setting}.png")


if __name__ == "__main__":
    main()
