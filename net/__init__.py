"""Embedding networks: a backbone, global average + max pooling, a linear embedding and an l2 norm."""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from net.backbone import Normalize
from net.bn_inception import BNInception
from net.googlenet import GoogLeNet
from net.pretrained import imagenet_file, load_weights
from net.resnet import LAYERS, ResNet

BACKBONES = {"bn_inception": BNInception, "googlenet": GoogLeNet} | {
    name: lambda name=name: ResNet(name) for name in LAYERS
}


STARTS = {"kaiming": partial(nn.init.kaiming_normal_, mode="fan_out"), "orthogonal": nn.init.orthogonal_}


class EmbeddingNet(nn.Module):
    """Images (B, 3, H, W) -> embeddings (B, D), through the published head.

    The backbone is `model` and the embedding layer `model.embedding`, so that keys agree with published checkpoints.
    forward takes images normalized as the backbone's weights expect; `normalize` does this to uint8 RGB. start: of the
    embedding layer's weights, one of STARTS.
    """

    def __init__(
        self, backbone: nn.Module, embedding_size: int, l2_norm: bool = True, bn_freeze: bool = True,
        start: str = "kaiming",
    ):  # fmt: skip
        super().__init__()
        self.model = backbone
        self.model.embedding = nn.Linear(backbone.num_features, embedding_size)
        STARTS[start](self.model.embedding.weight)
        nn.init.zeros_(self.model.embedding.bias)
        self.normalize = Normalize(backbone.mean, backbone.std, backbone.bgr)
        self.l2_norm = l2_norm
        self.bn_freeze = bn_freeze
        if bn_freeze:
            for norm in backbone.norms():
                norm.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings = self.model.embedding(self.model.pooled(images))  # (B, C) -> (B, D)
        if self.l2_norm:
            embeddings = embeddings / torch.sqrt(embeddings.square().sum(dim=1, keepdim=True) + self.model.epsilon)
        return embeddings

    def train(self, mode: bool = True):
        """As for every module, but with bn_freeze BatchNorm layers stay in eval mode and keep their statistics."""
        super().train(mode)
        if self.bn_freeze:
            for norm in self.model.norms():
                norm.eval()
        return self


def options(training: bool) -> argparse.ArgumentParser:
    """Command-line flags of the network, for a script that trains or one that only evaluates."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        default="bn_inception",
        choices=BACKBONES,
        help="backbone; bn_inception and resnet50 have published results, resnet18 is the quickest",
    )
    group.add_argument(
        "--embedding-size",
        default=512,
        type=int,
        metavar="D",
        help="dimensions of an embedding; fewer make search faster and recall lower",
    )
    group.add_argument(
        "--l2-norm", default=1, type=int, choices=(0, 1), help="1: embeddings of unit length, as published"
    )
    if training:
        group.add_argument(
            "--bn-freeze",
            default=1,
            type=int,
            choices=(0, 1),
            help="1: BatchNorm keeps its ImageNet statistics; 0 for SOP, In-shop and training from scratch",
        )
        group.add_argument(
            "--pretrained",
            default="imagenet",
            metavar="imagenet|none|PATH",
            help="weights that the backbone starts from: ImageNet's, none (from scratch) or those of a file",
        )
    return parser


def create(
    name: str, embedding_size: int, pretrained: str | Path | None = None, l2_norm: bool = True, bn_freeze: bool = True,
    start: str = "kaiming",
) -> EmbeddingNet:  # fmt: skip
    """Build an embedding network.

    pretrained: "imagenet" (downloaded once into torch's cache), "none" or None, or the path of a backbone weights file.
    bn_freeze: BatchNorm keeps its statistics; its weights and biases start with requires_grad False, as published.
    start: of the embedding layer, "kaiming", or "orthogonal" with rows of length 1.
    Raises OSError or ValueError if the weights cannot be loaded.
    """
    backbone = BACKBONES[name]()
    if pretrained not in ("none", None):
        load_weights(backbone, imagenet_file(name) if pretrained == "imagenet" else Path(pretrained))
    return EmbeddingNet(backbone, embedding_size, l2_norm, bn_freeze, start)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if the network cannot take images of this size."""
    if not accepts(args.model, args.image_size):
        parser.error(
            f"argument --image-size: {args.model} cannot take images of {args.image_size} pixels; multiples of 32 work"
        )


def accepts(name: str, image_size: int) -> bool:
    """Whether the network runs on square images of this size (BN-Inception's pools and strides disagree at many)."""
    with torch.device("meta"):  # shapes only, no arithmetic
        try:
            EmbeddingNet(BACKBONES[name](), 1).eval()(torch.empty(1, 3, image_size, image_size))
        except RuntimeError:
            return False
    return True
