"""ResNet-18, 34, 50 and 101 (He et al., 2016), as feature extractors, with the layer names of torchvision's weights.

torchvision has the same networks, but takes as long to import as torch, which a search in an index would wait for.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .backbone import Backbone

# {network: (kernel sizes of a block's convolutions, blocks in each stage)}
LAYERS = {
    "resnet18": ((3, 3), (2, 2, 2, 2)),
    "resnet34": ((3, 3), (3, 4, 6, 3)),
    "resnet50": ((1, 3, 1), (3, 4, 6, 3)),
    "resnet101": ((1, 3, 1), (3, 4, 23, 3)),
}
WIDTHS = (64, 128, 256, 512)  # channels inside the blocks of each stage
EXPANSION = 4  # of the channels, by the last convolution of a block with three


class Block(nn.Module):
    """Convolutions with BatchNorm, whose output is added to their input, projected where its shape differs."""

    def __init__(self, channels: int, kernels: tuple[int, ...], width: int, stride: int):
        super().__init__()
        self.depth, size = len(kernels), channels
        for number, kernel in enumerate(kernels, start=1):
            out = width * EXPANSION if number == 3 else width
            step = stride if number == kernels.index(3) + 1 else 1  # the first 3 x 3 convolution has the stride
            self.add_module(f"conv{number}", nn.Conv2d(size, out, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(out))
            size = out
        self.channels = size
        self.downsample = None
        if stride > 1 or channels != size:
            self.downsample = nn.Sequential(nn.Conv2d(channels, size, 1, stride, bias=False), nn.BatchNorm2d(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.depth:
                y = F.relu(y, inplace=True)
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class ResNet(Backbone, nn.Module):
    """`features` maps images (B, 3, H, W) to (B, 512 or 2048, H/32, W/32). `fc` is never run."""

    def __init__(self, name: str):
        super().__init__()
        kernels, depths = LAYERS[name]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, (width, depth) in enumerate(zip(WIDTHS, depths), start=1):
            blocks = []
            for number in range(depth):
                blocks.append(Block(channels, kernels, width, stride=2 if stage > 1 and number == 0 else 1))
                channels = blocks[-1].channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.num_features = channels
        self.fc = nn.Linear(channels, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, stride=2, padding=1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x
