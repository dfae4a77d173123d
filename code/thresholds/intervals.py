"""Estimates with intervals, from a bootstrap over the classes."""

from typing import NamedTuple

import numpy as np

from proxy_anchor.vectors import to_nearness

REPLICATES = 500  # of the bootstrap
LEVEL = 0.95  # of the intervals
SEED = 0  # of what is drawn: the samples of the bootstrap, the halves of the classes


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


def draw(classes: int, replicates: int = REPLICATES) -> np.ndarray:
    """How often each class is in each of R samples of the bootstrap: (R, C)."""
    return np.random.default_rng(SEED).multinomial(classes, np.full(classes, 1 / classes), replicates)


def estimate_share(hits: int, total: int, replicates: np.ndarray, classes: int) -> Estimate:
    """A share with its interval. If none or all are hits, all samples are alike: it is that of `classes` draws then."""
    value, low, high = estimate(hits / total, replicates.clip(0, 1))
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / classes)  # a larger share would almost surely show in one of these draws
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
