"""How hard each class is, and which classes are taken for which others."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from proxy_anchor.tiles import Points, origin_of
from proxy_anchor.vectors import Embeddings
from proxy_anchor.verification import REPLICATES, SEED, Estimate, estimate

BLOCK = 1024  # queries at a time


@dataclass
class ClassResult:
    """A class: its queries, how many of them find it first, the class they are most often taken for, and how often."""

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

    Images of the query's own group do not count; -1 if none is left.
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


def by_class(labels: list[int], taken_for: list[int], ranks: list[int]) -> tuple[list[ClassResult], Counter]:
    """The classes, the hardest first, and how often the queries of one are nearest to another: {(class, other): times}.

    labels, taken_for, ranks: each query's label, its nearest neighbour's label, and its rank from best_positive_rank.
    """
    confused = Counter((label, other) for label, other in zip(labels, taken_for) if label != other)
    rivals: dict = {}
    for (label, other), times in confused.most_common():
        rivals.setdefault(label, (other, times))
    right = Counter(label for label, rank in zip(labels, ranks) if rank == 0)
    classes = [
        ClassResult(label, count, right[label], *rivals.get(label, (None, 0)))
        for label, count in Counter(labels).items()
    ]
    return sorted(classes, key=lambda c: (c.recall, c.label)), confused


def recall_at_1(classes: list[ClassResult]) -> Estimate:
    """R@1 over all queries, with an interval from a bootstrap over the classes."""
    right, queries = np.array([(c.right, c.queries) for c in classes]).T
    drawn = np.random.default_rng(SEED).multinomial(len(classes), np.full(len(classes), 1 / len(classes)), REPLICATES)
    return estimate(right.sum() / queries.sum(), (drawn @ right) / (drawn @ queries))
