"""Loading a full-size Stable Diffusion 1.5 file, compared with safetensors alone.

    python -m bench.load --folder /tmp --rounds 5

Writes random weights under the official names (2.1 GB in float16, 4.3 GB in float32) and loads
them in turns, each time in a new process: minisd.load, and safetensors' load_file plus a copy of
every tensor. Prints the median seconds, and the peak of anonymous memory (RssAnon, which excludes
the mapped pages of the file) beyond that of a process that has imported torch, as a multiple of the
weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

CASES = (("float16", "float16"), ("float32", "float32"), ("float32", "float16"))


def write(path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    from minisd.checkpoints import names
    from minisd.config import SD1
    from minisd.models.clip import TextEncoder
    from minisd.models.ops import TORCH
    from minisd.models.unet import UNet
    from minisd.models.vae import VAE

    with torch.device("meta"):
        parts = {"text_encoder": TextEncoder(SD1.text, TORCH), "unet": UNet(SD1.unet, TORCH),
                 "vae": VAE(SD1.vae, TORCH)}
    tensors = {}
    for part, rows in names.single_file(SD1).items():
        official = {ours[0]: name for name, ours in reversed(rows.items()) if len(ours) == 1}
        for name, p in parts[part].state_dict().items():
            tensors[official[name]] = torch.randn(p.shape).mul_(0.02).to(getattr(torch, dtype))
    save_file(tensors, path)


def anonymous_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not report RssAnon")


def measure(who: str, path: str, dtype: str) -> None:
    """In a process of its own: load once, print seconds and peak memory as JSON."""
    import torch
    from safetensors.torch import load_file

    from minisd import load

    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_memory())

    base, watcher = anonymous_memory(), threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if who == "minisd":
        sd = load(path, device="cpu", dtype=dtype)
        weights = [p for m in (sd.text_encoder, sd.unet, sd.vae) for p in m.parameters()]
    else:
        target = getattr(torch, dtype)
        weights = [t.to(target, copy=True) for t in load_file(path).values()]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(w.numel() * w.element_size() for w in weights)
    print(json.dumps({"seconds": seconds, "memory": (peak - base) / size}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="needs 6.4 GB; files are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)
    print("file     to       minisd s  safetensors s  ratio (min-max)   memory: minisd safetensors")
    for stored, dtype in CASES:
        path = args.folder / f"minisd-bench-{stored}.safetensors"
        if not path.exists():
            write(path, stored)
        runs = {"minisd": [], "safetensors": []}
        for i in range(args.rounds + 1):  # the first warms the page cache
            for who in runs:
                command = [sys.executable, "-m", "bench.load", "--folder", str(args.folder),
                           "--measure", who, str(path), dtype]
                row = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                if i:
                    runs[who].append(row)
        ours, theirs = ([r["seconds"] for r in rows] for rows in runs.values())
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        memory = [max(r["memory"] for r in rows) for rows in runs.values()]
        middles = [statistics.median(seconds) for seconds in (ours, theirs)]
        print(f"{stored:8} {dtype:8} {middles[0]:8.2f} {middles[1]:14.2f}"
              f"  {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
              f"   {memory[0]:14.3f} {memory[1]:11.3f}", flush=True)


if __name__ == "__main__":
    main()
