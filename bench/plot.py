"""The share of the limit that every provider reaches: a plot for each kernel."""

from pathlib import Path


def plot(rows: list[dict], folder: Path, machine: dict[str, str]) -> str:
    """Plot the rows of kernels.csv into ``folder``; returns a sentence that names the files."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "no plot: pip install 'minisd[bench]' brings matplotlib"
    matplotlib.use("Agg")
    drawn = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        shares = [r for r in rows
                  if r["kernel"] == kernel and r.get("metric", "").startswith("share")]
        if shares:
            stamp = machine["date"].replace(":", "").replace("+0000", "Z")
            drawn.append(folder / f"{kernel}-{stamp}.png")
            _draw(shares, f"{kernel}, {machine['device']}", drawn[-1])
    return "drawn: " + ", ".join(map(str, drawn)) if drawn else "no plot: nothing was timed"


def _draw(shares: list[dict], title: str, path: Path) -> None:
    """Sizes from top to bottom, a mark for each provider; p20 to p80 as a line through it."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row["shape"] for row in shares))[::-1]
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    for provider in dict.fromkeys(row["provider"] for row in shares):
        mine = [row for row in shares if row["provider"] == provider]
        low, middle, high = ([float(row[p]) for row in mine] for p in ("p20", "p50", "p80"))
        where = [sizes.index(row["shape"]) for row in mine]
        marks = axes.plot(middle, where, "D" if provider == "minisd" else "o", label=provider)
        axes.hlines(where, low, high, color=marks[0].get_color())
    axes.set_yticks(range(len(sizes)), sizes)
    axes.set_xlim(0)
    axes.set_xlabel("share of the limit (1 is as fast as can be)")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
