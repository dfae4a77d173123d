"""How near images of one class are, and of two: samples of pairs, and how well a threshold tells them apart."""

import numpy as np
import torch

PAIRS = 200_000  # of each kind, at most
BLOCK = 1 << 14  # pairs at a time


def nearness(a: torch.Tensor, b: torch.Tensor, distance: str) -> torch.Tensor:
    """Of the vectors (..., D): the cosine similarity of unit vectors or, of any, minus the Euclidean distance."""
    return (a * b).sum(dim=-1) if distance == "cosine" else -torch.linalg.vector_norm(a - b, dim=-1)


def sample(
    embeddings, labels, gallery=None, gallery_labels=None, distance: str = "cosine", groups=None, gallery_groups=None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearness of random pairs of one class and of two, some pairs more than once in small sets.

    Of vectors (N, D), paired with each other or, with a gallery (M, D), with its. A pair of one class is a random
    image that has another of its class, and one of those; a pair of two is a random one of all of them. Of images with
    groups, numbers (N,) and (M,), pairs of one group are dropped.
    """
    within = gallery is None
    targets, target_labels = (embeddings, labels) if within else (gallery, gallery_labels)
    target_groups = groups if within else gallery_groups
    labels, target_labels = labels.cpu().numpy(), target_labels.cpu().numpy()
    if groups is not None:
        groups, target_groups = groups.numpy(), target_groups.numpy()
    random = np.random.default_rng(0)
    pairs = min(PAIRS, 50 * len(labels))

    # The images of a query's class have the places start ... start + count - 1 in the order of the labels.
    order = np.argsort(target_labels, kind="stable")
    start, end = (np.searchsorted(target_labels[order], labels, side) for side in ("left", "right"))
    count = end - start - within
    answerable = np.flatnonzero(count)
    first = random.choice(answerable, pairs) if len(answerable) else answerable
    place = start[first] + random.integers(0, count[first])
    if within:
        own_place = np.empty_like(order)
        own_place[order] = np.arange(len(order))
        place += place >= own_place[first]
    second = order[place]
    if groups is not None:
        apart = groups[first] != target_groups[second]
        first, second = first[apart], second[apart]
    same = _nearness(embeddings, targets, first, second, distance)

    first, second = random.integers(0, len(labels), pairs), random.integers(0, len(target_labels), pairs)
    apart = labels[first] != target_labels[second]
    if groups is not None:
        apart &= groups[first] != target_groups[second]
    return same, _nearness(embeddings, targets, first[apart], second[apart], distance)


def _nearness(embeddings, targets, first, second, distance) -> np.ndarray:
    first, second = (torch.from_numpy(side).to(embeddings.device).split(BLOCK) for side in (first, second))
    return torch.cat([nearness(embeddings[a], targets[b], distance) for a, b in zip(first, second)]).cpu().numpy()


def area_under_curve(same: np.ndarray, other: np.ndarray) -> float:
    """The ROC's AUC: how often a pair of one class is nearer than a pair of two; of equals, one half."""
    other = np.sort(other)
    below, not_above = (np.searchsorted(other, same, side).mean() for side in ("left", "right"))
    return float(below + not_above) / 2 / len(other)


def equal_error_threshold(same: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """The threshold with the most equal errors: the shares of one class below it, and of two at or above it.

    Returns (threshold, missed, mistaken); the thresholds are the values that occur.
    """
    same, other = np.sort(same), np.sort(other)
    thresholds = np.union1d(same, other)
    missed = np.searchsorted(same, thresholds) / len(same)
    mistaken = 1 - np.searchsorted(other, thresholds) / len(other)
    best = np.abs(missed - mistaken).argmin()
    return float(thresholds[best]), float(missed[best]), float(mistaken[best])
