"""The names of metrics, R@1 on the test set and val/R@1 on held-out training classes, and the best epoch by one."""

NOT_METRICS = ("epoch", "loss", "lr", "seconds")  # the other columns of metrics.csv


def of(row: dict) -> dict[str, float]:
    """The metrics in a row of metrics.csv."""
    return {name: value for name, value in row.items() if name not in NOT_METRICS}


def plain(row: dict) -> dict:
    """The row, or metrics, without what names are prefixed with: val/R@1 is R@1."""
    return {name.rpartition("/")[2]: value for name, value in row.items()}


def prefix(row: dict) -> str:
    """What the names of the row's metrics are prefixed with: nothing, or val/ with its slash."""
    return "".join(next(iter(of(row)), "").rpartition("/")[:2])


def best(rows: list[dict], by: str = "R@1") -> dict:
    """The row of the best epoch, the first of equals.

    The published protocol picks the epoch on the test set, which flatters it: scripts show the last one too.
    """
    return max(rows, key=lambda row: plain(row)[by])
