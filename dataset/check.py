"""A pass over all images of a data set: what can be read, how large it is, and what is there twice."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from dataset.files import BadFile, read_image


@dataclass
class Image:
    """What an image file holds: the digest of its bytes and its size, or why it cannot be read."""

    path: str
    digest: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


class Inspection(Dataset):
    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            _, height, width = read_image(path).shape
            return Image(path, hashlib.sha256(Path(path).read_bytes()).hexdigest(), width, height)
        except BadFile as error:
            return Image(path, problem=str(error))


def inspect(paths: list[str], workers: int) -> DataLoader:
    """An Image for each path, in their order; each file is decoded whole."""
    return each(Inspection(paths), workers)


def each(items: Dataset, workers: int) -> DataLoader:
    """The items in their order, made by workers; the global random numbers, of which a DataLoader takes, stay."""
    return DataLoader(items, batch_size=None, num_workers=workers, generator=torch.Generator())


def duplicates(parts: dict[str, list[Image]]) -> list[list[str]]:
    """The paths of images of the same bytes that are in more than one of the parts, a list for each such image."""
    where = defaultdict(dict)  # digest -> {part: first path}
    for part, images in parts.items():
        for image in images:
            if image.digest:
                where[image.digest].setdefault(part, image.path)
    return [list(paths.values()) for paths in where.values() if len(paths) > 1]
