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
from proxy_anchor.vectors import Embeddings

SPLITS, FAR = 20, 0.01


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
    """Choose a threshold on half of the classes and check it on the other half, for several halves."""
    rates, covered = [], 0
    for seed in range(SPLITS):
        calibration = verification.calibrate(embeddings, FAR, seed=seed)
        rates.append(calibration.far.value)
        covered += calibration.far.low <= FAR <= calibration.far.high
        print(
            f"seed {seed:2}  threshold {calibration.threshold.text()}  false accepts {calibration.far.percent()}",
            flush=True,
        )
    print(
        f"Requested: {FAR:.1%} false accepts. On the other classes, over {SPLITS} splits: mean {np.mean(rates):.2%}, "
        f"from {min(rates):.2%} to {max(rates):.2%}; the 95% interval contains the requested rate in {covered}"
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
