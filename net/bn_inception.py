"""BN-Inception (Ioffe & Szegedy, 2015) under the flat Caffe names that its public ImageNet weights use."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .backbone import Backbone

# block: 1x1 | 3x3 (reduce, out) | double 3x3 (reduce, out) | pool, projection. A block without 1x1 convolution
# halves the resolution: its last 3x3 convolutions and its pool have stride 2, and the pooled input passes through.
BLOCKS = {
    "3a": (64, (64, 64), (64, 96), "avg", 32),
    "3b": (64, (64, 96), (64, 96), "avg", 64),
    "3c": (None, (128, 160), (64, 96), "max", None),
    "4a": (224, (64, 96), (96, 128), "avg", 128),
    "4b": (192, (96, 128), (96, 128), "avg", 128),
    "4c": (160, (128, 160), (128, 160), "avg", 128),
    "4d": (96, (128, 192), (160, 192), "avg", 128),
    "4e": (None, (128, 192), (192, 256), "max", None),
    "5a": (352, (192, 320), (160, 224), "avg", 128),
    "5b": (352, (192, 320), (192, 224), "max", 128),
}
AVG_POOL = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)
MAX_POOL = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
MAX_POOL_HALVING = partial(F.max_pool2d, kernel_size=3, stride=2, ceil_mode=True)


class Conv(NamedTuple):
    """A convolution followed by BatchNorm and ReLU."""

    name: str
    width: int
    kernel: int
    stride: int = 1


STEM = [
    Conv("conv1_7x7_s2", 64, 7, 2),
    MAX_POOL_HALVING,
    Conv("conv2_3x3_reduce", 64, 1),
    Conv("conv2_3x3", 192, 3),
    MAX_POOL_HALVING,
]


def block_branches(block):
    """The branches of a block, in the order in which they are concatenated; a branch is a list of Convs and pools."""
    one, (three_reduce, three), (double_reduce, double), pool, projection = BLOCKS[block]
    name = f"inception_{block}_".__add__
    stride = 1 if one else 2
    pool = AVG_POOL if pool == "avg" else MAX_POOL if one else MAX_POOL_HALVING
    branches = [
        [Conv(name("3x3_reduce"), three_reduce, 1), Conv(name("3x3"), three, 3, stride)],
        [
            Conv(name("double_3x3_reduce"), double_reduce, 1),
            Conv(name("double_3x3_1"), double, 3),
            Conv(name("double_3x3_2"), double, 3, stride),
        ],
        [pool, Conv(name("pool_proj"), projection, 1)] if projection else [pool],
    ]
    return [[Conv(name("1x1"), one, 1)], *branches] if one else branches


class BNInception(Backbone):
    """BN-Inception without its classifier; `features` maps images (B, 3, H, W) to (B, 1024, H', W')."""

    num_features = 1024
    mean, std, bgr = (104.0, 117.0, 128.0), (1.0, 1.0, 1.0), True  # Caffe's format
    unused = ("last_linear",)

    def __init__(self):
        super().__init__()
        channels = self._add(STEM, 3)
        for block in BLOCKS:
            channels = sum(self._add(branch, channels) for branch in block_branches(block))
        self.last_linear = nn.Linear(channels, 1000)  # never run; its keys are in every checkpoint

    def _add(self, branch, channels):
        """Register the branch's layers under their flat names; returns the branch's width."""
        for step in branch:
            if isinstance(step, Conv):
                self.add_module(
                    step.name, nn.Conv2d(channels, step.width, step.kernel, step.stride, padding=step.kernel // 2)
                )
                # Momentum 0.9 as in Caffe: SOP and In-shop train BatchNorm, and the published results depend on it.
                self.add_module(f"{step.name}_bn", nn.BatchNorm2d(step.width, eps=1e-5, momentum=0.9))
                channels = step.width
        return channels

    def _run(self, branch, x):
        for step in branch:
            if isinstance(step, Conv):
                x = F.relu(self.get_submodule(f"{step.name}_bn")(self.get_submodule(step.name)(x)))
            else:
                x = step(x)
        return x

    def features(self, images):
        x = self._run(STEM, images)
        for block in BLOCKS:
            x = torch.cat([self._run(branch, x) for branch in block_branches(block)], dim=1)
        return x
