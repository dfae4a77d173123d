"""What a similarity threshold decides about pairs of images, and about queries; with bootstrap intervals.

Verification: a pair is accepted if its similarity reaches the threshold. The true-accept rate (TAR) is the share of
same-class pairs that are accepted, the false-accept rate (FAR) the share of different-class pairs.

Identification, open-set: a query matches if its nearest image reaches the threshold. It is unknown if its class is left
out of the gallery, and should not match; if its class is there, it is known, and its nearest image should be of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from proxy_anchor.collectives import ALONE, Processes
from proxy_anchor.files import printable, quantity
from proxy_anchor.pairs import Pairs, Scale
from proxy_anchor.spec import MEASURES, Threshold
from proxy_anchor.vectors import Embeddings, to_nearness

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
FEWEST = 10  # different-class pairs that a threshold must accept: with fewer, the rate is little more than chance
REPLICATES = 500  # of the bootstrap
LEVEL = 0.95  # of the intervals
FAR_STEPS, TAR_STEPS = 40, 24  # thresholds of the bootstrap's curves, evenly spaced in each rate
SEED = 0  # of the bootstrap, and of the halves of calibrate
BOUNDS = {"cosine": "at least", "euclidean": "at most"}  # of accepted pairs
FEWEST_MATCHES = 5  # of unknown queries, for a threshold: with fewer, their share is little more than chance
RELIABLE = 30  # classes: with fewer, a threshold and its interval are little more than chance
SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # of unknown queries that match
OPIS_FARS, OPIS_STEPS = (0.1, 0.01), 101
WORST = 10  # classes that are listed
REPLACEMENTS = 8  # nearest classes that can be the nearest in a sample of the bootstrap
HALVINGS = 4  # of the gallery, for which thresholds are recorded
NEAREST = 64  # other classes of each query that are kept: enough for a gallery of 1/2**HALVINGS of them


class Estimate(NamedTuple):
    """A value and the ends of its interval, which are NaN if there are too few classes for one."""

    value: float
    low: float
    high: float

    def text(self, form: str = "{:.4f}", unit: str = "", factor: float = 1) -> str:
        value, *ends = (form.format(factor * number) for number in self)
        return value + unit + ("" if np.isnan(self.low) else f" [{', '.join(ends)}]")

    def percent(self) -> str:
        return self.text("{:.2f}", "%", 100)

    def measured(self, distance: str) -> "Estimate":
        """A similarity (larger is nearer) as a cosine or a distance, see vectors.to_nearness."""
        value, *ends = (to_nearness(number, distance) for number in self)
        return Estimate(value, *sorted(ends))


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


def draw(classes: int, replicates: int = REPLICATES) -> np.ndarray:
    """How often each class is in each of R samples of the bootstrap: (R, C)."""
    return np.random.default_rng(SEED).multinomial(classes, np.full(classes, 1 / classes), replicates)


def estimate_share(hits: int, total: int, replicates: np.ndarray, classes: int) -> Estimate:
    """A share with its interval. If none or all are hits, all samples are alike: it is that of `classes` draws then."""
    value, low, high = estimate(hits / total, replicates.clip(0, 1))
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / classes)  # the largest share of which so many draws may well show nothing
    return Estimate(value, min(low, 1 - unseen) if hits == total else low, max(high, unseen) if not hits else high)


def estimate(value, replicates: np.ndarray) -> Estimate:
    """The value with the interval between the quantiles of the replicates, extended to the value itself.

    The replicates are interpolated between a few thresholds, and a sample of few classes lacks some of them, so the
    value may lie outside of the quantiles. A wider interval contains the true value no less often.
    """
    value, known = float(np.squeeze(value)), replicates[~np.isnan(replicates)]
    if not len(known):
        return Estimate(value, np.nan, np.nan)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(min(low, value)), float(max(high, value)))


@dataclass
class Identification:
    """The nearest images of Q queries: in a gallery with their class, and in one without it, from which it is left out.

    labels (Q,). own (Q,): the similarity of the nearest image of a query's own class, -inf without one. others (Q, K):
    of the nearest image of each of the nearest other classes, in descending order; near (Q, K): the labels of these.
    classes: how many others there are. size: how many images they have, on average. Larger similarities are nearer, see
    vectors.to_nearness.
    """

    distance: str
    classes: int
    size: int
    labels: np.ndarray
    own: np.ndarray
    others: np.ndarray
    near: np.ndarray

    def unknown(self, threshold: float) -> Estimate:
        """The share of unknown queries that match.

        The interval is from a bootstrap over the classes, of which the queries and the gallery consist: a few that look
        alike make most of the matches. A sample lacks a third of the classes, so fewer queries match in it; the shares
        of the samples are scaled to have the measured one as their mean.
        """
        queries, ranks = np.nonzero(self.others[:, :REPLACEMENTS] >= threshold)
        if not len(queries):
            return estimate_share(0, len(self.labels), np.zeros(1), len(np.unique(self.labels)))
        names, numbers = np.unique(np.concatenate([self.labels, self.near[queries, ranks]]), return_inverse=True)
        labels, near = numbers[: len(self.labels)], numbers[len(self.labels) :]
        drawn = draw(max(len(names), self.classes + 1)).T  # (C, R)
        first = np.flatnonzero(np.diff(queries, prepend=-1))
        match = np.logical_or.reduceat(drawn[near] > 0, first)  # (M, R): of the M queries that match
        total = np.bincount(labels, minlength=len(drawn)) @ drawn
        shares = (match * drawn[labels[queries[first]]]).sum(axis=0) / np.maximum(total, 1)
        scaled = len(first) / len(self.labels) * shares / shares.mean()
        return estimate_share(len(first), len(self.labels), scaled, len(np.unique(self.labels)))

    def known(self, threshold: float) -> Estimate:
        """The share of known queries whose nearest image is of their class and matches; NaN without any."""
        known = self.own > -np.inf
        return self._share((self.own >= threshold) & (self.own > self.others[:, 0]), known)

    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """(gap, right) of the known queries (M,): how much nearer the nearest class is than the second; whether own."""
        first, second = np.sort(np.column_stack([self.own, self.others[:, :2]]))[:, :-3:-1].T
        known = self.own > -np.inf
        return (first - second)[known], (self.own > self.others[:, 0])[known]

    def by_class(self, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(labels, false accepts, false rejects) of the classes (C,).

        False accepts: the share of its unknown queries that match; false rejects: the share of its known queries whose
        own class does not reach the threshold, NaN without any.
        """
        names, numbers = np.unique(self.labels, return_inverse=True)
        known = self.own > -np.inf
        with np.errstate(invalid="ignore"):
            rejects = np.bincount(numbers, known & (self.own < threshold)) / np.bincount(numbers, known)
        return names, np.bincount(numbers, self.others[:, 0] >= threshold) / np.bincount(numbers), rejects

    def curve(self, shares: np.ndarray) -> np.ndarray:
        """The share of known queries that are answered rightly where these shares of unknown queries match."""
        nearest, count = np.sort(self.others[:, 0])[::-1], len(self.own)
        limits = np.nextafter(nearest[(shares * count + 1e-9).astype(int).clip(max=count - 1)], np.inf)
        right = np.where(self.own > self.others[:, 0], self.own, -np.inf)[self.own > -np.inf]
        return (right[:, None] >= limits).mean(axis=0)

    def text(self) -> str:
        """Unknown queries that match and known ones answered rightly, at several thresholds, for a terminal."""
        lines = (
            f"{len(self.labels):,} queries, each among {self.size:,} images of other classes. Unknown: its own class "
            f"is left out; known: it is in the gallery\n{'unknown match':15}{'known right':26}"
            f"{MEASURES[self.distance]} {BOUNDS[self.distance]}\n"
        )
        for share in SHARES:
            if share * len(self.labels) >= FEWEST_MATCHES:
                known = self.known(limit := self.threshold(share)).percent()
                lines += f"{100 * share:>12g}%  {known:26}{to_nearness(limit, self.distance):.4f}\n"
        return lines

    def spread(self, threshold: float, names: Sequence) -> str:
        """How much the classes differ at a threshold, as lines for a terminal. names: of the classes, by label."""
        labels, accepts, rejects = self.by_class(threshold)
        lines = (
            f"At the recorded threshold, {to_nearness(threshold, self.distance):.4f} for {self.size:,} images, "
            f"{self.unknown(threshold).percent()} of unknown queries match, {self.known(threshold).percent()} of known "
            "ones are answered rightly. The classes differ:\n"
        )
        for kind, shares in (("unknown match", accepts), ("known rejected", rejects)):
            low, middle, high = np.nanquantile(shares, (0.05, 0.5, 0.95))
            first = np.argsort(-shares, kind="stable")[:WORST]
            worst = ", ".join(f"{printable(str(names[labels[i]]))} {shares[i]:.0%}" for i in first if shares[i] > 0)
            last = shares[first[-1]]
            if last > 0 and (others := (shares == last).sum() - (shares[first] == last).sum()):
                worst += f", and {others} more with {last:.0%}"
            most = f"most: {worst}" if worst else "none above 0%"
            lines += f"{kind}: median {middle:.1%}, 5% to 95% of the classes: {low:.1%} to {high:.1%}; {most}\n"
        return lines

    def _share(self, hits: np.ndarray, among: np.ndarray) -> Estimate:
        """The share of hits, with an interval from a bootstrap over the classes of the queries."""
        if not among.any():
            return Estimate(np.nan, np.nan, np.nan)
        names, numbers = np.unique(self.labels[among], return_inverse=True)
        counts = np.bincount(numbers, hits[among]), np.bincount(numbers)
        drawn = draw(len(names))
        shares = (drawn @ counts[0]) / (drawn @ counts[1])
        return estimate_share(int(counts[0].sum()), int(counts[1].sum()), shares, len(names))

    def threshold(self, share: float, classes: int | None = None) -> float:
        """The lowest threshold at which at most this share of unknown queries match.

        classes: in a gallery of this many of the other classes, on average over all choices of them: of C classes, k
        of which have an image that reaches the threshold, c hold none of these in binom(C - k, c) of binom(C, c).
        """
        total, (count, kept) = self.classes, self.others.shape
        classes = classes or total
        missed = [math.comb(total - k, classes) / math.comb(total, classes) for k in range(kept + 1)]
        values, gains = self.others.ravel(), np.tile(-np.diff(missed), count)  # each adds to the queries that match
        order = np.argsort(-values)
        matched = gains[order].cumsum() / count
        first_too_many = min(int(np.searchsorted(matched, share + 1e-12, side="right")), len(order) - 1)
        return float(np.nextafter(values[order[first_too_many]], np.inf))

    def thresholds(self, share: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """(sizes, thresholds) of galleries of all other classes, half of them, a quarter of them ..."""
        classes = [count for i in range(HALVINGS + 1) if (count := self.classes >> i)]
        sizes = [round(self.size * count / self.classes) for count in classes]
        return tuple(sizes), tuple(self.threshold(share, count) for count in classes)


@torch.no_grad()
def identify(
    queries: Embeddings, gallery: Embeddings | None = None, distance: str = "cosine", *, processes: Processes = ALONE
) -> Identification:
    """Compare each query with the gallery or, without one, with all other queries: with its own class, and without it.

    Two images of one group are not compared. Errors and the processes as for retrieval.best_positive_rank; all get
    the result of all queries, in the order of their labels. Memory grows with the queries, and with the classes for a
    tile of them.
    """
    pairs = Pairs.from_embeddings(queries, gallery, distance, processes)
    asked, targets = (
        torch.searchsorted(pairs.classes, torch.cat(processes.all_gather(side.labels)))
        for side in (pairs.queries, pairs.targets)
    )
    counts = torch.bincount(targets, minlength=len(pairs.classes))
    classes = int((counts > 0).sum()) - int((counts[asked] > 0).all())  # the most that a query has
    labels, own, others, near = [], [], [], []
    for row_labels, nearest in pairs.nearest_of_classes():
        column = torch.searchsorted(pairs.classes, row_labels)[:, None]
        labels.append(row_labels)
        own.append(nearest.gather(1, column)[:, 0])
        nearest.scatter_(1, column, -torch.inf)
        values, columns = nearest.topk(max(1, min(NEAREST, classes)))
        others.append(values)
        near.append(pairs.classes[columns])
    size = len(targets) - counts[asked].double().mean().item()
    columns = (torch.cat(x).cpu().numpy() for x in (labels, own, others, near))
    return Identification(distance, classes, round(size), *columns)


def calibrate(
    queries: Embeddings, share: float, gallery: Embeddings | None = None, distance: str = "cosine", seed: int = SEED
) -> Threshold:
    """Choose the threshold at which this share of unknown queries match on half of the classes; check it on the others.

    The first half of a shuffle of the classes with this seed chooses. Neither half is in the gallery of the other. Of
    several processes, one needs all embeddings. Raises ValueError as choose_threshold does.
    """
    labels = queries.labels if gallery is None else torch.cat([queries.labels, gallery.labels])
    classes = labels.unique().cpu().numpy()
    halves = [torch.from_numpy(half) for half in np.array_split(np.random.default_rng(seed).permutation(classes), 2)]
    return choose_threshold(
        share,
        *(
            identify(queries.of_classes(half), None if gallery is None else gallery.of_classes(half), distance)
            for half in halves
        ),
    )


def choose_threshold(share: float, chosen: Identification, checked: Identification | None = None) -> Threshold:
    """The threshold at which this share of unknown queries match, and what it achieves, on other classes if given.

    Raises ValueError for too few classes or queries, and if no query reaches it with its own class.
    """
    queries = f"{len(chosen.labels):,} queries that show {quantity(chosen.classes + 1, 'thing')}"
    if chosen.classes < 2:
        raise ValueError(f"A threshold needs at least 3 things, found {queries}; it stays as it was")
    if share * len(chosen.labels) < FEWEST_MATCHES:
        smallest = math.ceil(1e4 * FEWEST_MATCHES / len(chosen.labels)) / 1e4
        raise ValueError(
            f"{queries} allow --calibrate {smallest:g} or more, so that {FEWEST_MATCHES} of them match, found "
            f"{share:g}; the threshold stays as it was"
        )
    sizes, values = chosen.thresholds(share)
    if -np.inf < chosen.own.max() < values[0]:
        raise ValueError(
            f"At a threshold that {100 * share:g}% of unknown queries reach, no known query matches: other classes are "
            "as near as its own, as when a network maps all images to one point. Train it further, or give "
            "--calibrate a larger share; the threshold stays as it was"
        )
    distance, checked = chosen.distance, checked or chosen
    values = tuple(to_nearness(value, distance) for value in values)
    numbers = (chosen.classes + 1,) if checked is chosen else (chosen.classes + 1, checked.classes + 1)
    threshold = Threshold(distance, share, sizes, values, (), (), (), numbers, "", {})
    limit = to_nearness(threshold.at(checked.size), distance)
    known = checked.known(limit)
    unknown = tuple(checked.unknown(limit))
    if math.isnan(known.value):
        return replace(threshold, unknown=unknown)
    return replace(threshold, unknown=unknown, known=tuple(known), odds=log_odds(*chosen.gaps()))


def log_odds(gaps: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """(offset, slope) of the log odds of being right over the gap, by logistic regression on gaps (M,), right (M,).

    The targets are Platt's (1999), slightly inside 0 and 1, so that the odds are finite if all queries are right.
    """
    from scipy.optimize import minimize

    scale = gaps.mean() or 1.0
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))

    def loss(weights):
        z = weights[0] + weights[1] * gaps / scale
        return (np.logaddexp(0, z) - target * z).mean()

    offset, slope = minimize(loss, np.zeros(2)).x
    return float(offset), float(slope / scale)


def describe(threshold: Threshold) -> str:
    """A threshold as lines for a terminal."""
    classes, *checked = threshold.classes
    few = f"With fewer than {RELIABLE} things, do not rely on it.\n" if min(threshold.classes) < RELIABLE else ""
    known = f", {Estimate(*threshold.known).percent()} of known ones are answered rightly" if threshold.known else ""
    result = f"{Estimate(*threshold.unknown).percent()} of unknown queries match{known}\n"
    on = f"Chosen on half of the classes ({classes:,})" if checked else f"Chosen on {classes:,} things, each left out"
    return (
        f"{on}, so that at most {100 * threshold.share:g}% of unknown queries match: {threshold.text()}\n"
        + (f"Checked on the other half ({checked[0]:,}): " if checked else "On the same things: ")
        + result
        + few
    )
