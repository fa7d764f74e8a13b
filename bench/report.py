"""Write bench/RESULTS.md from the files that the other commands wrote.

    python -m bench.report                 # from bench/results and the folders inside it
    python -m bench.report DIR --print     # from that folder; print it, write nothing
    python -m bench.report --prove         # and record on which GPUs the kernels are right

Reads equality.csv, kernels.csv, image.csv, tune.csv and launches.csv, where they exist. A folder
makes a section for each device, newest first. The files of bench/results itself grow by every run:
of its image.csv the latest run of each device and model is shown.

Prints for each GPU that was checked whether its latest run proves the kernels: every size in every
dtype is right, and the kernels have not changed since that commit. Only --prove records that, in
kernels/proven.json; its exit code is 1 if something was not proven.
"""

import argparse
import csv
import json
import subprocess
from pathlib import Path

from minisd_kernels import proof
from minisd_kernels.ops import launch

from bench import shapes, tables
from bench.check import to_check
from bench.tables import distinct, groups, latest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MEASURED = {"image": "bench.image", "equality": "bench.kernels", "kernels": "bench.kernels",
            "tune": "bench.kernels"}  # file -> the command that writes it alone
LATEST = {"equality": ("kernel", "shape", "dtype"), "kernels": ("kernel", "shape"),
          "tune": ("kernel",)}  # file -> what its last run replaces
INTRODUCTION = """# Results

Written by `python -m bench.report`; [README.md](README.md) says which command answers which
question. Times are medians, in parentheses the 20th to the 80th percentile. A ratio is of times
taken in turns: above 1, minisd was faster. Errors are the largest difference from float64; those of
a whole model in half precision, from float32. A "sum of" is over the calls of one forward: of
medians and percentiles; its ratio is of two sums.
"""


def read(path: Path) -> list[dict]:
    """The rows of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_peers(rows: list[dict]) -> list[dict]:
    """Drop the runs of minisd alone, for each device and model that has a run with diffusers, so
    that a later run of minisd alone hides no comparison."""
    key = ("device", "model", "date")
    beside = {run for run, mine in groups(rows, *key).items() if any(
        row["what"] == "picture" and row["provider"].startswith("diffusers") for row in mine)}
    compared = {run[:2] for run in beside}
    return [row for row in rows for run in [tuple(row[c] for c in key)]
            if run in beside or run[:2] not in compared]


def section(files: dict[str, list[dict]], folder: Path) -> list[str]:
    """The results of one device in one folder."""
    top = folder.resolve() == RESULTS.resolve()
    shown = {name: latest(files[name], *columns) for name, columns in LATEST.items()}
    shown["image"] = latest(with_peers(files["image"]), "model") if top else files["image"]
    every = [row for rows in shown.values() for row in rows]
    commands = sorted({MEASURED[name] for name, rows in shown.items() if rows})
    if len(commands) > 1 and not top:
        commands = ["bench.everything"]
    days = ", ".join(sorted({row["date"][:10] for row in every}))
    versions = (f"{column} {distinct(every, column)}" for column in
                ("driver", "torch", "triton", "commit"))
    lines = [f"## {every[0]['device']}, {days}{'' if top else f' ({folder.name})'}", "",
             f"{' and '.join(f'`python -m {name}`' for name in commands)}; {', '.join(versions)}.",
             "", *tables.correctness(shown["equality"]), *tables.kernels(shown["kernels"])]
    for run in groups(shown["image"], "model", "date").values():
        lines += tables.model(run)
    return lines + tables.tune(shown["tune"])


def page(folders: list[Path]) -> str:
    """All results, as Markdown."""
    sections, counts = [], []
    for folder in folders:
        counts += read(folder / "launches.csv")
        files = {name: read(folder / f"{name}.csv") for name in MEASURED}
        for device in dict.fromkeys(row["device"] for rows in files.values() for row in rows):
            mine = {name: [row for row in rows if row["device"] == device]
                    for name, rows in files.items()}
            date = max(row["date"] for rows in mine.values() for row in rows)
            sections.append((date, section(mine, folder)))
    if not sections and not counts:
        raise SystemExit(f"no results in {', '.join(map(str, folders))}: "
                         "run `python -m bench.everything` first")
    sections.sort(key=lambda each: each[0], reverse=True)
    lines = [line for _, lines in sections for line in lines]
    return "\n".join([INTRODUCTION, *lines, *tables.launches(counts)]).strip() + "\n"


def unproven(rows: list[dict]) -> str:
    """Why the checks of one run prove nothing; empty if they prove the present kernels."""
    if wrong := [row for row in rows if row["ok"] != "True"]:
        return f"{len(wrong)} of {len(rows)} checks went wrong"
    wanted = {(case.kernel, case.label, str(dtype).removeprefix("torch."))
              for case, dtype in to_check(shapes.full(), launch.DTYPES)}
    if missing := wanted - groups(rows, "kernel", "shape", "dtype").keys():
        return f"{len(missing)} of {len(wanted)} checks are missing"
    written = json.loads(proof.FILE.read_text()) if proof.FILE.exists() else {}
    row = written.get(rows[0]["capability"], {})
    if row.get("date") == rows[0]["date"] and row.get("kernels") == proof.fingerprint():
        return ""  # recorded already, and only comments may have changed since
    for (commit,) in groups(rows, "commit"):
        files = [f"kernels/{Path(family.__file__).name}" for family in (*proof.FAMILIES, launch)]
        command = ["git", "diff", "--quiet", commit.removesuffix("-dirty"), "--", *files]
        same = subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.DEVNULL)
        if same.returncode:
            return f"the kernels have changed since commit {commit}, or git does not know it"
    return ""


def prove(rows: list[dict], write: bool) -> bool:
    """Print for each compute capability whether its latest run proves the kernels; with ``write``,
    record those that are proven. Returns whether all are."""
    rows = [row for row in rows if row["capability"] != "none"
            and "interpreter" not in row["device"]]
    right = bool(rows)
    for (capability,), mine in groups(latest(rows, "capability"), "capability").items():
        why = unproven(mine)
        said = f"not proven: {why}" if why else f"proven by {len(mine)} checks"
        print(f"compute capability {capability}, {mine[0]['date']}: {said}")
        if write and not why:
            row = {field: mine[0].get(field) for field in proof.FIELDS}
            row |= {"kernels": proof.fingerprint(), "checks": len(mine)}
            proof.record(proof.FILE, capability, row)
        right &= not why
    return right


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folders", type=Path, nargs="*", metavar="FOLDER", help="default: bench/results and inside")
    add("--out", type=Path, default=ROOT / "bench" / "RESULTS.md", help="default: bench/RESULTS.md")
    add("--print", action="store_true", help="print instead of writing")
    add("--prove", action="store_true", help="write kernels/proven.json")
    args = parser.parse_args(argv)
    folders = args.folders or [RESULTS, *sorted(RESULTS.glob("*/"))]
    text = page(folders)
    if args.print:
        print(text)
    else:
        args.out.write_text(text)
        print(f"{args.out}: written")
    checks = [row for folder in folders for row in read(folder / "equality.csv")]
    return 0 if prove(checks, args.prove) or not args.prove else 1


if __name__ == "__main__":
    raise SystemExit(main())
