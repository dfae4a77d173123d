"""The entries of an index: images or, by folder, the mean of the images in it."""

import os

import torch

from proxy_anchor.vectors import comparable


def group(paths: list[str]) -> dict[str, list[str]]:
    """{folder: the images in it}, from their paths."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(os.path.dirname(path) or ".", []).append(path)
    return folders


def stamp(paths: list[str]) -> str:
    """The sizes and times of change (ns) of these files: it differs where a file has changed or is another."""
    stats = sorted((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths))
    return " ".join(f"{size} {time}" for size, time in stats)  # takes half the memory of a list


def within(path: str, folder: str) -> bool:
    """Whether a path is this folder, or in it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def relocate(path: str, old: str, new: str) -> str:
    """The path, or the one at the same place in the folder `new` if it is within the folder `old`."""
    return os.path.normpath(os.path.join(new, os.path.relpath(path, old))) if within(path, old) else path


def blocks(entries, size: int):
    """Divide pairs (entry, its images) into dicts {entry: its images} with `size` images each, or a few more."""
    block: dict[str, list[str]] = {}
    count = 0
    for entry, images in entries:
        block[entry] = images
        count += len(images)
        if count >= size:
            yield block
            block, count = {}, 0
    if block:
        yield block


def embeddings_of(entries: dict[str, list[str]], paths: list[str], embeddings: torch.Tensor, distance: str):
    """(entries, (E, D)) from the embeddings (N, D) of images at these paths; entries without an image are left out.

    The mean of several images is of unit vectors, or of embeddings as they are; it has no unit length yet.
    """
    row_of = {path: row for row, path in enumerate(paths)}
    rows = {entry: [row_of[path] for path in images if path in row_of] for entry, images in entries.items()}
    rows = {entry: indices for entry, indices in rows.items() if indices}
    if all(len(indices) == 1 for indices in rows.values()):
        return list(rows), embeddings[[indices[0] for indices in rows.values()]]
    vectors = comparable(embeddings, distance)
    return list(rows), torch.stack([vectors[indices].double().mean(dim=0) for indices in rows.values()])
