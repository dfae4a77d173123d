"""What the embedding network needs from a backbone; nothing outside net/ depends on which one it is."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Backbone(nn.Module):
    """Mix-in of a backbone, which adds num_features, C, and features(images (B, 3, H, W)) -> (B, C, H', W').

    mean, std, bgr: how its ImageNet weights expect images, see Normalize. epsilon: of the l2 norm that follows.
    unused: its layers that never run. remark: a line on what a file of weights holds besides the backbone's.
    """

    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    bgr = False
    epsilon = 1e-12
    unused: tuple[str, ...] = ("fc",)
    remark = ""
    num_features: int
    features: Callable[[torch.Tensor], torch.Tensor]
    embedding: nn.Linear  # EmbeddingNet adds it

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, C): global average + global max pooling, as published."""
        features = self.features(images)  # (B, C, H', W')
        return (F.adaptive_avg_pool2d(features, 1) + F.adaptive_max_pool2d(features, 1)).flatten(1)

    def norms(self) -> list[nn.Module]:
        """The layers that --bn-freeze freezes: BatchNorm of every kind; networks without it have none."""
        return [module for module in self.modules() if isinstance(module, _BatchNorm)]

    def synchronize_norms(self) -> None:
        """Let its BatchNorm layers take their statistics over all processes."""
        nn.SyncBatchNorm.convert_sync_batchnorm(self)


class Normalize(nn.Module):
    """uint8 RGB images (B, 3, H, W) -> float32 as a backbone's ImageNet weights expect them.

    bgr: Caffe's format, channels blue, green, red, values 0-255; else red, green, blue, values 0-1. The mean is then
    subtracted, and the result divided by std. Neither is in the state dict: published checkpoints lack them.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], bgr: bool):
        super().__init__()
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.flip(1).float() if self.bgr else images.float() / 255
        return (images - self.mean) / self.std
