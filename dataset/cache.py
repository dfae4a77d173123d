"""Decoded images in a memory-mapped file, so that a JPEG is decoded once per machine and not once per epoch."""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataset.files import BadFile, image_size, read_image
from dataset.loading import parallel

FORMAT = "RGB, 8 bits, height x width x 3, one after the other: 1"  # of images.bin; whoever changes it, changes this


class Cache:
    """The decoded images of these files, in a folder named by their paths, sizes and times and by the format.

    Where one of them changes, so does the name, and the images are decoded again. upright: see files.to_tensor.
    """

    def __init__(self, folder: Path, paths: list[str], upright: bool = False):
        self.paths, self.upright = paths, upright
        stats = [os.stat(path) for path in paths]
        identity = [
            FORMAT + ", upright" * upright,
            [[path, s.st_size, s.st_mtime_ns] for path, s in zip(map(os.path.abspath, paths), stats)],
        ]
        self.folder = Path(folder, hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20])
        self.opened = None

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
        """Decode all images unless that has been done; if another process is doing it, wait.

        progress(batches, description) shows the progress, report(line) says how much disk space is needed and which
        other caches in the folder may be removed.
        Raises OSError if the disk is too small, BadFile for an image that cannot be read and for a cache that is
        damaged. The folder gets its name at the end, so what is unfinished is never read.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.folder.parent)
        with open(self.folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.folder.exists():
                self._check()
                return
            unfinished = self.folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            sizes = parallel(partial(image_size, upright=self.upright), self.paths, workers)
            shapes = np.array([(height, width) for width, height in progress(sizes, "image sizes")]).reshape(-1, 2)
            starts = offsets(shapes)
            if others := _superseded(self.folder.parent, set(map(os.path.abspath, self.paths))):
                size = sum((other / "images.bin").stat().st_size for other in others)
                report(
                    f"Other caches of some of these images, or of images that are gone, take {size / 1e9:.2f} GB; "
                    f"remove those that you no longer need: {', '.join(map(str, others))}"
                )
            need, free = int(starts[-1]), shutil.disk_usage(unfinished).free
            report(
                f"Decoding {len(self.paths):,} images into {self.folder}: {need / 1e9:.2f} GB, {free / 1e9:.2f} GB free"
            )
            if need > 0.98 * free:
                shutil.rmtree(unfinished)
                raise OSError(f"{self.folder.parent} has too little room: {need:,} bytes are needed, {free:,} are free")
            with open(unfinished / "images.bin", "wb") as file:
                file.truncate(need)
            write = partial(_write, unfinished / "images.bin", self.upright)
            images = list(zip(self.paths, starts, starts[1:]))
            for _ in progress(parallel(write, images, workers), "decoding"):
                pass
            np.save(unfinished / "shapes.npy", shapes)
            (unfinished / "paths.json").write_text(json.dumps(list(map(os.path.abspath, self.paths))))
            for name in ("images.bin", "shapes.npy", "paths.json"):
                with open(unfinished / name, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(unfinished, self.folder)

    def _check(self):
        """Raise BadFile where files in the folder are gone or cut short, as by who made room on the disk."""
        try:
            expected, found = (
                offsets(np.load(self.folder / "shapes.npy"))[-1],
                os.path.getsize(self.folder / "images.bin"),
            )
            problem = "" if found == expected else f"images.bin has {found:,} bytes, expected {expected:,}"
        except (OSError, EOFError, ValueError) as error:
            problem = str(error)
        if problem:
            raise BadFile(f"The cache {self.folder} is damaged ({problem}): delete this folder, and it is made again")


def _remove_unfinished(folder):
    """Remove what killed processes left: their locks are free."""
    for unfinished in folder.glob("*.unfinished"):
        with open(unfinished.with_suffix(".lock"), "w") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(unfinished, ignore_errors=True)


def _superseded(folder, paths):
    """The caches in the folder that hold some of these images, or images that are gone."""
    found = {file.parent: json.loads(file.read_text()) for file in sorted(folder.glob("*/paths.json"))}
    return [
        cache for cache, images in found.items()
        if cache.suffix != ".unfinished" and not (paths.isdisjoint(images) and all(map(os.path.exists, images[:1])))
    ]  # fmt: skip


def offsets(shapes: np.ndarray) -> np.ndarray:
    """Where each image of these (height, width) begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(shapes.astype(np.int64).prod(axis=1) * 3)])


def _write(file, upright, image):
    """Decode an image (path, start, end) and write it to its place in the file."""
    path, start, end = image
    pixels = read_image(path, upright).permute(1, 2, 0).numpy().tobytes()
    if len(pixels) != end - start:
        raise BadFile(f"The image {path} has changed while the cache was made: start again")
    with open(file, "rb+") as opened:
        opened.seek(start)
        opened.write(pixels)
