"""How well images of known classes are sorted into things, for `evaluate.py --verify`."""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from proxy_anchor.index import clustering
from proxy_anchor.spec import BOUNDS, MEASURES
from proxy_anchor.thresholds.identification import halves
from proxy_anchor.thresholds.intervals import SEED
from proxy_anchor.vectors import Embeddings


@dataclass
class Grouping:
    """The images of some classes, sorted into things: with the number of classes given, and by a threshold.

    labels: the classes (N,); given, estimated: the things (N,), see clustering.things. threshold: see there;
    is_recorded: whether it comes from a record, else it was chosen on other classes.
    """

    distance: str
    labels: np.ndarray
    threshold: float
    is_recorded: bool
    given: np.ndarray
    estimated: np.ndarray

    def scores(self, found: np.ndarray) -> tuple[float, float]:
        """The adjusted Rand index and the adjusted mutual information of things (N,) with the classes."""
        from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

        return float(adjusted_rand_score(self.labels, found)), float(adjusted_mutual_info_score(self.labels, found))

    def text(self) -> str:
        """The results as lines for a terminal."""
        given, estimated = ("ARI {:.3f}, AMI {:.3f}".format(*self.scores(x)) for x in (self.given, self.estimated))
        source = "as recorded" if self.is_recorded else "chosen on the other half of the classes"
        size = f"{len(self.labels):,} images of {len(np.unique(self.labels)):,} classes, half of all"
        return (
            f"Sorted into things, {size}:\n"
            f"with the number of classes given: {given}\n"
            f"with {MEASURES[self.distance]} {BOUNDS[self.distance]} {self.threshold:.4f}, {source}: {estimated}; "
            f"{clustering.summary(self.estimated)}\n"
        )


def measure(embeddings: Embeddings, distance: str, threshold: float | None = None, seed: int = SEED) -> Grouping | str:
    """Sort half of the classes into things by a recorded threshold or, without one, the best of the other half.

    The halves are those of identification.calibrate, so a threshold that was recorded on these images was chosen on the
    other half. Where this cannot be measured, the reason, without a full stop.
    """
    chosen, checked = (embeddings.of_classes(half) for half in halves(embeddings.labels, seed))
    if len(checked.labels) > clustering.LIMIT:
        return f"half of the classes have {len(checked.labels):,} images, more than {clustering.LIMIT:,}"
    if find_spec("sklearn") is None:
        return "ARI and AMI need scikit-learn: pip install scikit-learn"
    limit = clustering.best_threshold(chosen, distance) if threshold is None else threshold
    if limit is None:
        return "half of the classes have no two images of a class"
    merges = clustering.Merges.from_vectors(checked.vectors.cpu(), distance)
    labels = checked.labels.cpu().numpy()
    given = merges.after(len(labels) - len(np.unique(labels)))
    return Grouping(distance, labels, limit, threshold is not None, given, merges.up_to(limit))


def describe(embeddings: Embeddings, distance: str, threshold: float | None = None) -> str:
    """The result of `measure` as lines for a terminal, or why there is none."""
    grouping = measure(embeddings, distance, threshold)
    return f"Not sorted into things: {grouping}\n" if isinstance(grouping, str) else grouping.text()
