"""The metrics in a row of metrics.csv: R@1 is measured on the test set, val/R@1 on held-out training classes.

train/R@1 is measured on the training images, of a network that is trained on all classes for use.
"""

NOT_METRICS = ("epoch", "loss", "lr", "seconds")  # the other columns of metrics.csv


def metrics_only(row: dict) -> dict[str, float]:
    """The row without its other columns."""
    return {name: value for name, value in row.items() if name not in NOT_METRICS}


def plain(row: dict) -> dict:
    """The row without the prefix of its metrics: val/R@1 becomes R@1."""
    return {name.rpartition("/")[2]: value for name, value in row.items()}


def prefix(row: dict) -> str:
    """The prefix of the row's metrics: "", "val/" or "train/"."""
    return "".join(next(iter(metrics_only(row)), "").rpartition("/")[:2])


def best(rows: list[dict], by: str = "R@1") -> dict:
    """The row of the best epoch; of equal ones, the first.

    The published protocol picks the epoch on the test set, which is optimistic: scripts show the last epoch too.
    Metrics of training images only grow, and choose nothing: there, it is the last epoch.
    """
    if prefix(rows[-1]) == "train/":
        return rows[-1]
    return max(rows, key=lambda row: plain(row)[by])


def table(rows: dict[str, dict[str, float]]) -> str:
    """A table of metrics in percent: a line for each name of rows, a column for each metric that any line has.

    A prefix of the metrics' names is in the corner.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    corner = prefix(next(iter(rows.values())))
    width = max(map(len, [corner, *rows]))
    heads = [c.removeprefix(corner).replace("R-precision", "R-prec") for c in columns]  # for 80 characters
    lines = [f"{corner:<{width}}" + "".join(f"  {head:>6}" for head in heads)]
    for name, row in rows.items():
        cells = (f"{100 * row[c]:.2f}" if c in row else "-" for c in columns)
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>6}" for cell in cells))
    return "\n".join(lines)


# Recall@K in percent of the released checkpoints (512-d, 224 px), as published by the authors.
PUBLISHED: dict[tuple[str, str], dict[int, float]] = {
    ("cub", "bn_inception"): {1: 69.1, 2: 78.9, 4: 86.1, 8: 91.2},
    ("cub", "resnet50"): {1: 69.9, 2: 79.6, 4: 86.6, 8: 91.4},
    ("cars", "bn_inception"): {1: 86.4, 2: 91.9, 4: 95.0, 8: 97.0},
    ("cars", "resnet50"): {1: 87.7, 2: 92.7, 4: 95.5, 8: 97.3},
    ("SOP", "bn_inception"): {1: 79.2, 10: 90.7, 100: 96.2, 1000: 98.6},
    ("Inshop", "bn_inception"): {1: 91.9, 10: 98.1, 20: 98.7, 30: 99.0, 40: 99.1},
}
