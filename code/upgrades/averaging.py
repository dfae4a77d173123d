"""The exponential moving average of a network's weights over the steps of a training."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from proxy_anchor.embedding import Embedder


class AveragedEmbedder(Embedder):
    """An embedder with the average of another's weights, w after a step: a = w, then a = d a + (1 - d) w.

    Buffers, such as BatchNorm's statistics, are averaged as weights are, because they belong to these weights; what
    never changes stays as it is, to the bit. The network is in training mode until it embeds images for an evaluation.
    """

    def __init__(self, embedder: Embedder, decay: float):
        self.source = embedder.network
        self.average = AveragedModel(self.source, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        super().__init__(self.average.module.train(), embedder.device, *embedder.settings)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the weights into the average after each step of the optimizer from now on."""
        optimizer.register_step_post_hook(self.after_step)

    def after_step(self, optimizer, *_):
        """Average, unless the step was skipped. With fp16, to know this of a fused optimizer forces a host sync."""
        if not getattr(optimizer, "found_inf", False):
            self.average.update_parameters(self.source)

    def state_dict(self) -> dict:
        return self.average.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.average.load_state_dict(state)
