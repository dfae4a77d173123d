"""Proxy Synthesis (Gu et al., AAAI 2021, arXiv 2103.15454): Proxy-Anchor with classes mixed from those of the batch."""

import numpy as np
import torch

from proxy_anchor import collectives
from proxy_anchor.sharded import ShardedProxyAnchor
from proxy_anchor.vectors import norms

CONCENTRATION = 0.4  # of the Beta distribution, as published


class SyntheticProxyAnchor(ShardedProxyAnchor):
    """losses.ProxyAnchor of a batch, with synthetic images and classes mixed from images i, j of two classes y_i, y_j.

        x' = lambda x_i + (1 - lambda) x_j,  p' = lambda p_{y_i} + (1 - lambda) p_{y_j},  lambda ~ Beta(0.4, 0.4)

    All vectors have unit length, before and after. j is the next image of another class in the batch. Images mixed from
    the same two classes are of the same synthetic class. ratio: synthetic images per image, 0 to 1. A step has one
    lambda, which depends on the seed and the number of the step alone. A step forces a host sync.
    """

    step: torch.Tensor

    def __init__(self, num_classes, embedding_size, margin, alpha, ratio: float, seed: int):
        super().__init__(num_classes, embedding_size, margin, alpha)
        self.ratio, self.seed = ratio, seed
        self.register_buffer("step", torch.tensor(0))

    def local_terms(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        random = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, int(self.step)]))
        share = random.beta(CONCENTRATION, CONCENTRATION)
        self.step += 1
        i, j = (pair[: round(self.ratio * len(x))] for pair in pairs(labels))  # (n,)
        # The m synthetic classes, and the number of each image's: (m,), (n,)
        classes, numbers = (labels[i] * self.num_classes + labels[j]).unique(return_inverse=True)
        first, second = (self.directions(c) for c in (classes // self.num_classes, classes % self.num_classes))
        mixed = share * x[i] + (1 - share) * x[j]  # (n, D)
        x = torch.cat([x, mixed / norms(mixed)])
        local = range(len(classes))[collectives.shard(len(classes))]  # this process computes the terms of these
        proxies = torch.cat([self.proxies, (share * first + (1 - share) * second)[local.start : local.stop]])
        rows = torch.cat([positions(labels, self.classes), positions(numbers, local, len(self.proxies))])
        labels = torch.cat([labels, self.num_classes + numbers])
        return self.terms(proxies, x, labels, rows, x.new_ones(len(proxies), 1), self.num_classes + len(classes))

    def directions(self, classes: torch.Tensor) -> torch.Tensor:
        """The proxies (m, D) of these classes, of any process, with unit length."""
        rows = positions(classes, self.classes)
        proxies = self.proxies[rows[rows >= 0]]
        found = self.proxies.new_zeros(len(rows), proxies.shape[1])
        found = found.index_copy(0, (rows >= 0).nonzero()[:, 0], proxies / norms(proxies))
        return collectives.all_reduce_gradient(collectives.all_reduce(found))


def pairs(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(i, j): each image of a batch, and the next one of another class, from the last on to the first again."""
    i = torch.arange(len(labels), device=labels.device)
    # (B, B): the steps from each image to each other one, and more than any of these where the class is the same
    j = torch.where(labels == labels[:, None], len(i), (i - i[:, None]) % len(i)).argmin(dim=1)
    others = labels != labels[j]  # none in a batch of one class
    return i[others], j[others]


def positions(numbers: torch.Tensor, among: range, offset: int = 0) -> torch.Tensor:
    """The position of each number in the range, from the offset on; -1 for others."""
    return torch.where((numbers >= among.start) & (numbers < among.stop), numbers - among.start + offset, -1)
