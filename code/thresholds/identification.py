"""Open-set identification: what a similarity threshold decides about queries, and its calibration.

A query matches if its nearest image reaches the threshold. It is unknown if its class is left out of the gallery, and
should not match; if its class is there, it is known, and its nearest image should be of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from proxy_anchor.collectives import ALONE, Processes
from proxy_anchor.files import printable, quantity
from proxy_anchor.spec import BOUNDS, MEASURES, Calibration
from proxy_anchor.thresholds.intervals import SEED, Estimate, draw, estimate_share
from proxy_anchor.thresholds.pairs import Pairs
from proxy_anchor.vectors import Embeddings, concat_rows, to_nearness

FEWEST_MATCHES = 5  # of unknown queries, for a threshold: with fewer, their share is little more than chance
RELIABLE = 30  # classes: with fewer, a threshold and its interval are little more than chance
SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # of unknown queries that match
WORST = 10  # classes that are listed
REPLACEMENTS = 8  # nearest classes that can be the nearest in a sample of the bootstrap
HALVINGS = 4  # of the gallery, for which thresholds are recorded
NEAREST = 64  # other classes of each query that are kept: enough for a gallery of 1/2**HALVINGS of them


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
) -> Calibration:
    """Choose the threshold at which this share of unknown queries match on half of the classes; check it on the others.

    The first half of a shuffle of the classes with this seed chooses. Neither half is in the gallery of the other. Of
    several processes, one needs all embeddings. Raises ValueError as calibration_of does.
    """
    return calibration_of(
        share,
        *(
            identify(queries.of_classes(half), None if gallery is None else gallery.of_classes(half), distance)
            for half in halves(concat_rows(queries, gallery).labels, seed)
        ),
    )


def halves(labels: torch.Tensor, seed: int = SEED) -> list[torch.Tensor]:
    """The classes among the labels (N,) in two halves: that which chooses a threshold, and that which checks it."""
    classes = labels.unique().cpu().numpy()
    return [torch.from_numpy(half) for half in np.array_split(np.random.default_rng(seed).permutation(classes), 2)]


def calibration_of(share: float, chosen: Identification, checked: Identification | None = None) -> Calibration:
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
    calibration = Calibration(distance, share, sizes, values, (), (), (), numbers, "", {})
    limit = to_nearness(calibration.at(checked.size), distance)
    known = checked.known(limit)
    unknown = tuple(checked.unknown(limit))
    if math.isnan(known.value):
        return replace(calibration, unknown=unknown)
    return replace(calibration, unknown=unknown, known=tuple(known), odds=log_odds(*chosen.gaps()))


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


def describe(calibration: Calibration) -> str:
    """A calibration as lines for a terminal."""
    classes, *checked = calibration.classes
    few = f"With fewer than {RELIABLE} things, do not rely on it.\n" if min(calibration.classes) < RELIABLE else ""
    known = (
        f", {Estimate(*calibration.known).percent()} of known ones are answered rightly" if calibration.known else ""
    )
    result = f"{Estimate(*calibration.unknown).percent()} of unknown queries match{known}\n"
    on = f"Chosen on half of the classes ({classes:,})" if checked else f"Chosen on {classes:,} things, each left out"
    lines = (
        f"{on}, so that at most {100 * calibration.share:g}% of unknown queries match: {calibration.text()}\n"
        + (f"Checked on the other half ({checked[0]:,}): " if checked else "On the same things: ")
        + result
        + few
    )
    if calibration.groups is None:
        return lines
    return (
        f"{lines}To sort images into things, chosen on the same classes: {MEASURES[calibration.distance]} "
        f"{calibration.groups:.4f}\n"
    )
