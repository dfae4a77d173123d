"""The difference between two groups of runs: a paired bootstrap over the test classes, and an interval over seeds."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from proxy_anchor.runs import run_folders

DRAWS = 10_000
LEVEL = 0.95
FEWEST = 10  # classes: with fewer, the intervals are far too narrow
BLOCK = 1 << 22  # classes drawn at a time
COLUMNS = ["epoch", "class", "queries", "hits"]


class Difference(NamedTuple):
    """The difference of the means of two groups of runs, with the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap(queries: np.ndarray, hits: np.ndarray, other_hits: np.ndarray) -> Difference:
    """The difference in R@1 of two groups, with its percentile interval over DRAWS resamples of the classes (seed 0).

    queries (C,): the number per class. hits, other_hits (S, C): the number per run of a group and class, at K = 1. Runs
    are averaged. Classes are resampled, not images, because the queries of a class succeed and fail together, and both
    groups share each resample. The interval covers the choice of test classes, but neither other seeds nor other
    datasets. Raises ValueError for fewer than FEWEST classes.
    """
    classes = len(queries)
    if classes < FEWEST:
        raise ValueError(f"{classes} test classes are too few for an interval; expected at least {FEWEST}")
    gains = hits.mean(axis=0) - other_hits.mean(axis=0)
    random = np.random.default_rng(0)
    differences = []
    for start in range(0, DRAWS, step := max(1, BLOCK // classes)):
        sample = random.integers(classes, size=(min(step, DRAWS - start), classes))
        differences.append(gains[sample].sum(axis=1) / queries[sample].sum(axis=1))
    low, high = np.quantile(np.concatenate(differences), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(gains.sum() / queries.sum()), float(low), float(high))


def over_seeds(differences: list[float]) -> Difference:
    """The mean of the differences of pairs of runs, one pair per seed, with Student's t interval of the mean.

    NaN at both ends for a single pair.
    """
    values = np.asarray(differences)
    reach = np.nan
    if len(values) > 1:
        reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Difference(float(values.mean()), float(values.mean() - reach), float(values.mean() + reach))


def difference(runs: list[tuple], other_runs: list[tuple]) -> Difference:
    """The bootstrap of two groups of runs, each run (folder, configuration, rows of metrics.csv).

    Raises ValueError as bootstrap and read do, and if the runs were not tested on the same images.
    """
    groups = [[read(*run) for run in group] for group in (runs, other_runs)]
    if len({test_set for group in groups for test_set, _, _ in group}) > 1:
        raise ValueError("they were not tested on the same images")
    _, queries, _ = groups[0][0]
    return bootstrap(queries, *(np.stack([hits for _, _, hits in group]) for group in groups))


def read(folder: Path, config: dict, rows: list[dict]) -> tuple[str, np.ndarray, np.ndarray]:
    """(test set, queries (C,), hits (C,)) of a run: a text that identifies the test set, and counts in its best epoch.

    Raises ValueError if the run did not write them, or if they do not belong to the rows.
    """
    path = folder / run_folders.CLASSES
    if not path.is_file():
        raise ValueError(f"{folder} has no {run_folders.CLASSES}: the run is of an older version")
    try:
        with open(path, newline="") as file:
            head, *cells = csv.reader(file)
        table = np.array(cells, dtype=np.int64).T
        epochs, classes, queries, hits = table if head == COLUMNS else []
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is not the {run_folders.CLASSES} of a run: {error}") from error
    recalls = [row["R@1"] for row in rows if row["epoch"] == epochs[0]]
    if len(set(epochs)) > 1 or not np.isclose(recalls, hits.sum() / queries.sum(), rtol=0, atol=1e-9).any():
        raise ValueError(f"{path} does not match the metrics.csv next to it; train again to compare this run")
    data = {split: digest for split, digest in (config.get("data") or {}).items() if split != "train"}
    return json.dumps([config.get("dataset"), data, classes.tolist(), queries.tolist()]), queries, hits
