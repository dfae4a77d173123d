"""From a network and test images to metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from proxy_anchor import collectives
from proxy_anchor.collectives import ProcessGroup
from proxy_anchor.embedding import Embedder
from proxy_anchor.retrieval import recall_of_ranks, search
from proxy_anchor.runs.stopping import Stop
from proxy_anchor.vectors import unit_vectors


@dataclass
class Result:
    """metrics: R@K for each K, MAP@R and R-precision, in 0..1.

    For each query: ranks, as best_positive_rank gives them, and average_precisions, whose mean is MAP@R; labels; and
    left_out, how many images of its own group are left out of its gallery, where images have groups.
    tied: how many queries have an image of their class and one of another class tied for first place.
    """

    metrics: dict[str, float]
    ranks: torch.Tensor
    average_precisions: torch.Tensor
    labels: torch.Tensor
    tied: int = 0
    left_out: torch.Tensor | None = None

    def remark(self) -> str:
        """A line each on images left out, on queries without an image to find and on ties, if there are any."""
        total, alone, hits = len(self.ranks), int((self.ranks < 0).sum()), int((self.ranks == 0).sum())
        lines = where = ""
        if self.left_out is not None:
            where = " outside their own group"
            lines += (
                f"Images of a query's own group are left out of its gallery: {int(self.left_out.sum()):,} in all, of "
                f"{int((self.left_out > 0).sum()):,} of {total:,} queries.\n"
            )
        if alone:
            lines += f"{alone:,} of {total:,} queries have no image of their class to find{where}: they are misses.\n"
        if self.tied:
            lines += (
                f"{self.tied:,} of {total:,} queries have an image of their class and one of another tied for first "
                "place: misses here, hits by the published rule, by which R@1 is "
                f"{100 * (hits + self.tied) / total:.2f} instead of {100 * hits / total:.2f}.\n"
            )
        return lines

    def by_class(self) -> list[dict[str, int]]:
        """The number of each class of the queries, how many queries it has, and how many of them are hits at K = 1."""
        numbers, place, queries = self.labels.unique(return_inverse=True, return_counts=True)
        hits = torch.zeros_like(queries).index_add(0, place, (self.ranks == 0).long())
        columns = (numbers.tolist(), queries.tolist(), hits.tolist())
        return [dict(zip(("class", "queries", "hits"), row)) for row in zip(*columns)]


def evaluate(
    embedder: Embedder, loaders, ks: Sequence[int], stop: Stop | None = None, distance: str = "cosine", prefix: str = ""
) -> Result:
    """Embed the test sets of the loaders and measure; stop: a Stop, which raises Interrupted here at a signal.

    prefix: of the metrics' names, see metrics.py. Datasets of the loaders that have groups are measured by them.
    """
    embedded = [tensor for loader in loaders for tensor in embedder.embed(loader, "evaluation", stop)]
    if stop:
        stop.check()
    result = measure(embedded, ks, distance, [getattr(loader.dataset, "groups", None) for loader in loaders])
    return replace(result, metrics={prefix + name: value for name, value in result.metrics.items()})


def side_by_side(of_each: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The test sets (see Embedder.embed) of several networks as those of one, whose embeddings are theirs in a row.

    Each network's are made of unit length first. Raises ValueError if any is not finite.
    """
    columns = zip(*of_each)  # embeddings, labels, and so on of each network
    return [
        torch.cat([unit_vectors(part) for part in same], dim=1) if same[0].ndim == 2 else same[0] for same in columns
    ]


def measure(
    embedded: list[torch.Tensor], ks: Sequence[int], distance: str = "cosine", groups: Sequence | None = None
) -> Result:
    """Search the images of one test set within it or, given two, those of the first in the second; see Embedder.embed.

    Recall@K for each of ks, by a distance of vectors.DISTANCES. groups: for each test set the numbers (N,) of its
    images' groups, or None: images of a query's own group are left out of its gallery. Of several processes each passes
    what it has embedded, and the groups of all images; the Result is that of all. Raises ValueError as
    best_positive_rank does.
    """
    found = search(**arguments(embedded, distance, groups), group=collectives.world())
    recalls = {f"R@{k}": recall for k, recall in recall_of_ranks(found.ranks, ks).items()}
    means = {"MAP@R": found.average_precisions.mean().item(), "R-precision": found.r_precisions.mean().item()}
    (labels,) = whole(embedded[1:2])
    left_out = images_left_out(*map(torch.as_tensor, groups)) if groups and groups[0] is not None else None
    return Result(
        recalls | means, found.ranks.cpu(), found.average_precisions, labels.cpu(), int(found.tied.sum()), left_out
    )


def arguments(embedded: list[torch.Tensor], distance: str, groups: Sequence | None = None) -> dict[str, Any]:
    """Those of a search, see retrieval.best_positive_rank, by their names; of groups, this process's part."""
    of_each = [*(groups or ()), None, None][:2]
    numbers = [None if part is None else torch.as_tensor(part)[collectives.shard(len(part))] for part in of_each]
    names = ("embeddings", "labels", "gallery", "gallery_labels", "groups", "gallery_groups")
    return dict(zip(names, [*[*embedded, None, None][:4], *numbers])) | {"distance": distance}


def whole(embedded: list[torch.Tensor]) -> list[torch.Tensor]:
    """What all processes have embedded, in each of them."""
    return [torch.cat(ProcessGroup(collectives.world()).all_gather(part)) for part in embedded]


def images_left_out(groups: torch.Tensor, gallery_groups: torch.Tensor | None = None) -> torch.Tensor:
    """How many images of its own group each query (N,) has in its gallery: (M,), or the other queries."""
    numbers, sizes = (groups if gallery_groups is None else gallery_groups).unique(return_counts=True)
    place = torch.searchsorted(numbers, groups).clamp(max=len(numbers) - 1)
    return torch.where(numbers[place] == groups, sizes[place], 0) - int(gallery_groups is None)
