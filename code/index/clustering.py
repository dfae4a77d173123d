"""Images that nobody has labelled, sorted into things by average linkage of their embeddings.

Each image begins as a group, and the two nearest groups are merged, again and again. How near two groups are is the
mean over all pairs of an image of one and an image of the other: of their cosine similarities, or of their squared
Euclidean distances. Both are means of squared distances here, because the cosine of unit vectors is 1 - d^2 / 2.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from proxy_anchor.files import quantity
from proxy_anchor.thresholds.intervals import SEED
from proxy_anchor.vectors import Embeddings, comparable

LIMIT = 10_000  # images up to which scipy merges them: it holds the distances of all pairs, twice 0.4 GB for this many
TILE = 2**25  # distances in memory at a time, of more images


@dataclass
class Merges:
    """The merges of N images into groups, the nearest groups first.

    pairs (M, 2): an image of each of the two groups, of which the first stands for both from then on; squares (M,):
    the mean squared distance of the two, ascending. distance: one of spec.DISTANCES.
    """

    images: int
    distance: str
    pairs: np.ndarray
    squares: np.ndarray

    @classmethod
    def from_vectors(cls, vectors: torch.Tensor, distance: str, threshold: float | None = None) -> "Merges":
        """The merges of embeddings (N, D), at least those up to a threshold, see `things`."""
        vectors = comparable(vectors, distance)
        if distance == "euclidean":  # of any length: in float32, small distances between long vectors would be rounded
            vectors = vectors.double()
        merge = merge_all if len(vectors) <= LIMIT else merge_mutual
        largest = np.inf if threshold is None else to_square(threshold, distance)
        return cls(len(vectors), distance, *merge(vectors, largest))

    def up_to(self, threshold: float) -> np.ndarray:
        """The things (N,) by a threshold, see `things`."""
        return self.after(int((self.squares <= to_square(threshold, self.distance)).sum()))

    def after(self, count: int) -> np.ndarray:
        """The group (N,) of each image after this many merges: 0 is the largest, and of equal ones the first."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        graph = coo_array((np.ones(count), tuple(self.pairs[:count].T)), shape=(self.images, self.images))
        groups = connected_components(graph, directed=False)[1]
        _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
        rank = np.empty(len(sizes), int)
        rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
        return rank[groups]


def merge_all(vectors: torch.Tensor, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, squares) of Merges by scipy, with all merges."""
    from scipy.cluster.hierarchy import linkage

    if len(vectors) < 2:
        return np.empty((0, 2), int), np.empty(0)
    tree = linkage(vectors.double().numpy(), "average", "sqeuclidean")
    pairs, first = [], [*range(len(vectors))]  # the image that stands for each image, and for each merge
    for a, b in tree[:, :2].astype(int):
        pairs.append((first[a], first[b]))
        first.append(first[a])
    return np.array(pairs), tree[:, 2]


def merge_mutual(vectors: torch.Tensor, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, squares) of Merges up to the largest square, with memory for the vectors only.

    The mean squared distance of two groups is q + q' - 2 m m', where m is the mean of a group's vectors and q that of
    their squared lengths. No merge brings the groups nearer to a third one (Bruynooghe, 1977), so two groups that are
    each other's nearest can be merged at once, in any order, with the same result; and a group whose nearest is farther
    than the largest square is complete. Rounds of such merges take two to three times the work of comparing all images
    once.
    """
    means = vectors - vectors.mean(dim=0)  # small numbers: they are subtracted from each other
    squares, sizes = means.square().sum(dim=1), means.new_ones(len(means))
    nearest, distances = torch.zeros(len(means), dtype=torch.long), means.new_zeros(len(means))
    active = search = torch.arange(len(means))
    pairs, merges = [torch.empty(0, 2, dtype=torch.long)], [means.new_empty(0)]
    while len(active) > 1:
        gallery = means[active].T.contiguous()
        for rows in search.split(max(1, TILE // len(active))):
            values = torch.addmm(squares[active], means[rows], gallery, alpha=-2)
            values[torch.arange(len(rows)), torch.searchsorted(active, rows)] = torch.inf
            values, columns = values.min(dim=1)
            nearest[rows], distances[rows] = active[columns], values + squares[rows]
        near = active[distances[active] <= largest]
        if not len(near):
            break
        active = torch.cat([near, nearest[near]]).unique()
        best = active[distances[active].argmin()]
        nearest[nearest[best]] = best  # where rounding has left no two that are each other's nearest
        first = active[(nearest[nearest[active]] == active) & (active < nearest[active])]
        second = nearest[first]
        pairs.append(torch.stack([first, second], dim=1))
        merges.append(distances[first])
        share = sizes[second] / (sizes[first] + sizes[second])
        means[first] = torch.lerp(means[first], means[second], share[:, None])
        squares[first] = torch.lerp(squares[first], squares[second], share)
        sizes[first] += sizes[second]
        changed = torch.zeros(len(means), dtype=torch.bool)
        changed[first] = changed[second] = True
        active = active[~torch.isin(active, second)]
        search = active[changed[active] | changed[nearest[active]]]
    values, order = torch.cat(merges).sort(stable=True)
    return torch.cat(pairs)[order].numpy(), values.numpy()


def things(vectors: torch.Tensor, distance: str, threshold: float | None, count: int = 1) -> np.ndarray:
    """The thing (N,) that each of the embeddings (N, D) shows, from 0 for the largest; of equal ones, the first is 0.

    threshold: the mean similarity from which two groups are one thing or, for Euclidean distances, the root of the mean
    squared distance; None if count says how many things there are. Raises ValueError for more things than images.
    """
    if threshold is not None:
        return Merges.from_vectors(vectors, distance, threshold).up_to(threshold)
    if count > len(vectors):
        raise ValueError(f"{quantity(len(vectors), 'image')} cannot show {count:,} things: give a smaller number")
    return Merges.from_vectors(vectors, distance).after(len(vectors) - count)


def members(labels: np.ndarray, vectors: torch.Tensor, distance: str) -> list[np.ndarray]:
    """The rows of each thing of `things`, those nearest to the mean of its embeddings first."""
    x, result = comparable(vectors, distance).double().numpy(), []
    for rows in np.split(np.argsort(labels, kind="stable"), np.bincount(labels).cumsum()[:-1]):
        distances = np.linalg.norm(x[rows] - x[rows].mean(axis=0), axis=1)
        result.append(rows[np.argsort(distances, kind="stable")])
    return result


def to_square(threshold: float, distance: str) -> float:
    """The mean squared distance at a threshold of `things`."""
    return 2 - 2 * threshold if distance == "cosine" else threshold * abs(threshold)


def best_threshold(embeddings: Embeddings, distance: str) -> float | None:
    """The threshold of `things` that finds the classes best, by the adjusted Rand index.

    Of more than LIMIT images, those of some classes are chosen at random. None where no two images, or all, are of one
    class.
    """
    sample = embeddings.of_classes(sample_classes(embeddings.labels))
    merges = Merges.from_vectors(sample.vectors.cpu(), distance)
    scores = rand_indices(merges, sample.labels.tolist())
    if not np.isfinite(scores).all():
        return None
    best = int(scores.argmax())
    low, high = np.pad(merges.squares, 1)[best : best + 2]  # of the last merge, and of the next, which is too far
    square = (low + max(low, high)) / 2
    return float(1 - square / 2 if distance == "cosine" else np.sqrt(square))


def sample_classes(labels: torch.Tensor) -> torch.Tensor:
    """The classes or, of more than LIMIT images, classes at random that have LIMIT images at most."""
    classes, sizes = labels.cpu().unique(return_counts=True)
    chosen, total = [], 0
    for i in np.random.default_rng(SEED).permutation(len(classes)).tolist():
        if total + int(sizes[i]) <= LIMIT:
            chosen.append(i)
            total += int(sizes[i])
    return classes[chosen]


def rand_indices(merges: Merges, labels: list[int]) -> np.ndarray:
    """The adjusted Rand index before the merges and after each: (M + 1,); NaN where it is not defined.

    `same`, `joined` and `right` count the pairs of images that share a class, a group, and both.
    """
    groups = [Counter([label]) for label in labels]
    right, joined = [0], [0]
    for a, b in merges.pairs.tolist():
        small, large = sorted((groups[a], groups[b]), key=len)
        right.append(right[-1] + sum(count * large[label] for label, count in small.items()))
        joined.append(joined[-1] + small.total() * large.total())
        large.update(small)
        groups[a] = large
    pairs = len(labels) * (len(labels) - 1) / 2
    same = sum(count * (count - 1) / 2 for count in Counter(labels).values())
    if not 0 < same < pairs:
        return np.full(len(joined), np.nan)
    chance = np.array(joined) * (same / pairs)
    return (np.array(right) - chance) / ((np.array(joined) + same) / 2 - chance)


def sizes(labels: np.ndarray) -> tuple[int, int]:
    """(things of two or more images, images alone) among the things (N,) of images."""
    counts = np.bincount(labels)
    return int((counts > 1).sum()), int((counts == 1).sum())


def summary(labels: np.ndarray, noun: str = "image") -> str:
    """How many things there are among the things (N,) of images, or of what else the noun says, in words."""
    found, alone = sizes(labels)
    return f"{quantity(found, 'thing')} of two or more {noun}s, {quantity(alone, noun)} alone"
