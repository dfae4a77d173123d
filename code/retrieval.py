"""Exact image retrieval: the rank of each query's best positive, and Recall@K from it."""

import torch
from proxy_anchor.losses import norms

BLOCK_ELEMENTS = 1 << 24  # similarities at a time: 64 MB in float32


@torch.no_grad()
def best_positive_rank(embeddings, labels, gallery=None, gallery_labels=None) -> torch.Tensor:
    """Number of negatives that rank above each query's most similar positive, by cosine similarity: (N,), from 0.

    embeddings (N, D) and labels (N,) are the queries. Without a gallery (M, D) each query is compared with all others;
    it is left out of its own ranking by its index, so duplicate images count. A negative as similar as the best
    positive ranks above it: a network that maps all images to one point finds nothing. -1 where a query has no
    positive. Raises ValueError for embeddings that are not finite.
    """
    queries = _unit_vectors(embeddings)
    within = gallery is None
    gallery, gallery_labels = (queries, labels) if within else (_unit_vectors(gallery), gallery_labels)
    labels, gallery_labels = labels.to(queries.device), gallery_labels.to(queries.device)
    ranks = torch.empty(len(queries), dtype=torch.long, device=queries.device)
    rows = max(1, BLOCK_ELEMENTS // max(1, len(gallery)))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        similarity = queries[block] @ gallery.T  # (b, M)
        positive = labels[block, None] == gallery_labels  # (b, M)
        if within:
            similarity.diagonal(offset=start).fill_(-torch.inf)
        best = similarity.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)  # (b, 1)
        above = ((similarity >= best) & ~positive).sum(dim=1)
        ranks[block] = torch.where(best[:, 0] == -torch.inf, -1, above)
    return ranks


def recall_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None) -> dict[int, float]:
    """Recall@K for each K: the share of queries whose best positive has fewer than K negatives above it.

    Arguments as for best_positive_rank. A query without a positive is a miss.
    """
    return recall_of_ranks(best_positive_rank(embeddings, labels, gallery, gallery_labels), ks)


def recall_of_ranks(ranks: torch.Tensor, ks) -> dict[int, float]:
    """Recall@K for each K from the ranks of best_positive_rank."""
    return {k: ((ranks >= 0) & (ranks < k)).double().mean().item() for k in ks}


def _unit_vectors(embeddings):
    if not torch.isfinite(embeddings).all():
        rows = torch.nonzero(~torch.isfinite(embeddings).all(dim=1))
        raise ValueError(
            f"{len(rows)} of {len(embeddings)} embeddings are not finite; the first is number {int(rows[0])}"
        )
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return embeddings / norms(embeddings)
