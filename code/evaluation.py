"""From a network and test images to figures."""

from dataclasses import dataclass

import torch
from proxy_anchor.retrieval import best_positive_rank, map_at_r, recall_of_ranks

from proxy_anchor import distributed


@dataclass
class Result:
    """metrics: R@K for each K, MAP@R and R-precision, in 0..1; alone: queries with no image of their class to find."""

    metrics: dict[str, float]
    queries: int
    alone: int

    def remark(self) -> str:
        """A line on the queries that cannot be answered, or nothing."""
        if not self.alone:
            return ""
        return f"{self.alone:,} of {self.queries:,} queries have no image of their class to find: they are misses.\n"


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


def evaluate(network, ks, test_sets, precision) -> Result:
    """Search each query of one test set within it or, of two, each of the first in the second.

    test_sets: (batches, number of images) of each.
    """
    embedded = [tensor for batches, total in test_sets for tensor in embed(network, batches, total, precision)]
    ranks = best_positive_rank(*embedded, group=distributed.group())
    map_r, r_precision = map_at_r(*embedded, group=distributed.group()).mean(dim=1).tolist()
    recalls = {f"R@{k}": recall for k, recall in recall_of_ranks(ranks, ks).items()}
    return Result(recalls | {"MAP@R": map_r, "R-precision": r_precision}, len(ranks), int((ranks < 0).sum()))
