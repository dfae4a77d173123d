"""The pooled features of a frozen backbone, on disk, so that each image runs through it once and not once per epoch."""

import hashlib
import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from proxy_anchor import collectives, weights
from proxy_anchor.files import LOCK, hold, printable, quantity, replacing
from proxy_anchor.index.entries import stamp
from proxy_anchor.runs import logbook
from proxy_anchor.spec import NetworkSpec

EmbeddingNet = Any  # of net.embedding_net; this package does not import net
LIBRARIES = ("torch", "torchvision", "pillow", "timm")  # that decode images and compute features
BLOCK = 2**12  # images that are embedded before they are written


class FeatureStore:
    """The features (C,) of images, known by their paths, sizes and times of change, in the files of a folder.

    A file has the features of a block of images and is complete at any moment, so a killed process loses one block.
    Where an image has changed, a later block has its features. Raises ValueError for a damaged file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.row_of: dict[tuple[str, str], int] = {}  # of (path, stamp)
        self.blocks: list[torch.Tensor] = []
        self.files = 0
        while self._file().exists():
            self._append(self._read())

    def _file(self) -> Path:
        """The file of the next block."""
        return self.folder / f"{self.files}.pth"

    def _read(self) -> dict:
        try:
            return weights.read(self._file())
        except ValueError as error:
            raise ValueError(f"{error}; delete the folder {self.folder} to embed its images again") from error

    def _append(self, block: dict) -> None:
        rows = range(len(self.row_of), len(self.row_of) + len(block["images"]))
        self.row_of |= dict(zip(block["images"], rows))
        self.blocks.append(block["features"])
        self.files += 1

    def add(self, images: list[tuple[str, str]], features: torch.Tensor) -> None:
        """Write the features (n, C) of images (path, stamp) that are not yet in the store."""
        block = {"images": images, "features": features}
        with replacing(self._file()) as file:
            torch.save(block, file)
        self._append(block)

    def __contains__(self, image: tuple[str, str]) -> bool:
        return image in self.row_of

    def take(self, images: list[tuple[str, str]]) -> torch.Tensor:
        """The features (N, C) of images (path, stamp)."""
        return torch.cat(self.blocks)[[self.row_of[image] for image in images]]


def folder(parent: Path, spec: NetworkSpec, network: EmbeddingNet) -> Path:
    """The folder of the features of a network's backbone, named by a hash of all they depend on besides the images.

    That is its weights, how it sees images, and the versions of the libraries that decode and compute.
    """
    state = {name: x for name, x in network.model.state_dict().items() if not name.startswith("embedding.")}
    seen = replace(spec, embedding_size=1, l2_norm=1, head="linear", distance="cosine", backbone_only=True)
    versions = logbook.versions()
    identity = [weights.digest(state), seen.to_record(), {name: versions.get(name) for name in LIBRARIES}]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return parent / f"{spec.model}_{name}"


def of_images(folder: Path, paths: list[str], size: int, embed) -> torch.Tensor:
    """The features (N, size) of images; those that the store in the folder lacks are computed and added to it.

    embed(paths) -> (n, size): the features of images or, with several processes, of this one's shard of them. The first
    process alone reads and writes the store; another run that uses it waits. Raises as FeatureStore.
    """
    processes = collectives.world()
    opened: Any = _locked_store(folder) if processes.rank == 0 else nullcontext()
    with opened as store:
        # Taken before the images are read, so later changes are detected next time.
        images = collectives.from_rank_zero(lambda: [(os.path.abspath(path), stamp([path])) for path in paths])
        missing = collectives.from_rank_zero(lambda: [image for image in dict.fromkeys(images) if image not in store])
        if missing:
            print(
                f"Embedding {quantity(len(missing), 'image')} of {len(images):,} once; the features of all take "
                f"{4 * size * len(images) / 1e6:,.0f} MB in {printable(str(folder))}"
            )
        for start in range(0, len(missing), BLOCK):
            block = missing[start : start + BLOCK]
            features = torch.cat(processes.all_gather(embed([path for path, _ in block]).cpu()))
            if store:
                store.add(block, features)
        features = store.take(images) if store else torch.empty(len(images), size)
        return processes.broadcast(features, 0)


@contextmanager
def _locked_store(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / LOCK):
        yield FeatureStore(folder)
