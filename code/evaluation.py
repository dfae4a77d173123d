"""From a network and test images to figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxy_anchor import distributed
from proxy_anchor.retrieval import map_at_r, ranks_and_ties, recall_of_ranks


@dataclass
class Result:
    """metrics: R@K for each K, MAP@R and R-precision, in 0..1.

    Of each query: ranks, as best_positive_rank gives them, and average_precisions, of which MAP@R is the mean.
    tied: how many queries are nearest to an image of their class and, exactly as near, one of another.
    """

    metrics: dict[str, float]
    ranks: torch.Tensor
    average_precisions: torch.Tensor
    tied: int = 0

    def remark(self) -> str:
        """A line on the queries that cannot be answered and one on those in dispute, where there are any."""
        total, alone, hits = len(self.ranks), int((self.ranks < 0).sum()), int((self.ranks == 0).sum())
        lines = ""
        if alone:
            lines += f"{alone:,} of {total:,} queries have no image of their class to find: they are misses.\n"
        if self.tied:
            lines += (
                f"{self.tied:,} of {total:,} queries are nearest to an image of their class and, exactly as near, one "
                "of another: misses here, hits by the published rule, by which R@1 is "
                f"{100 * (hits + self.tied) / total:.2f} instead of {100 * hits / total:.2f}.\n"
            )
        return lines


@torch.inference_mode()
def embed(network, batches, total: int, precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (total, D) and labels (total,) of all batches (images, labels), in eval mode.

    Where several processes share the work, the batches are this one's part of the images.
    """
    network.eval()
    device = next(network.parameters()).device
    embeddings = [torch.empty(0, network.model.embedding.out_features, device=device)]
    labels = [torch.empty(0, dtype=torch.long, device=device)]
    for images, batch_labels in batches:
        with precision.autocast():
            embeddings.append(network(images).float())
        labels.append(batch_labels)
    return distributed.gather(torch.cat(embeddings), total), distributed.gather(torch.cat(labels), total)


def embed_all(network, test_sets, precision) -> list[torch.Tensor]:
    """Embeddings and labels of each test set, given as (batches, number of images)."""
    return [tensor for batches, total in test_sets for tensor in embed(network, batches, total, precision)]


def measure(embedded: list[torch.Tensor], ks: Sequence[int], distance: str = "cosine") -> Result:
    """Search each query of one test set within it or, of two, each of the first in the second; from embed_all.

    Recall@K for each of ks, by a distance of retrieval.DISTANCES. Raises ValueError as best_positive_rank does.
    """
    ranks, tied = ranks_and_ties(*embedded, distance=distance, group=distributed.group())
    average_precisions, r_precisions = map_at_r(*embedded, distance=distance, group=distributed.group())
    recalls = {f"R@{k}": recall for k, recall in recall_of_ranks(ranks, ks).items()}
    means = {"MAP@R": average_precisions.mean().item(), "R-precision": r_precisions.mean().item()}
    return Result(recalls | means, ranks.cpu(), average_precisions, int(tied.sum()))
