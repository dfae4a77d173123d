"""The images of a split as a torch Dataset."""

import hashlib
import os
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from proxy_anchor.files import quantity
from proxy_anchor.spec import ORIENTATIONS

from . import transforms
from .cache import Cache
from .check import inspect
from .files import read_image


class ImageDataset(Dataset):
    """Images of a split; an item is (transform(image), label) of a uint8 image (3, H, W) and its class number.

    The key of an item is its index or, for random transforms, (seed, epoch, index) or (seed, epoch, view, index), which
    alone determine the random numbers.

    groups (N,): group numbers (of bursts, cameras, ...) or None. A query is not compared with images of its group.
    features (N, C): if set, an item is (features (C,), label), and no image is read.
    upright: whether images are rotated according to EXIF, see files.to_tensor.
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
        self.left_out = ""  # a line on skipped files of the folders, see files.describe_skipped
        self.cache: Cache | None = None
        self.features: torch.Tensor | None = None
        self.total = len(paths)
        self.numbers = np.arange(len(paths))  # within the whole split, even if some images are left out

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index = key[-1] if isinstance(key, tuple) else key
        if self.features is not None:
            return self.features[index], int(self.labels[index])
        image = read_image(self.paths[index], self.upright) if self.cache is None else self.cache[index]
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                if isinstance(key, tuple):
                    entropy = (*key[:-1], int(self.numbers[index]))
                    torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                image = self.transform(image)
        return image, int(self.labels[index])

    def use_cache(self, folder: Path, workers: int, progress, report) -> None:
        """Read the images from a Cache in this folder, which is built if necessary; see Cache.build.

        Evaluation's crops are cached as they are. Photographs of one's own, which may be large, are reduced to what
        training crops need; those of the benchmarks, which are not upright, keep every pixel.
        """
        stored: transforms.Evaluation | transforms.Reduction | None = None
        rest = self.transform
        if isinstance(self.transform, transforms.Evaluation):
            stored, rest = self.transform, None
        elif self.upright and isinstance(self.transform, transforms.RandomCrop):
            stored = transforms.Reduction(self.transform.area)
        cache = Cache(folder, self.paths, self.upright, stored)
        cache.build(workers, progress, report)
        self.cache, self.transform = cache, rest

    def find_bad(self, workers: int) -> dict[str, str]:
        """{path: reason} of unreadable images; decodes all images."""
        return {image.path: image.problem for image in inspect(self.paths, workers, self.upright) if image.problem}

    def leave_out(self, paths) -> None:
        """Remove these images; call it before use_cache. The other images keep their numbers."""
        self._select(np.array([path not in paths for path in self.paths], dtype=bool))

    def select_classes(self, mask: np.ndarray, name: str, transform) -> "ImageDataset":
        """A dataset of the classes in the mask (num_classes,), whose images keep their numbers.

        Call it before use_cache.
        """
        subset = copy(self)
        subset.name, subset.transform = name, transform
        subset._select(mask[self.labels])
        subset.labels = (np.cumsum(mask) - 1)[subset.labels]
        subset.classes = [label for label, selected in zip(self.classes, mask) if selected]
        subset.total = len(subset)
        return subset

    def _select(self, mask: np.ndarray) -> None:
        """Remove all images outside the mask (N,)."""
        self.paths = [path for path, selected in zip(self.paths, mask) if selected]
        self.labels, self.numbers = self.labels[mask], self.numbers[mask]
        if self.groups is not None:
            self.groups = self.groups[mask]


def size(images: ImageDataset) -> tuple[int, int]:
    """(number of images, number of classes with images)."""
    return len(images), len(np.unique(images.labels))


def fingerprint(images: ImageDataset, root: str | Path) -> str:
    """A digest of the images' paths relative to the root, classes and groups."""
    base = root if os.path.isdir(root) else os.path.dirname(root) or "."
    digest = hashlib.sha256()
    for path, label in zip(images.paths, images.labels):
        digest.update(os.fsencode(f"{os.path.relpath(path, base)}\n{images.classes[label]}\n"))
    if images.groups is not None:
        digest.update(np.asarray(images.groups, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def stamp(images: ImageDataset) -> str:
    """A digest of the files' sizes and modification times, which reveals changed files of the same names."""
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, images.paths)]
    return hashlib.sha256(np.array(stats, dtype="<i8").tobytes()).hexdigest()[:16]


def record(splits: dict[str, ImageDataset], root: str | Path) -> dict:
    """The data section of a run's config: the orientation; the size, fingerprint and stamp of each split."""
    (upright,) = {images.upright for images in splits.values()}
    return {
        "orientation": ORIENTATIONS[upright],
        "sizes": {split: size(images) for split, images in splits.items()},
        "data": {split: fingerprint(images, root) for split, images in splits.items()},
        "files": {split: stamp(images) for split, images in splits.items()},
    }


def describe(splits: dict[str, ImageDataset]) -> str:
    """A line on the size of each split."""
    sizes = [(split, *size(images)) for split, images in splits.items()]
    return ", ".join(
        f"{split}: {quantity(images, 'image')} of {quantity(classes, 'class')}" for split, images, classes in sizes
    )


def remark(test_sets: list[ImageDataset]) -> str:
    """Lines on skipped files, and on test sets for which any network reaches 100%; "" if there are none."""
    lines = [line for line in dict.fromkeys(images.left_out for images in test_sets) if line]
    if len({images.classes[label] for images in test_sets for label in np.unique(images.labels)}) == 1:
        lines.append("All test images belong to the same class, so R@1 is 100% for any network.")
    return "".join(f"{line}\n" for line in lines)
