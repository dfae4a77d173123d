"""From a network and test images to metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from proxy_anchor import distributed
from proxy_anchor.embedding import Embedder
from proxy_anchor.retrieval import map_at_r, ranks_and_ties, recall_of_ranks, unit_vectors
from proxy_anchor.stopping import Stop


@dataclass
class Result:
    """metrics: R@K for each K, MAP@R and R-precision, in 0..1.

    For each query: ranks, as best_positive_rank gives them, and average_precisions, whose mean is MAP@R.
    tied: how many queries have an image of their class and one of another class tied for first place.
    """

    metrics: dict[str, float]
    ranks: torch.Tensor
    average_precisions: torch.Tensor
    tied: int = 0

    def remark(self) -> str:
        """A line on queries without an image to find and one on ties, if there are any."""
        total, alone, hits = len(self.ranks), int((self.ranks < 0).sum()), int((self.ranks == 0).sum())
        lines = ""
        if alone:
            lines += f"{alone:,} of {total:,} queries have no image of their class to find: they are misses.\n"
        if self.tied:
            lines += (
                f"{self.tied:,} of {total:,} queries have an image of their class and one of another tied for first "
                "place: misses here, hits by the published rule, by which R@1 is "
                f"{100 * (hits + self.tied) / total:.2f} instead of {100 * hits / total:.2f}.\n"
            )
        return lines


def evaluate(
    embedder: Embedder, loaders, ks: Sequence[int], stop: Stop | None = None, distance: str = "cosine", prefix: str = ""
) -> Result:
    """Embed the test sets of the loaders and measure; stop: a Stop, which raises Interrupted here at a signal.

    prefix: of the metrics' names, see metrics.py.
    """
    embedded = [tensor for loader in loaders for tensor in embedder.embed(loader, "evaluation", stop)]
    if stop:
        stop.check()
    result = measure(embedded, ks, distance)
    return replace(result, metrics={prefix + name: value for name, value in result.metrics.items()})


def side_by_side(of_each: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The test sets (see Embedder.embed) of several networks as those of one, whose embeddings are theirs in a row.

    Each network's are made of unit length first. Raises ValueError if any is not finite.
    """
    columns = zip(*of_each)  # embeddings, labels, and so on of each network
    return [
        torch.cat([unit_vectors(part) for part in same], dim=1) if same[0].ndim == 2 else same[0] for same in columns
    ]


def measure(embedded: list[torch.Tensor], ks: Sequence[int], distance: str = "cosine") -> Result:
    """Search the images of one test set within it or, given two, those of the first in the second; see Embedder.embed.

    Recall@K for each of ks, by a distance of retrieval.DISTANCES. Raises ValueError as best_positive_rank does.
    """
    arguments: list[Any] = [*[*embedded, None, None][:4], distance]  # of one test set, without a gallery
    ranks, tied = ranks_and_ties(*arguments, group=distributed.group())
    average_precisions, r_precisions = map_at_r(*arguments, group=distributed.group())
    recalls = {f"R@{k}": recall for k, recall in recall_of_ranks(ranks, ks).items()}
    means = {"MAP@R": average_precisions.mean().item(), "R-precision": r_precisions.mean().item()}
    return Result(recalls | means, ranks.cpu(), average_precisions, int(tied.sum()))
