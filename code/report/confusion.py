"""The recall of each class, and confusions between classes."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from proxy_anchor.thresholds.intervals import REPLICATES, SEED, Estimate, estimate
from proxy_anchor.tiles import Points, origin_of
from proxy_anchor.vectors import Embeddings

BLOCK = 1024  # queries at a time


@dataclass
class ClassResult:
    """The results of a class: its queries, its hits at K = 1, and its most frequent wrong class with its count."""

    label: int
    queries: int
    right: int
    rival: int | None
    times: int

    @property
    def recall(self) -> float:
        return self.right / self.queries


def nearest_neighbour(queries: Embeddings, gallery: Embeddings | None = None, distance: str = "cosine") -> torch.Tensor:
    """The index of each query's nearest image in the gallery or among the other queries: (N,).

    Images of the query's group do not count; -1 if there are no others.
    """
    targets = queries if gallery is None else gallery
    origin = origin_of(targets.vectors, distance)
    query_points = Points.from_vectors(queries.vectors, origin)
    target_points = query_points if gallery is None else Points.from_vectors(targets.vectors, origin)
    nearest = []
    for start in range(0, len(queries.labels), BLOCK):
        similarity = query_points[start : start + BLOCK].similarities(target_points)
        if gallery is None:
            similarity.diagonal(offset=start).fill_(-torch.inf)
        if queries.groups is not None and targets.groups is not None:
            same_group = queries.groups[start : start + BLOCK, None] == targets.groups
            similarity.masked_fill_(same_group.to(similarity.device), -torch.inf)
        indices = similarity.argmax(dim=1)
        indices[similarity.amax(dim=1) == -torch.inf] = -1
        nearest.append(indices)
    return torch.cat(nearest).cpu()


def by_class(labels: list[int], predictions: list[int], ranks: list[int]) -> tuple[list[ClassResult], Counter]:
    """The results of the classes, hardest first, and the confusions {(class, nearest neighbour's class): count}.

    labels, predictions, ranks: each query's label, its nearest neighbour's label, and its rank from best_positive_rank.
    """
    confusions = Counter((label, other) for label, other in zip(labels, predictions) if label != other)
    rivals: dict = {}
    for (label, other), times in confusions.most_common():
        rivals.setdefault(label, (other, times))
    right = Counter(label for label, rank in zip(labels, ranks) if rank == 0)
    classes = [
        ClassResult(label, count, right[label], *rivals.get(label, (None, 0)))
        for label, count in Counter(labels).items()
    ]
    return sorted(classes, key=lambda c: (c.recall, c.label)), confusions


def recall_at_1(classes: list[ClassResult]) -> Estimate:
    """R@1 over all queries, with a bootstrap interval over the classes."""
    right, queries = np.array([(c.right, c.queries) for c in classes]).T
    draws = np.random.default_rng(SEED).multinomial(len(classes), np.full(len(classes), 1 / len(classes)), REPLICATES)
    return estimate(right.sum() / queries.sum(), (draws @ right) / (draws @ queries))
