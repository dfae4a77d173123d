"""A pass over all images of a dataset: which can be read, how large they are, and which are there twice."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from dataset.files import BadFile, read_image
from dataset.loading import parallel


@dataclass
class Image:
    """What an image file holds: the digest of its bytes and its size, or why it cannot be read."""

    path: str
    digest: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def inspect(paths: list[str], workers: int) -> DataLoader:
    """An Image for each path, in their order; each file is decoded whole."""
    return parallel(_inspect, paths, workers)


def _inspect(path):
    try:
        _, height, width = read_image(path).shape
        return Image(path, hashlib.sha256(Path(path).read_bytes()).hexdigest(), width, height)
    except BadFile as error:
        return Image(path, problem=str(error))


def duplicates(parts: dict[str, list[Image]]) -> list[list[str]]:
    """The paths of images of the same bytes that are in more than one of the parts, a list for each such image."""
    where = defaultdict(dict)  # digest -> {part: first path}
    for part, images in parts.items():
        for image in images:
            if image.digest:
                where[image.digest].setdefault(part, image.path)
    return [list(paths.values()) for paths in where.values() if len(paths) > 1]
