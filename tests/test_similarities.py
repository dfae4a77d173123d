"""Samples of pairs, their AUC and the threshold of equal errors, beside brute force."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from proxy_anchor import similarities
from proxy_anchor.retrieval import unit_vectors


def random_set(count, classes, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    embeddings = random.normal(size=(classes, 8))[labels] + random.normal(size=(count, 8))
    return unit_vectors(torch.from_numpy(embeddings)), torch.from_numpy(labels)


@pytest.mark.parametrize("searched", ["themselves", "a gallery", "a gallery that lacks classes"])
def test_samples_are_of_pairs_of_one_class_and_of_two(searched):
    """Each pair that there is comes up, no other, and in the mean they are as similar."""
    queries, labels = random_set(30, 6, 0)
    gallery = () if searched == "themselves" else random_set(20, 6 if searched == "a gallery" else 4, 1)
    targets, target_labels = gallery or (queries, labels)
    matrix = (queries @ targets.T).numpy()
    alike = labels[:, None].numpy() == target_labels.numpy()
    pair = ~np.eye(30, dtype=bool) if not gallery else np.ones_like(alike)
    same, other = similarities.sample(queries, labels, *gallery)
    assert len(same) == 30 * 50 and len(other) > 1000
    one_class = alike & pair
    assert set(same.round(9)) == set(matrix[one_class].round(9))
    assert set(other.round(9)) <= set(matrix[~alike].round(9))
    of_each_query = [matrix[i, row].mean() for i, row in enumerate(one_class) if row.any()]
    assert same.mean() == pytest.approx(np.mean(of_each_query), abs=0.03)
    assert other.mean() == pytest.approx(matrix[~alike].mean(), abs=0.03)


@pytest.mark.parametrize("decimals", [9, 1])  # without equals and with many
def test_auc_is_that_of_sklearn(decimals):
    random = np.random.default_rng(0)
    same, other = random.normal(0.5, 0.3, 70).round(decimals), random.normal(0.2, 0.3, 90).round(decimals)
    expected = roc_auc_score([1] * 70 + [0] * 90, [*same, *other])
    assert similarities.area_under_curve(same, other) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decimals", [9, 1])
@pytest.mark.parametrize("distance", [0.3, 5, -5])  # 5: a threshold without errors
def test_threshold_of_equal_errors_is_that_of_a_loop(decimals, distance):
    random = np.random.default_rng(0)
    same, other = random.normal(distance, 0.3, 70).round(decimals), random.normal(0, 0.3, 90).round(decimals)
    threshold, missed, mistaken = similarities.equal_error_threshold(same, other)
    errors = {t: (np.mean(same < t), np.mean(other >= t)) for t in [*same, *other]}
    assert (missed, mistaken) == pytest.approx(errors[threshold], abs=1e-12)
    assert abs(missed - mistaken) == pytest.approx(min(abs(a - b) for a, b in errors.values()), abs=1e-12)
    if distance == 5:
        assert (missed, mistaken) == (0, 0)


def test_pairs_that_are_all_equal():
    ones = np.ones(5)
    assert similarities.area_under_curve(ones, ones) == 0.5
    assert similarities.equal_error_threshold(ones, ones) == (1, 0, 1)
