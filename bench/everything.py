"""Every measurement of minisd on a GPU, in one command and a given number of minutes.

    python -m bench.everything --minutes 8 --out DIR           # is it right, and how fast
    python -m bench.everything --minutes 5 --out DIR --tune    # which settings are fastest
    python -m bench.everything --stages equality core --out DIR

What matters most comes first. Each stage is one of the other commands, in a process of its own that
is ended when its time is up; its rows until then are in DIR. `python -m bench.report DIR` makes a
page of them. DIR gets equality.csv, kernels.csv, image.csv, tune.csv, profile.txt, and log.txt of
all that the stages print.

Needs a GPU of 80 GB, 16 cores, diffusers, transformers, pytest and pytest-xdist, and no network.
Without a GPU it is a rehearsal: small models in float32, and kernels only with TRITON_INTERPRET=1.
Exit code 1 if a kernel was wrong, minisd did not run, or a stage failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from bench import harness
from bench.harness import GPU

CORES = os.cpu_count() or 1
GRACE = 3.0  # seconds past its time after which a stage is killed
HEAVY = "unet or decoder or image_in_float16"  # tests with a model in float64: few at once
MODEL, OTHERS = ("SD1.5-512", ("SD2.1-768", "tiny")) if GPU else ("tiny", ("quarter",))
TESTS = ("pytest", "tests/kernels/test_gpu.py", "-o", "addopts=", "-q", "--tb=short", "-rfE",
         "-p", "no:cacheprovider")
IMAGE = ("bench.image", "--models", MODEL, "--batches")


class Stage(NamedTuple):
    """A command after ``python -m``, and its ``seconds`` of a run of 480, scaled to the time given;
    but no less than that for stages that time nothing. Those that do are ``alone`` on the GPU."""

    seconds: float
    command: tuple[str, ...]
    alone: bool = True


STAGES = {
    "tests": Stage(100, (*TESTS, "-n", str(min(8, CORES)), "-k",
                         f"not full_size and not ladder and not ({HEAVY})"), alone=False),
    "heavy tests": Stage(100, (*TESTS, "-n", str(min(2, CORES)), "-k", HEAVY), alone=False),
    "equality": Stage(80, ("bench.kernels", "--check", "--workers",
                           str(min(12, CORES) if GPU else 0)), alone=False),
    "core": Stage(50, (*IMAGE, "--only", "fused", "eager", "--profile")),
    "compiled": Stage(135, (*IMAGE, "--only", "fused", "compiled", "--profile")),
    # The heaviest calls of the fused model: q, k and v in one projection, and channels_last.
    "kernels": Stage(50, ("bench.kernels", "--time", "--rounds", "9", "--compile-minutes", "0.3",
                          "--only", "packed", "channels_last", "attention VAE", "norm SD1",
                          "geglu SD1")),
    "others": Stage(25, (*IMAGE, "--only", "torch", "triton", "--rounds", "5")),
    "batches": Stage(60, ("bench.image", "--models", MODEL, "--only", "fused", "eager", "--rounds",
                          "2", "--batches", *(("1", "4", "16") if GPU else ("2",)))),
    "models": Stage(60, ("bench.image", "--models", *OTHERS, "--only", "fused", "eager", "--rounds",
                         "5", "--batches")),
    "tune": Stage(120, ("bench.kernels", "--tune", "--rounds", "5", "--only",
                        *(("SD1.5", "VAE") if GPU else ("geglu",)))),
    "autotuned": Stage(180, (*IMAGE, "--only", "fused", "compiled", "--compile-mode",
                             "max-autotune")),
}
SECOND = ("tune", "autotuned")
RUN = 480.0
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
    # Of max-autotune: Triton's own products and convolutions would take the whole run to compile.
    "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN",
    "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS": "ATEN",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.options(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tune", action="store_true", help=f"the second half: {' and '.join(SECOND)}")
    add("--stages", nargs="+", choices=STAGES, metavar="STAGE", help="these alone")
    args = parser.parse_args(argv)
    if args.out is None:
        parser.error("--out DIR is the folder of the results")
    args.minutes = 8.0 if args.minutes is None else args.minutes
    args.stages = args.stages or [name for name in STAGES if (name in SECOND) == args.tune]
    return args


class Running:
    """A stage's process: started early, so that it has imported everything when its turn comes and
    it reads its minutes from stdin."""

    def __init__(self, name: str, command: list[str], say: Callable[[str, str], None]):
        self.name, self.say = name, say
        self.process = subprocess.Popen(
            command, cwd=harness.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            env=os.environ | ENVIRONMENT)
        self.pump = threading.Thread(target=self._pump, daemon=True)
        self.pump.start()

    def _pump(self) -> None:
        for line in self.process.stdout:
            self.say(self.name, line.rstrip())

    def go(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        try:
            self.process.stdin.write(f"{seconds / 60}\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before its turn; `wait` reports its exit code

    def wait(self) -> bool:
        """Whether it ended by itself with code 0; its processes are killed in any case."""
        try:
            code = self.process.wait(max(0.0, self.end - time.monotonic()) + GRACE)
            said = f"ended with {code}"
        except subprocess.TimeoutExpired:
            code, said = None, "its time was up: killed"
        self.kill()
        self.pump.join(1)
        self.process.stdout.close()
        self.say(self.name, said)
        return code == 0 or code == 5 and not GPU  # 5: pytest collected nothing

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def run(args: argparse.Namespace, machine: dict[str, str]) -> bool:
    """All stages, in order: those that may share the GPU at once, then the others one at a time,
    while the next one is importing."""
    start, lock, started = time.monotonic(), threading.Lock(), {}
    scale = 60 * args.minutes / RUN
    with (args.out / "log.txt").open("a") as log:
        def say(who: str, line: str) -> None:
            with lock:
                line = f"[{time.monotonic() - start:6.1f} {who}] {line}"
                for file in (sys.stdout, log):
                    print(line, file=file, flush=True)

        def begin(names: list[str]) -> None:
            common = ["--minutes", "-", "--out", str(args.out), "--commit", machine["commit"],
                      "--date", machine["date"]]
            for name in names:
                command = STAGES[name].command
                command += tuple(common) if command[0] != "pytest" else ()
                started[name] = Running(name, [sys.executable, "-m", *command], say)

        say("all", ", ".join(f"{key} {value}" for key, value in machine.items()))
        together = [name for name in args.stages if not STAGES[name].alone]
        turns = [name for name in args.stages if STAGES[name].alone]
        try:
            begin(together + turns[:1])
            for name in together:
                started[name].go(min(STAGES[name].seconds * max(1, scale), 60 * args.minutes))
            right = all([started[name].wait() for name in together])
            for i, name in enumerate(turns):
                left = start + 60 * args.minutes - time.monotonic()
                # Later stages share the time that earlier ones left over.
                share = STAGES[name].seconds / sum(STAGES[each].seconds for each in turns[i:])
                started[name].go(min(left, max(STAGES[name].seconds * scale, left * share)))
                begin(turns[i + 1 : i + 2])
                right &= started[name].wait()
        finally:
            for each in started.values():
                each.kill()
        say("all", f"{'all right' if right else 'something was wrong'}; {args.out}")
    return right


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    return 0 if run(args, harness.machine(harness.device(), args.commit, args.date)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
