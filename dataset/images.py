"""The images of a split as a torch Dataset."""

import hashlib
import os
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.cache import Cache
from dataset.check import inspect
from dataset.files import read_image

ORIENTATIONS = ("stored", "upright")  # as a record says it, by ImageDataset.upright


class ImageDataset(Dataset):
    """Images, uint8 (3, H, W), and labels, the numbers of their classes; an item is (transform(image), label).

    The key of an item is its index or, if the transform is random, (seed, epoch, index) or (seed, epoch, view, index);
    what the transform draws depends on nothing else.

    groups: the number of each image's group (one burst, one camera), None where the dataset has none. A query is not
    to find images of its own group. upright: whether images are turned as their EXIF says, see files.to_tensor.
    """

    def __init__(
        self,
        paths: list[str],
        labels: np.ndarray,
        classes: list,
        transform=None,
        name: str = "images",
        groups: np.ndarray | None = None,
        upright: bool = True,
    ):
        self.name = name
        self.paths = paths
        self.labels = labels
        self.groups = groups
        self.classes = classes
        self.transform = transform
        self.upright = upright
        self.left_out = ""  # a line on the files beside them that are not read, see files.left_out
        self.cache: Cache | None = None
        self.total = len(paths)
        self.numbers = np.arange(len(paths))  # in the whole split, also when some are left out

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index = key[-1] if isinstance(key, tuple) else key
        image = read_image(self.paths[index], self.upright) if self.cache is None else self.cache[index]
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                if isinstance(key, tuple):
                    entropy = (*key[:-1], int(self.numbers[index]))
                    torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                image = self.transform(image)
        return image, int(self.labels[index])

    def use_cache(self, folder: Path, workers: int, progress, report) -> None:
        """Take the images from a Cache in this folder, built first if necessary; see Cache.build."""
        cache = Cache(folder, self.paths, self.upright)
        cache.build(workers, progress, report)
        self.cache = cache

    def find_bad(self, workers: int) -> dict[str, str]:
        """{path: reason} of the images that cannot be read; all are decoded to find out."""
        return {image.path: image.problem for image in inspect(self.paths, workers, self.upright) if image.problem}

    def leave_out(self, paths) -> None:
        """Leave out these images, before a cache is used; the others keep their numbers."""
        self._keep(np.array([path not in paths for path in self.paths], dtype=bool))

    def of_classes(self, chosen: np.ndarray, name: str, transform) -> "ImageDataset":
        """A dataset of the images of some classes, chosen (num_classes,), which are its classes; a cache comes later.

        The images keep their numbers.
        """
        part = copy(self)
        part.name, part.transform = name, transform
        part._keep(chosen[self.labels])
        part.labels = (np.cumsum(chosen) - 1)[part.labels]
        part.classes = [label for label, keep in zip(self.classes, chosen) if keep]
        part.total = len(part)
        return part

    def _keep(self, kept: np.ndarray) -> None:
        """Leave out all images but these, kept (N,)."""
        self.paths = [path for path, keep in zip(self.paths, kept) if keep]
        self.labels, self.numbers = self.labels[kept], self.numbers[kept]
        if self.groups is not None:
            self.groups = self.groups[kept]


def size(images: ImageDataset) -> tuple[int, int]:
    """(images, classes with an image)."""
    return len(images), len(np.unique(images.labels))


def fingerprint(images: ImageDataset, root: str | Path) -> str:
    """A digest of the images, by their paths below the root, and of their classes and groups."""
    base = root if os.path.isdir(root) else os.path.dirname(root) or "."
    digest = hashlib.sha256()
    for path, label in zip(images.paths, images.labels):
        digest.update(os.fsencode(f"{os.path.relpath(path, base)}\n{images.classes[label]}\n"))
    if images.groups is not None:
        digest.update(np.asarray(images.groups, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def states(images: ImageDataset) -> str:
    """A digest of the sizes and the times of change of the files, by which other images under their names are known."""
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, images.paths)]
    return hashlib.sha256(np.array(stats, dtype="<i8").tobytes()).hexdigest()[:16]


def record(splits: dict[str, ImageDataset], root: str | Path) -> dict:
    """What a run notes of its data: how its images are turned; of each split its size, fingerprint and states."""
    (upright,) = {images.upright for images in splits.values()}
    return {
        "orientation": ORIENTATIONS[upright],
        "sizes": {split: size(images) for split, images in splits.items()},
        "data": {split: fingerprint(images, root) for split, images in splits.items()},
        "files": {split: states(images) for split, images in splits.items()},
    }


def describe(splits: dict[str, ImageDataset]) -> str:
    """A line on what is in each split."""
    sizes = {split: size(images) for split, images in splits.items()}
    return ", ".join(f"{split}: {images:,} images of {classes:,} classes" for split, (images, classes) in sizes.items())


def remark(test_sets: list[ImageDataset]) -> str:
    """Lines on what is left out, and if the result of a search says nothing about the network; or an empty text."""
    lines = [line for line in dict.fromkeys(images.left_out for images in test_sets) if line]
    if len({images.classes[label] for images in test_sets for label in np.unique(images.labels)}) == 1:
        lines.append("All test images are of one class: any network finds the right one, R@1 is 100% by definition.")
    return "".join(f"{line}\n" for line in lines)
