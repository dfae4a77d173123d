"""Embeddings prepared for comparison, and their similarities in tiles of equal size."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from proxy_anchor.collectives import ALONE, Processes
from proxy_anchor.spec import DISTANCES
from proxy_anchor.vectors import Embeddings, finite, unit_vectors

# Rows and columns of each product, which fit the cache of a CPU. All products have the same shape, a multiple of the
# kernels' width: at the edges of other shapes, sums have another order, and equal pairs would get different values.
TILE = {"cpu": 960, "cuda": 4096, "mps": 4096}
CLUSTER = 32  # columns of a tile that share a maximum; a power of two that divides all tile sizes


@dataclass
class Points:
    """Vectors prepared for comparison by products; for Euclidean distances, with half of their squared lengths.

    x.y - (|x|^2 + |y|^2) / 2 = -|x - y|^2 / 2, bit for bit the same for (x, y) and (y, x).
    """

    vectors: torch.Tensor  # (N, D)
    halves: torch.Tensor | None = None  # (N,)

    @classmethod
    def from_vectors(cls, vectors: torch.Tensor, origin: torch.Tensor | None) -> "Points":
        """Vectors (N, D) relative to the origin (D,); without an origin, unit vectors.

        Raises ValueError for Euclidean vectors whose squares overflow.
        """
        if origin is None:
            return cls(unit_vectors(vectors))
        vectors = finite(vectors).to(origin.device).double() - origin
        halves = vectors.square().sum(dim=1) / 2
        if not halves.isfinite().all():
            raise ValueError("The embeddings are too large to square: divide them by a constant")
        return cls(vectors, halves)

    def __getitem__(self, rows) -> "Points":
        return Points(self.vectors[rows], None if self.halves is None else self.halves[rows])

    def broadcast(self, processes: Processes, owner: int) -> "Points":
        """Copy the owner's points to all processes, overwriting their own."""
        halves = None if self.halves is None else processes.broadcast(self.halves, owner)
        return Points(processes.broadcast(self.vectors, owner), halves)

    def padded(self, multiple: int) -> "Points":
        """The points followed by rows of zeros, up to a positive multiple of rows."""
        fill = -len(self.vectors) % multiple if len(self.vectors) else multiple
        halves = None if self.halves is None else F.pad(self.halves, (0, fill))
        return Points(F.pad(self.vectors, (0, 0, 0, fill)), halves)

    def similarities(self, others: "Points", out: torch.Tensor | None = None) -> torch.Tensor:
        """Similarities (N, M): larger is nearer. Equal pairs have equal values only in products of the same shape."""
        products = torch.mm(self.vectors, others.vectors.T, out=out)
        if self.halves is None or others.halves is None:
            return products
        return products.sub_(self.halves[:, None] + others.halves)


def origin_of(gallery: torch.Tensor, distance: str, processes: Processes = ALONE) -> torch.Tensor | None:
    """The common origin (D,) of all processes for Euclidean distances; None for the cosine.

    Small distances are differences of large squares. An origin inside the gallery keeps the squares small, and float64
    has enough digits for vectors of float32. The origin is rounded to a few digits, so subtracting it is exact and
    equal distances stay exactly equal. Raises ValueError for an unknown distance.
    """
    if distance not in DISTANCES:
        raise ValueError(f"There is no distance '{distance}'; there are {', '.join(DISTANCES)}")
    if distance == "cosine":
        return None
    if gallery.device.type == "mps":
        gallery = gallery.cpu()  # MPS has no float64
    zero = gallery.new_zeros((), dtype=torch.double)
    largest = float(processes.max(finite(gallery).abs().max().double() if len(gallery) else zero))
    # The sum of whole numbers is exact, so it does not depend on the number of processes.
    unit = 2.0 ** (math.ceil(math.log2(largest or 1)) - 20)
    total = processes.sum((gallery.double() / unit).round().sum(dim=0))
    count = processes.sum(torch.tensor(len(gallery), device=total.device))
    return (total * unit / count).bfloat16().double()


@dataclass
class Tiled:
    """Points sorted by label, in tiles of equal size; zeros fill up the last tile."""

    points: Points  # tiles * size rows
    labels: torch.Tensor  # (N,), ascending
    order: torch.Tensor  # (N,), indices before sorting
    size: int
    groups: torch.Tensor | None = None  # (N,)

    def __post_init__(self):
        last = torch.arange(self.size, len(self.labels) + self.size, self.size).clamp(max=len(self.labels)) - 1
        ends = torch.stack([self.labels[:: self.size], self.labels[last.to(self.labels.device)]], dim=1)
        self.ranges = ends.tolist()  # the first and the last label of each tile

    @classmethod
    def from_embeddings(cls, embeddings: Embeddings, origin: torch.Tensor | None) -> "Tiled":
        """Tiles of embeddings relative to the origin, see origin_of."""
        points = Points.from_vectors(embeddings.vectors, origin)
        device = points.vectors.device
        size = TILE[device.type]
        labels, order = torch.sort(embeddings.labels.to(device), stable=True)
        groups = None if embeddings.groups is None else embeddings.groups.to(device)[order]
        return cls(points[order].padded(size), labels, order, size, groups)

    def __len__(self):
        return len(self.ranges)

    def tile(self, tile) -> Points:
        return self.points[tile * self.size : (tile + 1) * self.size]

    def rows(self, tile) -> slice:
        """The rows of a tile, without padding."""
        return slice(tile * self.size, min((tile + 1) * self.size, len(self.labels)))

    def length(self, tile):
        return min(self.size, len(self.labels) - tile * self.size)

    def per_process(self, processes: Processes) -> list["Tiled"]:
        """The tiles of all processes; those of other processes have only a buffer for one tile of points."""
        labels, orders = processes.all_gather(self.labels), processes.all_gather(self.order)
        groups = [None] * processes.size if self.groups is None else processes.all_gather(self.groups)
        buffer = self.points[:0].padded(self.size)
        return [
            self if owner == processes.rank else Tiled(buffer, labels[owner], orders[owner], self.size, groups[owner])
            for owner in range(processes.size)
        ]

    def broadcast(self, tile, owner: int, processes: Processes) -> Points:
        """Send a tile of the owner to all processes."""
        return self.tile(tile if owner == processes.rank else 0).broadcast(processes, owner)

    def shares_labels(self, tile, other, other_tile):
        first, last = self.ranges[tile]
        other_first, other_last = other.ranges[other_tile]
        return first <= other_last and other_first <= last


class Panel:
    """The similarities of a tile of queries to tiles of targets, one per slot; -inf for padding and excluded pairs."""

    def __init__(self, targets: Tiled, slots: int):
        self.targets, self.size, self.slots = targets, targets.size, slots
        vectors = targets.points.vectors
        self.values = vectors.new_empty(self.size, slots * self.size)
        self.maxima = vectors.new_empty(self.size, slots * self.size // CLUSTER)
        self.buffer = vectors.new_empty(self.size, self.size)

    def fill(self, slot: int, tile: int, queries: Points, groups: torch.Tensor | None) -> None:
        """Compare a tile of queries with groups (b,) to a tile of the targets; pairs within a group are excluded."""
        values, length = self.values[:, slot * self.size : (slot + 1) * self.size], self.targets.length(tile)
        queries.similarities(self.targets.tile(tile), out=values)
        values[:, length:] = -torch.inf
        if groups is not None and self.targets.groups is not None:
            same = groups[:, None] == self.targets.groups[self.targets.rows(tile)]
            values[: len(groups), :length].masked_fill_(same, -torch.inf)

    def above(self, slot: int, limits: torch.Tensor) -> torch.Tensor:
        """Count the values of a slot that reach their row's limit (b,): (b,). Stores cluster maxima for `nearest`."""
        values = self.values[: len(limits), slot * self.size : (slot + 1) * self.size]
        step = self.size // CLUSTER
        maxima = self.maxima[: len(limits), slot * step : (slot + 1) * step]
        halves = values
        while halves.shape[1] > step:  # faster than amax over strided columns
            halves = torch.maximum(*halves.chunk(2, dim=1))
        maxima.copy_(halves)
        # As floats, 0 and 1 are summed faster than as bools.
        return torch.ge(values, limits[:, None], out=self.buffer[: len(limits)]).sum(dim=1).long()

    def nearest(self, slots: int, rows: int, count: int) -> torch.Tensor:
        """Candidates that include the `count` largest values of each row in the first slots; call `above` first.

        The largest values are in the clusters with the largest maxima, so rows need not be sorted.
        """
        values, step = self.values[:rows, : slots * self.size], self.size // CLUSTER
        if count * CLUSTER >= values.shape[1]:
            return values
        clusters = self.maxima[:rows, : slots * step].topk(count, sorted=False).indices
        first = clusters // step * self.size + clusters % step  # a cluster is every step-th column of its tile
        columns = first[:, :, None] + step * torch.arange(CLUSTER, device=values.device)
        return values.gather(1, columns.flatten(1))
