"""DataLoaders for training and evaluation, and parallel passes over files.

Training samples keys (seed, epoch, index), or (seed, epoch, view, index) with several views per image. An image's
augmentation depends only on its key, and the order only on (seed, epoch), so neither the number of workers nor earlier
epochs change the network's input.
"""

import signal
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .files import BadFile

if TYPE_CHECKING:  # images imports this module
    from .images import ImageDataset


class RandomBatches(Sampler):
    """Batches of a random permutation of the images; an incomplete last batch is dropped, as published.

    With several views, a batch has the first views of all its images, then the second views, and so on. With several
    processes, share = (rank, processes), each yields its shard of every batch.
    """

    def __init__(self, labels, batch_size: int, seed: int, share: tuple[int, int] = (0, 1), views: int = 1):
        if batch_size > len(labels):
            raise ValueError(
                f"The batch size {batch_size} is larger than the training set of {len(labels)} images; "
                "choose a smaller --batch-size"
            )
        self.labels = np.asarray(labels)
        self.batch_size = batch_size
        self.views: list[tuple] = [()] if views == 1 else [(view,) for view in range(views)]  # components of a key
        self.images_per_batch = batch_size * views
        self.seed = seed
        self.share = share
        self.steps = len(labels) // batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Set the epoch and the number of its batches that are already done, which are skipped."""
        self.epoch = epoch
        self.done = done

    def __len__(self):
        return self.steps - self.done

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        for indices in islice(self._batches(random), self.done, None):
            keys = [(self.seed, self.epoch, *view, int(index)) for view in self.views for index in indices]
            rank, processes = self.share
            yield [keys[i] for i in np.array_split(np.arange(len(keys)), processes)[rank]]

    def _batches(self, random):
        order = random.permutation(len(self.labels))
        return order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)


class BalancedBatches(RandomBatches):
    """Batches of (batch_size // images_per_class) classes x images_per_class images.

    Classes are drawn without replacement, their images with replacement, as published. Where images_per_class does not
    divide the batch size, batches are smaller (the published code accidentally split classes across batches).
    """

    def __init__(
        self, labels, batch_size: int, images_per_class: int, seed: int, share: tuple[int, int] = (0, 1), views: int = 1
    ):
        super().__init__(labels, batch_size, seed, share, views)
        if not 1 <= images_per_class <= batch_size:
            raise ValueError(f"--IPC {images_per_class} must be between 1 and the batch size {batch_size}")
        self.images_per_class = images_per_class
        self.classes_per_batch = batch_size // images_per_class
        self.images_per_batch = self.classes_per_batch * images_per_class * views
        order = np.argsort(self.labels, kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(self.labels[order])) + 1)  # indices of each class
        if self.classes_per_batch > len(self.members):
            raise ValueError(
                f"--batch-size {batch_size} with --IPC {images_per_class} needs {self.classes_per_batch} classes per "
                f"batch, but the training set has {len(self.members)}; choose a smaller --batch-size or a larger --IPC"
            )

    def _batches(self, random):
        for _ in range(self.steps):
            classes = random.choice(len(self.members), self.classes_per_batch, replace=False)
            yield np.concatenate([random.choice(self.members[c], self.images_per_class) for c in classes])


def train_loader(
    images: "ImageDataset",
    batch_size: int,
    images_per_class: int | None,
    seed: int,
    workers: int,
    share: tuple[int, int] = (0, 1),
    views: int = 1,
) -> DataLoader:
    """Batches (images (B, 3, H, W) uint8, labels (B,)); call batch_sampler.set_epoch before each epoch.

    share = (rank, processes): the process's shard of every batch. views: the number of independent augmentations of
    each of the batch_size images in a batch.
    """
    if images_per_class is None:
        batches = RandomBatches(images.labels, batch_size, seed, share, views)
    else:
        batches = BalancedBatches(images.labels, batch_size, images_per_class, seed, share, views)
    return DataLoader(images, batch_sampler=batches, **_worker_settings(workers))


def eval_loader(images: "ImageDataset", batch_size: int, workers: int, share=(0, 1)) -> DataLoader:
    """Batches of all images in order, or of the shard of process rank in share = (rank, processes).

    Raises BadFile if all images were left out.
    """
    if not len(images):
        raise BadFile(f"{images.name}: all {images.total:,} images are left out, so there is nothing to evaluate")
    rank, processes = share
    shard = np.array_split(np.arange(len(images)), processes)[rank]
    return DataLoader(images, sampler=shard.tolist(), batch_size=batch_size, **_worker_settings(workers))


def _worker_settings(workers):
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _ignore_signals if workers else None,
        "generator": torch.Generator(),  # each pass draws a number from it, not from the global generator
    }


def _ignore_signals(worker: int) -> None:
    """Keep a worker alive on signals to the whole job (Ctrl-C, SLURM): the main process finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # a last resort, if the main process never ends it


def parallel(function, items: list, workers: int) -> DataLoader:
    """function(item) of each item, in order, by worker processes; leaves the global random state unchanged."""
    return DataLoader(_Results(function, items), batch_size=None, num_workers=workers, generator=torch.Generator())


class _Results(Dataset):
    def __init__(self, function, items):
        self.function = function
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.function(self.items[index])
