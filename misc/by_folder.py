"""Compare an index's images with its folders as answers, where each folder shows one thing.

    python search.py index --backbone-only --model resnet50 --images photos --out photos.index
    python misc/by_folder.py photos.index

Every image of the index is a query. It is searched first among all other images, then among the means of the folders
as `search.py index --by-folder` makes them, where the mean of its own folder is computed without it.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from proxy_anchor import cli, retrieval
from proxy_anchor.index.store import Index


def recall_by_folder(vectors: torch.Tensor, labels: torch.Tensor) -> float:
    """R@1 of images (N, D), by cosine, among the means of their folders (N,), each leaving the query out."""
    x = normalize(vectors.double())
    sums = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=x.dtype).index_add_(0, labels, x)
    similarities = x @ normalize(sums).T
    similarities[torch.arange(len(x)), labels] = -torch.inf
    own = (x * normalize(sums[labels] - x)).sum(dim=1)
    own[labels.bincount()[labels] == 1] = -torch.inf  # nothing is left of its folder
    return (own > similarities.max(dim=1).values).double().mean().item()


def main(folder: str) -> None:
    with cli.errors_in_one_line("by_folder.py"):
        index = Index.open(Path(folder))
        if index.made["by_folder"] or index.distance != "cosine":
            raise ValueError(
                f"{folder} is no index of single images by cosine similarity: make one without --by-folder"
            )
        vectors, labels = (embeddings := index.embeddings()).vectors, embeddings.labels
        (alone,) = retrieval.recall_at_k(vectors, labels, [1]).values()
        means = recall_by_folder(vectors, labels)
        print(f"R@1 of {len(vectors):,} images among the other images: {100 * alone:.2f}")
        folders = int(labels.max()) + 1
        print(f"R@1 of {len(vectors):,} images among {folders:,} folders, each without the query: {100 * means:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
