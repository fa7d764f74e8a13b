"""The README's gallery: 8x6 images of the shipped model, all with seed 0.

    python -m weights.recipe.gallery    # writes weights/gallery.png and prints the prompts by row

A star marks a held-out pair: the object, in any skin tone, was never trained on that background.
"""

from pathlib import Path

from PIL import Image

import minisd
from weights.recipe.scenes import caption, fifth

# A layout (of scenes.LAYOUTS), one object or two, a background or none.
ROWS = [
    [("{}", "red heart", "blue"), ("{}", "rocket", "black"), ("{}", "pineapple", "red"),
     ("{}", "pizza", "teal"), ("{}", "penguin", "orange"), ("{}", "castle", "yellow"),
     ("{}", "octopus", "green"), ("{}", "crown", "purple")],
    [("{}", "sunflower", "purple"), ("{}", "guitar", "green"), ("{}", "tomato", "red"),
     ("{}", "dolphin", "blue"), ("{}", "volcano", "teal"), ("{}", "owl", "gray"),
     ("{}", "cherries", "white"), ("{}", "robot", "pink")],
    [("small {} on the left", "fish", "blue"), ("small {} on the right", "ghost", "black"),
     ("small {} at the top", "balloon", "white"), ("small {} at the bottom", "fox", "teal"),
     ("small {}", "star", "purple"), ("small {} on the left", "cat", "yellow"),
     ("small {} at the top", "airplane", "pink"), ("small {} at the bottom", "turtle", "green")],
    [("{}", "astronaut with dark skin tone", "yellow"),
     ("{}", "woman with medium skin tone", "teal"), ("{}", "farmer with light skin tone", "green"),
     ("{}", "thumbs up with medium dark skin tone", "orange"),
     ("{}", "superhero with medium light skin tone", "purple"), ("{}", "baby", "pink"),
     ("{}", "ninja with dark skin tone", "white"), ("{}", "mage with light skin tone", "blue")],
    [("{} beside {}", "tiger", "zebra", "green"), ("{} beside {}", "moose", "snowman", "blue"),
     ("{} beside {}", "banana", "lemon", "purple"), ("{} beside {}", "dog", "cat", "pink"),
     ("{} beside {}", "candle", "rose", "black"), ("{} beside {}", "alien", "robot", "gray"),
     ("{} beside {}", "hamburger", "doughnut", "teal"), ("{} beside {}", "key", "anchor", "pink")],
    [("{}", "panda", ""), ("{}", "rainbow", ""), ("{}", "cactus", ""), ("{}", "dragon", ""),
     ("{}", "mushroom", ""), ("{}", "teapot", ""), ("{}", "koala", ""), ("{}", "butterfly", "")],
]
FILE = Path(__file__).parents[1] / "gallery.png"


def prompt(layout: str, *things_and_background: str) -> str:
    *things, background = things_and_background
    return caption(layout, things, background)


def never_trained(layout: str, *things_and_background: str) -> bool:
    *things, background = things_and_background
    return any(fifth(f"{thing.split(' with ')[0]}|{background}") for thing in things if background)


def captions() -> list[str]:
    """The line of each row in the README."""
    return ["; ".join(prompt(*asked) + " \\*" * never_trained(*asked) for asked in row)
            for row in ROWS]


def main() -> None:
    sd = minisd.load()
    side = sd.config.sample_size
    sheet = Image.new("RGB", (len(ROWS[0]) * side, len(ROWS) * side))
    for y, row in enumerate(ROWS):
        images = sd([prompt(*asked) for asked in row], seed=[0] * len(row),
                    num_inference_steps=30, progress=False).images
        for x, image in enumerate(images):
            sheet.paste(image, (x * side, y * side))
    sheet.save(FILE)
    print("\n".join(captions()))


if __name__ == "__main__":
    main()
