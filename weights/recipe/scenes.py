"""The training data of the shipped model: scenes of emoji on plain backgrounds, with captions.

The emoji are Microsoft's Fluent Emoji in 3D (npm @lobehub/fluent-emoji-3d, MIT). The names and
keywords are those of emojilib (npm, MIT).

B scenes in a batch, N emoji, S side of an image
"""

import hashlib
import json
import random
import re
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojilib@3.0.12")
STATE = Path.home() / ".cache/minisd/train_tiny"
TOO_ALIKE = 30  # two objects with a smaller RMS difference, of 255, count as the same
BACKGROUNDS = {
    "red": (215, 40, 45), "orange": (245, 140, 30), "yellow": (250, 220, 70),
    "green": (60, 165, 70), "teal": (0, 135, 140), "blue": (40, 90, 220),
    "purple": (130, 60, 190), "pink": (250, 155, 195), "brown": (120, 75, 45),
    "black": (20, 20, 22), "gray": (130, 132, 135), "white": (250, 250, 250),
}
SKIN_TONES = {"1f3fb": "light", "1f3fc": "medium light", "1f3fd": "medium",
              "1f3fe": "medium dark", "1f3ff": "dark"}
# The places of the objects: x, y, size. The frame is 2 by 2 around (0, 0).
LAYOUTS = {
    "{}": [(0, 0, 1)], "small {}": [(0, 0, 0.5)],
    "small {} on the left": [(-0.5, 0, 0.5)], "small {} on the right": [(0.5, 0, 0.5)],
    "small {} at the top": [(0, -0.5, 0.5)], "small {} at the bottom": [(0, 0.5, 0.5)],
    "{} beside {}": [(-0.5, 0, 0.5), (0.5, 0, 0.5)],
}
WEIGHTS = (0, 1, 1, 1, 1, 1, 4)  # of the layouts, in a scene that is not plain
NOWHERE = (9, 9, 1)  # a place outside the frame
HELD_BACK = 20  # one object in so many is held out of the training of the autoencoder
# Flags of countries, letters in squares, keycaps, clock faces, families; men and women too, because
# most of them have a counterpart called a person.
LEFT_OUT = re.compile("^1f1|e00|20e3|^1f55|^1f56[0-7]|^1f46[89]-200d|200d-264[02]")


def key(codes: str) -> str:
    """Code points, in the same form for both packages."""
    return "-".join(c.lstrip("0") for c in codes.lower().split("-") if c not in ("fe0f", ""))


def simple(text: str) -> str:
    """The words of a name: lower case ASCII letters, and digits one by one."""
    text = unicodedata.normalize("NFKD", re.sub("['’]", "", text.lower()))
    return " ".join(re.findall("[a-z]+|[0-9]", text.encode("ascii", "ignore").decode()))


def fifth(text: str) -> bool:
    """True for a fixed fifth of all texts."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def read_emoji(path: Path, size: int) -> Tensor:
    """RGBA with premultiplied alpha, (4, S, S) uint8; the outermost pixels are transparent."""
    image = Image.open(path).convert("RGBA").convert("RGBa")
    image = image.resize((size - size // 16,) * 2, Image.Resampling.BOX)
    return F.pad(torch.from_numpy(np.array(image)).permute(2, 0, 1), (size // 32,) * 4)


def catalogue(state: Path, size: int, things: int) -> None:
    """Write objects.json (the names of each object and the indices of its emoji),
    objects.safetensors (the emoji) and the vocabulary, unless they exist.

    Takes the ``things`` objects with the shortest names, because common objects have short names.
    Of two objects that look alike, it takes the one with the shorter name. A keyword that two
    objects share is not used. A fifth of the (object, background) pairs is held out.
    """
    if (state / "tokenizer/merges.txt").exists():  # it is written last
        return
    data, half = state / "data", state / "data.tmp"
    if not data.exists():
        npm = ["npm", "install", "--ignore-scripts", "--prefix", str(half)]
        subprocess.run([*npm, *PACKAGES], check=True)
        half.rename(data)
    files = {key(f.stem): f for f in data.rglob("*.webp")}
    words = json.loads(next(data.rglob("emoji-en-US.json")).read_text())
    known = {key("-".join(f"{ord(c):x}" for c in e)): [*map(simple, w)] for e, w in words.items()}
    known = {c: w for c, w in known.items() if c in files and not LEFT_OUT.search(c)}
    uses = Counter(word for w in known.values() for word in set(w))
    objects, pixels, seen = [], [], torch.empty(0, 4, 32, 32)
    for code, (name, *more) in sorted(known.items(), key=lambda k: (len(k[1][0]), k[1][0])):
        look = F.adaptive_avg_pool2d(read_emoji(files[code], size).float(), 32)
        if ((seen - look).square().mean(dim=(1, 2, 3)).sqrt() < TOO_ALIKE).any():
            continue
        if len(objects) == things:
            break
        seen = torch.cat([seen, look[None]])
        head, _, tail = code.partition("-")
        tones = {f" with {SKIN_TONES[t]} skin tone": key(f"{head}-{t}-{tail}") for t in SKIN_TONES}
        looks = {"": code} | {words: c for words, c in tones.items() if c in files}
        objects.append({
            "names": [name, *[w for w in more if uses[w] == 1 and len(w) > 2][:2]],
            "first": len(pixels),
            "skin_tones": list(looks),
            "held_out": [b for b in BACKGROUNDS if fifth(f"{name}|{b}")],
        })
        pixels += [read_emoji(files[c], size) for c in looks.values()]
    about = {"backgrounds": BACKGROUNDS, "layouts": LAYOUTS, "objects": objects}
    write_json(state / "objects.json", about)
    save_file({"rgba": torch.stack(pixels)}, state / "objects.safetensors")
    vocabulary(state, objects)


def vocabulary(state: Path, objects: list[dict]) -> None:
    """Write words.txt, the words of the captions, and tokenizer/, a byte-level BPE like CLIP's that
    has each of these words as a single token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [n + tone for o in objects for n in o["names"] for tone in o["skin_tones"]]
    texts += [f"a an grey on {b} background" for b in BACKGROUNDS]
    texts += [layout.replace("{}", "") for layout in LAYOUTS]
    words = sorted({word for text in texts for word in text.split()})
    (state / "words.txt").write_text("\n".join(words) + "\n")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator([*words, *letters], trainers.BpeTrainer(
        vocab_size=10**6, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False,
    ))
    (state / "tokenizer").mkdir(exist_ok=True)
    bpe.model.save(str(state / "tokenizer"))  # vocab.json, then merges.txt


def write_json(path: Path, fields: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(fields, indent=2) + "\n")
    path.with_suffix(".tmp").replace(path)


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(layout: str, things: list[str], background: str) -> str:
    """The prompt for objects in a layout on a background."""
    text = article(layout.format(things[0], article(things[-1])))
    return f"{text} on {article(background)} background" if background else text


class Scenes(Dataset):
    """Batches of scenes. Batch n is always the same.

    ``plain`` is the share of scenes of one object, as large as the image.
    """

    def __init__(self, objects: list[dict], plain: float, batch: int, tokenizer):
        self.objects, self.plain, self.batch, self.tokenizer = objects, plain, batch, tokenizer

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        """Indices of emoji (B, 2), places (B, 2, 3), colours (B, 3), caption ids (B, 77)."""
        rng = random.Random(number)
        *scenes, captions = zip(*(self.draw(rng) for _ in range(self.batch)), strict=True)
        return *map(torch.tensor, scenes), self.tokenizer(list(captions))

    def draw(self, rng: random.Random) -> tuple[list, list, tuple, str]:
        others = rng.choices(list(LAYOUTS), WEIGHTS)[0]
        layout = "{}" if rng.random() < self.plain else others
        things = rng.sample(self.objects, 2)
        looks = [rng.randrange(len(t["skin_tones"])) * (rng.random() < 0.5) for t in things]
        names = [t["names"][0] if rng.random() < 0.75 else rng.choice(t["names"]) for t in things]
        names = [n + t["skin_tones"][i] for n, t, i in zip(names, things, looks, strict=True)]
        caption = layout.format(names[0], article(names[1]))
        caption = article(caption) if rng.random() < 0.75 else caption
        held_out = [b for t in things[: len(LAYOUTS[layout])] for b in t["held_out"]]
        background = rng.choice([b for b in BACKGROUNDS if b not in held_out] or ["gray"])
        spelled = "grey" if background == "gray" and rng.random() < 0.5 else background
        kind = rng.random()
        if kind < 0.15:  # "" trains uncond for guidance; a background alone, negative prompts
            caption = "" if kind < 0.1 else f"{spelled} background"
        elif kind > 0.23:  # between, the caption names no background
            caption += f" on {article(spelled)} background"
        which = [t["first"] + i for t, i in zip(things, looks, strict=True)]
        places = [*LAYOUTS[layout], NOWHERE][:2]
        return which, places, BACKGROUNDS[background], caption


def compose(rgba: Tensor, which: Tensor, places: Tensor, colours: Tensor) -> Tensor:
    """Scenes (B, 3, S, S) in [-1, 1]: one or two emoji of rgba (N, 4, S, S) on each colour."""
    image = colours[:, :, None, None].float()
    for i in range(which.shape[1]):
        x, y, size = places[:, i].float().unbind(dim=1)
        zero = torch.zeros_like(x)
        theta = torch.stack([1 / size, zero, -x / size, zero, 1 / size, -y / size], dim=1)
        emoji = rgba[which[:, i]].float()                                    # (B, 4, S, S)
        grid = F.affine_grid(theta.unflatten(1, (2, 3)), emoji.shape, align_corners=False)
        emoji = F.grid_sample(emoji, grid, align_corners=False)
        image = emoji[:, :3] + (1 - emoji[:, 3:] / 255) * image              # (B, 3, S, S)
    return image / 127.5 - 1
