"""The seconds of a picture by provider, a panel for each model."""

from pathlib import Path


def plot(rows: list[dict], folder: Path, machine: dict[str, str]) -> str:
    """Draw the rows of image.csv into ``folder``; returns a sentence on what was drawn."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "no plot: pip install 'minisd[bench]' brings matplotlib"
    matplotlib.use("Agg")
    pictures = [row for row in rows if row["what"] == "picture" and row.get("p50")]
    if not pictures:
        return "no plot: nothing was timed"
    stamp = machine["date"].replace(":", "").replace("+0000", "Z")
    path = folder / f"image-{stamp}.png"
    _draw(pictures, machine["device"], path)
    return f"drawn: {path}"


def _draw(pictures: list[dict], title: str, path: Path) -> None:
    """Bars from nothing, p20 to p80 as a line."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in pictures))
    figure = Figure(figsize=(9, 1 + 2 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names):
        mine = [row for row in pictures if row["model"] == name][::-1]
        low, middle, high = ([float(row[p]) for row in mine] for p in ("p20", "p50", "p80"))
        providers = [row["provider"] for row in mine]
        colors = ["C0" if provider.startswith("minisd") else "C7" for provider in providers]
        axes.barh(providers, middle, color=colors)
        axes.hlines(providers, low, high, color="black")
        axes.set_title(f"{name}, seconds a picture of {mine[0]['steps']} steps, {mine[0]['dtype']}",
                       fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
