"""Exact image retrieval: the rank of each query's best positive, Recall@K, MAP@R, R-precision; cosine or Euclidean."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.distributed as dist

from proxy_anchor.collectives import ProcessGroup
from proxy_anchor.losses import whole_numbers
from proxy_anchor.tiles import Panel, Points, Tiled, origin_of
from proxy_anchor.vectors import finite

PANEL = 1 << 25  # similarities that are kept at a time, at least those with the positives of a tile's rows


def best_positive_rank(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    distance: str = "cosine",
    *,
    groups: torch.Tensor | None = None,
    gallery_groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Number of negatives that rank above each query's nearest positive: (N,), from 0; -1 where there is no positive.

    embeddings (N, D) and labels (N,) are the queries. Without a gallery (M, D) each query is compared with all others;
    it is left out of its own ranking by its index, so duplicate images count. distance: "cosine", or "euclidean", of
    the embeddings as they are. A negative exactly as near as the nearest positive ranks above it: a network that maps
    all images to one point finds nothing. groups (N,) and gallery_groups (M,), numbers: images of the query's own group
    (taken in one burst, say) are left out of its gallery. Raises ValueError for embeddings that are not finite, for no
    embeddings, for shapes that do not agree, and for another distance.

    The processes of a torch.distributed group each pass their own part of the queries and of the gallery, which may be
    empty; all get the ranks of all queries, in the order of the processes.
    """
    return search(
        embeddings, labels, gallery, gallery_labels, distance, groups=groups, gallery_groups=gallery_groups, group=group
    ).ranks


@dataclass
class Found:
    """What is found of each query (N,).

    ranks: of best_positive_rank; average_precisions, r_precisions: of map_at_r; tied: whether negatives tie with the
    best positive for the first place. By the published rule, a negative is above a positive only if it is more similar:
    queries that tie are misses at K = 1 here, and hits by that rule.
    """

    ranks: torch.Tensor
    tied: torch.Tensor
    average_precisions: torch.Tensor
    r_precisions: torch.Tensor


@torch.no_grad()
def search(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    distance: str = "cosine",
    *,
    groups: torch.Tensor | None = None,
    gallery_groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Found:
    """All that is measured of the queries, from one pass over their similarities to the gallery.

    Arguments, ties, errors and the group as for best_positive_rank. No process holds more than its part of the
    embeddings: the queries travel, a tile's rows at a time. What is found is the same for any number of processes.
    """
    processes, within = ProcessGroup(group), gallery is None
    embeddings, labels, gallery, gallery_labels = searched(embeddings, labels, gallery, gallery_labels, processes)
    groups, gallery_groups = groups_searched(groups, gallery_groups, labels, gallery_labels, within)
    origin = origin_of(gallery, distance, processes)
    queries = Tiled.of(Points.of(embeddings, origin), labels, groups)
    targets = queries if within else Tiled.of(Points.of(gallery, origin), gallery_labels, gallery_groups)
    owners = enumerate(queries.all_gather(processes))
    found = [of_queries(shard, owner, targets, within, processes) for owner, shard in owners]
    ranks, tied, *precisions = (torch.cat(each) for each in zip(*found))
    return Found(ranks.to(embeddings.device), tied.to(embeddings.device), *(each.cpu() for each in precisions))


def of_queries(queries: Tiled, owner: int, targets: Tiled, within: bool, processes: ProcessGroup) -> list[torch.Tensor]:
    """What Found has of the queries of one process.

    In the order of the labels, the positives of a tile's queries are in few tiles of the targets. These come first: so
    the negatives above the best positive are counted tile by tile, while each is in the cache. To MAP@R only as many of
    the nearest negatives matter as the query has positives.
    """
    size, device = targets.size, targets.labels.device
    begin = torch.searchsorted(targets.labels, queries.labels)  # (N,): where the query's label is among the targets'
    end = torch.searchsorted(targets.labels, queries.labels, right=True)
    numbers = processes.sum(end - begin) - int(within)  # of positives, in all processes
    # The only look from the host: for each tile of queries, where its labels are, and the most positives of a query.
    tiles = [queries.slice(i) for i in range(len(queries))]
    bounds = [torch.stack([begin[rows][0], end[rows][-1], numbers[rows].max()]) for rows in tiles]
    bounds = torch.stack(bounds).tolist() if bounds else []
    near = [range(first // size, -(-last // size)) if first < last else range(0) for first, last, _ in bounds]
    panel = Panel(targets, slots=min(max([1, PANEL // size**2, *map(len, near)]), max(1, len(targets))))
    ranks, tied = torch.zeros_like(begin), torch.zeros_like(begin, dtype=torch.bool)
    precisions = torch.zeros(2, len(begin), dtype=torch.float if device.type == "mps" else torch.double, device=device)

    for i, (rows, near_tiles, (_, _, most)) in enumerate(zip(tiles, near, bounds)):
        height, most = rows.stop - rows.start, max(1, most)
        block = queries.broadcast_tile(i, owner, processes)
        groups = None if queries.groups is None else queries.groups[rows]
        for slot, tile in enumerate(near_tiles):
            panel.fill(slot, tile, block, groups)

        # The positives of all processes, the nearest first: (b, most).
        column = begin[rows, None] + torch.arange(most + within, device=device)
        positive = column < end[rows, None]
        if within and owner == processes.rank:
            positive &= column != torch.arange(rows.start, rows.stop, device=device)[:, None]
        place = (column - near_tiles.start * size).clamp(0, panel.values.shape[1] - 1)
        positives = panel.values[:height].gather(1, place).masked_fill_(~positive, -torch.inf)
        positives = processes.concat_columns(positives).topk(most).values
        if near_tiles:  # from here on, the panel has negatives alone
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

        # A positive is among the R nearest if its place among positives and the negatives above it are R at most.
        count = (positives > -torch.inf).sum(dim=1, keepdim=True)  # (b, 1): R
        place = torch.arange(1, most + 1, device=device)
        passed = most - torch.searchsorted(negatives.flip(1), positives)
        found = (place <= count) & (passed + place <= count)
        precision = torch.where(found, place / (passed + place).to(precisions.dtype), 0)
        queries_of = queries.order[rows]
        ranks[queries_of] = torch.where(count[:, 0] > 0, above, -1)
        tied[queries_of] = (negatives[:, 0] == positives[:, 0]) & (count[:, 0] > 0)
        precisions[:, queries_of] = torch.stack([precision.sum(dim=1), found.sum(dim=1)]) / count[:, 0].clamp(min=1)
    return [ranks, tied, *precisions]


def recall_at_k(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    ks: Sequence[int],
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    distance: str = "cosine",
    *,
    groups: torch.Tensor | None = None,
    gallery_groups: torch.Tensor | None = None,
) -> dict[int, float]:
    """Recall@K for each K, in 0..1: the share of queries whose nearest positive has fewer than K negatives above it.

    Arguments and errors as for best_positive_rank, and ValueError for a K that is not 1, 2, ... A query without a
    positive is a miss.
    """
    ranks = best_positive_rank(
        embeddings, labels, gallery, gallery_labels, distance, groups=groups, gallery_groups=gallery_groups
    )
    return recall_of_ranks(ranks, ks)


def recall_of_ranks(ranks: torch.Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Recall@K for each K from the ranks (N,) of best_positive_rank. Raises ValueError for other K than 1, 2, ..."""
    if wrong := [k for k in ks if not isinstance(k, Integral) or k < 1]:
        raise ValueError(f"Recall@K is for whole numbers K from 1, found {wrong[0]}")
    return {k: ((ranks >= 0) & (ranks < k)).sum().item() / len(ranks) for k in ks}


def map_at_r(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    distance: str = "cosine",
    *,
    groups: torch.Tensor | None = None,
    gallery_groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """MAP@R and R-precision of each query, (2, N) in 0..1, as in "A Metric Learning Reality Check" (2020).

    R is the query's number of positives. R-precision is the share of positives among its R nearest neighbours; MAP@R
    the mean over these places of the precision up to the place where it holds a positive, and 0 otherwise. Arguments,
    ties and errors as for best_positive_rank; a query without a positive scores 0, and an image left out of its gallery
    is no positive. The processes of a group each pass their part, as there.
    """
    found = search(
        embeddings, labels, gallery, gallery_labels, distance, groups=groups, gallery_groups=gallery_groups, group=group
    )
    return torch.stack([found.average_precisions, found.r_precisions])


def searched(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None,
    gallery_labels: torch.Tensor | None,
    processes: ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries and the gallery, without one the queries again: on one device, in one type, with int64 labels.

    Raises ValueError for shapes that do not agree, for labels that are not whole numbers and, in all processes, for
    embeddings that are not finite and for no embeddings at all; those of a part may be none.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("A gallery and its labels come together: pass both, or neither to search within the queries")
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = embeddings, labels
    labels, gallery_labels = whole_numbers(labels), whole_numbers(gallery_labels, "gallery_labels")
    size = embeddings.shape[1] if embeddings.ndim == 2 else "D"
    for name, x, y in (("embeddings", embeddings, labels), ("gallery", gallery, gallery_labels)):
        if x.ndim != 2 or x.shape[1] != size or y.shape != x.shape[:1]:
            raise ValueError(
                f"Expected {name} (N, {size}) and labels (N,), found {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not processes.sum(torch.tensor(len(x), device=x.device)):
            raise ValueError(f"There is nothing to search: {name} {tuple(x.shape)}")
        finite(x, processes)
    dtype = torch.promote_types(embeddings.dtype, gallery.dtype)
    return embeddings.to(dtype), labels, gallery.to(embeddings.device, dtype), gallery_labels


def groups_searched(
    groups: torch.Tensor | None,
    gallery_groups: torch.Tensor | None,
    labels: torch.Tensor,
    gallery_labels: torch.Tensor,
    within: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The groups of queries and gallery as int64, if there are any: without a gallery, those of the queries again.

    Raises ValueError where only one side has groups, for other than whole numbers, and for shapes that do not agree.
    """
    if within and gallery_groups is None:
        gallery_groups = groups
    if (groups is None) != (gallery_groups is None) or (within and gallery_groups is not groups):
        raise ValueError("The groups of queries and gallery come together: pass gallery_groups only with a gallery")
    if groups is None or gallery_groups is None:
        return None, None
    groups, gallery_groups = whole_numbers(groups, "groups"), whole_numbers(gallery_groups, "gallery_groups")
    for name, found, y in (("groups", groups, labels), ("gallery_groups", gallery_groups, gallery_labels)):
        if found.shape != y.shape:
            raise ValueError(f"Expected {name} {tuple(y.shape)}, a number for each image, found {tuple(found.shape)}")
    return groups, gallery_groups
