"""A pass over all images of a dataset: which can be read, how large they are, and which are there twice."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from dataset.duplicates import perceptual_hash
from dataset.files import BadFile, read_image
from dataset.loading import parallel


@dataclass
class Image:
    """What an image file holds: the digest of its bytes, its size and perceptual hash, or why it cannot be read.

    There is no perceptual hash of nearly uniform images, and none that was not asked for.
    """

    path: str
    digest: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""
    perceptual: int | None = None


def inspect(paths: list[str], workers: int, upright: bool = True, perceptual: bool = False) -> DataLoader:
    """An Image for each path, in their order; each file is decoded whole. perceptual: with perceptual hashes."""
    return parallel(partial(_inspect, upright=upright, perceptual=perceptual), paths, workers)


def _inspect(path, upright, perceptual):
    try:
        pixels = read_image(path, upright)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        hashed = perceptual_hash(pixels.permute(1, 2, 0).numpy()) if perceptual else None
        return Image(path, digest, pixels.shape[2], pixels.shape[1], perceptual=hashed)
    except BadFile as error:
        return Image(path, problem=str(error))


def with_several_labels(parts: dict[str, list[Image]], sets: dict) -> list[str]:
    """A line on each image, of the same bytes, that has several labels; sets: the ImageDataset of each part."""
    first: dict[str, dict] = defaultdict(dict)  # digest -> {class: first path}
    for part, data in sets.items():
        for image, label in zip(parts[part], data.labels):
            if image.digest:
                first[image.digest].setdefault(data.classes[label], image.path)
    return [
        "One image has several labels: " + ", ".join(f"{path} is of class {label}" for label, path in found.items())
        for found in first.values()
        if len(found) > 1
    ]


def in_several(parts: dict[str, list[Image]]) -> list[list[str]]:
    """The paths of images of the same bytes that are in more than one of the parts, a list for each such image."""
    where: dict[str, dict[str, str]] = defaultdict(dict)  # digest -> {split: first path}
    for part, images in parts.items():
        for image in images:
            if image.digest:
                where[image.digest].setdefault(part, image.path)
    return [list(paths.values()) for paths in where.values() if len(paths) > 1]
