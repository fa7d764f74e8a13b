"""Run the cases of damage.py and damaged_files.py, and count the outcomes, until the time is up.

    python -m tests.long.fuzz SECONDS [--seed N] [--state FILE]    resumes the run of the state
    python -m tests.long.fuzz 0 --case headers:1234 [--seed N]     repeats one case

Run it from the folder above tests. The seed, the kind and the number determine a case. The exit
code is 0 if every case was rejected with the one error allowed, or read as other readers read it.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

# As pytest does, for the helpers beside this file and above it.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import damage
import damaged_files

TARGETS = {
    "headers": 100_000, "bodies": 1_000, "tensors": 4_520, "prompts": 50_000, "images": 20_000,
    "steps": 1_000, "metadata": 5_000, "yaml": 20_000,
}
PREPARE = {kind: getattr(damage, kind, None) or getattr(damaged_files, kind) for kind in TARGETS}
RIGHT = ("rejected", "same")
SLICE = 2  # seconds of one turn of a kind


def run_case(case: damaged_files.Case, kind: str, seed: int, number: int) -> str:
    """The outcome: "rejected", "same", "different", or the name of another exception."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return case(random.Random(f"{seed} {kind} {number}"), number)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"


def run_kind(state: dict, kind: str, case: damaged_files.Case, count: int, seconds: float) -> None:
    """Run the next cases of a kind; count the outcomes and list the wrong ones."""
    rows, end = state["kinds"].setdefault(kind, {"done": 0, "same": 0, "rejected": 0}), None
    while rows["done"] < count and (end is None or time.monotonic() < end):
        end = end or time.monotonic() + seconds
        outcome = run_case(case, kind, state["seed"], rows["done"])
        if outcome in RIGHT:
            rows[outcome] += 1
        else:
            state["wrong"].append([kind, rows["done"], outcome])
        rows["done"] += 1


def table(state: dict, command: str) -> str:
    """The counts, as the table of tests/README.md."""
    lines = ["| kind | cases | rejected | the same | exceptions other than allowed "
             "| accepted and different | command |", "|---|---|---|---|---|---|---|"]
    for kind, rows in state["kinds"].items():
        wrong = Counter(what == "different" for k, _, what in state["wrong"] if k == kind)
        numbers = (rows["done"], rows["rejected"], rows["same"], wrong[False], wrong[True])
        lines.append(f"| {kind} | {' | '.join(f'{n:,}' for n in numbers)} | `{command}` |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.long.fuzz")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="a JSON file, read if it exists, then updated")
    parser.add_argument("--case", metavar="KIND:NUMBER", help="repeat one case, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.case:
            kind, number = args.case.split(":")
            case = PREPARE[kind](Path(folder))
            with torch.no_grad():
                draw = random.Random(f"{args.seed} {kind} {number}")
                print(case(draw, int(number)))
            return 0
        state = {"seed": args.seed, "kinds": {}, "wrong": []}
        if args.state and args.state.exists():
            state = json.loads(args.state.read_text())
        run_all(state, Path(folder), args.seconds, args.state)
    print(table(state, f"python -m tests.long.fuzz {args.seconds:g} --seed {state['seed']}"))
    for kind, number, what in state["wrong"]:
        print(f"--case {kind}:{number}  {what}")
    return bool(state["wrong"])


def run_all(state: dict, folder: Path, seconds: float, keep: Path | None) -> None:
    """Run the kinds in turns, until the time is up or all have reached their targets."""
    end, cases, turn = time.monotonic() + seconds, {}, list(TARGETS)
    while turn and time.monotonic() < end:
        kind = turn.pop(0)
        if kind not in cases:
            (folder / kind).mkdir()
            cases[kind] = PREPARE[kind](folder / kind)
        left = end - time.monotonic()
        run_kind(state, kind, cases[kind], TARGETS[kind], min(SLICE, left))
        if state["kinds"][kind]["done"] < TARGETS[kind]:
            turn.append(kind)
        if keep:
            keep.write_text(json.dumps(state))


if __name__ == "__main__":
    sys.exit(main())
