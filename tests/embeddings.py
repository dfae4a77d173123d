"""Random sets of embeddings for the tests of thresholds."""

import numpy as np
import torch

from proxy_anchor.vectors import Embeddings


def sides(*tensors):
    """The embeddings of the queries and, of four tensors, those of the gallery."""
    return [Embeddings(*tensors[i : i + 2]) for i in range(0, len(tensors), 2)]


def random_set(count, classes, seed, dimensions=8):
    """Embeddings and labels, which are neither consecutive nor sorted."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, dimensions))
    embeddings = centres[numbers] + random.normal(size=(count, dimensions))
    return torch.from_numpy(embeddings).float(), torch.from_numpy(numbers * 7 - 20)


SETS = {
    "themselves": random_set(130, 12, 0),
    "a gallery": (*random_set(70, 12, 1), *random_set(90, 12, 2)),
    "a gallery that lacks classes": (*random_set(70, 12, 1), *random_set(90, 7, 2)),
}
