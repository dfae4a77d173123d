"""The pictures: the course of a run, images in rows, and the style they share with misc/."""

import textwrap
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proxy_anchor import metrics
from proxy_anchor.files import printable, replacing

INK, QUIET, GRID = "#24292f", "#6e7781", "#e7eaee"
STRONG = ("#0b5cad", "#c2410c", "#0f766e", "#7c3aed")  # what a picture is about
MUTED = ("#6f7a8a", "#9a7b52", "#6c8a68", "#8a70a0", "#ac7b72", "#5f8791")  # what it is compared with
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#afb8c1",
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#afb8c1",
    "ytick.color": "#afb8c1",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # a card, on dark pages too
    "svg.hashsalt": "proxy-anchor",  # the same file each time
}
MARKED = 20  # epochs up to which each has a marker
ROWS, COLUMNS, THUMBNAIL = 20, 11, 224


@contextmanager
def picture(path: Path, width: float, height: float, layout: Any = "constrained"):
    """A matplotlib Figure of this size in inches, written at the end in the format that the path's ending names."""
    import matplotlib  # slow to import, and without pyplot it needs no display
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        suffix = path.suffix.removeprefix(".").lower()
        metadata = {"Date": None} if suffix == "svg" else None
        with replacing(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=130, metadata=metadata)


def draw_run(rows: list[dict], backbone: dict | None, path: Path, title: str) -> None:
    """Draw loss, Recall@K and learning rate over epochs and wall time, of two or more epochs.

    rows, backbone: see run_folders.read_metrics.
    """
    if len(rows) == 1:  # no curve yet
        return
    x = [int(row["epoch"]) for row in rows]
    edges = [x[0] - 0.5, *(epoch + 0.5 for epoch in x)]
    first = metrics.prefix(rows[0]) + "R@1"
    recalls = [name for name in rows[0] if name.startswith(first[:-1])]
    best = metrics.best(rows)
    marker = "o" if len(rows) <= MARKED else None
    with picture(path, 7.6, 6.6) as figure:
        loss_axes, recall_axes, lr_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 5, 0.7))
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")

        loss_axes.set_title("loss")
        loss_axes.plot(x, [row["loss"] for row in rows], color=STRONG[0], marker=marker, markersize=3.5)

        recall_axes.set_title(f"Recall@K, %: the best {first} is {100 * best[first]:.2f}, in epoch {best['epoch']:.0f}")
        colors = ramp(len(recalls))
        for name, color in zip(recalls, colors):
            recall_axes.plot(x, [100 * row[name] for row in rows], color=color, marker=marker, markersize=3.5)
        recall_axes.axvline(best["epoch"], color=STRONG[1], linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        recall_axes.plot(
            best["epoch"],
            100 * best[first],
            "o",
            color="white",
            markeredgecolor=STRONG[1],
            markeredgewidth=1.8,
            markersize=7,
            zorder=5,
        )

        if backbone:
            draw_level(recall_axes, 100 * backbone[first], f"backbone alone: {first}")

        rates = [row["lr"] for row in rows]
        lr_axes.set_title("learning rate")
        lr_axes.stairs(rates, edges, fill=True, color="#c9d3df")
        lr_axes.set(ylim=(0, 1.1 * max(rates) or 1), yticks=[max(rates)], yticklabels=[f"{max(rates):g}"])
        lr_axes.grid(False)
        lr_axes.set(
            xlabel="epoch, from 0", xlim=(edges[0], x[-1] + 0.02 * len(x))
        )  # the labels stand at the ends of the lines
        lr_axes.xaxis.get_major_locator().set_params(integer=True)
        for ax in (loss_axes, recall_axes):
            ax.tick_params(labelbottom=False)
        add_time(loss_axes, edges, [0, *(row["elapsed"] for row in rows)])
        label_ends(
            recall_axes,
            [
                (100 * rows[-1][name], f"{name}  {100 * rows[-1][name]:.1f}", color)
                for name, color in zip(recalls, colors)
            ],
        )


def draw_level(ax, level: float, label: str = "") -> None:
    """A dashed line at this level, with the label and its value above it; without a label, only the line."""
    ax.axhline(level, color=QUIET, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    if label:
        text = f"{label} {level:.1f}"
        ax.text(0.01, level, text, color=QUIET, va="bottom", fontsize=8.5, transform=ax.get_yaxis_transform())


def ramp(count: int) -> list[tuple[float, float, float]]:
    """Shades of the first strong colour, from dark to light."""
    import numpy as np

    dark, light = np.array([[6, 56, 110], [112, 166, 219]]) / 255
    return [tuple(dark + (light - dark) * i / max(1, count - 1)) for i in range(count)]


def time_axis(seconds: float) -> tuple[float, str]:
    """(seconds of the unit, its name) in which a run of this length is shown."""
    return (3600, "hours") if seconds > 2 * 3600 else (60, "minutes") if seconds > 120 else (1, "seconds")


def add_time(ax, epochs: list[float], elapsed: list[float]) -> None:
    """A second axis on top: the wall time, at the epochs by which it had passed."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    unit, name = time_axis(elapsed[-1])
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, elapsed[-1] / unit) if 0 <= tick <= elapsed[-1] / unit]
    texts = [f"{tick:g}" for tick in ticks[:-1]] + [f"{ticks[-1]:g} {name}"]
    top = ax.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks, np.divide(elapsed, unit), epochs), texts)
    top.spines["top"].set_visible(True)


def label_ends(ax, ends: list[tuple[float, str, Any]]) -> None:
    """Write each (y, text, color) to the right of the axes at y, pushed apart so that no two overlap.

    Call it last: the limits of the axes must not move afterwards.
    """
    labels = [
        ax.annotate(
            printable(text),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )
        for y, text, color in ends
    ]
    figure = ax.get_figure()
    figure.draw_without_rendering()  # now the layout is known
    points = 72 / figure.dpi
    height = 1.1 * max(label.get_window_extent().height for label in labels) * points
    wanted = [ax.transData.transform((0, y))[1] * points for y, _, _ in ends]
    for label, y, free in zip(labels, wanted, pushed_apart(wanted, height, ax.bbox.y0 * points, ax.bbox.y1 * points)):
        label.xyann = (6, free - y)


def pushed_apart(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions between low and high, at least a gap apart, in the order of those wanted and as near as possible.

    Near is in least squares. Without the gaps, positions must only not decrease: isotonic regression, by pooling.
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list] = []  # [sum, number] of positions that have moved together
    for i, index in enumerate(order):
        blocks.append([wanted[index] - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    means = [total / count for total, count in blocks for _ in range(count)]
    highest = high - (len(wanted) - 1) * gap
    free = [min(max(mean, low), highest) + i * gap for i, mean in enumerate(means)]
    return [free[order.index(i)] for i in range(len(wanted))]


def draw_images(rows: list[list[tuple[str, str]]], read_image, path: Path, wrong: Collection[str] = ()) -> None:
    """Draw rows of (path of an image, caption), each a query and its neighbours; at most ROWS by COLUMNS.

    read_image gives uint8 (3, H, W) for a path. An image that it cannot read is an empty frame with the file's name.
    wrong: paths of neighbours to frame.
    """
    import numpy as np
    from matplotlib.patches import Rectangle
    from PIL import Image

    rows = [row[:COLUMNS] for row in rows[:ROWS]]
    lines = max(caption.count("\n") + 1 for row in rows for _, caption in row)
    width, height = max(map(len, rows)) + 0.08, len(rows) * (1.04 + 0.15 * lines)  # an image is 0.92 wide and high
    with picture(path, 1.3 * width, 1.3 * height, layout=None) as figure:
        ax = figure.add_axes((0, 0, 1, 1))  # a single one: hundreds are slow
        for row, bottom in zip(rows, np.linspace(height, 0, len(rows), endpoint=False) - height / len(rows) + 0.06):
            for column, (name, caption) in enumerate(row):
                left = column + 0.08
                try:
                    image = Image.fromarray(read_image(name).permute(1, 2, 0).numpy())
                    image.thumbnail((THUMBNAIL, THUMBNAIL))  # a photograph has more pixels than the picture
                    w, h = (0.92 * side / max(image.size) for side in image.size)
                    x, y = left + (0.92 - w) / 2, bottom + (0.92 - h) / 2
                    ax.imshow(image, extent=(x, x + w, y, y + h))
                except (OSError, ValueError):
                    x, y, w, h = left, bottom, 0.92, 0.92
                    shown = "\n".join(textwrap.wrap(printable(Path(name).name), 16))
                    ax.text(left + 0.46, bottom + 0.46, shown, fontsize=7, color=QUIET, ha="center", va="center")
                color, line, weight = (STRONG[0], 2, "bold") if column == 0 else (GRID, 1, "normal")
                if column and name in wrong:
                    color, line = STRONG[1], 2
                ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=line, zorder=3))
                caption = "\n".join(map(printable, caption.split("\n")))
                ax.text(left + 0.46, bottom + 0.97, caption, ha="center", va="bottom", fontsize=9, fontweight=weight)
        ax.set(xlim=(0, width), ylim=(0, height))
        ax.axis("off")
