"""Measure the numbers on thresholds and folders in docs/use.md.

    python misc/thresholds.py --dataset glyphs --resume RUN
    python misc/thresholds.py photos.index

On the test classes of a dataset, with the flags of evaluate.py, or on the folders of an index, of which only
thresholds are measured.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
import evaluate
from proxy_anchor import cli, retrieval
from proxy_anchor.embedding import Embedder
from proxy_anchor.index.entries import embeddings_of, group
from proxy_anchor.index.store import Index
from proxy_anchor.spec import SHARE
from proxy_anchor.thresholds import identification, verification
from proxy_anchor.thresholds.intervals import Estimate
from proxy_anchor.vectors import Embeddings

SPLITS = 20


def embed(argv: list[str]) -> tuple[Embeddings, list[str], str]:
    """The embeddings, paths and distance of the test images. Raises ValueError if they are queries and a gallery."""
    args = evaluate.parse(argv)
    network, *others = evaluate.open_networks(args)[0]
    images, *gallery = evaluate.open_test_sets(args)
    if others or gallery:
        raise ValueError("Expected one network, and a dataset whose test images are queries and gallery")
    embedder = Embedder(network, torch.device("cpu"), args.amp)
    embeddings = embedder.embed(dataset.eval_loader(images, args.batch_size, args.workers))
    return embeddings, images.paths, args.spec.distance


def pair_thresholds(embeddings: Embeddings) -> None:
    """The share of unknown queries that reach thresholds for pairs of images."""
    identified = identification.identify(embeddings)
    for far, (threshold, _) in verification.verify(embeddings).at_far.items():
        share = identified.unknown(threshold.value).percent()
        print(
            f"Threshold for {far:.2%} false accepts of pairs: {threshold.value:.4f}, {share} of unknown queries match"
        )


def split(embeddings: Embeddings, seed: int, share: int) -> list[identification.Identification]:
    """Of one in `share` of the classes, and of the others; neither is in the gallery of the other."""
    order = np.random.default_rng(seed).permutation(embeddings.labels.unique().numpy())
    parts = torch.from_numpy(order).tensor_split([-(-len(order) // share)])
    return [identification.identify(embeddings.of_classes(part)) for part in parts]


def check_calibrations(embeddings: Embeddings, name: str, share: int) -> None:
    """Choose a threshold on some classes and check it on others, for several splits of the classes.

    And the probabilities: how often known queries are answered rightly, for each tenth of the probabilities.
    """
    calibrations, probabilities, right = [], [], []
    for seed in range(SPLITS):
        chosen, checked = split(embeddings, seed, share)
        calibrations.append(calibration := identification.calibration_of(SHARE, chosen, checked))
        gaps, is_right = checked.gaps()
        probabilities += [calibration.probability(gap) for gap in gaps]
        right += is_right.tolist()
        print(
            f"seed {seed:2}  threshold {calibration.values[0]:.4f}; unknown queries that match, from {name}: "
            f"{Estimate(*calibration.unknown).percent()}",
            flush=True,
        )
    shares, known = [c.unknown[0] for c in calibrations], [c.known[0] for c in calibrations]
    covered = sum(low <= SHARE <= high for _, low, high in (c.unknown for c in calibrations))
    print(
        f"Requested: {SHARE:.1%} of unknown queries. From {name}, over {SPLITS} splits: mean {np.mean(shares):.2%}, "
        f"from {min(shares):.2%} to {max(shares):.2%}, above 8% in {sum(share > 0.08 for share in shares)}; the 95% "
        f"interval contains it in {covered}; known queries answered rightly: mean {np.mean(known):.2%}"
    )
    tenths = np.array_split(np.argsort(probabilities), 10)
    for kind, values in (("probability", probabilities), ("right", right)):
        print(f"{kind:<12}" + "".join(f"{np.take(values, tenth).mean():>7.1%}" for tenth in tenths))


def folders(embeddings: Embeddings, paths: list[str]) -> None:
    """R@1 of half of each class's images against the other half, as images and as folder means."""
    random = np.random.default_rng(0)
    vectors, labels = embeddings.vectors, embeddings.labels
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = random.permutation(torch.nonzero(labels == label).flatten().numpy())
        second[rows[len(rows) // 2 :]] = True
    halves = {}
    for name, half in (("queries", ~second), ("gallery", second)):
        half_paths = [path for path, chosen in zip(paths, half) if chosen]
        label_of = dict(zip(group(half_paths), labels[half].unique_consecutive()))
        entries, means = embeddings_of(group(half_paths), half_paths, vectors[half], "cosine")
        halves[name] = {
            "images": (vectors[half], labels[half]),
            "folders": (means.float(), torch.stack([label_of[entry] for entry in entries])),
        }
    for kind, index in (("images", "images"), ("images", "folders"), ("folders", "folders")):
        (x, y), (gallery, gallery_labels) = halves["queries"][kind], halves["gallery"][index]
        recall = retrieval.recall_at_k(x, y, [1], gallery, gallery_labels)[1]
        print(f"R@1 of {len(x):,} {kind} among {len(gallery):,} {index}: {100 * recall:.2f}")
    means = Embeddings(*halves["gallery"]["folders"])
    calibration = identification.calibration_of(SHARE, identification.identify(means))
    for kind, query in halves["queries"].items():
        found = identification.identify(Embeddings(*query), means)
        limit = calibration.at(found.size)
        print(
            f"Threshold of {len(means.labels):,} folders {limit:.4f}: {found.unknown(limit).percent()} of unknown "
            f"{kind} match, {found.known(limit).percent()} of known ones are answered rightly"
        )


def main(argv: list[str]) -> None:
    with cli.errors_in_one_line("thresholds.py"):
        if len(argv) == 1 and os.path.isdir(argv[0]):
            return check_calibrations(Index.open(Path(argv[0])).embeddings(), "one half to the other", 2)
        embeddings, paths, _ = embed(argv)
        if len(group(paths)) == len(embeddings.labels.unique()):  # each class is in a folder of its own
            folders(embeddings, paths)
        pair_thresholds(embeddings)
        check_calibrations(embeddings, "one half to the other", 2)
        check_calibrations(embeddings, "a quarter to the rest", 4)


if __name__ == "__main__":
    main(sys.argv[1:])
