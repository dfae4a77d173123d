"""Counts of all pairs of images by similarity, and the counts of bootstrap samples of the classes.

The similarity is the cosine, or minus the Euclidean distance: larger is nearer.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from proxy_anchor.collectives import ALONE, Processes
from proxy_anchor.retrieval import validate_gallery
from proxy_anchor.tiles import Points, Tiled, origin_of
from proxy_anchor.vectors import Embeddings

RESOLUTION = 1 << 16  # bins in the range of the cosine
STEPS, MANTISSA = 1 << 14, 52 - 14  # distances: bins per power of two, and dropped bits of the mantissa
OCTAVES = 26  # powers of two from the largest distance down to rounding errors: half the bits of float64
CELLS = 1 << 23  # counts at a time in the bootstrap


@dataclass
class Scale:
    """Bins of similarities. Thresholds are lower edges of bins; the last bin begins at the largest similarity.

    Bins of cosines have equal widths. Bins of distances divide each power of two into STEPS, so all thresholds have the
    same relative precision.
    """

    edges: np.ndarray  # ascending; the first one accepts all pairs, the last one none
    farthest: int | None = None  # for distances: the step of the first edge, see steps

    @classmethod
    def for_cosines(cls) -> "Scale":
        return cls(-1 + 2 / RESOLUTION * np.arange(RESOLUTION + 2))

    @classmethod
    def for_distances(cls, farthest: float) -> "Scale":
        """Bins from the largest distance down by 2**-OCTAVES; shorter distances are rounding errors and count as 0."""
        last = int(steps(torch.tensor(farthest or 1, dtype=torch.double)))
        numbers = torch.arange(last, last - OCTAVES * STEPS, -1) << MANTISSA
        edges = -numbers.view(torch.double).numpy()
        return cls(np.concatenate([edges, [0, -edges[-1]]]), last)

    @classmethod
    def for_points(cls, queries: Points, targets: Points, processes: Processes) -> "Scale":
        halves = [processes.max(p.halves.max()) for p in (queries, targets) if p.halves is not None]  # |x|^2 / 2
        return cls.for_distances(sum(math.sqrt(2 * half) for half in halves)) if halves else cls.for_cosines()

    def __len__(self):
        return len(self.edges) - 1

    def edge_from(self, threshold: float) -> int:
        """The index of the first edge at or above the threshold."""
        return min(int(np.searchsorted(self.edges, threshold)), len(self))

    def bins(self, similarities: torch.Tensor) -> torch.Tensor:
        """The index of each similarity's bin; overwrites the similarities."""
        if self.farthest is None:
            numbers = similarities.add_(1).div_(2 / RESOLUTION).long()
        else:
            numbers = steps(similarities.abs_()).neg_().add_(self.farthest)
        return numbers.clamp_(0, len(self) - 1)


def steps(distances: torch.Tensor) -> torch.Tensor:
    """Distances (float64, not negative) as whole numbers with STEPS per power of two, rounded up.

    The bit patterns of floating-point numbers are ordered like the numbers, so the trailing bits can be dropped.
    """
    return -(-distances.view(torch.long) >> MANTISSA)


@dataclass
class Pairs:
    """All pairs of queries and targets, in tiles of their similarity matrix: each pair once, no image with itself.

    Images of the same group are not paired. Only one tile is in memory at a time. With several processes, each has a
    shard of the queries and of the targets, and the queries are broadcast, as in retrieval.search.
    """

    queries: Tiled
    targets: Tiled
    within: bool
    scale: Scale
    classes: torch.Tensor  # (C,), ascending
    processes: Processes

    @classmethod
    def from_embeddings(
        cls,
        queries: Embeddings,
        gallery: Embeddings | None = None,
        distance: str = "cosine",
        processes: Processes = ALONE,
    ) -> "Pairs":
        """Pairs of the queries with the gallery; without a gallery, among the queries."""
        within = gallery is None
        queries, gallery = validate_gallery(queries, gallery, processes)
        origin = origin_of(gallery.vectors, distance, processes)
        tiled = Tiled.from_embeddings(queries, origin)
        targets = tiled if within else Tiled.from_embeddings(gallery, origin)
        classes = torch.unique(torch.cat([*processes.all_gather(tiled.labels), *processes.all_gather(targets.labels)]))
        scale = Scale.for_points(tiled.points, targets.points, processes)
        return cls(tiled, targets, within, scale, classes, processes)

    def tiles(self):
        """Yield (row labels, column labels, mixed, bins) of each tile.

        Different-class pairs are in the first len(scale) bins, same-class pairs in the next len(scale), and excluded
        pairs in the last one. mixed: whether the tile may have other than different-class pairs.
        """
        targets, no_pair = self.targets, 2 * len(self.scale)
        for owner, queries in enumerate(self.queries.per_process(self.processes)):
            symmetric = self.within and owner == self.processes.rank
            for i in range(len(queries)):
                block, rows = queries.broadcast(i, owner, self.processes), queries.rows(i)
                for j in range(i if symmetric else 0, len(targets)) if self.compares(owner) else ():
                    columns = targets.rows(j)
                    bins = self.scale.bins(self.similarities(block, queries.length(i), j))
                    if mixed := queries.shares_labels(i, targets, j):
                        bins += (queries.labels[rows, None] == targets.labels[columns]) * len(self.scale)
                    if queries.groups is not None and targets.groups is not None:
                        bins.masked_fill_(queries.groups[rows, None] == targets.groups[columns], no_pair)
                        mixed = True
                    if symmetric and i == j:
                        bins.masked_fill_(torch.ones_like(bins, dtype=torch.bool).tril_(), no_pair)
                    yield queries.labels[rows], targets.labels[columns], mixed, bins

    def nearest_of_classes(self):
        """Yield (labels (b,), similarities (b, C)) of each tile of queries: of the nearest target of each class.

        -inf where a class has none. All processes get the tiles of all queries.
        """
        targets = self.targets
        column_class = torch.searchsorted(self.classes, targets.labels)
        for owner, queries in enumerate(self.queries.per_process(self.processes)):
            for i in range(len(queries)):
                block, rows, height = queries.broadcast(i, owner, self.processes), queries.rows(i), queries.length(i)
                nearest = block.vectors.new_full((height, len(self.classes)), -torch.inf)
                for j in range(len(targets)):
                    columns, similarities = targets.rows(j), self.similarities(block, height, j)
                    if queries.groups is not None and targets.groups is not None:
                        same = queries.groups[rows, None] == targets.groups[columns]
                        similarities.masked_fill_(same, -torch.inf)
                    if self.within and owner == self.processes.rank and i == j:
                        similarities.fill_diagonal_(-torch.inf)
                    nearest.scatter_reduce_(1, column_class[columns].expand(height, -1), similarities, "amax")
                yield queries.labels[rows], self.processes.max(nearest)

    def similarities(self, block: Points, height: int, tile: int) -> torch.Tensor:
        """Of the first rows of a block to a tile of the targets: cosines, or minus the distances."""
        similarities = block.similarities(self.targets.tile(tile))[:height, : self.targets.length(tile)]
        if block.halves is not None:  # similarities are -d^2 / 2
            similarities = similarities.clamp_(max=0).mul_(-2).sqrt_().neg_()
        return similarities

    def compares(self, owner: int) -> bool:
        """Whether this process compares the owner's queries; among queries, only one of two processes does."""
        offset, count = (self.processes.rank - owner) % self.processes.size, self.processes.size
        return not self.within or 2 * offset < count or (2 * offset == count and owner < self.processes.rank)

    def histograms(self) -> tuple[np.ndarray, np.ndarray]:
        """(same-class pairs, different-class pairs) in each bin of the scale."""
        total = torch.zeros(2 * len(self.scale) + 1, dtype=torch.long)
        for *_, bins in self.tiles():
            total += torch.bincount(bins.flatten(), minlength=len(total)).cpu()
        other, same = self._sum_over_processes(total)[:-1].view(2, -1).numpy()
        return same, other

    def by_class(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(same-class pairs, different-class pairs) of each class between edges: (C, K - 1) each.

        edges (K,): as for resampled, but may repeat. A different-class pair is one of its query's class and, without a
        gallery, of the other's too.
        """
        cells = len(edges) - 1
        cell_of_bin = torch.from_numpy(np.searchsorted(edges, np.arange(len(self.scale)), side="right") - 1)
        cell_of = torch.cat([cell_of_bin, cell_of_bin + cells, torch.tensor([2 * cells])]).to(self.classes.device)
        total = torch.zeros(len(self.classes) * (2 * cells + 1), dtype=torch.long)
        for *labels, _, bins in self.tiles():
            row, column = (torch.searchsorted(self.classes, y) * (2 * cells + 1) for y in labels)
            index = cell_of[bins]
            total += torch.bincount((index + row[:, None]).flatten(), minlength=len(total)).cpu()
            if self.within:
                index = (index + column)[bins < len(self.scale)]
                total += torch.bincount(index, minlength=len(total)).cpu()
        counts = self._sum_over_processes(total).view(len(self.classes), -1).numpy()
        return counts[:, cells : 2 * cells], counts[:, :cells]

    def resampled(self, edges: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(same-class pairs, different-class pairs) between edges, with weighted classes: (K - 1, R) each.

        edges (K,): indices of the scale's edges, from its first to its last. weights (C, R): how often each class was
        drawn. A same-class pair of c counts w_c times, because copies of a class are not compared with each other; a
        pair of classes c and c' counts w_c w_c' times.
        """
        device = self.queries.labels.device
        cells = len(edges) - 1
        cell_of_bin = torch.from_numpy(np.searchsorted(edges, np.arange(len(self.scale)), side="right") - 1)
        cell_of = torch.cat([cell_of_bin, cell_of_bin + cells, torch.tensor([2 * cells])]).to(device)
        class_weights = torch.from_numpy(weights).float().to(device)  # (C, R)
        total = torch.zeros(2, cells, class_weights.shape[1], dtype=torch.double)  # different-class, same-class
        for *labels, mixed, bins in self.tiles():
            kinds = 2 * cells + 1 if mixed else cells
            row, column = (torch.searchsorted(self.classes, y) for y in labels)  # class numbers, ascending
            first, left, width = int(row[0]), int(column[0]), int(column[-1] - column[0]) + 1
            step = max(1, CELLS // (kinds * max(width, class_weights.shape[1])))
            for start in range(first, int(row[-1]) + 1, step):  # a block of row classes, all column classes
                rows = slice(*torch.searchsorted(row, torch.tensor([start, start + step], device=device)).tolist())
                height = min(step, int(row[-1]) + 1 - start)
                index = cell_of[bins[rows]]
                index += (row[rows, None] - start) * kinds
                index *= width
                index += column - left
                counts = torch.bincount(index.flatten(), minlength=height * kinds * width).float()
                counts = counts.view(height, kinds, width)
                row_weights = class_weights[start : start + height]
                weighted = counts[:, :cells].reshape(-1, width) @ class_weights[left : left + width]
                total[0] += (weighted.view(height, cells, -1) * row_weights[:, None]).sum(dim=0).cpu()
                if kinds > cells:
                    same = counts[:, cells : 2 * cells].sum(dim=2)  # (height, cells)
                    total[1] += (same.T @ row_weights).cpu()
        different, same_class = self._sum_over_processes(total).numpy()
        return same_class, different

    def _sum_over_processes(self, counts: torch.Tensor) -> torch.Tensor:
        return self.processes.sum(counts.to(self.queries.labels.device)).cpu()
