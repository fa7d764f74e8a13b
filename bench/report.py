"""The tables of the README, from the results: of every device the latest run of each model.

    python -m bench.report                # between the markers in README.md
    python -m bench.report --print        # only to look at

Reads bench/results/image.csv, waterfall.csv and launches.csv, what is there of them. Writing twice
changes nothing. Ends with an error if README.md lacks the markers.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

BEGIN, END = "<!-- bench.report: begin -->", "<!-- bench.report: end -->"
ROOT = Path(__file__).parents[1]
COMMAND = "python -m bench.image"
DECODING = ", decoding"  # ends a model's name in launches.csv where the decoder was counted


def read(path: Path) -> list[dict]:
    """The rows of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def groups(rows: list[dict], *columns: str) -> dict[tuple, list[dict]]:
    """The rows of each combination, in the order of appearance."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[c] for c in columns), []).append(row)
    return found


def latest(rows: list[dict], *columns: str) -> list[dict]:
    """Of each combination the rows of its last run: comparable, since one run has one date."""
    return [row for group in groups(rows, *columns).values() for row in group
            if row["date"] == max(r["date"] for r in group)]


def with_peers(rows: list[dict]) -> list[dict]:
    """The rows of the runs in which diffusers drew, of each device and model where there are any:
    a run of minisd alone, for the waterfall, is to hide no comparison."""
    key = ("device", "model", "date")
    beside = {run for run, mine in groups(rows, *key).items() if any(
        row["what"] == "picture" and row["provider"].startswith("diffusers") for row in mine)}
    compared = {run[:2] for run in beside}
    return [row for row in rows for run in [tuple(row[c] for c in key)]
            if run in beside or run[:2] not in compared]


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(text: str, digits: int = 3) -> str:
    return f"{float(text):.{digits}g}" if text else ""


def cell(rows: list[dict], what: str, show: Callable[[dict], str]) -> str:
    """What is said of the row of that kind; nothing if there is none."""
    return next((show(row) for row in rows if row["what"] == what and row["p50"]), "")


def spread(row: dict) -> str:
    return f"{number(row['p50'])} ({number(row['p20'])}-{number(row['p80'])})"


def pictures(rows: list[dict]) -> str:
    """One model on one device: a line a provider, its picture, step and decoding."""
    kind = next(row for row in rows if row["what"] == "picture")
    single = [row for row in rows if row["what"] not in ("pictures/s", "not run")
              and row["dtype"] == kind["dtype"]]
    single = groups([row for row in single if row["batch"] in ("", "1")], "provider")
    body = []
    for (provider,), mine in single.items():
        error = cell(mine, "picture", lambda row: f"{row['psnr']} dB")
        body.append([
            provider, cell(mine, "picture", spread), error, cell(mine, "step", spread),
            cell(mine, "step", lambda row: row["max_err"]), cell(mine, "decode", spread),
            cell(mine, "decode", lambda row: f"{row['psnr']} dB"),
            cell(mine, "memory", lambda row: number(row["p50"], 4)),
            cell(mine, "load", lambda row: number(row["p50"])),
            cell(mine, "first picture", lambda row: number(row["p50"])),
        ])
    head = ["", "picture, s", "PSNR", "step, ms", "error", "decode, ms", "PSNR", "memory, MB",
            "load, s", "first picture, s"]
    lines = [f"**{kind['model']}**, {kind['steps']} steps, {kind['dtype']}:", "",
             markdown(head, body)]
    for row in rows:
        if row["what"] == "picture" and row["note"]:
            said = f"the picture is {row['psnr']} dB from the exact one"
            lines += ["", f"{row['provider']} in {row['dtype']}: {said}."]
    return "\n".join(lines + ["", *absent(rows), *throughput(rows)])


def absent(rows: list[dict]) -> list[str]:
    told = [f"{row['provider']} ({row['note']})" for row in rows
            if row["what"] == "not run" and row["batch"] == ""]
    return [f"Not run: {'; '.join(told)}.", ""] if told else []


def throughput(rows: list[dict]) -> list[str]:
    """Pictures a second by batch, and the memory."""
    rates = [row for row in rows if row["what"] == "pictures/s"]
    if not rates:
        return []
    batches = list(dict.fromkeys(row["batch"] for row in rates))
    body = []
    for (provider,), mine in groups(rates, "provider").items():
        line = [provider]
        for batch in batches:
            held = [r["p50"] for r in rows if (r["provider"], r["what"], r["batch"], r["steps"]) ==
                    (provider, "memory", batch, mine[0]["steps"])]
            rate = [number(r["p50"]) for r in mine if r["batch"] == batch]
            line.append(f"{rate[0]} ({number(held[-1], 4)})" if rate and held else "".join(rate))
        body.append(line)
    head = [f"pictures/s of {rates[0]['steps']} steps (MB), batch", *batches]
    return [markdown(head, body), ""]


def image(rows: list[dict]) -> list[str]:
    """Every device that has drawn pictures."""
    parts = []
    for (device,), mine in groups(latest(with_peers(rows), "device", "model"), "device").items():
        tables = [pictures(of) for of in groups(mine, "model").values()
                  if any(row["what"] == "picture" for row in of)]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in mine))
        dates = ", ".join(dict.fromkeys(row["date"][:10] for row in mine))
        parts += [f"### {device}", "", f"`{COMMAND}`, commit {commits}, torch {mine[0]['torch']}, "
                  f"{dates}; medians, and the 20th to the 80th percentile.", "", *tables]
    return parts


def waterfall(rows: list[dict]) -> list[str]:
    """What each change made of the step, device by device, in the order of the file."""
    parts = []
    for (device, model, dtype), mine in groups(rows, "device", "model", "dtype").items():
        body, before = [], None
        for row in mine:
            gain = "" if before is None else f"{before - float(row['p50']):.2f}"
            body.append([row["label"], row["commit"], spread(row), gain, row["predicted"],
                         f"{row['psnr']} dB"])
            before = float(row["p50"])
        head = ["change", "commit", "step, ms", "gained", "predicted", "picture"]
        parts += [f"**The step of {model}, {dtype}, change by change, on {device}**", "",
                  markdown(head, body), ""]
    return parts


def launches(rows: list[dict]) -> list[str]:
    """The counts, all models side by side: those of a step, then those of a decoding."""
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
            parts += [f"{what}, in float16:", "", markdown(["", *head], body), ""]
    return parts and [
        "### Counted", "", "By `python -m bench.launches`, which says what a count is and is not; it "
        "is no time.", "", *parts]


def report(folder: Path) -> str:
    """Everything that the results have to tell, as Markdown."""
    image_rows, waterfall_rows, launch_rows = (
        read(folder / f"{name}.csv") for name in ("image", "waterfall", "launches"))
    if not image_rows + waterfall_rows + launch_rows:
        raise SystemExit(f"{folder} has no results: run `{COMMAND}` first")
    parts = [*image(image_rows), *waterfall(waterfall_rows), *launches(launch_rows)]
    return "\n".join(parts).strip()


def write(readme: Path, text: str) -> bool:
    """Put the text between the markers; whether that changed anything."""
    old = readme.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise SystemExit(f"{readme} needs the lines {BEGIN} and {END}, once and in this order")
    head, rest = old.split(BEGIN)
    new = f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
    if new != old:
        readme.write_text(new)
    return new != old


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print instead of writing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    text = report(args.results)
    if args.print:
        print(text)
    else:
        print(f"{args.readme}: {'written' if write(args.readme, text) else 'as it was'}")


if __name__ == "__main__":
    main()
