"""Exact image retrieval: the rank of each query's best positive, Recall@K, MAP@R, R-precision; cosine or Euclidean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from proxy_anchor.collectives import ALONE, Processes
from proxy_anchor.tiles import Panel, Tiled, origin_of
from proxy_anchor.vectors import Embeddings, as_tensor, check_finite, whole_numbers

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    Array = torch.Tensor | ArrayLike

PANEL = 1 << 25  # similarities in memory at a time; never fewer than those of one tile's queries with their positives


def best_positive_rank(
    embeddings: Array,
    labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    distance: str = "cosine",
    *,
    groups: Array | None = None,
    gallery_groups: Array | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Number of negatives that rank above each query's nearest positive: (N,), from 0; -1 where there is no positive.

    embeddings (N, D) and labels (N,) are the queries: tensors, numpy arrays or lists, with labels of any integer type.
    Numbers in a list are taken as float32, those of a tensor or an array in their own precision, float32 or better.
    Without a gallery (M, D), each query is compared with all others; it is left out of its own ranking by its index, so
    duplicate images count. distance: "cosine", or "euclidean" for the embeddings as they are. A negative exactly as
    near as the nearest positive ranks above it: a network that maps all images to one point finds nothing. groups (N,)
    and gallery_groups (M,), whole numbers: images of the query's own group (one burst of photos, say) are left out of
    its gallery. Raises ValueError for embeddings that are not finite, for no embeddings, for labels that are no whole
    numbers, for shapes that do not agree and for any other distance, and TypeError for what is no array of numbers.

    The processes of a torch.distributed group each pass their share of the queries and of the gallery, which may be
    empty; all get the ranks of all queries, in the order of the processes.
    """
    queries, others = from_arrays(embeddings, labels, gallery, gallery_labels, groups, gallery_groups)
    return search(queries, others, distance, Processes(group)).ranks


@dataclass
class QueryResults:
    """The measurements of each query (N,).

    ranks: see best_positive_rank; average_precisions, r_precisions: see map_at_r; tied: whether a negative ties with
    the best positive for first place. By the published rule a negative ranks above a positive only if it is more
    similar, so tied queries are misses at K = 1 here, and hits by that rule.
    """

    ranks: torch.Tensor
    tied: torch.Tensor
    average_precisions: torch.Tensor
    r_precisions: torch.Tensor


@torch.no_grad()
def search(
    queries: Embeddings, gallery: Embeddings | None = None, distance: str = "cosine", processes: Processes = ALONE
) -> QueryResults:
    """Measure the queries in one pass over their similarities to the gallery or, without one, to each other.

    Ties, errors and processes as for best_positive_rank. No process holds more than its share of the embeddings: the
    queries travel, one tile at a time. The results are the same for any number of processes.
    """
    within, device = gallery is None, queries.vectors.device
    queries, gallery = validate_gallery(queries, gallery, processes)
    origin = origin_of(gallery.vectors, distance, processes)
    tiled = Tiled.from_embeddings(queries, origin)
    targets = tiled if within else Tiled.from_embeddings(gallery, origin)
    results = [
        search_shard(shard, owner, targets, within, processes)
        for owner, shard in enumerate(tiled.per_process(processes))
    ]
    ranks, tied, average_precisions, r_precisions = (torch.cat(columns) for columns in zip(*results))
    return QueryResults(ranks.to(device), tied.to(device), average_precisions.cpu(), r_precisions.cpu())


def search_shard(queries: Tiled, owner: int, targets: Tiled, within: bool, processes: Processes) -> list[torch.Tensor]:
    """The columns of QueryResults for the queries of one process, the owner.

    Targets are sorted by label, so the positives of a tile of queries lie in a few tiles. These come first; then the
    negatives above the best positive are counted tile by tile, while each tile is in the cache. MAP@R depends on no
    more of the nearest negatives than the query has positives.
    """
    size, device = targets.size, targets.labels.device
    begin = torch.searchsorted(targets.labels, queries.labels)  # (N,): where the query's class begins and ends
    end = torch.searchsorted(targets.labels, queries.labels, right=True)
    positives_of = processes.sum(end - begin) - int(within)  # (N,), over all processes
    # The only host sync: where the labels of each tile of queries lie, and the most positives that a query has.
    tile_rows = [queries.rows(i) for i in range(len(queries))]
    bounds = [torch.stack([begin[rows][0], end[rows][-1], positives_of[rows].max()]) for rows in tile_rows]
    bounds = torch.stack(bounds).tolist() if bounds else []
    near = [range(first // size, -(-last // size)) if first < last else range(0) for first, last, _ in bounds]
    panel = Panel(targets, slots=min(max([1, PANEL // size**2, *map(len, near)]), max(1, len(targets))))
    ranks, tied = torch.zeros_like(begin), torch.zeros_like(begin, dtype=torch.bool)
    precisions = torch.zeros(2, len(begin), dtype=torch.float if device.type == "mps" else torch.double, device=device)

    for i, (rows, near_tiles, (_, _, most)) in enumerate(zip(tile_rows, near, bounds)):
        height, most = rows.stop - rows.start, max(1, most)
        block = queries.broadcast(i, owner, processes)
        groups = None if queries.groups is None else queries.groups[rows]
        for slot, tile in enumerate(near_tiles):
            panel.fill(slot, tile, block, groups)

        # The positives in all processes, the nearest first: (b, most).
        column = begin[rows, None] + torch.arange(most + within, device=device)
        positive = column < end[rows, None]
        if within and owner == processes.rank:
            positive &= column != torch.arange(rows.start, rows.stop, device=device)[:, None]
        index = (column - near_tiles.start * size).clamp(0, panel.values.shape[1] - 1)
        positives = panel.values[:height].gather(1, index).masked_fill_(~positive, -torch.inf)
        positives = processes.concat_columns(positives).topk(most).values
        if near_tiles:  # from here on, the panel holds only negatives
            labels = targets.labels[near_tiles.start * size : near_tiles.stop * size]
            panel.values[:height, : len(labels)].masked_fill_(queries.labels[rows, None] == labels, -torch.inf)

        # The negatives: how many are above the best positive, and the nearest ones.
        above, negatives = torch.zeros_like(begin[rows]), torch.full_like(positives, -torch.inf)
        order = [*near_tiles, *(tile for tile in range(len(targets)) if tile not in near_tiles)]
        for start in range(0, len(order), panel.slots):
            batch = order[start : start + panel.slots]
            for slot, tile in enumerate(batch):
                if start + slot >= len(near_tiles):
                    panel.fill(slot, tile, block, groups)
                above += panel.above(slot, positives[:, 0])
            nearest = panel.nearest(len(batch), height, most)
            negatives = torch.cat([negatives, nearest], dim=1).topk(most).values
        above, negatives = processes.sum(above), processes.concat_columns(negatives).topk(most).values

        # A positive is among the R nearest if its rank among the positives plus the negatives above it is at most R.
        count = (positives > -torch.inf).sum(dim=1, keepdim=True)  # (b, 1): R
        rank = torch.arange(1, most + 1, device=device)
        passed = most - torch.searchsorted(negatives.flip(1), positives)
        hit = (rank <= count) & (passed + rank <= count)
        precision = torch.where(hit, rank / (passed + rank).to(precisions.dtype), 0)
        indices = queries.order[rows]
        ranks[indices] = torch.where(count[:, 0] > 0, above, -1)
        tied[indices] = (negatives[:, 0] == positives[:, 0]) & (count[:, 0] > 0)
        precisions[:, indices] = torch.stack([precision.sum(dim=1), hit.sum(dim=1)]) / count[:, 0].clamp(min=1)
    return [ranks, tied, *precisions]


def recall_at_k(
    embeddings: Array,
    labels: Array,
    ks: Sequence[int],
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    distance: str = "cosine",
    *,
    groups: Array | None = None,
    gallery_groups: Array | None = None,
) -> dict[int, float]:
    """Recall@K for each K, in 0..1: the share of queries whose nearest positive has fewer than K negatives above it.

    Arguments and errors as for best_positive_rank, and ValueError for a K that is not 1, 2, ... A query without a
    positive is a miss.
    """
    queries, others = from_arrays(embeddings, labels, gallery, gallery_labels, groups, gallery_groups)
    return recall_of_ranks(search(queries, others, distance).ranks, ks)


def recall_of_ranks(ranks: torch.Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Recall@K for each K from the ranks (N,) of best_positive_rank. Raises ValueError for a K that is not 1, 2, ..."""
    if wrong := [k for k in ks if not isinstance(k, Integral) or k < 1]:
        raise ValueError(f"Recall@K is for whole numbers K from 1, found {wrong[0]}")
    return {k: ((ranks >= 0) & (ranks < k)).sum().item() / len(ranks) for k in ks}


def map_at_r(
    embeddings: Array,
    labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    distance: str = "cosine",
    *,
    groups: Array | None = None,
    gallery_groups: Array | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """MAP@R and R-precision of each query, (2, N) in 0..1, as in "A Metric Learning Reality Check" (2020).

    R is the query's number of positives. R-precision is the share of positives among its R nearest neighbours. MAP@R is
    the mean over these R ranks of the precision up to the rank where it holds a positive, and of 0 where it does not.
    Arguments, ties, errors and the group as for best_positive_rank; a query without a positive scores 0, and an image
    left out of the query's gallery is not one of its positives.
    """
    queries, others = from_arrays(embeddings, labels, gallery, gallery_labels, groups, gallery_groups)
    results = search(queries, others, distance, Processes(group))
    return torch.stack([results.average_precisions, results.r_precisions])


def from_arrays(
    embeddings: Array,
    labels: Array,
    gallery: Array | None,
    gallery_labels: Array | None,
    groups: Array | None,
    gallery_groups: Array | None,
) -> tuple[Embeddings, Embeddings | None]:
    """Queries and gallery as Embeddings. Raises ValueError for a gallery without labels, or its groups without it."""
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("A gallery and its labels come together: pass both, or neither to search within the queries")
    queries = _embeddings(embeddings, labels, groups)
    if gallery is None or gallery_labels is None:
        if gallery_groups is not None:
            raise ValueError("There is no gallery for these groups: pass gallery_groups only with a gallery")
        return queries, None
    return queries, _embeddings(gallery, gallery_labels, gallery_groups, "gallery")


def _embeddings(vectors: Array, labels: Array, groups: Array | None, side: str = "") -> Embeddings:
    prefix = f"{side}_" if side else ""
    return Embeddings(
        as_tensor(vectors, side or "embeddings"),
        as_tensor(labels, f"{prefix}labels"),
        None if groups is None else as_tensor(groups, f"{prefix}groups"),
    )


def validate_gallery(
    queries: Embeddings, gallery: Embeddings | None, processes: Processes
) -> tuple[Embeddings, Embeddings]:
    """Queries and gallery on one device and in one type; without a gallery, the queries twice. See `validate`.

    Raises ValueError where they differ in dimensions, or where one has groups and the other none.
    """
    size = queries.vectors.shape[1] if queries.vectors.ndim == 2 else None
    queries = validate(queries, size, processes)
    if gallery is None:
        return queries, queries
    gallery = validate(gallery, size, processes, "gallery")
    if (queries.groups is None) != (gallery.groups is None):
        raise ValueError("The groups of queries and gallery come together: pass both, or neither")
    dtype = torch.promote_types(queries.vectors.dtype, gallery.vectors.dtype)
    gallery = replace(gallery, vectors=gallery.vectors.to(queries.vectors.device, dtype))
    return replace(queries, vectors=queries.vectors.to(dtype)), gallery


def validate(embeddings: Embeddings, size: int | None, processes: Processes, side: str = "") -> Embeddings:
    """The embeddings with labels and groups as int64. side: "gallery", or "" for the queries, in messages.

    Raises ValueError for vectors that are not (N, size), for labels or groups that are not N whole numbers and, in all
    processes, for vectors that are not finite and for none at all; a single process may have none.
    """
    vectors, prefix, name = embeddings.vectors, f"{side}_" if side else "", side or "embeddings"
    labels = whole_numbers(embeddings.labels, f"{prefix}labels")
    if vectors.ndim != 2 or vectors.shape[1] != size or labels.shape != vectors.shape[:1]:
        raise ValueError(
            f"Expected {name} (N, {size or 'D'}) and labels (N,), found {tuple(vectors.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not processes.sum(torch.tensor(len(vectors), device=vectors.device)):
        raise ValueError(f"There is nothing to search: {name} {tuple(vectors.shape)}")
    check_finite(torch.cat(processes.all_gather(torch.isfinite(vectors).all(dim=1))))
    groups = embeddings.groups
    if groups is not None:
        groups = whole_numbers(groups, f"{prefix}groups")
        if groups.shape != labels.shape:
            raise ValueError(
                f"Expected {prefix}groups {tuple(labels.shape)}, a number for each image, found {tuple(groups.shape)}"
            )
    return Embeddings(vectors, labels, groups)
