"""Measure how well images are sorted into things, for docs/use.md: 20 times on a random half of the test classes.

python misc/grouping.py --dataset glyphs --resume CHECKPOINT

It takes the flags of evaluate.py. The threshold is chosen on the other half. For comparison: the threshold that is best
for the measured half itself, and the one for queries, see evaluate.py --calibrate.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
import evaluate
from proxy_anchor import cli, hardware, verification
from proxy_anchor.embedding import Embedder
from proxy_anchor.index import clustering
from proxy_anchor.spec import SHARE
from proxy_anchor.vectors import Embeddings, concat_rows, to_nearness

SPLITS = 20


def embed(args) -> Embeddings:
    """The embeddings of all test images by the network of a command line."""
    (network,), _, _ = evaluate.open_networks(args)
    embedder = Embedder(network, hardware.select(args.gpu_id), args.amp)
    sets = [
        embedder.embed(dataset.eval_loader(images, args.batch_size, args.workers))
        for images in evaluate.open_test_sets(args)
    ]
    return concat_rows(*sets, *[None] * (2 - len(sets)))


def measure(embeddings: Embeddings, distance: str, seed: int) -> dict[str, list[float]]:
    """{how the images were sorted: [things of several images, images alone, ARI, AMI]} of one half."""
    grouping = clustering.measure(embeddings, distance, seed=seed)
    if grouping is None:
        raise ValueError("half of the classes have no two images of a class: expected several images of each class")
    chosen, checked = (embeddings.of_classes(half) for half in verification.halves(embeddings.labels, seed))
    queries = verification.identify(chosen, distance=distance).threshold(SHARE)
    others = {
        "best threshold for this half": clustering.best_threshold(checked, distance),
        f"threshold for queries, {SHARE:.0%}": to_nearness(queries, distance),
    }
    results = {"number given": grouping.given, "threshold of the other half": grouping.estimated}
    results |= {name: clustering.things(checked.vectors, distance, limit) for name, limit in others.items()}
    print(f"seed {seed:2}: threshold {grouping.threshold:.4f}, {len(np.unique(grouping.labels))} classes", flush=True)
    return {name: [*clustering.sizes(found), *grouping.scores(found)] for name, found in results.items()}


def main(argv=None):
    args = evaluate.parse(argv)
    with cli.errors_in_one_line("grouping.py"):
        embeddings = embed(args)
        rows = [measure(embeddings, args.spec.distance, seed) for seed in range(SPLITS)]
        for name in rows[0]:
            columns = zip(("things", "alone", "ARI", "AMI"), zip(*(row[name] for row in rows)))
            values = (
                f"{column} {np.mean(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"
                for column, numbers in columns
            )
            print(f"{name}: {', '.join(values)}")


if __name__ == "__main__":
    main()
