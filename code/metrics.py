"""The metrics in a row of metrics.csv: R@1 is measured on the test set, val/R@1 on held-out training classes."""

NOT_METRICS = ("epoch", "loss", "lr", "seconds")  # the other columns of metrics.csv


def metrics_only(row: dict) -> dict[str, float]:
    """The row without its other columns."""
    return {name: value for name, value in row.items() if name not in NOT_METRICS}


def plain(row: dict) -> dict:
    """The row without the prefix of its metrics: val/R@1 becomes R@1."""
    return {name.rpartition("/")[2]: value for name, value in row.items()}


def prefix(row: dict) -> str:
    """The prefix of the row's metrics: "" or "val/"."""
    return "".join(next(iter(metrics_only(row)), "").rpartition("/")[:2])


def best(rows: list[dict], by: str = "R@1") -> dict:
    """The row of the best epoch; of equal ones, the first.

    The published protocol picks the epoch on the test set, which is optimistic: scripts show the last epoch too.
    """
    return max(rows, key=lambda row: plain(row)[by])
