"""ResNet-18/34/50/101 (He et al., 2016) from torchvision, as feature extractors."""

import torchvision

from .backbone import Backbone

LAYERS = {
    "resnet18": (torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (torchvision.models.resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (torchvision.models.resnet.Bottleneck, [3, 4, 23, 3]),
}


class ResNet(Backbone, torchvision.models.ResNet):
    """torchvision's ResNet; `features` maps images (B, 3, H, W) to (B, 512 or 2048, H/32, W/32). `fc` is never run."""

    def __init__(self, name):
        super().__init__(*LAYERS[name])
        self.num_features = self.fc.in_features

    def features(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
