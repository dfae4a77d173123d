"""GoogLeNet (Szegedy et al., 2015) from torchvision, as a feature extractor."""

import torchvision

from .backbone import Backbone


class GoogLeNet(Backbone, torchvision.models.GoogLeNet):
    """torchvision's GoogLeNet; `features` maps images (B, 3, H, W) to (B, 1024, H/32, W/32).

    `fc`, `aux1` and `aux2` are never run; their keys are in every checkpoint.
    """

    epsilon = 1e-5  # of the l2 norm, as published for this network alone
    unused = ("fc", "aux1", "aux2")

    def __init__(self):
        super().__init__(aux_logits=True, transform_input=False, init_weights=True)
        self.num_features = self.fc.in_features

    def features(self, x):
        for name, layer in self.named_children():
            if name == "avgpool":
                return x
            if not name.startswith("aux"):
                x = layer(x)
