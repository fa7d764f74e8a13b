"""Write bench/RESULTS.md from the files that the other commands wrote.

    python -m bench.report                 # from bench/results and the folders inside it
    python -m bench.report DIR --out PAGE  # from that folder
    python -m bench.report --prove         # and record on which GPUs the kernels are right

A folder makes a section for each device, newest first. The files of bench/results itself grow by
every run: of those the latest run of each device and model is shown.

Prints for each GPU that was checked whether its latest run proves the kernels: every size in every
dtype is right, and the kernels have not changed since that commit. Only --prove records that, in
kernels/proven.json; its exit code is 1 if something was not proven.
"""

import argparse
import csv
import json
import re
import subprocess
import textwrap
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from minisd_kernels import proof
from minisd_kernels.ops import launch

from bench import cases
from bench.harness import RESULTS, ROOT, SHARE
from bench.providers import OURS

LATEST = {  # file -> what its last run replaces
    "equality": ("kernel", "shape", "dtype"), "kernels": ("kernel", "shape"), "tune": ("kernel",),
    "image": ("model",), "load": ("model", "dtype")}
DECODING = ", decoding"  # suffix of a model's name in launches.csv where the decoder was counted
INTRODUCTION = """# Results

Written by `python -m bench.report`; [README.md](README.md) says which command answers which
question. Times are medians, in parentheses the 20th to the 80th percentile. A ratio is of times
taken in turns: above 1, minisd was faster. Errors are the largest difference from float64; those of
a whole model in half precision, from float32. A "sum of" is over the calls of one forward: of
medians and percentiles; its ratio is of two sums.
"""


# --- tables: from rows of one kind to lines of Markdown; from no rows, no lines -------------------


def groups(rows: list[dict], *columns: str) -> dict[tuple, list[dict]]:
    """The rows of each combination, in the order of appearance."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[c] for c in columns), []).append(row)
    return found


def latest(rows: list[dict], *columns: str) -> list[dict]:
    """The rows of the last run of each combination; a run has one date."""
    return [row for group in groups(rows, *columns).values()
            for last in [max(row["date"] for row in group)] for row in group if row["date"] == last]


def distinct(rows: list[dict], column: str) -> str:
    return ", ".join(dict.fromkeys(row[column] for row in rows))


def markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """A table and an empty line; nothing for an empty body."""
    lines = [head, ["---"] * len(head), *body]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""] if body else []


def missing(title: str, rows: list[dict], *columns: str) -> list[str]:
    """What is missing, by these columns, and why; each reason once."""
    said = dict.fromkeys(
        f"{' '.join(row[c] for c in columns if row[c]) or 'everyone'} "
        f"({textwrap.shorten(row['note'], 120, placeholder=' ...')})" for row in rows)
    return [f"{title}: {'; '.join(said)}.", ""] if said else []


def number(text: str, digits: int = 3) -> str:
    """``digits`` significant digits, or all those before the point."""
    value = float(text)
    return f"{value:.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"


def spread(row: dict) -> str:
    return f"{number(row['p50'])} ({number(row['p20'])}-{number(row['p80'])})"


def middle(row: dict) -> str:
    return number(row["p50"])


def whole(row: dict) -> str:
    return number(row["p50"], 4)


def ratio(row: dict) -> str:
    return f"{float(row['p50']):.2f}"


def cell(rows: list[dict], what: str, show: Callable[[dict], str] = spread) -> str:
    """``show`` of the last row of that kind; empty if there is none."""
    return "".join([show(row) for row in rows if row["what"] == what and row["p50"]][-1:])


def correctness(rows: list[dict]) -> list[str]:
    """The checks against float64 in one line; then those that went wrong."""
    wrong = [row | {"note": row["note"] or "error {max_err}, {bound} allowed".format(**row)}
             for row in rows if row["ok"] != "True"]
    worst = {kernel: max(float(row["max_err"]) / float(row["bound"]) for row in mine)
             for (kernel,), mine in groups([r for r in rows if r["bound"]], "kernel").items()}
    sizes, dtypes = len(groups(rows, "kernel", "shape")), len(groups(rows, "dtype"))
    verdict = f"{len(wrong)} not within the bound" if wrong else "all within the bound"
    shares = ", ".join(f"{kernel} {share:.2g}" for kernel, share in worst.items())
    line = (f"{sizes} sizes in {dtypes} dtypes, {len(rows)} checks against float64: {verdict}. "
            f"Largest error as a share of its bound: {shares or 'unknown'}.")
    return [line, "", *missing("Wrong", wrong, "kernel", "shape", "dtype")] if rows else []


def kernels(rows: list[dict]) -> list[str]:
    """A table for each kernel: a line for each size, then the sums; below it what could not run."""
    parts = []
    for (kernel,), mine in groups(rows, "kernel").items():
        timed = [row for row in mine if row["p50"]]
        timed += sums(timed)
        peers = [name for (name,) in groups(timed, "provider") if name != OURS]
        body = [kernel_line(of, peers) for of in groups(timed, "shape", "dtype").values()]
        head = [kernel, "limit, us", "minisd, us", "of the limit", "error",
                *(f"{peer}: us, ratio, error" for peer in peers)]
        lost = [row for row in mine if row["metric"] == "not timed"]
        parts += markdown(head, body) + missing(f"{kernel}, not timed", lost, "provider")
    return parts


def sums(rows: list[dict]) -> list[dict]:
    """All GroupNorms of a forward, as rows like those of one size: the sum of time x calls, for
    providers that timed all of them in one run."""
    forwards: dict[tuple, dict] = {}
    for case in cases.full():
        if case.op == "group_norm_silu":
            forwards.setdefault((case.model, case.layout), {})[case.label] = case.calls
    return [row for (model, layout), calls in forwards.items()
            for run in groups([r for r in rows if r["shape"] in calls], "dtype", "date").values()
            for row in forward(f"{model} sum of {sum(calls.values())} {layout}", calls, run)]


def forward(name: str, calls: dict[str, int], rows: list[dict]) -> list[dict]:
    """One run's sum over these sizes, weighted by their calls."""
    found, ours = [], 0.0
    for mine in groups(rows, "provider").values():
        times = {row["shape"]: row for row in mine if row["metric"] == "time"}
        shares = {row["shape"]: row for row in mine if row["metric"].startswith(SHARE)}
        if times.keys() != calls.keys():
            continue
        total = {p: sum(n * float(times[size][p]) for size, n in calls.items())
                 for p in ("p20", "p50", "p80")}
        limit = sum(n * float(times[size]["p50"]) * float(shares[size]["p50"])
                    for size, n in calls.items())
        metrics = {"time": total, shares[mine[0]["shape"]]["metric"]: {"p50": limit / total["p50"]}}
        if mine[0]["provider"] == OURS:
            ours = total["p50"]
        elif ours:
            metrics["time over minisd's"] = {"p50": total["p50"] / ours}
        worst = max((row["max_err"] for row in mine), key=float)
        found += [mine[0] | values | {"shape": name, "metric": metric, "max_err": worst}
                  for metric, values in metrics.items()]
    return found


def kernel_line(rows: list[dict], peers: list[str]) -> list[str]:
    """One size. The limit is the least of time x share over the providers: of an even number of
    samples a median is the mean of two, which makes that product too large."""
    found = {(row["provider"], row["metric"].partition(" (")[0]): row for row in rows}
    shares = [(name, row) for (name, metric), row in found.items() if metric == SHARE]
    limit = min(float(found[name, "time"]["p50"]) * float(row["p50"]) for name, row in shares)
    what, waits = f"{rows[0]['shape']} {rows[0]['dtype']}", shares[0][1]["metric"].split()[-1]
    line, time = [what, f"{number(str(limit))} {waits}"], found.get((OURS, "time"))
    line += [spread(time), f"{float(found[OURS, SHARE]['p50']):.0%}",
             time["max_err"]] if time else [""] * 3
    for peer in peers:
        row, over = found.get((peer, "time")), found.get((peer, "time over minisd's"))
        said = [middle(row), f"{ratio(over)}x" if over else "", row["max_err"]] if row else []
        line.append(", ".join(filter(None, said)))
    return line


IMAGE = [  # column, the rows that it is from, what it says of them
    ("picture, s", "picture", spread), ("over fused", "picture over fused", ratio),
    ("PSNR, dB", "picture", itemgetter("psnr")), ("step, ms", "step", spread),
    ("over fused", "step over fused", ratio), ("error", "step", itemgetter("max_err")),
    ("decode, ms", "decode", spread), ("PSNR, dB", "decode", itemgetter("psnr")),
    ("memory, MB", "memory", whole), ("load, s", "load", middle),
    ("first picture, s", "first picture", middle),
]


def images(rows: list[dict]) -> list[str]:
    """One model in one run: a line for each provider, of its last race. A ratio is of one race."""
    drawn = [row for row in rows if row["what"] == "picture"]
    kind = next((row for row in drawn if row["p50"]), None)
    if kind is None:
        return []
    single = [row for row in rows if row["p50"] and row["dtype"] == kind["dtype"]
              and row["batch"] in ("", "1") and row["steps"] in ("", kind["steps"])]
    body = [[provider, *(cell(mine, what, show) for _, what, show in IMAGE)]
            for (provider,), mine in groups(single, "provider").items()]
    return [f"**{kind['model']}**, {kind['steps']} steps, {kind['dtype']}, {kind['date'][:16]}:",
            "", *markdown(["", *(head for head, *_ in IMAGE)], body)]


def model(rows: list[dict]) -> list[str]:
    """One model in one run."""
    lost = [row | {"batch": row["batch"] and f"in batches of {row['batch']}"} for row in rows
            if row["what"] == "not run"]
    return [*images(rows), *missing(f"{rows[0]['model']}, not run", lost, "provider", "batch"),
            *throughput(rows)]


def throughput(rows: list[dict]) -> list[str]:
    """Images a second by batch, and the memory."""
    rates = [row for row in rows if row["what"] == "pictures/s"]
    batches, body = groups(rates, "batch"), []
    for provider, steps in groups(rates, "provider", "steps"):
        line = [f"{provider}, {steps} steps"]
        for (batch,) in batches:
            of = groups(rows, "provider", "steps", "batch").get((provider, steps, batch), [])
            rate, held = cell(of, "pictures/s", middle), cell(of, "memory", whole)
            line.append(f"{rate} ({held})" if held else rate)
        body.append(line)
    return markdown(["pictures/s (MB), batch", *(batch for (batch,) in batches)], body)


def loads(rows: list[dict]) -> list[str]:
    """A line for each file, dtype and provider."""
    columns = {"load a file": spread, "load over minisd's": ratio, "memory over the weights": ratio}
    body = [[" ".join((*key[:2], "to", key[2])), *(cell(mine, what, show)
                                                  for what, show in columns.items())]
            for key, mine in groups(rows, "provider", "model", "dtype").items()]
    return markdown(["loading a file", "s", "over minisd", "memory over the weights"], body)


def tune(rows: list[dict]) -> list[str]:
    """The launch settings of each kernel, fastest first; the present one, timed first, is bold."""
    rows, body = [row | {"provider": re.sub(r"\w+=", "", row["provider"])} for row in rows], []
    for (kernel,), mine in groups([row for row in rows if row["p50"]], "kernel").items():
        cells = [f"{row['provider']} {number(row['p50'], 4)}" for row in
                 sorted(mine, key=lambda row: float(row["p50"]))]
        today = f"{mine[0]['provider']} {number(mine[0]['p50'], 4)}"
        body.append([kernel, ", ".join(f"**{c}**" if c == today else c for c in cells)])
    lost = [row for row in rows if not row["p50"]]
    return (markdown(["launch settings", "us of a picture, today's in bold"], body)
            + missing("Settings not timed", lost, "kernel", "provider"))


def launches(rows: list[dict]) -> list[str]:
    """The counts of a step, then of a decoding; all models side by side."""
    parts = []
    for what, decodes in (("One denoise step with guidance", False), ("One decoding", True)):
        chosen = [row for row in rows if row["model"].endswith(DECODING) == decodes]
        chosen = groups(latest(chosen, "model"), "model")
        rungs = {row["rung"]: [] for mine in chosen.values() for row in mine}
        for mine in chosen.values():
            counts = {row["rung"]: row for row in mine}
            for rung, cells in rungs.items():
                row = counts.get(rung)
                cells += [row["launches"], f"{int(row['bytes']) / 1e9:.2f}",
                          f"{int(row['flops']) / 1e9:.0f}"] if row else [""] * 3
        if rungs:
            head = [f"{model.removesuffix(DECODING)}: {unit}" for (model,) in chosen
                    for unit in ("launches", "GB", "GFLOP")]
            body = [[rung, *cells] for rung, cells in rungs.items()]
            parts += [f"{what}, in float16:", "", *markdown(["", *head], body)]
    return parts and ["## Counted", "", "By `python -m bench.counts`, which says what a count is "
                      "and is not; it is no time.", "", *parts]


# --- the page -------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    """The rows of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def section(files: dict[str, list[dict]], folder: Path) -> list[str]:
    """The results of one device in one folder."""
    top = folder.resolve() == RESULTS.resolve()
    shown = {name: rows if name == "image" and not top else latest(rows, *LATEST[name])
             for name, rows in files.items()}
    every = [row for rows in shown.values() for row in rows]
    days = ", ".join(sorted({row["date"][:10] for row in every}))
    # Rows of before 2026-11-29 do not say it. Options are in the files alone.
    commands = " and ".join(f"`{name}`" for name in sorted({
        " ".join((row.get("command") or "python -m bench.everything").split()[:3])
        for row in every}))
    versions = (f"{column} {distinct(every, column)}" for column in
                ("driver", "torch", "triton", "commit"))
    lines = [f"## {every[0]['device']}, {days}{'' if top else f' ({folder.name})'}", "",
             f"{commands}; {', '.join(versions)}.", "",
             *correctness(shown["equality"]), *kernels(shown["kernels"])]
    for run in groups(shown["image"], "model", "date").values():
        lines += model(run)
    return lines + loads(shown["load"]) + tune(shown["tune"])


def page(folders: list[Path]) -> str:
    """All results, as Markdown."""
    sections, counts = [], []
    for folder in folders:
        counts += read(folder / "launches.csv")
        files = {name: read(folder / f"{name}.csv") for name in LATEST}
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
    return "\n".join([INTRODUCTION, *lines, *launches(counts)]).strip() + "\n"


# --- the proof ------------------------------------------------------------------------------------


def unproven(rows: list[dict]) -> str:
    """Why the checks of one run prove nothing; empty if they prove the present kernels."""
    if wrong := [row for row in rows if row["ok"] != "True"]:
        return f"{len(wrong)} of {len(rows)} checks went wrong"
    wanted = {(case.op, case.label, str(dtype).removeprefix("torch."))
              for case in cases.full() for dtype in launch.DTYPES}
    if missed := wanted - groups(rows, "kernel", "shape", "dtype").keys():
        return f"{len(missed)} of {len(wanted)} checks are missing"
    written = json.loads(proof.FILE.read_text()) if proof.FILE.exists() else {}
    row = written.get(rows[0]["capability"], {})
    if row.get("date") == rows[0]["date"] and row.get("kernels") == proof.fingerprint():
        return ""  # recorded already, and only comments may have changed since
    if dirty := [row["commit"] for row in rows if row["commit"].endswith("-dirty")]:
        return f"the kernels that ran had changes that are in no commit, {dirty[0]}"
    package = Path(proof.__file__).parent
    files = [Path("kernels", Path(family.__file__).relative_to(package))
             for family in (*proof.FAMILIES, launch)]
    for (commit,) in groups(rows, "commit"):
        command = ["git", "diff", "--quiet", commit, "--", *files]
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
    add("--prove", action="store_true", help="write kernels/proven.json")
    args = parser.parse_args(argv)
    folders = args.folders or [RESULTS, *sorted(RESULTS.glob("*/"))]
    args.out.write_text(page(folders))
    print(f"{args.out}: written")
    checks = [row for folder in folders for row in read(folder / "equality.csv")]
    return 0 if prove(checks, args.prove) or not args.prove else 1


if __name__ == "__main__":
    raise SystemExit(main())
