"""The embedding network: a backbone, the published head and an l2 norm; or either of them alone."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from proxy_anchor.spec import HEADS

from .backbone import Backbone, Normalize

# How the embedding layer's weights start. "layernorm" normalizes the features before it, without parameters.
STARTS: dict[str, Callable] = dict(
    zip(HEADS, (partial(nn.init.kaiming_normal_, mode="fan_out"), nn.init.orthogonal_, nn.init.orthogonal_))
)


class EmbeddingNet(nn.Module):
    """Images (B, 3, H, W) -> embeddings (B, D), through the published head.

    The backbone is `model` and the embedding layer `model.embedding`, so that keys agree with published checkpoints.
    forward takes images normalized as the backbone's weights expect; `normalize` does this to uint8 RGB. head: one of
    HEADS.
    """

    def __init__(
        self,
        backbone: Backbone,
        embedding_size: int,
        l2_norm: bool = True,
        bn_freeze: bool = True,
        head: str = "linear",
    ):
        super().__init__()
        self.model = backbone
        self.embedding_size = embedding_size
        self.model.embedding = nn.Linear(backbone.num_features, embedding_size)
        STARTS[head](self.model.embedding.weight)
        nn.init.zeros_(self.model.embedding.bias)
        self.head = head
        self.normalize = Normalize(backbone.mean, backbone.std, backbone.bgr)
        self.l2_norm = l2_norm
        self.bn_freeze = bn_freeze
        self.frozen: tuple[str, ...] = ()
        if bn_freeze:
            for norm in backbone.norms():
                norm.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(self.model.pooled(images))

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, C) -> embeddings (B, D)."""
        if self.head == "layernorm":
            features = F.layer_norm(features, features.shape[1:])
        embeddings = self.model.embedding(features)  # (B, D)
        if self.l2_norm:
            embeddings = embeddings / torch.sqrt(embeddings.square().sum(dim=1, keepdim=True) + self.model.epsilon)
        return embeddings

    def train(self, mode: bool = True):
        """As for every module, except that frozen layers, and BatchNorm with bn_freeze, stay in eval mode."""
        super().train(mode)
        for module in [*self._frozen(self.model.named_modules()), *(self.model.norms() if self.bn_freeze else ())]:
            module.eval()
        return self

    def freeze(self, names: str) -> None:
        """Keep layers of the backbone as they are from now on, statistics included.

        names: of layers, with all in them, or of parameters, separated by commas. Raises ValueError for unknown ones.
        """
        self.frozen = tuple(name.strip() for name in names.split(",")) if names else ()
        known = [name for name, _ in self.model.named_parameters() if not name.startswith("embedding.")]
        for name in self.frozen:
            if not any(within(key, name) for key in known):
                first = ", ".join(dict.fromkeys(key.split(".")[0] for key in known))
                raise ValueError(f"The backbone has no layer '{name}' to freeze; it has {first}, and layers in these")
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The parameters of the frozen layers."""
        return self._frozen(self.model.named_parameters())

    def _frozen(self, named):
        return [value for key, value in named if any(within(key, name) for name in self.frozen)]


class PooledBackbone(nn.Module):
    """Images (B, 3, H, W) -> the pooled features (B, C) of a backbone, which may be part of an EmbeddingNet."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.model = backbone
        self.embedding_size = backbone.num_features
        self.normalize = Normalize(backbone.mean, backbone.std, backbone.bgr)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(self.model.pooled(images))

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, C) are the embeddings."""
        return features


class Head(nn.Module):
    """Pooled features (B, C) -> embeddings (B, D), as a network computes them, with which it shares its weights."""

    def __init__(self, network: EmbeddingNet | PooledBackbone):
        super().__init__()
        self.embedding = getattr(network.model, "embedding", None)  # its parameters
        self.embed: Any = network.embed  # a method
        self.embedding_size = network.embedding_size
        self.normalize = nn.Identity()  # images were normalized before the backbone

    @property
    def network(self) -> EmbeddingNet | PooledBackbone:
        """The network whose head it is."""
        return self.embed.__self__

    def __deepcopy__(self, memo):
        """The head of another network, which has an embedding layer of its own and shares the backbone's weights."""
        deepcopy(self.embedding, memo)
        backbone = self.network.model
        memo |= {id(x): x for x in (*backbone.parameters(), *backbone.buffers()) if id(x) not in memo}
        return Head(deepcopy(self.network, memo))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.embed(features)


def within(key: str, name: str) -> bool:
    """Whether this key of a state dict is in the layer, or is the parameter, of this name."""
    return f"{key}.".startswith(f"{name}.")
