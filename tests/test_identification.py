"""Known or unknown queries: rates, intervals and calibration, against loops, subsets and scikit-learn."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from embeddings import SETS, random_set, sides
from sklearn.linear_model import LogisticRegression

from proxy_anchor.spec import DISTANCES, Calibration
from proxy_anchor.thresholds import identification
from proxy_anchor.thresholds.identification import calibrate, calibration_of, describe, identify
from proxy_anchor.vectors import Embeddings, to_nearness


def nearness_of(queries, targets, distance):
    x, y = (t.double().numpy() for t in (queries, targets))
    if distance == "cosine":
        return (x @ y.T) / np.sqrt((x**2).sum(axis=1)[:, None] * (y**2).sum(axis=1))
    return -np.sqrt(((x[:, None] - y) ** 2).sum(axis=2))


def nearest_by_loop(queries, labels, gallery=None, gallery_labels=None, distance="cosine", groups=None):
    """(own, others) of each query, in the order of the labels: {class: the nearest image's nearness} for the others."""
    targets, target_labels = (queries, labels) if gallery is None else (gallery, gallery_labels)
    nearness = nearness_of(queries, targets, distance)
    if gallery is None:
        np.fill_diagonal(nearness, -np.inf)
    if groups is not None:
        nearness[groups[:, None].numpy() == groups.numpy()] = -np.inf
    rows = []
    for i in np.argsort(labels.numpy(), kind="stable"):
        best = {int(c): nearness[i, (target_labels == c).numpy()].max() for c in target_labels.unique()}
        rows.append((best.pop(int(labels[i]), -np.inf), best))
    return rows


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("searched", SETS)
def test_identification_is_that_of_a_loop(searched, distance, tile):
    rows = nearest_by_loop(*SETS[searched], distance=distance)
    found = identify(*sides(*SETS[searched]), distance=distance)
    assert found.own == pytest.approx([own for own, _ in rows], abs=1e-5)
    for others, (_, best) in zip(found.others, rows, strict=True):
        expected = [*sorted(best.values(), reverse=True), -np.inf]  # one more where its class is missing
        assert others == pytest.approx(expected[: len(others)], abs=1e-5)
    limit = np.median(found.others[:, 0]) + 1e-3
    known = [own >= limit and own > max(best.values()) for own, best in rows if own > -np.inf]
    assert found.known(limit).value == pytest.approx(np.mean(known))
    assert found.unknown(limit).value == pytest.approx(np.mean([max(best.values()) >= limit for _, best in rows]))
    _, labels, *gallery = SETS[searched]
    targets = gallery[1] if gallery else labels
    assert found.classes == max(len(set(targets.tolist()) - {label}) for label in labels.tolist())
    assert found.size == round(np.mean([(targets != label).sum() for label in labels]))


def test_images_of_a_group_are_not_compared():
    x, y = random_set(90, 6, 3)
    groups = torch.arange(90) // 2 % 20
    rows = nearest_by_loop(x, y, groups=groups)
    found = identify(Embeddings(x, y, groups))
    assert found.own == pytest.approx([own for own, _ in rows], abs=1e-5)
    assert found.others[:, 0] == pytest.approx([max(best.values()) for _, best in rows], abs=1e-5)


def test_only_the_nearest_classes_are_kept(monkeypatch):
    x, y = random_set(200, 30, 3)
    full = identify(Embeddings(x, y))
    monkeypatch.setattr(identification, "NEAREST", 7)
    assert (identify(Embeddings(x, y)).others == full.others[:, :7]).all()


def test_spread_over_the_classes_is_that_of_a_loop():
    x, y = random_set(200, 30, 3)
    found, rows = identify(Embeddings(x, y)), nearest_by_loop(x, y)
    limit = found.threshold(0.2) + 1e-6
    labels, accepts, rejects = found.by_class(limit)
    of_query = np.sort(y.numpy())
    for label, accept, reject in zip(labels, accepts, rejects, strict=True):
        of_class = [row for row, query in zip(rows, of_query) if query == label]
        assert accept == pytest.approx(np.mean([max(best.values()) >= limit for _, best in of_class]), abs=0.01)
        known = [own < limit for own, _ in of_class if own > -np.inf]
        assert not known or reject == pytest.approx(np.mean(known), abs=0.01)
    text = found.spread(limit, {label: f"thing {label}" for label in labels.tolist()})
    worst = int(np.argsort(-accepts, kind="stable")[0])
    assert f"unknown match: median {np.median(accepts):.1%}, 5% to 95% of the classes: " in text
    assert f"; most: thing {labels[worst]} {accepts[worst]:.0%}, " in text
    assert re.search(rf"\n +5%  {found.known(found.threshold(0.05)).value:.2%} \[", found.text())


@pytest.mark.parametrize("share", [0.03, 0.2])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_thresholds_of_smaller_galleries_are_those_of_all_subsets(count, share):
    """Of each query's 7 other classes, every choice of `count`: the mean share of queries that match."""
    x, y = random_set(160, 8, 4, dimensions=3)
    found, rows = identify(Embeddings(x, y)), nearest_by_loop(x, y)

    def share_at(limit):
        return np.mean(
            [max(chosen) >= limit for _, best in rows for chosen in itertools.combinations(best.values(), count)]
        )

    limit = found.threshold(share, count)
    assert share_at(limit + 3e-7) <= share < share_at(limit - 3e-7)
    sizes, values = found.thresholds(share)
    assert sizes == tuple(round(found.size * c / 7) for c in (7, 3, 1))
    assert dict(zip((7, 3, 1), values))[count] == limit


@pytest.mark.parametrize("distance", DISTANCES)
def test_threshold_of_a_larger_gallery_is_extrapolated(distance):
    """From 600 images of 200 classes to 4,800 of 1,600, at which as many unknown queries match, on average."""
    shares = []
    for seed in range(3):
        random = np.random.default_rng(seed)
        labels = torch.arange(4800) // 3
        x = torch.from_numpy(random.normal(size=(1600, 4))[labels] + 0.2 * random.normal(size=(4800, 4)))
        small = Embeddings(x, labels).of_classes(torch.arange(200))
        limit = calibration_of(0.1, identify(small, distance=distance)).at(4800 - 3)
        others = identify(Embeddings(x, labels), distance=distance)
        shares.append(others.unknown(to_nearness(limit, distance)).value)
        unmoved = others.unknown(
            to_nearness(calibration_of(0.1, identify(small, distance=distance)).values[0], distance)
        )
        assert unmoved.value > 0.3  # what it is without
    assert np.mean(shares) == pytest.approx(0.1, abs=0.03)


def test_interval_of_unknown_queries_is_that_of_classes_drawn_as_queries_and_gallery():
    """Each sample by brute force: the queries of the classes drawn, as often, among the images of the classes drawn."""
    x, y = random_set(300, 40, 3, dimensions=3)
    found, rows = identify(Embeddings(x, y)), nearest_by_loop(x, y)
    limit = found.threshold(0.2) + 1e-6
    of_query, classes, random = np.sort(y.numpy()), np.unique(y.numpy()), np.random.default_rng(5)
    shares = []
    for _ in range(500):
        drawn = dict(zip(*np.unique(random.choice(classes, len(classes)), return_counts=True)))
        best = [
            (drawn[c], max(value for other, value in best.items() if other in drawn))
            for c, (_, best) in zip(of_query, rows)
            if c in drawn
        ]
        shares.append(sum(times for times, value in best if value >= limit) / sum(times for times, _ in best))
    measured = found.unknown(limit)
    assert measured.value == np.mean([max(best.values()) >= limit for _, best in rows])
    low, high = np.quantile(shares, [0.025, 0.975]) * measured.value / np.mean(shares)
    assert measured[1:] == pytest.approx((low, high), rel=0.15)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("searched", ["themselves", "a gallery"])
def test_calibration_checks_on_classes_that_did_not_choose(searched, distance):
    embedded = (
        [*random_set(600, 40, 3)] if searched == "themselves" else [*random_set(300, 40, 3), *random_set(300, 40, 4)]
    )
    queries, *gallery = sides(*embedded)
    found = calibrate(queries, 0.05, *gallery, distance=distance, seed=1)
    classes = np.unique(torch.cat(embedded[1::2]).numpy())
    chosen, checked = (
        nearest_by_loop(
            *(t[torch.from_numpy(np.isin(embedded[i // 2 * 2 + 1].numpy(), half))] for i, t in enumerate(embedded)),
            distance=distance,
        )
        for half in np.split(np.random.default_rng(1).permutation(classes), 2)
    )
    nearest = np.sort([max(best.values()) for _, best in chosen])
    allowed = int(0.05 * len(nearest))
    limit = to_nearness(found.values[0], distance)
    assert nearest[-allowed - 1] - 1e-5 <= limit <= nearest[-allowed] + 1e-5
    limit = to_nearness(found.at(round(600 / 2 * (1 if searched == "themselves" else 0.5) * 19 / 20)), distance)
    assert found.unknown[0] == pytest.approx(np.mean([max(best.values()) >= limit for _, best in checked]), abs=0.02)
    right = [own >= limit and own > max(best.values()) for own, best in checked if own > -np.inf]
    assert found.known[0] == pytest.approx(np.mean(right), abs=0.02)
    for value, low, high in (found.unknown, found.known):
        assert 0 <= low <= value <= high <= 1 and low < high
    assert found.classes == (20, 20) and found.distance == distance
    kind = "similarity" if distance == "cosine" else "distance"
    text = describe(found)
    assert f"at most 5% of unknown queries match: {kind} {found.values[0]:.4f} for {found.sizes[0]} images (" in text
    assert f"Checked on the other half (20): {100 * found.unknown[0]:.2f}% [" in text


def test_odds_are_those_of_sklearn():
    """A logistic regression on what share of Platt's targets is right, without a penalty; finite if all are right."""
    random = np.random.default_rng(0)
    gaps = random.exponential(0.1, 400)
    right = random.random(400) < 1 / (1 + np.exp(1 - 15 * gaps))
    high, low = (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2)
    target = np.where(right, high, low)
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(np.tile(gaps, 2)[:, None], np.repeat([1, 0], 400), sample_weight=np.concatenate([target, 1 - target]))
    assert identification.log_odds(gaps, right) == pytest.approx((model.intercept_[0], model.coef_[0, 0]), rel=1e-3)
    offset, slope = identification.log_odds(gaps, np.ones(400, dtype=bool))
    assert offset + slope * 0.1 == pytest.approx(math.log(401), rel=0.05)


@pytest.mark.parametrize("searched", SETS)
def test_gaps_are_those_of_a_loop(searched):
    gaps, right = identify(*sides(*SETS[searched])).gaps()
    expected = []
    for own, best in nearest_by_loop(*SETS[searched]):
        if own > -np.inf:
            first, second = sorted([own, *best.values()])[:-3:-1]
            expected.append((first - second, own == first))
    assert gaps == pytest.approx([gap for gap, _ in expected], abs=1e-5)
    assert right.tolist() == [own for _, own in expected]


def test_calibration_needs_queries_enough():
    with pytest.raises(ValueError, match="54 queries that show 6 things allow --calibrate 0.0926 or more"):
        calibrate(*sides(*SETS["themselves"]), 0.001)
    with pytest.raises(ValueError, match="needs at least 3 things, found 50 queries that show 2 things"):
        calibrate(Embeddings(torch.randn(100, 2), torch.arange(100) % 4), 0.2)


def test_threshold_by_size():
    """At the sizes it is their value; between them the gap is a power of the size, and beyond the power of all."""
    cosine = Calibration("cosine", 0.05, (400, 100, 50), (0.9, 0.8, 0.5), (0.1, 0.0, 0.2), (), (), (4,), "", {})
    assert [cosine.at(size) for size in (400, 100, 50, 3)] == pytest.approx([0.9, 0.8, 0.5, 0.5])
    assert cosine.at(200) == pytest.approx(1 - math.sqrt(0.1 * 0.2))
    power, _ = np.polyfit(np.log([400, 100, 50]), np.log([0.1, 0.2, 0.5]), 1)
    assert cosine.at(1600) == pytest.approx(1 - 0.1 * 4**power)
    distance = replace(cosine, distance="euclidean", values=(1.0, 2.0, 3.0))
    assert [distance.at(size) for size in (400, 200)] == pytest.approx([1, math.sqrt(2)])
    power, _ = np.polyfit(np.log([400, 100, 50]), np.log([1.0, 2.0, 3.0]), 1)
    assert distance.at(1600) == pytest.approx(4**power)
    assert replace(cosine, values=(1.0, 1.0, 0.5)).at(10**9) == pytest.approx(1)
    assert Calibration.from_record(cosine.to_record()) == cosine
