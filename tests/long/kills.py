"""Kill a run of many images at random moments, then let it finish: `python -m tests.long.kills 50`.

That is 50 SIGKILL and 50 SIGINT, in sets of five in one folder. After each, every image is
complete, and earlier ones are unchanged. At the end the set is complete and the folder holds
nothing else.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from minisd.app.png import read_settings

ROOT = Path(__file__).parents[2]
COUNT = 24
LINE = ["a red heart", "--steps", "2", "--size", "32x32", "--seed", "1", "--count", str(COUNT)]


def start(folder: Path, *line: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "minisd", *(line or LINE), "--quiet", "-o", f"{folder}/"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def whole(folder: Path) -> dict[str, tuple[int, int]]:
    """The images, each of them decoded, with inode and time, which a second save would change."""
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
        index, seed = map(int, path.stem.split("-"))
        made = read_settings(path)
        assert (made["prompt"], made["seed"], made["width"]) == (LINE[0], seed, 32), path
        found[path.name] = path.stat().st_ino, path.stat().st_mtime_ns
    return found


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not name.endswith(".png")]


def reported(out: str) -> dict[bool, set[str]]:
    """The names that a run printed: of images kept (True) and made (False)."""
    lines = [(Path(line.split("  ")[0]).name, "(kept" in line) for line in out.splitlines()]
    return {kept: {name for name, was in lines if was is kept} for kept in (True, False)}


def kill(folder: Path, number: signal.Signals, draw: random.Random) -> str:
    """Kill one run while it loads, between images or while it saves one; return which it was."""
    before, moment = whole(folder), draw.choice(["anywhere", "steps", "saving"])
    child = start(folder)

    def has_begun() -> bool:
        names = os.listdir(folder)
        return (sum(name.endswith(".png") for name in names) > len(before) if moment == "steps"
                else any(f"-{child.pid}-" in name for name in names))

    if moment == "anywhere":
        time.sleep(draw.uniform(0, 4))
    else:
        while child.poll() is None and not has_begun():
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 0.05 if moment == "steps" else 0.004))
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    after, said = whole(folder), reported(out)
    assert before.items() <= after.items(), "a finished image was lost or made again"
    assert said[True] <= before.keys() and said[False] <= after.keys() - before.keys()
    ends = {0, 130, -signal.SIGINT} if number == signal.SIGINT else {0, -signal.SIGKILL}
    assert child.returncode in ends, (child.returncode, err)
    return f"{moment}: {'left a temporary file' if leftovers(folder) else child.returncode}"


def finish(folder: Path) -> None:
    """The same command completes the set, makes no image twice and leaves nothing else."""
    before = whole(folder)
    child = start(folder)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, "")
    after, said = whole(folder), reported(out)
    assert before.items() <= after.items() and said[True] == before.keys()
    assert said[False] == after.keys() - before.keys() and len(after) == COUNT
    assert leftovers(folder) == []


def main(count: int) -> None:
    # In a background job of a shell, SIGINT is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw, seen = random.Random(), Counter()
    numbers = [signal.SIGKILL, signal.SIGINT] * count
    for first in range(0, len(numbers), 5):
        with tempfile.TemporaryDirectory() as name:
            for number in numbers[first : first + 5]:
                seen[f"{number.name} {kill(Path(name), number, draw)}"] += 1
            finish(Path(name))
        print(f"{sum(seen.values())} kills, 0 failures:", dict(sorted(seen.items())), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
