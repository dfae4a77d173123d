"""From a network and test images to ranks."""

import torch
from proxy_anchor.retrieval import best_positive_rank


@torch.inference_mode()
def embed(network, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, D) and labels (N,) of all batches (images, labels), in eval mode."""
    network.eval()
    embeddings, labels = zip(*((network(images).float(), labels) for images, labels in batches))
    return torch.cat(embeddings), torch.cat(labels)


def rank(network, *test_sets) -> torch.Tensor:
    """best_positive_rank of each query (N,): of one test set within itself, or of queries against a gallery.

    Each test set is an iterable of batches (images, labels).
    """
    return best_positive_rank(*(tensor for batches in test_sets for tensor in embed(network, batches)))
