"""What the shipped model was taught: emoji pictures, their names, and the backgrounds behind them.

Pictures are Microsoft's Fluent Emoji in 3D (npm @lobehub/fluent-emoji-3d, MIT), names those of
emoji-datasource (npm emoji-datasource-google, MIT). A folder ``state`` keeps everything made here.
"""

import hashlib
import json
import random
import re
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import tiny_layout
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emoji-datasource-google@16.0.0")
SIZE, MARGIN = 64, 2  # the margin keeps the outermost pixels pure background
BACKGROUNDS = {
    "red": (215, 40, 45), "orange": (245, 140, 30), "yellow": (250, 220, 70),
    "green": (60, 165, 70), "teal": (0, 135, 140), "blue": (40, 90, 220),
    "purple": (130, 60, 190), "pink": (250, 155, 195), "brown": (120, 75, 45),
    "black": (20, 20, 22), "gray": (130, 132, 135), "white": (250, 250, 250),
}  # fmt: skip
SKIN_TONES = {
    "1f3fb": "light", "1f3fc": "medium light", "1f3fd": "medium",
    "1f3fe": "medium dark", "1f3ff": "dark",
}  # fmt: skip
ALIASES = {
    "heart": "red heart", "hamburger": "burger", "coffee": "cup of coffee", "tada": "party popper",
    "hankey": "poop", "bulb": "light bulb", "art": "paint palette", "red_car": "red car",
    "boom": "explosion", "soccer": "soccer ball", "star2": "glowing star", "gift": "present",
    "ladybug": "ladybird", "sunny": "sun", "santa": "santa claus", "doughnut": "donut",
    "gem": "diamond", "joy": "face crying with laughter", "heart_eyes": "face with heart eyes",
    "earth_americas": "planet earth", "zap": "lightning bolt", "computer": "laptop",
    "+1": "thumbs up", "-1": "thumbs down", "100": "hundred points", "relaxed": "smiling face",
    "pizza": "slice of pizza", "fries": "french fries", "boat": "sailboat", "wave": "waving hand",
    "cop": "police officer", "pray": "folded hands", "muscle": "strong arm", "star": "yellow star",
    "point_right": "hand pointing right", "point_left": "hand pointing left",
    "point_up_2": "hand pointing up", "point_down": "hand pointing down", "kiss": "lipstick kiss",
    "recycle": "recycling symbol", "v": "victory hand", "frog": "frog", "bear": "bear",
    "sunglasses": "smiling face with sunglasses", "bee": "bee", "lion_face": "lion",
}  # fmt: skip
# What people try first is drawn four times as often as the rest.
COMMON = {
    "red heart", "red apple", "rocket", "cat face", "dog face", "cup of coffee", "sunflower",
    "slice of pizza", "penguin", "guitar", "light bulb", "burger", "banana", "strawberry",
    "ghost", "fire", "yellow star", "sun", "crescent moon", "christmas tree", "snowman",
    "soccer ball", "bicycle", "airplane", "sailboat", "house building", "key", "crown",
    "diamond", "balloon", "present", "lemon", "watermelon", "mushroom", "cactus", "tulip",
    "rainbow", "planet earth", "umbrella", "octopus", "turtle", "butterfly", "owl", "fox face",
    "panda face", "pig face", "frog", "lion", "red car", "robot face", "extraterrestrial alien",
    "skull", "donut", "birthday cake", "laptop", "books", "thumbs up",
    "smiling face with sunglasses", "party popper", "explosion",
}  # fmt: skip
# Left over from the names' typewriter days, and dropped unless the short name has it too.
FILLER = {"black", "white", "heavy", "sign", "symbol", "ornament", "squared", "negative"}


def fetch(state: Path) -> None:
    """Both packages, unpacked below ``state / "data"``."""
    for package in PACKAGES:
        folder = state / "data" / package.strip("@").rpartition("@")[0].replace("/", "-")
        if not any(folder.glob("**/package/*")):
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", package], cwd=folder, check=True)
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                wanted = [m for m in archive if m.name.endswith((".webp", "/emoji.json"))]
                archive.extractall(folder, wanted, filter="data")


def key(code: str) -> str:
    """A code point sequence in the form on which both packages agree."""
    return "-".join(p.lstrip("0") for p in code.lower().split("-") if p != "fe0f")


def plain(text: str) -> str:
    """The words of a name: lower case ASCII letters, and digits one by one."""
    text = unicodedata.normalize("NFKD", text.lower().replace("'", "").replace("’", ""))
    return " ".join(re.findall("[a-z]+|[0-9]", text.encode("ascii", "ignore").decode()))


def names(entry: dict) -> list[str]:
    """What one emoji may be called, best name first."""
    if entry["category"] == "Flags":
        country = plain(entry["name"]).removesuffix(" flag")
        return [f"{country} flag", f"flag of {country}"]
    shorts = entry["short_names"]
    official = [w for w in plain(entry["name"]).split() if w not in FILLER or w in shorts[0]]
    readable = [plain(s) for s in shorts if len(s) > 2 and not re.search(r"\d", s)]
    found = [ALIASES[s] for s in shorts if s in ALIASES]
    if ":" in entry["name"]:  # "MAN: RED HAIR" is "red haired man" for short
        found += readable
    found += [" ".join(official), *readable]
    return list(dict.fromkeys(n for n in found if n))


def skin_tone(code: str) -> str:
    """The skin tones of a code point sequence, as the end of a name."""
    tones = dict.fromkeys(SKIN_TONES[p] for p in code.split("-") if p in SKIN_TONES)
    return " with " + " and ".join(tones) + " skin tone" if tones else ""


def picture(path: Path) -> Tensor:
    """RGBA, colour premultiplied by alpha, (4, 64, 64) uint8."""
    side = SIZE - 2 * MARGIN
    image = Image.open(path).convert("RGBA").convert("RGBa")
    canvas = Image.new("RGBa", (SIZE, SIZE))
    canvas.paste(image.resize((side, side), Image.Resampling.BOX), (MARGIN, MARGIN))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def composite(rgba: Tensor, colour: Tensor) -> Tensor:
    """Premultiplied (B, 4, 64, 64) over colours (B, 3), both 0..255: (B, 3, 64, 64) in [-1, 1]."""
    alpha = rgba[:, 3:].float() / 255
    return (rgba[:, :3] + (1 - alpha) * colour[:, :, None, None]) / 127.5 - 1


def held_out(name: str, background: str) -> bool:
    """A fixed fifth of the pairs is never trained on."""
    return hashlib.sha256(f"{name}|{background}".encode()).digest()[0] % 5 == 0


def catalogue(state: Path) -> None:
    """Write objects.json (names, skin tones, held-out backgrounds), objects.safetensors (pixels).

    Both are also what the measuring command reads. A name belongs to one object only: to the one
    whose first choice it is, before anyone's second.
    """
    files = {key(f.stem): f for f in sorted((state / "data").rglob("*.webp"))}
    entries = json.loads(next((state / "data").rglob("emoji.json")).read_text())
    entries = sorted(entries, key=lambda e: e["sort_order"])
    entries = [e for e in entries if key(e["unified"]) in files]
    called = [names(e) for e in entries]
    owner = {}
    for choice in range(max(map(len, called))):
        for i, options in enumerate(called):
            if choice < len(options):
                owner.setdefault(options[choice], i)
    objects, pixels = [], []
    for i, entry in enumerate(entries):
        mine = [n for n in called[i] if owner[n] == i]
        variants = [entry, *entry.get("skin_variations", {}).values()]
        codes = [c for c in (key(v["unified"]) for v in variants) if c in files]
        if mine:
            objects.append({
                "names": mine,
                "first": len(pixels),
                "skin_tones": [skin_tone(c) for c in codes],
                "held_out": [b for b in BACKGROUNDS if held_out(mine[0], b)],
            })  # fmt: skip
            pixels += [picture(files[c]) for c in codes]
    save_file({"rgba": torch.stack(pixels)}, state / "objects.safetensors")
    about = {"backgrounds": BACKGROUNDS, "objects": objects}
    (state / "objects.json").write_text(json.dumps(about, indent=1))


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def often(objects: list[dict]) -> list[dict]:
    """The objects, the common ones four times."""
    return objects + 3 * [o for o in objects if o["names"][0] in COMMON]


def draw(objects: list[dict], rng: random.Random) -> tuple[int, int, str]:
    """One training example: the picture's number, the background's, and a caption.

    Every entry is as likely as any other, however many skin tones it has.
    """
    thing = rng.choice(objects)
    tones = thing["skin_tones"]
    variant = rng.randrange(len(tones)) if rng.random() < 0.4 else 0
    backgrounds = list(BACKGROUNDS)
    background = rng.choice([b for b in backgrounds if b not in thing["held_out"]])
    name = thing["names"][0] if rng.random() < 0.75 else rng.choice(thing["names"])
    name += tones[variant]
    caption = article(name) if rng.random() < 0.75 else name
    kind = rng.random()
    if kind > 0.18:  # else the background is left to chance
        spelled = "grey" if background == "gray" and rng.random() < 0.5 else background
        caption += f" on {article(spelled)} background"
    return thing["first"] + variant, backgrounds.index(background), "" if kind < 0.1 else caption


def vocabulary(state: Path) -> None:
    """Write words.txt, the words of the captions, and tokenizer/, a CLIP-style byte-level BPE in
    which each of them is a single token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    objects = json.loads((state / "objects.json").read_text())["objects"]
    texts = [n + tone for o in objects for n in o["names"] for tone in o["skin_tones"]]
    texts += [f"a an on {b} background grey" for b in BACKGROUNDS]
    words = sorted({word for text in texts for word in text.split()})
    (state / "words.txt").write_text("\n".join(words) + "\n")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=10**6, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # the order in which CLIP numbers bytes
    symbols = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    tiny_layout.write_tokenizer(state / "tokenizer", symbols, merges)
