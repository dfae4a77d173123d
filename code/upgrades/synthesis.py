"""Proxy Synthesis (Gu et al., AAAI 2021, arXiv 2103.15454): Proxy-Anchor with classes mixed from those of the batch."""

import numpy as np
import torch

from proxy_anchor import collectives
from proxy_anchor.sharded import SampledProxyAnchor, SeededProxyAnchor, positions
from proxy_anchor.vectors import norms

CONCENTRATION = 0.4  # of the Beta distribution, as published


class SyntheticProxyAnchor(SeededProxyAnchor):
    """losses.ProxyAnchor of a batch, with synthetic images and classes mixed from images i, j of two classes y_i, y_j.

        x' = lambda x_i + (1 - lambda) x_j,  p' = lambda p_{y_i} + (1 - lambda) p_{y_j},  lambda ~ Beta(0.4, 0.4)

    All vectors have unit length, before and after. j is the next image of another class in the batch. Images mixed from
    the same two classes are of the same synthetic class. ratio: synthetic images per image, 0 to 1. A step has one
    lambda, and forces a host sync.
    """

    jumps = 0  # of the bit generator, before lambda is drawn

    def __init__(self, *settings, ratio: float, **more):
        super().__init__(*settings, **more)
        self.ratio = ratio

    def terms(self, proxies, x, labels, rows, weights, num_classes: int) -> torch.Tensor:
        lam = self.draw_lambda()
        i, j = (pair[: round(self.ratio * len(x))] for pair in pairs(labels))  # (n,)
        # The m synthetic classes, and the number of each image's: (m,), (n,)
        classes, numbers = (labels[i] * num_classes + labels[j]).unique(return_inverse=True)
        first, second = (self.directions(proxies, c) for c in (classes // num_classes, classes % num_classes))
        mixed = lam * x[i] + (1 - lam) * x[j]  # (n, D)
        local = range(len(classes))[collectives.shard(len(classes))]  # this process computes the terms of these
        rows = torch.cat([rows, positions(numbers, local, len(proxies))])
        proxies = torch.cat([proxies, (lam * first + (1 - lam) * second)[local.start : local.stop]])
        weights = torch.cat([weights, weights.new_ones(len(local), 1)])
        x, labels = torch.cat([x, mixed / norms(mixed)]), torch.cat([labels, num_classes + numbers])
        return super().terms(proxies, x, labels, rows, weights, num_classes + len(classes))

    def directions(self, proxies: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The proxies (m, D) of these classes of the batch, of any process, with unit length."""
        rows = self.rows_of(classes)
        own = proxies[rows[rows >= 0]]
        found = own.new_zeros(len(rows), own.shape[1]).index_copy(0, (rows >= 0).nonzero()[:, 0], own / norms(own))
        return collectives.all_reduce_gradient(collectives.all_reduce(found))

    def draw_lambda(self) -> float:
        return np.random.Generator(self.bit_generator().jumped(self.jumps)).beta(CONCENTRATION, CONCENTRATION)


class SyntheticSampledProxyAnchor(SyntheticProxyAnchor, SampledProxyAnchor):
    """SyntheticProxyAnchor with a sample of the classes, which always has those of the batch, so all that are mixed."""

    jumps = 1  # the sample is drawn from the numbers before, and lambda must not depend on it


def pairs(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(i, j): each image of a batch, and the next one of another class, from the last on to the first again."""
    i = torch.arange(len(labels), device=labels.device)
    # (B, B): the steps from each image to each other one, and more than any of these where the class is the same
    j = torch.where(labels == labels[:, None], len(i), (i - i[:, None]) % len(i)).argmin(dim=1)
    others = labels != labels[j]  # none in a batch of one class
    return i[others], j[others]
