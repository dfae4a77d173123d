"""Measure the numbers on thresholds and folders in docs/use.md, on the test classes of glyphs.

python misc/thresholds.py CHECKPOINT
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
import net
from proxy_anchor import cli, retrieval, verification
from proxy_anchor.checkpoint import Checkpoint
from proxy_anchor.embedding import Embedder
from proxy_anchor.index.entries import embeddings_of, group
from proxy_anchor.spec import SHARE
from proxy_anchor.vectors import Embeddings

SPLITS = 20


def embed(path: str, root: str) -> tuple[Embeddings, list[str]]:
    """The embeddings and the paths of the test images. Raises ValueError for a checkpoint without a record."""
    checkpoint = Checkpoint(path)
    if not (spec := checkpoint.spec):
        raise ValueError(f"{path} has no record of its network: expected a checkpoint of train.py --dataset glyphs")
    network = checkpoint.open(spec, net.from_spec)
    (images,) = dataset.eval_sets("glyphs", root, spec.image_size, spec.geometry)
    embedder = Embedder(network, torch.device("cpu"))
    return embedder.embed(dataset.eval_loader(images, batch_size=150, workers=0)), images.paths


def calibrations(embeddings: Embeddings) -> None:
    """Choose a threshold on some classes and check it on others, for several halves, and for quarters and the rest."""
    classes = embeddings.labels.unique().numpy()
    halves, quarters = [], []
    for seed in range(SPLITS):
        halves.append(verification.calibrate(embeddings, SHARE, seed=seed))
        order = torch.from_numpy(np.random.default_rng(seed).permutation(classes))
        quarter, rest = (
            verification.identify(embeddings.of_classes(part)) for part in order.tensor_split([len(order) // 4])
        )
        quarters.append(verification.choose_threshold(SHARE, quarter, rest))
        print(
            f"seed {seed:2}  threshold {halves[-1].values[0]:.4f}; unknown queries that match, from one half to the "
            f"other: {verification.Estimate(*halves[-1].unknown).percent()}, from a quarter to the rest: "
            f"{verification.Estimate(*quarters[-1].unknown).percent()}",
            flush=True,
        )
    for name, thresholds in (("one half to the other", halves), ("a quarter to the rest", quarters)):
        shares, known = [t.unknown[0] for t in thresholds], [t.known[0] for t in thresholds]
        covered = sum(low <= SHARE <= high for _, low, high in (t.unknown for t in thresholds))
        print(
            f"Requested: {SHARE:.1%} of unknown queries. From {name}, over {SPLITS} splits: mean {np.mean(shares):.2%}"
            f", from {min(shares):.2%} to {max(shares):.2%}; the 95% interval contains it in {covered}; "
            f"known queries answered rightly: mean {np.mean(known):.2%}"
        )


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
    threshold = verification.choose_threshold(SHARE, verification.identify(means))
    for kind, query in halves["queries"].items():
        found = verification.identify(Embeddings(*query), means)
        limit = threshold.at(found.size)
        print(
            f"Threshold of {len(means.labels):,} folders {limit:.4f}: {found.unknown(limit).percent()} of unknown "
            f"{kind} match, {found.known(limit).percent()} of known ones are answered rightly"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--data-root", default=str(dataset.DATA_ROOT), metavar="DIR")
    args = parser.parse_args(argv)
    with cli.errors_in_one_line("thresholds.py"):
        embeddings, paths = embed(args.checkpoint, args.data_root)
        folders(embeddings, paths)
        calibrations(embeddings)


if __name__ == "__main__":
    main()
