"""Every measurement of minisd on a GPU, in one command and a given number of minutes.

    python -m bench.everything --minutes 8 --out DIR           # is it right, and how fast
    python -m bench.everything --minutes 5 --out DIR --tune    # which settings are fastest
    python -m bench.everything --stages equality core --out DIR

What matters most comes first. Each stage is a process of its own, which is ended when its time is
up; its rows until then are in DIR. `python -m bench.report DIR` makes a page of them.

  tests      tests/test_gpu.py, without its full sizes             tests.txt, tests-heavy.txt
  equality   every size in three dtypes against float64            equality.csv
  core       SD1.5: minisd fused, diffusers eager; a profile       image.csv, profile.txt
  compiled   SD1.5: diffusers compiled beside minisd fused         image.csv, profile.txt
  kernels    the heaviest kernels beside their peers               kernels.csv
  changes    the fused step with one thing changed                 image.csv
  others     SD1.5 by torch's ops and by the kernels               image.csv
  rest       batches; SD2.1 at 768; the shipped model              image.csv
  tune       every listed launch setting                           tune.csv
  autotuned  diffusers compiled with max-autotune                  image.csv

and log.txt of them all. Needs a GPU of 80 GB, 16 cores, diffusers, transformers, pytest and
pytest-xdist, and no network. Without a GPU it is a rehearsal: small models in float32, and kernels
only with TRITON_INTERPRET=1. Exit code 1 if a kernel was wrong, minisd did not run, or a stage
failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from minisd_kernels.ops import launch
from minisd_kernels.ops.attention import _kernel

from bench import check, image, inside, kernels, models, record, shapes, tune
from bench.clock import limited
from bench.contest import COMPILED, EAGER, FUSED, Contest
from bench.group_norm import Compiler

GPU = torch.cuda.is_available()
INTERPRETED = launch.interpreted(_kernel)
CORES = os.cpu_count() or 1
GRACE = 3.0  # seconds past its time after which a stage is killed


class Day(NamedTuple):
    """What every stage gets: the folder of its rows, their columns of the machine, its deadline."""

    out: Path
    machine: dict[str, str]
    end: float  # of time.monotonic

    device = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
    dtype = torch.float16 if GPU else torch.float32

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, name: str, columns: list[str]) -> Callable[..., None]:
        """A function that adds rows to a file."""
        return lambda *rows: record.append(self.out / name, columns,
                                           [self.machine | row for row in rows])

    def contest(self, name: str) -> Contest:
        """The contest of a model, with its exact results computed."""
        if not GPU:
            name = {"SD1.5-512": "tiny", "SD2.1-768": "quarter"}.get(name, name)
        add = self.add("image.csv", image.COLUMNS)

        def both(row: dict) -> None:
            add(row)
            print(image.line(row), flush=True)

        return Contest(models.standard(quick=not GPU)[name](), self.device, self.dtype, both)


def tests(day: Day) -> bool:
    """Two runs at once: tests with a model in float64 in few processes, the others in many."""
    heavy = "unet or decoder or image_in_float16"
    runs = {"tests.txt": (f"not full_size and not ({heavy})", min(8, CORES)),
            "tests-heavy.txt": (heavy, min(2, CORES))}
    children, right = {}, True
    for name, (chosen, workers) in runs.items():
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-o", "addopts=", "-v",
                   "-n", str(workers), "-k", chosen, "--tb=short", "-rfE", "-p", "no:cacheprovider"]
        with (day.out / name).open("wb") as file:
            children[name] = subprocess.Popen(command, cwd=record.ROOT, stdout=file,
                                              stderr=subprocess.STDOUT)
    for name, child in children.items():
        try:
            code = child.wait(max(1.0, day.left() - 1))
        except subprocess.TimeoutExpired:
            code = None
        lines = (day.out / name).read_text().splitlines()
        shown = [line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:]
        print(*(f"{name}: {line[:200]}" for line in shown), sep="\n", flush=True)
        right &= code == 0 or code == 5 and not GPU  # None: out of time; 5: nothing was collected
    return right


def equality(day: Day) -> bool:
    cases = shapes.full() if GPU else shapes.tiny() if INTERPRETED else []
    return check.equality(
        cases, day.device, kernels.dtypes(), day.add("equality.csv", record.EQUALITY),
        min(12, CORES) if GPU else 0, day.end - 2)


def core(day: Day) -> bool:
    contest = day.contest("SD1.5-512")
    for name in (FUSED, EAGER):
        image.enter(contest, name)
    contest.race(7, 0.5 * day.left())
    inside.profile(contest, day.out / "profile.txt")
    return FUSED in contest.entered


def changes(day: Day) -> None:
    contest = day.contest("SD1.5-512")
    image.enter(contest, FUSED)
    inside.try_all(contest, lambda: day.left() < 6)
    inside.profile(contest, day.out / "profile.txt")


def compiled(day: Day, mode: str = "reduce-overhead") -> None:
    contest = day.contest("SD1.5-512")
    image.enter(contest, FUSED)
    print(f"compiling, mode={mode}", flush=True)
    image.enter(contest, COMPILED, mode, limited(day.left() - 20, f"the time for {mode} was up"))
    if COMPILED in contest.entered:
        contest.race(7, day.left() - 8)
        inside.profile(contest, day.out / "profile.txt")


def autotuned(day: Day) -> None:
    os.environ |= {"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN",
                   "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS": "ATEN"}
    compiled(day, "max-autotune")


def heaviest() -> list:
    """The kernels that take most of an image's time, as the fused model calls them: q, k and v in
    one projection, and channels_last."""
    def chosen(case) -> bool:
        if case.kernel == "attention":
            return case.d > 256 or case.packed
        return case.channels_last if case.kernel == "group_norm_silu" else case.model != "SD2.1"

    cases = [case for case in shapes.full() if chosen(case)]
    return sorted(cases, key=lambda case: case.model == "SD2.1")


def some_kernels(day: Day) -> bool:
    cases = heaviest() if GPU else shapes.tiny() if INTERPRETED else shapes.small()[::4]
    found = kernels.time_all(
        cases, day.device, day.dtype, Compiler(0.4 * day.left() if GPU else 0), 9 if GPU else 2,
        day.end - 2, day.add("kernels.csv", record.COLUMNS))
    return not GPU or kernels.ours_timed(found)


def others(day: Day) -> bool:
    contest = day.contest("SD1.5-512")
    for name in ("minisd torch", "minisd triton"):
        image.enter(contest, name)
    contest.race(5, day.left() - 4)
    return not GPU or len(contest.entered) == 2


def rest(day: Day) -> None:
    contest = day.contest("SD1.5-512")
    for name in (FUSED, EAGER):
        image.enter(contest, name)
    contest.batches([1, 4, 16] if GPU else [2], 20 if GPU else 2, 2, lambda: day.left() < 30)
    del contest
    for name in ("SD2.1-768", "tiny"):
        if day.left() > 12:
            contest = day.contest(name)
            for provider in (FUSED, EAGER):
                image.enter(contest, provider)
            contest.race(5, 0.6 * day.left())
            del contest


def tuned(day: Day) -> bool:
    cases = shapes.sd1()
    if INTERPRETED:
        cases = [case for case in shapes.tiny() if case.kernel == "geglu"]
    code = tune.tune(cases, tune.Setup(day.device, day.dtype, 5), day.end - 5,
                     min(14, CORES) if GPU else 0, day.add("tune.csv", record.COLUMNS))
    return code == 0 or not GPU


class Stage(NamedTuple):
    """``seconds`` of a day of 480, scaled to the time given; but no less than that for stages that
    time nothing. Those that do are ``alone`` on the GPU."""

    run: Callable[[Day], bool | None]
    seconds: float
    alone: bool = True


STAGES = {
    "tests": Stage(tests, 100, alone=False), "equality": Stage(equality, 80, alone=False),
    "core": Stage(core, 50), "compiled": Stage(compiled, 135), "kernels": Stage(some_kernels, 50),
    "changes": Stage(changes, 45), "others": Stage(others, 25), "rest": Stage(rest, 75),
    "tune": Stage(tuned, 120), "autotuned": Stage(autotuned, 180),
}
SECOND = ("tune", "autotuned")
DAY = 480.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--minutes", type=float, default=8.0, help="of all (default: %(default)s)")
    add("--tune", action="store_true", help=f"the second half: {' and '.join(SECOND)}")
    add("--stages", nargs="+", choices=STAGES, metavar="STAGE", help="these alone")
    add("--commit", default="", help="what is measured, where git cannot tell")
    add("--date", default="", help=argparse.SUPPRESS)  # of the run, in a stage's own process
    add("--stage", choices=STAGES, help=argparse.SUPPRESS)  # this process is that stage
    args = parser.parse_args(argv)
    args.stages = args.stages or [name for name in STAGES if (name in SECOND) == args.tune]
    return args


def stage(name: str, out: Path, commit: str, date: str) -> int:
    """In a process of its own: import what is slow, read the number of seconds from stdin, run."""
    machine = record.machine(Day.device, INTERPRETED, commit, date)
    if name not in ("tests", "equality", "kernels", "tune"):
        try:
            import bench.peers  # noqa: F401
        except ImportError:
            pass  # image.enter says so in a row
    if (seconds := float(sys.stdin.readline() or 0)) < 2:
        print("no time was left")
        return 1
    torch.set_grad_enabled(False)
    return 0 if STAGES[name].run(Day(out, machine, time.monotonic() + seconds)) is not False else 1


class Running:
    """A stage's process: started early, so that it has imported everything when its turn comes."""

    def __init__(self, name: str, command: list[str], say: Callable[[str, str], None]):
        self.name, self.say = name, say
        self.process = subprocess.Popen(
            command, cwd=record.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"})
        self.pump = threading.Thread(target=self._pump, daemon=True)
        self.pump.start()

    def _pump(self) -> None:
        for line in self.process.stdout:
            self.say(self.name, line.rstrip())

    def go(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        try:
            self.process.stdin.write(f"{seconds}\n")
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
        return code == 0

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
    scale = 60 * args.minutes / DAY
    with (args.out / "log.txt").open("a") as log:
        def say(who: str, line: str) -> None:
            with lock:
                for file in (sys.stdout, log):
                    print(f"[{time.monotonic() - start:6.1f} {who}] {line}", file=file, flush=True)

        def begin(names: list[str]) -> None:
            for name in names:
                command = [sys.executable, "-m", "bench.everything", "--stage", name, "--out",
                           str(args.out), "--commit", args.commit, "--date", args.date]
                started[name] = Running(name, command, say)

        say("day", ", ".join(f"{key} {value}" for key, value in machine.items()))
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
        say("day", f"{'all right' if right else 'something was wrong'}; {args.out}")
    return right


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    record.refuse_two_trees()
    if args.stage:
        return stage(args.stage, args.out, args.commit, args.date)
    args.out, args.date = args.out.resolve(), record.now()
    args.out.mkdir(parents=True, exist_ok=True)
    machine = record.machine(Day.device, INTERPRETED, args.commit, args.date)
    args.commit = machine["commit"]
    return 0 if run(args, machine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
