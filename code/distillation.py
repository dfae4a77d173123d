"""Losses of embedding transfer: a student learns, without labels, how a teacher relates the images of a batch.

The relaxed contrastive loss (Kim et al., "Embedding Transfer with Label Relaxation", CVPR 2021, arXiv 2103.14908) and
its two baselines.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

FLOOR = 1e-12  # the smallest squared distance, as published: equal rows would give 0 / 0


class Distillation(nn.Module, ABC):
    """A loss of a student's embeddings, given the directions of a teacher's, which get no gradient.

    Half-precision embeddings are converted to float32.
    """

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """student (n, d) and teacher (n, D) of the same images -> scalar. Raises ValueError on other shapes."""
        if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 2:
            raise ValueError(
                "Expected embeddings (n, d) of a student and (n, D) of a teacher, of two or more images, "
                f"found {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, torch.float32)
            return self.loss(student.to(dtype), F.normalize(teacher.detach().to(dtype)))

    @abstractmethod
    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The scalar for embeddings in float32 or float64; the teacher's have unit length."""


class RelaxedContrastive(Distillation):
    """The relaxed contrastive loss of the distances d_ij of the student and D_ij of the teacher.

        1/n sum_i sum_j  w_ij r_ij^2 + (1 - w_ij) max(delta - r_ij, 0)^2
        w_ij = exp(-D_ij^2 / sigma),  r_ij = d_ij / mean_k d_ik

    The label w is near 1 for pairs that are near for the teacher: these attract each other. It is near 0 for far pairs,
    which repel each other up to delta. The means include k = i, where d_ik is 0; the gradient flows through them.
    """

    def __init__(self, sigma: float = 1.0, delta: float = 1.0):
        super().__init__()
        self.sigma = sigma
        self.delta = delta

    def loss(self, student, teacher):
        w = torch.exp(-distances(teacher).square() / self.sigma)  # (n, n)
        d = distances(student)
        r = d / d.mean(dim=1, keepdim=True)
        terms = w * r.square() + (1 - w) * F.relu(self.delta - r).square()  # 0 on the diagonal: w is 1 and r is 0
        return terms.sum() / len(terms)


class RKD(Distillation):
    """Relational knowledge distillation (Park et al., CVPR 2019): distances, and angles with twice their weight.

    Distances are divided by the mean over all pairs; the angle at i between j and k counts by its cosine.
    """

    def loss(self, student, teacher):
        distance_loss = F.smooth_l1_loss(relative(student), relative(teacher))
        angle_loss = F.smooth_l1_loss(cosines(student), cosines(teacher))
        return distance_loss + 2 * angle_loss


class PKT(Distillation):
    """Probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018): the divergence of similarities."""

    epsilon = 1e-7  # as published, as is the mean over all pairs instead of the sum

    def loss(self, student, teacher):
        p, q = self.shares(student), self.shares(teacher)  # (n, n)
        return (q * torch.log((q + self.epsilon) / (p + self.epsilon))).mean()

    def shares(self, x: torch.Tensor) -> torch.Tensor:
        """The similarities of each row of (n, d) to all rows, divided by their sum: (n, n)."""
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + self.epsilon)
        similarity = (x @ x.T + 1) / 2
        return similarity / similarity.sum(dim=1, keepdim=True)


def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_j - x_i of rows (n, d) as (n, n, d), and the squared lengths (n, n); equal rows give exactly 0."""
    apart = x - x[:, None]
    return apart, apart.square().sum(dim=2)


def distances(x: torch.Tensor) -> torch.Tensor:
    """The distances between rows (n, d) as (n, n), at least the root of FLOOR but on the diagonal."""
    _, squared = differences(x)
    return squared.clamp(min=FLOOR).sqrt() * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def relative(x: torch.Tensor) -> torch.Tensor:
    """The distances between rows (n, d), divided by their mean over all pairs of two rows: (n, n)."""
    d = distances(x)
    return d / (d.sum() / (len(x) * (len(x) - 1)))


def cosines(x: torch.Tensor) -> torch.Tensor:
    """The cosines of the angles at row i of (n, d) between j and k as (n, n, n); 0 where i equals j or k."""
    apart, squared = differences(x)
    directions = torch.where(squared > FLOOR, squared, torch.inf).rsqrt()[:, :, None] * apart
    return directions @ directions.mT


LOSSES: dict[str, Callable[[float, float], Distillation]] = {
    "Relaxed_Contra": RelaxedContrastive,
    "RKD": lambda sigma, delta: RKD(),
    "PKT": lambda sigma, delta: PKT(),
}


def create(name: str, sigma: float = 1.0, delta: float = 1.0) -> Distillation:
    """A loss by its name in LOSSES; sigma and delta are the relaxed contrastive loss's."""
    return LOSSES[name](sigma, delta)
