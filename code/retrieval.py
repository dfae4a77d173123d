"""Exact image retrieval: the rank of each query's best positive, Recall@K, MAP@R, R-precision; cosine or Euclidean."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.distributed as dist
import torch.nn.functional as F

from proxy_anchor.losses import norms

# Rows and columns of the product at a time: on a CPU what its cache holds. All products have one shape, a multiple of
# the kernels' width: at the edges of others, matrix multiplication adds in another order, and equal pairs would differ.
TILE = {"cpu": 960, "cuda": 4096, "mps": 4096}
ALIGNMENT = 192  # of 64, and of 12, the width of a CPU's float64 kernels
DISTANCES = ("cosine", "euclidean")
BLOCK_ELEMENTS = 1 << 23  # similarities at a time where whole rows are needed


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

    Nothing is sorted: the best positive of each query is found, then the negatives above it are counted, tile by tile
    of the matrix of similarities. Within one set the matrix is symmetric and half of its tiles are computed. The
    processes of a torch.distributed group, which all pass the same, divide the tiles: the ranks are the same for any
    number of them.
    """
    return ranks_and_ties(
        embeddings, labels, gallery, gallery_labels, distance, groups=groups, gallery_groups=gallery_groups, group=group
    )[0]


@torch.no_grad()
def ranks_and_ties(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    distance: str = "cosine",
    *,
    groups: torch.Tensor | None = None,
    gallery_groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """best_positive_rank, and whether each query's best positive ties for the first place with negatives: (N,), bool.

    By the published rule, a negative is above a positive only if it is more similar: these queries are misses at K = 1
    here, and hits by that rule. Arguments and errors as for best_positive_rank.
    """
    within = gallery is None
    gallery, gallery_labels = searched(embeddings, labels, gallery, gallery_labels)
    gallery_groups = groups_searched(groups, gallery_groups, labels, gallery_labels, within)
    origin = origin_of(gallery, distance)
    queries = Tiled.of(Points.of(embeddings, origin), labels, groups)
    targets = queries if within else Tiled.of(Points.of(gallery, origin), gallery_labels, gallery_groups)
    tiles = [(i, j) for i in range(len(queries)) for j in range(i if within else 0, len(targets))]
    if group:
        tiles = tiles[dist.get_rank(group) :: dist.get_world_size(group)]
    # In the order of the labels, the positives are in few of the tiles.
    with_positives = {(i, j) for i, j in tiles if queries.shares_labels(i, targets, j)}
    mirrored = {(i, j) for i, j in tiles if within and i != j}  # these are tiles of the rows j too
    vectors = queries.points.vectors
    buffer = torch.empty(2, queries.size, queries.size, dtype=vectors.dtype, device=vectors.device)

    def similarities(i, j):
        """Tile (i, j), without its padding."""
        queries.tile(i).similarities(targets.tile(j), out=buffer[0])
        return buffer[0, : queries.length(i), : targets.length(j)]

    def same_label(i, j):
        return queries.labels[queries.slice(i), None] == targets.labels[targets.slice(j)]

    def same_group(i, j):
        return queries.groups[queries.slice(i), None] == targets.groups[targets.slice(j)]

    def positives(i, j):
        positive = same_label(i, j)
        if groups is not None:
            positive &= ~same_group(i, j)
        return positive.fill_diagonal_(False) if within and i == j else positive

    best = torch.full((len(labels),), -torch.inf, dtype=buffer.dtype, device=buffer.device)
    for i, j in sorted(with_positives):
        similarity = similarities(i, j).masked_fill_(~positives(i, j), -torch.inf)
        rows, columns = queries.slice(i), targets.slice(j)
        best[rows] = torch.maximum(best[rows], similarity.amax(dim=1))
        if (i, j) in mirrored:
            best[columns] = torch.maximum(best[columns], similarity.amax(dim=0))
    if group:
        dist.all_reduce(best, dist.ReduceOp.MAX, group)

    above = torch.zeros_like(best, dtype=torch.long)
    best_negative = torch.full_like(best, -torch.inf)
    for i, j in tiles:
        similarity = similarities(i, j)
        if (i, j) in with_positives:  # a query is not below itself or its positives
            similarity.masked_fill_(same_label(i, j), -torch.inf)
        if groups is not None:  # which may have images of any labels
            similarity.masked_fill_(same_group(i, j), -torch.inf)
        rows, columns = queries.slice(i), targets.slice(j)
        is_above = buffer[1, : similarity.shape[0], : similarity.shape[1]]  # 0 or 1; floats are added faster than bools
        above[rows] += torch.ge(similarity, best[rows, None], out=is_above).sum(dim=1).long()
        best_negative[rows] = torch.maximum(best_negative[rows], similarity.amax(dim=1))
        if (i, j) in mirrored:
            above[columns] += torch.ge(similarity, best[columns], out=is_above).sum(dim=0).long()
            best_negative[columns] = torch.maximum(best_negative[columns], similarity.amax(dim=0))
    if group:
        dist.all_reduce(above, group=group)
        dist.all_reduce(best_negative, dist.ReduceOp.MAX, group)

    without_positive = best == -torch.inf
    place = torch.argsort(queries.order)  # of each query among the sorted
    ranks, tied = torch.where(without_positive, -1, above)[place], ((best_negative == best) & ~without_positive)[place]
    return ranks.to(embeddings.device), tied.to(embeddings.device)


@dataclass
class Points:
    """Embeddings ready to compare: by their product, minus half of their squared lengths if the distance is Euclidean.

    x.y - (|x|^2 + |y|^2) / 2 = -|x - y|^2 / 2. To the last bit, it is the same for (x, y) and (y, x).
    """

    vectors: torch.Tensor  # (N, D)
    halves: torch.Tensor | None = None  # (N,)

    @classmethod
    def of(cls, embeddings: torch.Tensor, origin: torch.Tensor | None) -> "Points":
        """Embeddings (N, D) seen from the origin (D,), or, without one, their directions."""
        if origin is None:
            return cls(unit_vectors(embeddings))
        vectors = finite(embeddings).to(origin.device).double() - origin
        halves = vectors.square().sum(dim=1) / 2
        if not halves.isfinite().all():
            raise ValueError("The embeddings are too large to square: divide them by a constant")
        return cls(vectors, halves)

    def __getitem__(self, rows) -> "Points":
        return Points(self.vectors[rows], None if self.halves is None else self.halves[rows])

    def filled_up(self, multiple: int) -> "Points":
        """With zeros to a multiple of rows."""
        fill = -len(self.vectors) % multiple
        halves = None if self.halves is None else F.pad(self.halves, (0, fill))
        return Points(F.pad(self.vectors, (0, 0, 0, fill)), halves)

    def similarities(self, others: "Points", out: torch.Tensor | None = None) -> torch.Tensor:
        """(N, M): larger is nearer. Equal pairs are equal only in products of one shape."""
        products = torch.mm(self.vectors, others.vectors.T, out=out)
        if self.halves is None or others.halves is None:
            return products
        return products.sub_(self.halves[:, None] + others.halves)


def origin_of(gallery: torch.Tensor, distance: str) -> torch.Tensor | None:
    """The point (D,) from which to measure Euclidean distances, None for the cosine. ValueError for another distance.

    Small distances are differences of large squares. An origin inside the gallery keeps the squares small, and float64
    has digits enough for those of float32. Rounded to a few digits, it costs the embeddings none: on a grid, say, equal
    distances stay exactly equal.
    """
    if distance not in DISTANCES:
        raise ValueError(f"There is no distance '{distance}'; there are {', '.join(DISTANCES)}")
    if distance == "cosine":
        return None
    if gallery.device.type == "mps":
        gallery = gallery.cpu()  # MPS has no float64
    return gallery.mean(dim=0, dtype=torch.double).bfloat16().double()


@dataclass
class Tiled:
    """Points in the order of their labels, in tiles of equal size; zeros fill up the last tile."""

    points: Points  # tiles x size
    labels: torch.Tensor  # (N,), ascending
    order: torch.Tensor  # (N,): the index of each before sorting
    size: int
    ranges: list[tuple[int, int]]  # first and last label of each tile
    groups: torch.Tensor | None = None  # (N,)

    @classmethod
    def of(cls, points: Points, labels: torch.Tensor, groups: torch.Tensor | None = None) -> "Tiled":
        device = points.vectors.device
        size = TILE[device.type]
        labels, order = torch.sort(labels.to(device), stable=True)
        ends = [(start, min(start + size, len(labels)) - 1) for start in range(0, len(labels), size)]
        ranges = labels[torch.tensor(ends, device=device)].tolist()
        groups = None if groups is None else groups.to(device)[order]
        return cls(points[order].filled_up(size), labels, order, size, ranges, groups)

    def __len__(self):
        return len(self.ranges)

    def tile(self, tile):
        return self.points[tile * self.size : (tile + 1) * self.size]

    def slice(self, tile):
        return slice(tile * self.size, min((tile + 1) * self.size, len(self.labels)))

    def length(self, tile):
        return min(self.size, len(self.labels) - tile * self.size)

    def shares_labels(self, tile, other, other_tile):
        first, last = self.ranges[tile]
        other_first, other_last = other.ranges[other_tile]
        return first <= other_last and other_first <= last


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


@torch.no_grad()
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
    is no positive. The processes of a group divide the queries.
    """
    within = gallery is None
    gallery, gallery_labels = searched(embeddings, labels, gallery, gallery_labels)
    gallery_groups = groups_searched(groups, gallery_groups, labels, gallery_labels, within)
    origin = origin_of(gallery, distance)
    queries = Points.of(embeddings, origin)
    targets = queries if within else Points.of(gallery, origin)
    device = queries.vectors.device
    labels, target_labels = labels.to(device), gallery_labels.to(device)
    if groups is not None and gallery_groups is not None:
        groups, gallery_groups = groups.to(device), gallery_groups.to(device)
    most = int(torch.unique(target_labels, return_counts=True)[1].max())  # positives of a query, at most
    targets = targets.filled_up(ALIGNMENT)
    step = ALIGNMENT * max(1, BLOCK_ELEMENTS // (ALIGNMENT * len(targets.vectors)))
    starts = range(0, len(labels), step)
    scores = torch.zeros(2, len(labels), dtype=torch.double)
    for start in starts[dist.get_rank(group) :: dist.get_world_size(group)] if group else starts:
        own_labels = labels[start : start + step]
        block = queries[start : start + step].filled_up(step)
        similarity = block.similarities(targets)[: len(own_labels), : len(target_labels)]  # (b, M)
        not_negative = own_labels[:, None] == target_labels
        positive = not_negative.clone()
        if groups is not None:
            same_group = groups[start : start + step, None] == gallery_groups
            positive &= ~same_group
            not_negative |= same_group
        if within:
            positive.diagonal(offset=start).fill_(False)
        count = positive.sum(dim=1, keepdim=True).cpu()  # (b, 1): R
        # The rank of every positive: how many negatives are above the j-th best, and j.
        best = similarity.masked_fill(~positive, -torch.inf).topk(most, dim=1).values.flip(1)  # (b, most), ascending
        negative = similarity.masked_fill(not_negative, -torch.inf)
        passed = torch.searchsorted(best, negative, right=True)  # (b, M): positives that the negative is not below
        negatives = torch.zeros(len(best), most + 1, dtype=torch.long, device=best.device)
        negatives.scatter_add_(1, passed, torch.ones_like(passed))
        above = negatives.flip(1).cumsum(1)[:, :most].cpu()  # (b, most): above the best positive, the second, ...
        place = torch.arange(1, most + 1)
        found = (place <= count) & (above + place <= count)  # among the R nearest
        precision = torch.where(found, place / (above + place).double(), 0)
        scores[:, start : start + step] = torch.stack([precision.sum(dim=1), found.sum(dim=1)])
        scores[:, start : start + step] /= count[:, 0].clamp(min=1)
    if group:
        scores = scores.to(device)
        dist.all_reduce(scores, group=group)
    return scores.cpu()


def searched(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None,
    gallery_labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gallery, where the queries are, and its labels: without one, the queries themselves.

    Raises ValueError for shapes that do not agree and for no embeddings at all.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("A gallery and its labels come together: pass both, or neither to search within the queries")
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = embeddings, labels
    size = embeddings.shape[1] if embeddings.ndim == 2 else "D"
    for name, x, y in (("embeddings", embeddings, labels), ("gallery", gallery, gallery_labels)):
        if x.ndim != 2 or x.shape[1] != size or y.shape != x.shape[:1]:
            raise ValueError(
                f"Expected {name} (N, {size}) and labels (N,), found {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not len(x):
            raise ValueError(f"There is nothing to search: {name} {tuple(x.shape)}")
    return gallery.to(embeddings.device), gallery_labels


def groups_searched(
    groups: torch.Tensor | None,
    gallery_groups: torch.Tensor | None,
    labels: torch.Tensor,
    gallery_labels: torch.Tensor,
    within: bool,
) -> torch.Tensor | None:
    """The groups of the gallery, if there are any: those of the queries where these are searched within themselves.

    Raises ValueError where only one side has groups, and for shapes that do not agree.
    """
    if within and gallery_groups is None:
        gallery_groups = groups
    if (groups is None) != (gallery_groups is None) or (within and gallery_groups is not groups):
        raise ValueError("The groups of queries and gallery come together: pass gallery_groups only with a gallery")
    for name, found, y in (("groups", groups, labels), ("gallery_groups", gallery_groups, gallery_labels)):
        if found is not None and found.shape != y.shape:
            raise ValueError(f"Expected {name} {tuple(y.shape)}, a number for each image, found {tuple(found.shape)}")
    return gallery_groups


def finite(embeddings: torch.Tensor) -> torch.Tensor:
    """The embeddings (N, D). Raises ValueError if any is not finite."""
    finite_rows = torch.isfinite(embeddings).all(dim=1)
    if not finite_rows.all():
        rows = torch.nonzero(~finite_rows)
        raise ValueError(
            f"{len(rows)} of {len(embeddings)} embeddings are not finite; the first is number {int(rows[0])}"
        )
    return embeddings


def comparable(embeddings: torch.Tensor, distance: str) -> torch.Tensor:
    """Rows (N, D) as a distance of DISTANCES sees them, in float32 or better: of unit length, or as they are.

    Raises ValueError if any is not finite.
    """
    if distance == "cosine":
        return unit_vectors(embeddings)
    return finite(embeddings).to(torch.promote_types(embeddings.dtype, torch.float32))


def unit_vectors(embeddings: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) divided by their length, in float32 or better. Raises ValueError if any is not finite."""
    embeddings = finite(embeddings).to(torch.promote_types(embeddings.dtype, torch.float32))
    return embeddings / norms(embeddings)
