"""Whether two groups of runs differ: a paired bootstrap over the test classes of the difference of their R@1."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proxy_anchor.runs import run_folders

DRAWS = 10_000
LEVEL = 0.95
FEWEST = 10  # classes: of fewer, the intervals are far too narrow
BLOCK = 1 << 22  # classes drawn at a time
COLUMNS = ["epoch", "class", "queries", "hits"]


class Difference(NamedTuple):
    """Of the mean R@1 of two groups of runs, in -1..1, with the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap(queries: np.ndarray, hits: np.ndarray, other_hits: np.ndarray) -> Difference:
    """The difference of two groups' R@1, with its percentile interval over DRAWS draws of classes (seed 0).

    queries (C,): of each class; hits and other_hits (S, C): at K = 1, one row for each run of a group. Runs are
    averaged; classes, not images, are drawn, with replacement and the same for both groups, because queries of a class
    succeed and fail together. The interval covers the choice of test classes, for the mean of just these runs. It
    covers neither how much other seeds would vary nor other datasets. Raises ValueError for fewer than FEWEST classes.
    """
    classes = len(queries)
    if classes < FEWEST:
        raise ValueError(f"{classes} test classes are too few for an interval; expected at least {FEWEST}")
    gained = hits.mean(axis=0) - other_hits.mean(axis=0)
    random = np.random.default_rng(0)
    drawn = []
    for start in range(0, DRAWS, step := max(1, BLOCK // classes)):
        chosen = random.integers(classes, size=(min(step, DRAWS - start), classes))
        drawn.append(gained[chosen].sum(axis=1) / queries[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(gained.sum() / queries.sum()), float(low), float(high))


def difference(members: list[tuple], others: list[tuple]) -> Difference:
    """See bootstrap; of two groups of runs, each (folder, configuration, rows of metrics.csv).

    Raises ValueError also where runs do not say what they found, and where they were not tested on the same images.
    """
    found = [[read(*run) for run in group] for group in (members, others)]
    if len({test for group in found for test, _, _ in group}) > 1:
        raise ValueError("they were not tested on the same images")
    _, queries, _ = found[0][0]
    return bootstrap(queries, *(np.stack([hits for _, _, hits in group]) for group in found))


def read(folder: Path, config: dict, rows: list[dict]) -> tuple[str, np.ndarray, np.ndarray]:
    """What a run was tested on, and the queries and the hits of each class, (C,), in its best epoch.

    Raises ValueError where the run did not write them, or where they do not belong to the rows.
    """
    path = folder / run_folders.CLASSES
    if not path.is_file():
        raise ValueError(f"{folder} has no {run_folders.CLASSES}: an earlier version wrote it")
    try:
        with open(path, newline="") as file:
            head, *cells = csv.reader(file)
        table = np.array(cells, dtype=np.int64).T
        epochs, classes, queries, hits = table if head == COLUMNS else []
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is not the {run_folders.CLASSES} of a run: {error}") from error
    recalls = [row["R@1"] for row in rows if row["epoch"] == epochs[0]]
    if len(set(epochs)) > 1 or not np.isclose(recalls, hits.sum() / queries.sum(), rtol=0, atol=1e-9).any():
        raise ValueError(f"{path} does not belong to the metrics.csv beside it; train again to compare this run")
    data = {split: digest for split, digest in (config.get("data") or {}).items() if split != "train"}
    return json.dumps([config.get("dataset"), data, classes.tolist(), queries.tolist()]), queries, hits
