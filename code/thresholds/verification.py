"""Verification: what a similarity threshold decides about pairs of images, with bootstrap intervals.

A pair is accepted if its similarity reaches the threshold. The true-accept rate (TAR) is the share of same-class pairs
that are accepted, the false-accept rate (FAR) the share of different-class pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from proxy_anchor.collectives import ALONE, Processes
from proxy_anchor.spec import BOUNDS, MEASURES
from proxy_anchor.thresholds.intervals import LEVEL, REPLICATES, Estimate, draw, estimate
from proxy_anchor.thresholds.pairs import Pairs, Scale
from proxy_anchor.vectors import Embeddings, to_nearness

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
FEWEST = 10  # different-class pairs that a threshold must accept: with fewer, the rate is little more than chance
FAR_STEPS, TAR_STEPS = 40, 24  # thresholds of the bootstrap's curves, evenly spaced in each rate
OPIS_FARS, OPIS_STEPS = (0.1, 0.01), 101


@dataclass
class Verification:
    """What thresholds achieve on the pairs of some classes, with intervals from a bootstrap over these classes.

    same, other: the numbers of same-class and different-class pairs in each bin of the scale.
    auc: the area under the ROC curve. equal_error: (threshold, rate) where FAR = 1 - TAR.
    at_far: {FAR: (threshold, TAR)}; the threshold is the lowest edge of the scale that accepts no more than this share
    of the different-class pairs. too_rare: the FARs for which there are too few of these pairs.
    at_threshold: {threshold: (FAR, TAR)}. opis: see opis. All thresholds are similarities: larger is nearer, see
    vectors.to_nearness. Without pairs of both kinds there are no estimates.
    """

    distance: str
    classes: int
    scale: Scale
    same: np.ndarray
    other: np.ndarray
    auc: Estimate | None = None
    equal_error: tuple[Estimate, Estimate] | None = None
    at_far: dict[float, tuple[Estimate, Estimate]] = field(default_factory=dict)
    too_rare: list[float] = field(default_factory=list)
    at_threshold: dict[float, tuple[Estimate, Estimate]] = field(default_factory=dict)
    opis: float = np.nan

    def table(self) -> list[tuple[str, str, str]]:
        """(FAR, TAR, threshold) for each rate with enough pairs, with intervals."""
        return [
            (f"{100 * far:g}%", tar.percent(), threshold.measured(self.distance).text())
            for far, (threshold, tar) in self.at_far.items()
        ]

    def remark(self) -> str:
        """A line on the pairs, and one on the rates for which there are too few."""
        same, other = (f"{counts.sum():,}" for counts in (self.same, self.other))
        if self.auc is None:
            return f"{same} same-class and {other} different-class pairs; thresholds need both kinds.\n"
        lines = (
            f"{same} same-class and {other} different-class pairs; brackets: {100 * LEVEL:g}% bootstrap intervals over "
            f"{self.classes:,} classes\n"
        )
        if self.too_rare:
            rates = ", ".join(f"{100 * far:g}%" for far in self.too_rare)
            lines += f"There are too few different-class pairs for thresholds with {rates} false accepts.\n"
        return lines

    def text(self) -> str:
        """All results as lines for a terminal."""
        if self.auc is None or self.equal_error is None:
            return self.remark()
        threshold, rate = self.equal_error
        kind = MEASURES[self.distance]
        return (
            f"{self.remark()}ROC AUC {self.auc.percent()}, "
            f"equal errors {rate.percent()} at {kind} {threshold.measured(self.distance).text()}\n"
            f"{'false accepts':15}{'true accepts':26}{kind} {BOUNDS[self.distance]}\n"
            + "".join(f"{far:>13}  {tar:26}{threshold}\n" for far, tar, threshold in self.table())
            + "".join(
                f"At the recorded threshold {to_nearness(limit, self.distance):.4f}: {far.percent()} false accepts, "
                f"{tar.percent()} true accepts\n"
                for limit, (far, tar) in self.at_threshold.items()
            )
            + f"OPIS {self.opis:.2e} (how much the classes differ at the thresholds for 1% to 10% false accepts)\n"
        )


@dataclass
class Curve:
    """FAR and TAR (K, R) of R sets of pairs at ascending thresholds (K,), from all pairs accepted to none."""

    thresholds: np.ndarray
    far: np.ndarray
    tar: np.ndarray

    @classmethod
    def from_counts(cls, thresholds: np.ndarray, same: np.ndarray, other: np.ndarray) -> "Curve":
        """From the numbers (K - 1, R) of same-class and different-class pairs between the thresholds."""
        accepted = [np.pad(counts[::-1].cumsum(axis=0)[::-1], ((0, 1), (0, 0))) for counts in (other, same)]
        with np.errstate(invalid="ignore"):  # NaN for sets without pairs of a kind
            return cls(thresholds, *(counts / counts[0] for counts in accepted))

    def auc(self) -> np.ndarray:
        """How often a same-class pair is nearer than a different-class pair, where ties count half: the ROC's area."""
        return ((self.tar[1:] + self.tar[:-1]) * (self.far[:-1] - self.far[1:])).sum(axis=0) / 2

    def equal_errors(self) -> tuple[np.ndarray, np.ndarray]:
        """(threshold, rate) where FAR = 1 - TAR, interpolated between the thresholds."""
        threshold, rate, _ = self._where(self.far + self.tar - 1, 0)
        return threshold, rate

    def at_far(self, far: float) -> tuple[np.ndarray, np.ndarray]:
        """(threshold, TAR) where FAR falls to this value, interpolated between the thresholds."""
        threshold, _, tar = self._where(self.far, far)
        return threshold, tar

    def _where(self, falling, level):
        after = (falling <= level).argmax(axis=0)[None]
        before = np.maximum(after - 1, 0)
        high, low = (np.take_along_axis(falling, at, axis=0) for at in (before, after))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (high - level) / (high - low)
        columns = self.thresholds[:, None].repeat(falling.shape[1], axis=1), self.far, self.tar
        ends = [[np.take_along_axis(column, at, axis=0) for at in (before, after)] for column in columns]
        return [(start + share * (end - start))[0] for start, end in ends]


@torch.no_grad()
def verify(
    queries: Embeddings,
    gallery: Embeddings | None = None,
    distance: str = "cosine",
    *,
    fars: Sequence[float] = FARS,
    thresholds: Sequence[float] = (),
    replicates: int = REPLICATES,
    processes: Processes = ALONE,
) -> Verification:
    """Tell same-class from different-class pairs by their similarity, at these false-accept rates and thresholds.

    The pairs are each query with each image of the gallery or, without one, all pairs of two queries; two images of one
    group are not a pair. Errors and the processes as for retrieval.best_positive_rank. The rates are exact at
    the edges of the scale, to which the thresholds are rounded up. For the intervals, classes are drawn with
    replacement, because pairs that share a class vary together. Memory grows with the images and classes, not with the
    pairs, which the processes divide.
    """
    pairs = Pairs.from_embeddings(queries, gallery, distance, processes)
    same, other = pairs.histograms()
    result = Verification(distance, len(pairs.classes), pairs.scale, same, other)
    if not (same.any() and other.any()):
        return result
    curve = Curve.from_counts(pairs.scale.edges, same[:, None], other[:, None])
    result.too_rare = [far for far in fars if far * other.sum() < FEWEST]
    edge_of_far = {far: int((curve.far <= far).argmax()) for far in fars if far not in result.too_rare}
    edge_of_threshold = {threshold: pairs.scale.edge_from(threshold) for threshold in thresholds}
    edges = edges_of_interest(curve, [*edge_of_far.values(), *edge_of_threshold.values()], other.sum())
    drawn = draw(result.classes, replicates)
    resampled = Curve.from_counts(pairs.scale.edges[edges], *pairs.resampled(edges, drawn.T))

    result.auc = estimate(curve.auc(), resampled.auc())
    (threshold, rate), (thresholds_drawn, rates_drawn) = curve.equal_errors(), resampled.equal_errors()
    result.equal_error = estimate(threshold, thresholds_drawn), estimate(rate, rates_drawn)
    for far, edge in edge_of_far.items():
        thresholds_drawn, rates_drawn = resampled.at_far(far)
        result.at_far[far] = estimate(curve.thresholds[edge], thresholds_drawn), estimate(curve.tar[edge], rates_drawn)
    for limit, edge in edge_of_threshold.items():
        row = np.searchsorted(edges, edge)
        result.at_threshold[limit] = (
            estimate(curve.far[edge], resampled.far[row]),
            estimate(curve.tar[edge], resampled.tar[row]),
        )
    result.opis = opis(pairs, *(float(curve.at_far(far)[0][0]) for far in OPIS_FARS))
    return result


def opis(pairs: Pairs, low: float, high: float) -> float:
    """The operating-point inconsistency score: how much the classes differ at the same thresholds, from low to high.

    The variance over the classes, averaged over OPIS_STEPS thresholds, of the harmonic mean of two shares of a
    class: of its same-class pairs that are accepted, and of its different-class pairs that are not. Classes without
    pairs of both kinds are left out.
    """
    edges = [pairs.scale.edge_from(threshold) for threshold in np.linspace(low, high, OPIS_STEPS)]
    same, other = pairs.by_class(np.array([0, *edges, len(pairs.scale)]))
    both = same.any(axis=1) & other.any(axis=1)
    accepted = same[both, ::-1].cumsum(axis=1)[:, ::-1][:, 1:] / same[both].sum(axis=1, keepdims=True)
    rejected = other[both].cumsum(axis=1)[:, :-1] / other[both].sum(axis=1, keepdims=True)
    utility = 2 * accepted * rejected / np.maximum(accepted + rejected, 1e-12)
    return float(utility.var(axis=0).mean())


def edges_of_interest(curve: Curve, required: list[int], pairs: int) -> np.ndarray:
    """The numbers of the edges between which the bootstrap counts: the required ones, and enough to draw a curve."""
    far, tar = curve.far[:, 0], curve.tar[:, 0]
    levels = np.geomspace(1 / pairs, 1, FAR_STEPS), np.linspace(0, 1, TAR_STEPS)
    steps = [len(rate) - np.searchsorted(rate[::-1], level, side="right") for rate, level in zip((far, tar), levels)]
    return np.unique([0, len(far) - 1, *np.concatenate(steps).clip(0, len(far) - 1), *required])
