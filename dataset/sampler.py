"""The order of training images: batches of keys (seed, epoch, index), one for each image drawn.

The key is all that the randomness of an image's augmentation depends on, and (seed, epoch) all that the order
depends on, so neither the number of workers nor what ran before changes what the network sees.
"""

from itertools import islice

import numpy as np
from torch.utils.data import Sampler


class RandomBatches(Sampler):
    """Batches of a random permutation of the images; what does not fill a batch is left out, as published.

    Where several processes share the work, each yields its part, share = (rank, processes), of every batch.
    """

    def __init__(self, labels, batch_size: int, seed: int, share: tuple[int, int] = (0, 1)):
        if batch_size > len(labels):
            raise ValueError(
                f"The batch size {batch_size} is larger than the training set of {len(labels)} images; "
                "choose a smaller --batch-size"
            )
        self.labels = np.asarray(labels)
        self.batch_size = batch_size
        self.images_per_batch = batch_size
        self.seed = seed
        self.share = share
        self.steps = len(labels) // batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch, and how many of its batches are left out because they were done before."""
        self.epoch = epoch
        self.done = done

    def __len__(self):
        return self.steps - self.done

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        for indices in islice(self._batches(random), self.done, None):
            rank, processes = self.share
            yield [(self.seed, self.epoch, int(index)) for index in np.array_split(indices, processes)[rank]]

    def _batches(self, random):
        order = random.permutation(len(self.labels))
        return order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)


class BalancedBatches(RandomBatches):
    """Batches of (batch_size // images_per_class) classes x images_per_class images.

    Classes are drawn without replacement, their images with replacement, as published. Where images_per_class does not
    divide the batch size, batches are the smaller multiple (the published code re-cut them across classes by accident).
    """

    def __init__(self, labels, batch_size: int, images_per_class: int, seed: int, share: tuple[int, int] = (0, 1)):
        super().__init__(labels, batch_size, seed, share)
        if not 1 <= images_per_class <= batch_size:
            raise ValueError(f"--IPC {images_per_class} must be between 1 and the batch size {batch_size}")
        self.images_per_class = images_per_class
        self.classes_per_batch = batch_size // images_per_class
        self.images_per_batch = self.classes_per_batch * images_per_class
        order = np.argsort(self.labels, kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(self.labels[order])) + 1)  # indices of each class
        if self.classes_per_batch > len(self.members):
            raise ValueError(
                f"--batch-size {batch_size} with --IPC {images_per_class} needs {self.classes_per_batch} classes "
                f"a batch, the training set has {len(self.members)}; choose a smaller --batch-size or a larger --IPC"
            )

    def _batches(self, random):
        for _ in range(self.steps):
            classes = random.choice(len(self.members), self.classes_per_batch, replace=False)
            yield np.concatenate([random.choice(self.members[c], self.images_per_class) for c in classes])
