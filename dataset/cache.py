"""Decoded images in a memory-mapped file, so that a JPEG is decoded once per machine and not once per epoch."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch

from proxy_anchor.files import hold, is_intact, seal

from . import transforms
from .files import BadFile, image_size, read_image
from .loading import parallel

FORMAT = "RGB, 8 bits, height x width x 3, one after the other: 2"  # of images.bin; update it with the layout
VERSIONS = f"torch {torch.__version__}, Pillow {PIL.__version__}"  # of what resizes images
FILES = ("images.bin", "shapes.npy", "paths.json")
SEALS = "seals.json"  # of FILES, see files.seal
NAME, UNFINISHED = "[0-9a-f]" * 20, ".unfinished"


class Cache:
    """Decoded images, in a folder whose name is a hash of the format and of the files' paths, sizes and times.

    So a changed file leads to another folder, and to new decoding. upright: see files.to_tensor. transform: applied to
    the images before they are stored; its size(height, width) is that of its results.
    """

    def __init__(
        self,
        folder: Path,
        paths: list[str],
        upright: bool = False,
        transform: transforms.Evaluation | transforms.Reduction | None = None,
    ):
        self.paths, self.upright, self.transform = paths, upright, transform
        stats = [os.stat(path) for path in paths]
        identity = [
            FORMAT + ", upright" * upright + f", {transform} by {VERSIONS}" * (transform is not None),
            [[path, s.st_size, s.st_mtime_ns] for path, s in zip(map(os.path.abspath, paths), stats)],
        ]
        self.folder = Path(folder, hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20])
        self.opened: tuple[np.memmap, np.ndarray, np.ndarray] | None = None

    def __getstate__(self):
        return self.__dict__ | {"opened": None}  # each process maps the file itself

    def __getitem__(self, index: int) -> torch.Tensor:
        """The image as uint8 (3, H, W)."""
        if self.opened is None:
            shapes = np.load(self.folder / "shapes.npy")
            self.opened = np.memmap(self.folder / "images.bin", np.uint8, "c"), shapes, offsets(shapes)
        pixels, shapes, starts = self.opened
        height, width = shapes[index]
        image = pixels[starts[index] : starts[index + 1]].reshape(height, width, 3)
        return torch.from_numpy(image).permute(2, 0, 1)

    def build(self, workers: int, progress, report) -> None:
        """Decode all images unless the cache exists; wait if another process is building it.

        progress(batches, description) shows the progress; report(line) receives the required disk space and the other
        caches that may be removed. Raises OSError if the disk is too small, BadFile for an unreadable image or a
        damaged cache. The folder gets its name at the end, so an unfinished cache is never read.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.folder.parent)
        with hold(self.folder.with_suffix(".lock")):
            if self.folder.exists():
                self._check()
                return
            unfinished = self.folder.with_suffix(UNFINISHED)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            sizes = parallel(partial(image_size, upright=self.upright), self.paths, workers)
            size = self.transform.size if self.transform else lambda height, width: (height, width)
            shapes = np.array([size(height, width) for width, height in progress(sizes, "image sizes")]).reshape(-1, 2)
            starts = offsets(shapes)
            if others := _superseded(self.folder.parent, set(map(os.path.abspath, self.paths))):
                total = sum((other / "images.bin").stat().st_size for other in others)
                report(
                    f"Other caches of some of these images, or of deleted images, take {total / 1e9:.2f} GB; "
                    f"remove those that you no longer need: {', '.join(map(str, others))}"
                )
            need, free = int(starts[-1]), shutil.disk_usage(unfinished).free
            report(
                f"Decoding {len(self.paths):,} images into {self.folder}: {need / 1e9:.2f} GB, {free / 1e9:.2f} GB free"
            )
            if need > 0.98 * free:
                shutil.rmtree(unfinished)
                raise OSError(f"{self.folder.parent} has too little space: {need:,} bytes needed, {free:,} bytes free")
            with open(unfinished / "images.bin", "wb") as file:
                file.truncate(need)
            write = partial(_write, unfinished / "images.bin", self.upright, self.transform)
            images = list(zip(self.paths, starts, starts[1:]))
            for _ in progress(parallel(write, images, workers), "decoding"):
                pass
            np.save(unfinished / "shapes.npy", shapes)
            (unfinished / "paths.json").write_text(json.dumps(list(map(os.path.abspath, self.paths))))
            (unfinished / SEALS).write_text(json.dumps({name: seal(unfinished / name) for name in FILES}))
            for name in (*FILES, SEALS):
                with open(unfinished / name, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(unfinished, self.folder)

    def _check(self):
        """Raise BadFile if a file of the cache is missing or was changed."""
        try:
            seals = json.loads((self.folder / SEALS).read_text())
            changed = [name for name in FILES if not is_intact(self.folder / name, seals[name])]
            problem = f"{changed[0]} was changed" if changed else ""
        except (OSError, ValueError, LookupError, TypeError) as error:
            problem = str(error)
        if problem:
            raise BadFile(f"The cache {self.folder} is damaged ({problem}): delete this folder to rebuild it")


def _remove_unfinished(folder):
    """Remove leftovers of killed processes, whose locks are free."""
    for unfinished in folder.glob(NAME + UNFINISHED):
        with suppress(BlockingIOError), hold(unfinished.with_suffix(".lock"), wait=False):
            shutil.rmtree(unfinished, ignore_errors=True)


def _superseded(folder, paths):
    """Other caches in the folder that hold some of these images, or images that no longer exist."""
    caches = {}
    for file in sorted(folder.glob(f"{NAME}/paths.json")):
        with suppress(ValueError):  # damaged: its own run reports it
            caches[file.parent] = json.loads(file.read_text())
    return [
        cache
        for cache, images in caches.items()
        if not (paths.isdisjoint(images) and all(map(os.path.exists, images[:1])))
    ]


def offsets(shapes: np.ndarray) -> np.ndarray:
    """The start of each image (height, width) in the file, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(shapes.astype(np.int64).prod(axis=1) * 3)])


def _write(file, upright, transform, image):
    """Decode an image (path, start, end) and write it into the file at its offset."""
    path, start, end = image
    decoded = read_image(path, upright)
    pixels = (transform(decoded) if transform else decoded).permute(1, 2, 0).numpy().tobytes()
    if len(pixels) != end - start:
        raise BadFile(f"The image {path} changed while the cache was built: start again")
    with open(file, "rb+") as opened:
        opened.seek(start)
        opened.write(pixels)
