"""All pairs of images, counted by their nearness: as they are, and for classes drawn again.

Nearness is the cosine similarity, or minus the Euclidean distance: more is nearer.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from proxy_anchor.collectives import ProcessGroup
from proxy_anchor.retrieval import groups_searched, searched
from proxy_anchor.tiles import Points, Tiled, origin_of

RESOLUTION = 1 << 16  # bins in the range of the similarities
STEPS, MANTISSA = 1 << 14, 52 - 14  # of distances: bins from one power of two to the next, and the bits left out
OCTAVES = 26  # from the farthest to rounding errors: of distances, the root of those of float64
CELLS = 1 << 23  # numbers at a time in the bootstrap


@dataclass
class Scale:
    """Bins of nearness; a threshold is the lower edge of one, and the last begins at the nearest possible.

    Those of similarities are equal. Those of distances are the numbers with STEPS steps from one power of two to the
    next: each is as exact as all others, relative to itself, however far the farthest image is.
    """

    edges: np.ndarray  # ascending: the first accepts all pairs, the last none
    farthest: int | None = None  # of distances: the number of the first edge, see steps

    @classmethod
    def of_similarities(cls) -> "Scale":
        return cls(-1 + 2 / RESOLUTION * np.arange(RESOLUTION + 2))

    @classmethod
    def of_distances(cls, farthest: float) -> "Scale":
        """Down to 2**-OCTAVES of the farthest: what is nearer, but for rounding errors of the squares, is at 0."""
        last = int(steps(torch.tensor(farthest or 1, dtype=torch.double)))
        numbers = torch.arange(last, last - OCTAVES * STEPS, -1) << MANTISSA
        edges = -numbers.view(torch.double).numpy()
        return cls(np.concatenate([edges, [0, -edges[-1]]]), last)

    @classmethod
    def of(cls, queries: Points, targets: Points, processes: ProcessGroup) -> "Scale":
        halves = [processes.max(p.halves.max()) for p in (queries, targets) if p.halves is not None]  # |x|^2 / 2
        return cls.of_distances(sum(math.sqrt(2 * half) for half in halves)) if halves else cls.of_similarities()

    def __len__(self):
        return len(self.edges) - 1

    def edge_from(self, threshold: float) -> int:
        """The number of the first edge that is not below the threshold."""
        return min(int(np.searchsorted(self.edges, threshold)), len(self))

    def bins(self, nearness: torch.Tensor) -> torch.Tensor:
        """The numbers of the bins; overwrites the nearness."""
        if self.farthest is None:
            numbers = nearness.add_(1).div_(2 / RESOLUTION).long()
        else:
            numbers = steps(nearness.abs_()).neg_().add_(self.farthest)
        return numbers.clamp_(0, len(self) - 1)


def steps(distances: torch.Tensor) -> torch.Tensor:
    """Their numbers among those with STEPS steps to an octave, rounded up; they are float64 and not negative.

    The bits of floating-point numbers are in the order of the numbers: those after the first are left out.
    """
    return -(-distances.view(torch.long) >> MANTISSA)


@dataclass
class Pairs:
    """The pairs of queries and targets, in tiles of the matrix of their nearness; each pair once, no image with itself.

    Of images with groups, two of one group are no pair. Only a tile is in memory at a time. Of several processes each
    has a part of the queries and of the targets, and the queries travel, as in retrieval.search.
    """

    queries: Tiled
    targets: Tiled
    within: bool
    scale: Scale
    classes: torch.Tensor  # (C,), ascending
    processes: ProcessGroup

    @classmethod
    def of(
        cls,
        embeddings,
        labels,
        gallery=None,
        gallery_labels=None,
        distance="cosine",
        groups=None,
        gallery_groups=None,
        group=None,
    ) -> "Pairs":
        within = gallery is None
        processes = ProcessGroup(group)
        embeddings, labels, gallery, gallery_labels = searched(embeddings, labels, gallery, gallery_labels, processes)
        groups, gallery_groups = groups_searched(groups, gallery_groups, labels, gallery_labels, within)
        origin = origin_of(gallery, distance, processes)
        queries = Tiled.of(Points.of(embeddings, origin), labels, groups)
        targets = queries if within else Tiled.of(Points.of(gallery, origin), gallery_labels, gallery_groups)
        labels = [part for tiled in (queries, targets) for part in processes.all_gather(tiled.labels)]
        classes = torch.unique(torch.cat(labels))
        return cls(queries, targets, within, Scale.of(queries.points, targets.points, processes), classes, processes)

    def tiles(self):
        """Of each tile: the labels of its rows and columns, whether it has more than different-class pairs, its bins.

        The bins of different-class pairs come first, then those of one class, then one for what is no pair.
        """
        targets, no_pair = self.targets, 2 * len(self.scale)
        for owner, queries in enumerate(self.queries.all_gather(self.processes)):
            selves = self.within and owner == self.processes.rank
            for i in range(len(queries)):
                block, rows = queries.broadcast_tile(i, owner, self.processes), queries.slice(i)
                for j in range(i if selves else 0, len(targets)) if self.compares(owner) else ():
                    columns = targets.slice(j)
                    nearness = block.similarities(targets.tile(j))[: queries.length(i), : targets.length(j)]
                    if block.halves is not None:  # these are -d^2 / 2
                        nearness = nearness.clamp_(max=0).mul_(-2).sqrt_().neg_()
                    bins = self.scale.bins(nearness)
                    if others := queries.shares_labels(i, targets, j):
                        bins += (queries.labels[rows, None] == targets.labels[columns]) * len(self.scale)
                    if queries.groups is not None and targets.groups is not None:
                        bins.masked_fill_(queries.groups[rows, None] == targets.groups[columns], no_pair)
                        others = True
                    if selves and i == j:
                        bins.masked_fill_(torch.ones_like(bins, dtype=torch.bool).tril_(), no_pair)
                    yield queries.labels[rows], targets.labels[columns], others, bins

    def compares(self, owner: int) -> bool:
        """Whether this process compares the owner's queries with its targets: within one set, one of two does."""
        ahead, count = (self.processes.rank - owner) % self.processes.size, self.processes.size
        return not self.within or 2 * ahead < count or (2 * ahead == count and owner < self.processes.rank)

    def histograms(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of same-class and different-class pairs in each bin of the scale."""
        total = torch.zeros(2 * len(self.scale) + 1, dtype=torch.long)
        for *_, bins in self.tiles():
            total += torch.bincount(bins.flatten(), minlength=len(total)).cpu()
        other, same = self._over_all_processes(total)[:-1].view(2, -1).numpy()
        return same, other

    def resampled(self, edges: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of same-class and different-class pairs between edges, with weighted classes: (K - 1, R) each.

        edges (K,): numbers of the scale's; the first and the last are its first and last. weights (C, R): how often
        each class was drawn. A pair of class c counts w_c, one of classes c and c' counts w_c w_c': two copies of a
        class are not compared with each other.
        """
        device = self.queries.labels.device
        cells = len(edges) - 1
        of_bin = torch.from_numpy(np.searchsorted(edges, np.arange(len(self.scale)), side="right") - 1)
        cell_of = torch.cat([of_bin, of_bin + cells, torch.tensor([2 * cells])]).to(device)
        drawn = torch.from_numpy(weights).float().to(device)  # (C, R)
        total = torch.zeros(2, cells, drawn.shape[1], dtype=torch.double)  # of two classes, of one
        for *labels, others, bins in self.tiles():
            kinds = 2 * cells + 1 if others else cells
            row, column = (torch.searchsorted(self.classes, of) for of in labels)  # numbers of classes, ascending
            first, left, width = int(row[0]), int(column[0]), int(column[-1] - column[0]) + 1
            step = max(1, CELLS // (kinds * max(width, drawn.shape[1])))
            for start in range(first, int(row[-1]) + 1, step):  # some classes, together with all of the columns'
                part = slice(*torch.searchsorted(row, torch.tensor([start, start + step], device=device)).tolist())
                height = min(step, int(row[-1]) + 1 - start)
                place = cell_of[bins[part]]
                place += (row[part, None] - start) * kinds
                place *= width
                place += column - left
                counts = torch.bincount(place.flatten(), minlength=height * kinds * width).float()
                counts = counts.view(height, kinds, width)
                own = drawn[start : start + height]
                met = counts[:, :cells].reshape(-1, width) @ drawn[left : left + width]
                total[0] += (met.view(height, cells, -1) * own[:, None]).sum(dim=0).cpu()
                if kinds > cells:
                    ones = counts[:, cells : 2 * cells].sum(dim=2)  # (height, cells)
                    total[1] += (ones.T @ own).cpu()
        other, same = self._over_all_processes(total).numpy()
        return same, other

    def _over_all_processes(self, counts: torch.Tensor) -> torch.Tensor:
        return self.processes.sum(counts.to(self.queries.labels.device)).cpu()
