"""Measure how well images are sorted into things, for docs/use.md: 20 times on a random half of the classes.

    python misc/grouping.py --dataset glyphs --resume RUN
    python misc/grouping.py photos.index

On the test classes of a dataset, with the flags of evaluate.py, or on the folders of an index. The threshold is chosen
on the other half. For comparison: the threshold that is best for the measured half itself, and the one for queries.
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from thresholds import embed

from proxy_anchor import cli
from proxy_anchor.index import clustering
from proxy_anchor.index.store import Index
from proxy_anchor.spec import SHARE
from proxy_anchor.thresholds import grouping as sorting
from proxy_anchor.thresholds import identification
from proxy_anchor.vectors import Embeddings, to_nearness

SPLITS = 20


def measure(embeddings: Embeddings, distance: str, seed: int) -> dict[str, list[float]]:
    """{how the images were sorted: [things of several images, images alone, ARI, AMI]} of one half.

    Raises ValueError where no class of the other half has two images.
    """
    grouping = sorting.measure(embeddings, distance, seed=seed)
    if isinstance(grouping, str):
        raise ValueError(f"{grouping}: expected several images of each class")
    chosen, checked = (embeddings.of_classes(half) for half in identification.halves(embeddings.labels, seed))
    queries = identification.identify(chosen, distance=distance).threshold(SHARE)
    others = {
        "best threshold for this half": clustering.best_threshold(checked, distance),
        f"threshold for queries, {SHARE:.0%}": to_nearness(queries, distance),
    }
    results = {"number given": grouping.given, "threshold of the other half": grouping.estimated}
    results |= {name: clustering.things(checked.vectors, distance, limit) for name, limit in others.items()}
    print(f"seed {seed:2}: threshold {grouping.threshold:.4f}, {len(np.unique(grouping.labels))} classes", flush=True)
    return {name: [*clustering.sizes(found), *grouping.scores(found)] for name, found in results.items()}


def main(argv: list[str]) -> None:
    with cli.errors_in_one_line("grouping.py"):
        if len(argv) == 1 and os.path.isdir(argv[0]):
            index = Index.open(Path(argv[0]))
            embeddings, distance = index.embeddings(), index.distance
        else:
            embeddings, _, distance = embed(argv)
        rows = [measure(embeddings, distance, seed) for seed in range(SPLITS)]
        for name in rows[0]:
            columns = zip(("things", "alone", "ARI", "AMI"), zip(*(row[name] for row in rows)))
            values = (f"{kind} {np.mean(x):.3g} ({min(x):.3g} to {max(x):.3g})" for kind, x in columns)
            print(f"{name}: {', '.join(values)}")


if __name__ == "__main__":
    main(sys.argv[1:])
