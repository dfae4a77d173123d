"""The course of a run, read from its metrics.csv, and as a picture."""

import csv
from itertools import accumulate
from pathlib import Path

from proxy_anchor.files import replacing


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, an epoch each, with "elapsed": seconds since the start. Raises ValueError."""
    try:
        with open(path, newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the metrics.csv of a run: {error}") from error
    if not rows or not {"epoch", "loss", "lr", "seconds", "R@1"} <= set(rows[0]):
        raise ValueError(f"{path} is not the metrics.csv of a run: it has no rows, or other columns")
    for row, elapsed in zip(rows, accumulate(row["seconds"] for row in rows)):
        row["elapsed"] = elapsed
    return rows


def time_axis(seconds: float) -> tuple[float, str]:
    """(seconds of the unit, its name) in which a run of this length is shown."""
    return (3600, "hours") if seconds > 2 * 3600 else (60, "minutes") if seconds > 120 else (1, "seconds")


def draw(metrics: Path, path: Path) -> None:
    """Draw loss, Recall@K and learning rate over epochs and over wall time from a metrics.csv into a PNG."""
    from matplotlib.figure import Figure  # slow to import, and without pyplot it needs no display

    rows = read(metrics)
    unit, unit_name = time_axis(rows[-1]["elapsed"])
    panels = {
        "loss": ["loss"],
        "Recall@K, %": [name for name in rows[0] if name.startswith("R@")],
        "learning rate": ["lr"],
    }
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(len(panels), 2, sharex="col", sharey="row")
    for (label, names), row_axes in zip(panels.items(), axes):
        for ax, x in zip(row_axes, ("epoch", "elapsed")):
            scale = 1 if x == "epoch" else unit
            for name in names:
                y = [row[name] * (100 if name.startswith("R@") else 1) for row in rows]
                style = "steps-pre" if name == "lr" else "default"
                ax.plot([row[x] / scale for row in rows], y, marker=".", drawstyle=style, label=name)
            ax.grid(alpha=0.3)
        row_axes[0].set_ylabel(label)
        if len(names) > 1:
            row_axes[1].legend(loc="lower right")
    axes[-1][0].set_xlabel("epoch")
    axes[-1][0].xaxis.get_major_locator().set_params(integer=True)
    axes[-1][1].set_xlabel(unit_name)
    best = max(rows, key=lambda row: row["R@1"])
    figure.suptitle(f"best R@1 {100 * best['R@1']:.2f} in epoch {best['epoch']:.0f}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
