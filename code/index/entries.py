"""What the entries of an index are: images or, by folder, the mean of the images that lie in one."""

import os

import torch

from proxy_anchor.vectors import comparable


def group(paths: list[str]) -> dict[str, list[str]]:
    """{folder: the images that lie in it}, by their paths."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(os.path.dirname(path) or ".", []).append(path)
    return folders


def stamp(paths: list[str]) -> str:
    """What tells whether one of these files has changed, or is another: their sizes and times of change in ns."""
    stats = sorted((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths))
    return " ".join(f"{size} {time}" for size, time in stats)  # takes half the memory of a list


def blocks(entries, size: int):
    """Parts {entry: its images} of pairs (entry, its images), in their order, each with `size` images or a few more."""
    part: dict[str, list[str]] = {}
    count = 0
    for entry, images in entries:
        part[entry] = images
        count += len(images)
        if count >= size:
            yield part
            part, count = {}, 0
    if part:
        yield part


def embeddings_of(entries: dict[str, list[str]], paths: list[str], embeddings: torch.Tensor, distance: str):
    """(entries, (E, D)) from the embeddings (N, D) of images at these paths; the entries without an image are left out.

    The mean of several images is of unit vectors, or of embeddings as they are; it has no unit length yet.
    """
    place = {path: i for i, path in enumerate(paths)}
    rows = {entry: [place[path] for path in images if path in place] for entry, images in entries.items()}
    rows = {entry: own for entry, own in rows.items() if own}
    if all(len(own) == 1 for own in rows.values()):
        return list(rows), embeddings[[own[0] for own in rows.values()]]
    vectors = comparable(embeddings, distance)
    return list(rows), torch.stack([vectors[own].double().mean(dim=0) for own in rows.values()])
