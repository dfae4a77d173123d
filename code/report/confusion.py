"""How hard each class is, and which classes are taken for which."""

from collections import Counter
from dataclasses import dataclass

import torch

from proxy_anchor.tiles import Points, origin_of

BLOCK = 1024  # queries at a time


@dataclass
class ClassResult:
    """A class: its queries, how many find it first, the class that they are most often taken for, and how often."""

    label: int
    queries: int
    right: int
    rival: int | None
    times: int

    @property
    def recall(self) -> float:
        return self.right / self.queries


def nearest_neighbour(
    embeddings: torch.Tensor,
    gallery: torch.Tensor | None = None,
    distance: str = "cosine",
    groups: torch.Tensor | None = None,
    gallery_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """The index of the nearest other image of each query, by a distance of vectors.DISTANCES: (N,).

    Of images with groups, numbers (N,) and (M,), the nearest of another group. -1 where there is none.
    """
    origin = origin_of(embeddings if gallery is None else gallery, distance)
    queries = Points.of(embeddings, origin)
    targets = queries if gallery is None else Points.of(gallery, origin)
    nearest = []
    for start in range(0, len(embeddings), BLOCK):
        similarity = queries[start : start + BLOCK].similarities(targets)
        if gallery is None:
            similarity.diagonal(offset=start).fill_(-torch.inf)
        if groups is not None:
            same_group = groups[start : start + BLOCK, None] == (groups if gallery_groups is None else gallery_groups)
            similarity.masked_fill_(same_group.to(similarity.device), -torch.inf)
        found = similarity.argmax(dim=1)
        found[similarity.amax(dim=1) == -torch.inf] = -1
        nearest.append(found)
    return torch.cat(nearest).cpu()


def by_class(labels: list[int], taken_for: list[int], ranks: list[int]) -> tuple[list[ClassResult], Counter]:
    """The classes, the hardest first, and how often queries of a class are nearest to another: {(class, other): times}.

    Given for each query: its label, that of its nearest neighbour, and its rank from best_positive_rank.
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
