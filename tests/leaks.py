"""Whether memory grows while pictures are made: `python -m tests.leaks 1000`."""

import sys
from pathlib import Path

import torch

import minisd

WARM = 50


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process in memory; "VmHWM": at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def main(count: int) -> None:
    torch.set_num_threads(1)
    sd = minisd.load()
    for i in range(WARM + count):
        if i == WARM:
            before = resident()
        sd("a red heart", seed=i, num_inference_steps=2, progress=False)
    print(f"{count} pictures after the first {WARM}: {resident() - before} bytes more")


if __name__ == "__main__":
    main(int(sys.argv[1]))
