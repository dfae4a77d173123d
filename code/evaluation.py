"""From a network and test images to figures."""

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


def measure(embedded: list[torch.Tensor], ks) -> Result:
    """Search each query of one test set within it or, of two, each of the first in the second; from embed_all."""
    ranks = best_positive_rank(*embedded, group=distributed.group())
    average_precisions, r_precisions = map_at_r(*embedded, group=distributed.group())
    recalls = {f"R@{k}": recall for k, recall in recall_of_ranks(ranks, ks).items()}
    means = {"MAP@R": average_precisions.mean().item(), "R-precision": r_precisions.mean().item()}
    return Result(recalls | means, ranks.cpu(), average_precisions)
