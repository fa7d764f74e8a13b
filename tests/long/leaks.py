"""Does memory grow from image to image? `python -m tests.long.leaks 1000`."""

import sys

import torch

import minisd
from bench.timing import resident

WARM = 50


def main(count: int) -> None:
    torch.set_num_threads(1)
    sd = minisd.load()
    for i in range(WARM + count):
        if i == WARM:
            before = resident("VmRSS")
        sd("a red heart", seed=i, num_inference_steps=2, progress=False)
    more = resident("VmRSS") - before
    print(f"{count} images after the first {WARM}: {more} bytes more")


if __name__ == "__main__":
    main(int(sys.argv[1]))
