"""The upgrades that a run has chosen, as train.py uses them."""

from typing import Any

import torch

from proxy_anchor import collectives
from proxy_anchor.embedding import Embedder
from proxy_anchor.upgrades.averaging import AveragedEmbedder
from proxy_anchor.upgrades.self_distillation import DECAY, SelfDistillation
from proxy_anchor.upgrades.threshold_margin import threshold_margin


class Upgrades:
    """What is added to the loss, to the state of a run and to its evaluation: nothing where all settings are 0.

    threshold_margin, self_distill: the weights of these terms. average_weights: the decay of the average.
    """

    def __init__(self, embedder: Embedder, threshold_margin: float, self_distill: float, average_weights: float):
        self.embedder, self.margin_weight, self.distillation_weight = embedder, threshold_margin, self_distill
        self.distillation = SelfDistillation()
        self.teacher = AveragedEmbedder(embedder, DECAY) if self_distill else None
        self.average = AveragedEmbedder(embedder, average_weights) if average_weights else None

    def added(self, loss, images, embeddings, labels) -> torch.Tensor:
        """The loss with the chosen terms; images of this process, embeddings (B, D) and labels (B,) of the batch."""
        if self.margin_weight:
            loss = loss + self.margin_weight * threshold_margin(embeddings, labels)
        if self.teacher:
            with torch.no_grad():
                targets = collectives.gather_shards(self.teacher(images), len(embeddings))
            loss = loss + self.distillation_weight * self.distillation(embeddings, targets)
        return loss

    @property
    def state(self) -> dict[str, AveragedEmbedder]:
        """The parts of last.pth."""
        parts = {"teacher": self.teacher, "average": self.average}
        return {name: part for name, part in parts.items() if part}

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the weights after each step of the optimizer from now on."""
        for averaged in self.state.values():
            averaged.attach_optimizer(optimizer)

    @property
    def network(self) -> Any:
        """The net.EmbeddingNet that is evaluated and saved, if it is another than the one that trains."""
        averaged = self.average and self.average.network
        return getattr(averaged, "network", averaged)  # with --frozen it is a Head, and part of the network to save

    def evaluated(self) -> Embedder:
        """The embedder of the results of an epoch, after which all processes have the averages of the first one."""
        for averaged in self.state.values():
            collectives.broadcast_module(averaged.network)  # as the network that trains, see training.train_one_epoch
        return self.average or self.embedder
