"""A pass over all images of a dataset: whether they are readable, their sizes, and exact duplicates."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from .duplicates import perceptual_hash
from .files import BadFile, read_image
from .loading import parallel


@dataclass
class Image:
    """An inspected file: the digest of its bytes, its size and perceptual hash, or the reason why it is unreadable.

    The perceptual hash is None for nearly uniform images, and if it was not requested.
    """

    path: str
    digest: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""
    perceptual: int | None = None


def inspect(paths: list[str], workers: int, upright: bool = True, perceptual: bool = False) -> DataLoader:
    """An Image for each path, in order; every file is fully decoded. perceptual: compute perceptual hashes."""
    return parallel(partial(_inspect, upright=upright, perceptual=perceptual), paths, workers)


def _inspect(path, upright, perceptual):
    try:
        pixels = read_image(path, upright)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        hashed = perceptual_hash(pixels.permute(1, 2, 0).numpy()) if perceptual else None
        return Image(path, digest, pixels.shape[2], pixels.shape[1], perceptual=hashed)
    except BadFile as error:
        return Image(path, problem=str(error))


def with_several_labels(results: dict[str, list[Image]], sets: dict) -> list[str]:
    """A line on each set of identical files with several labels; results and sets (ImageDatasets) are by split."""
    first: dict[str, dict] = defaultdict(dict)  # digest -> {class: first path}
    for split, data in sets.items():
        for image, label in zip(results[split], data.labels):
            if image.digest:
                first[image.digest].setdefault(data.classes[label], image.path)
    return [
        "Identical files have different labels: " + ", ".join(f"{path} has {label}" for label, path in paths.items())
        for paths in first.values()
        if len(paths) > 1
    ]


def in_several(splits: dict[str, list[Image]]) -> list[list[str]]:
    """For each image that is in more than one split: the paths of its identical files, one per split."""
    first: dict[str, dict[str, str]] = defaultdict(dict)  # digest -> {split: first path}
    for split, images in splits.items():
        for image in images:
            if image.digest:
                first[image.digest].setdefault(split, image.path)
    return [list(paths.values()) for paths in first.values() if len(paths) > 1]
