"""Self-distillation: a network learns how the average of its own weights relates the images of a batch."""

import torch
import torch.nn.functional as F

from proxy_anchor.distillation import Distillation

TEMPERATURE, DECAY = 0.1, 0.999  # as published; the decay of the teacher's weights


class SelfDistillation(Distillation):
    """The cross-entropy of the student's similarities z_i z_j within the batch and those z'_i z'_j of its teacher.

        mean_i CE(softmax_j(z'_i z'_j / tau), softmax_j(z_i z_j / tau)),  j != i

    z and z' have unit length.
    """

    def loss(self, student, teacher):
        own, targets = (others(z @ z.T) / TEMPERATURE for z in (F.normalize(student), teacher))  # (n, n - 1)
        return F.cross_entropy(own, targets.softmax(dim=1))


def others(x: torch.Tensor) -> torch.Tensor:
    """(n, n) without its diagonal: (n, n - 1). From one element of the diagonal to the next it is n + 1 elements."""
    n = len(x)
    return x.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
