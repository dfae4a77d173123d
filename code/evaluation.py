"""From a network and test images to metrics."""

from dataclasses import dataclass

import torch

from proxy_anchor import distributed
from proxy_anchor.retrieval import best_positive_rank, map_at_r, recall_of_ranks


@dataclass
class Result:
    """metrics: R@K for each K, MAP@R and R-precision, in 0..1.

    Of each query: ranks, as best_positive_rank gives them, and average_precisions, of which MAP@R is the mean.
    """

    metrics: dict[str, float]
    ranks: torch.Tensor
    average_precisions: torch.Tensor

    def remark(self) -> str:
        """A line on the queries that cannot be answered, or nothing."""
        alone = int((self.ranks < 0).sum())
        if not alone:
            return ""
        return f"{alone:,} of {len(self.ranks):,} queries have no image of their class to find: they are misses.\n"


def evaluate(embedder, loaders, ks, stop=None) -> Result:
    """Embed the test sets of the loaders and measure; stop: a Stop, which raises Interrupted here at a signal."""
    embedded = [tensor for loader in loaders for tensor in embedder.embed(loader, "evaluation", stop)]
    if stop:
        stop.check()
    return measure(embedded, ks)


def measure(embedded: list[torch.Tensor], ks) -> Result:
    """Search each query of one test set within it or, of two, each of the first in the second; from Embedder.embed."""
    ranks = best_positive_rank(*embedded, group=distributed.group())
    average_precisions, r_precisions = map_at_r(*embedded, group=distributed.group())
    recalls = {f"R@{k}": recall for k, recall in recall_of_ranks(ranks, ks).items()}
    means = {"MAP@R": average_precisions.mean().item(), "R-precision": r_precisions.mean().item()}
    return Result(recalls | means, ranks.cpu(), average_precisions)
