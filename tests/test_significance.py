"""Whether two groups of runs differ: the bootstrap over classes, and what misc/compare.py says."""

import csv
import itertools
import json

import compare
import numpy as np
import pytest
import significance
from helpers import write_run


def test_all_draws_of_three_classes(monkeypatch):
    """27 equally likely draws: the quantiles are known."""
    monkeypatch.setattr(significance, "FEWEST", 3)
    queries, hits, others = np.array([2, 4, 10]), np.array([[2, 3, 4], [2, 1, 4]]), np.array([[1, 4, 0]])
    gained = [1, -2, 4]  # of the mean of the runs
    draws = sorted(
        sum(gained[c] for c in draw) / sum(queries[c] for c in draw) for draw in itertools.product(range(3), repeat=3)
    )
    found = significance.bootstrap(queries, hits, others)
    assert found.mean == pytest.approx(3 / 16)
    # Each end is in the first and the last 1/27, 3.7%: the worst and the best draw.
    assert (found.low, found.high) == (pytest.approx(draws[0]), pytest.approx(draws[-1]))
    assert significance.bootstrap(queries, hits, others) == found  # the same each time
    swapped = significance.bootstrap(queries, others, hits)
    assert swapped == pytest.approx([-found.mean, -found.high, -found.low])


def simulated(classes, difference, random):
    """Queries and hits of two runs each of two methods, whose classes differ in difficulty and in the difference."""
    queries = random.integers(5, 60, classes)
    recall = random.uniform(0.2, 0.8, classes)
    better = (recall + difference + 0.08 * random.normal(size=classes)).clip(0, 1)
    return queries, *(np.stack([random.binomial(queries, p) for _ in range(2)]) for p in (better, recall))


def test_interval_is_that_of_normal_theory():
    """Of a ratio of sums over many independent classes, by the delta method."""
    queries, hits, others = simulated(500, 0.02, np.random.default_rng(0))
    gained = hits.mean(axis=0) - others.mean(axis=0)
    mean = gained.sum() / queries.sum()
    deviation = (gained - mean * queries).std(ddof=1) / queries.mean() / 500**0.5
    found = significance.bootstrap(queries, hits, others)
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * deviation, abs=0.1 * deviation)
    assert found.high == pytest.approx(mean + 1.96 * deviation, abs=0.1 * deviation)


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(significance, "DRAWS", 1000)
    random = np.random.default_rng(0)
    found = [significance.bootstrap(*simulated(50, 0.02, random)) for _ in range(400)]
    assert 0.91 <= np.mean([one.low <= 0.02 <= one.high for one in found]) <= 0.98


def test_few_classes_are_refused():
    queries, hits, others = simulated(9, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="9 test classes are too few for an interval; expected at least 10"):
        significance.bootstrap(queries, hits, others)


# What compare.py says


def write_tested(folder, queries, hits, best_epoch=1, **config):
    """The folder of a run of three epochs that found these in the second."""
    recall = hits.sum() / queries.sum()
    write_run(folder, [recall / 2, recall, recall / 3], dataset="cub", data={"train": "a", "eval": "b"}, **config)
    with open(folder / "classes.csv", "w", newline="") as file:
        rows = [[best_epoch, c, q, h] for c, (q, h) in enumerate(zip(queries, hits))]
        csv.writer(file).writerows([["epoch", "class", "queries", "hits"], *rows])
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    """Two runs of Proxy-Anchor and of Proxy-NCA, which is worse, and of MS, which is as good."""
    random = np.random.default_rng(0)
    queries, good, bad = simulated(60, 0.1, random)
    as_good = good.copy()
    as_good[:, :10] -= 1
    as_good[:, 10:19] += 1  # a query less
    good, bad, as_good = (part.clip(0, queries) for part in (good, bad, as_good))
    return [
        write_tested(tmp_path / f"{loss}{seed}", queries, hits[seed - 1], loss=loss, seed=seed)
        for loss, hits in (("Proxy_Anchor", good), ("MS", as_good), ("Proxy_NCA", bad))
        for seed in (1, 2)
    ]


def verdicts(folders, tmp_path, capsys):
    compare.main([*folders, "--save", str(tmp_path / "chart.png")])
    return capsys.readouterr().out.splitlines()[len({f[:-1] for f in folders}) + 1 : -1]


def test_groups_are_compared_with_the_best(folders, tmp_path, capsys):
    as_good, worse = verdicts(folders, tmp_path, capsys)
    good, bad = (
        np.stack([np.loadtxt(f"{folder}/classes.csv", int, delimiter=",", skiprows=1).T for folder in pair])
        for pair in (folders[:2], folders[4:])
    )  # (seeds, columns, classes)
    mean, low, high = (100 * value for value in significance.bootstrap(good[0, 2], good[:, 3], bad[:, 3]))
    assert worse == f"Proxy-Anchor - Proxy-NCA: {mean:+.2f} points, 95% interval [{low:.2f}, {high:.2f}]: they differ"
    assert as_good.startswith("Proxy-Anchor - Multi-Similarity: +0.") and as_good.endswith("no difference is shown")


def test_fewer_than_two_seeds_are_refused(folders, tmp_path, capsys):
    *others, last = verdicts(folders[:-1], tmp_path, capsys)
    assert last == "Not compared (one seed each): Proxy-NCA; run at least two seeds" and len(others) == 1
    (line,) = verdicts([folders[0], folders[2]], tmp_path, capsys)
    assert line == "Not compared (one seed each): Proxy-Anchor; Multi-Similarity; run at least two seeds"
    assert verdicts(folders[:2], tmp_path, capsys) == []


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / "classes.csv").unlink(), "has no classes.csv: the run is of an older version"),
        (lambda folder: (folder / "classes.csv").write_text("a,b\n1,2\n"), "is not the classes.csv of a run"),
        (lambda folder: (folder / "classes.csv").write_text("epoch,class,queries,hits\n"), "is not the classes.csv"),
        (
            lambda folder: (folder / "classes.csv").write_text("epoch,class,queries,hits\n0,0,5,5\n"),
            "classes.csv does not match the metrics.csv next to it",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(json.loads((folder / "config.json").read_text()) | {"data": {"train": "a", "eval": "c"}})
            ),
            "they were not tested on the same images",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(folders, tmp_path, capsys, change, words):
    for seed in "12":
        change(tmp_path / f"Proxy_NCA{seed}")
    compare.main([*folders, "--save", str(tmp_path / "chart.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "not compared: " in line]
    assert len(lines) == 1 and words in lines[0]
