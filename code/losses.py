"""Proxy-Anchor loss (Kim et al., CVPR 2020, arXiv 2003.13911) and the losses it is compared with."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, with the published epsilon."""
    return x / torch.sqrt(x.square().sum(dim=1, keepdim=True) + 1e-12)


class ProxyAnchor(nn.Module):
    """Proxy-Anchor loss, equation 4 of the paper.

        1/|P+| sum_{p in P+} log(1 + sum_{x in X+_p} exp(-alpha (s(x, p) - margin)))
      + 1/|P|  sum_{p in P}  log(1 + sum_{x in X-_p} exp( alpha (s(x, p) + margin)))

    s is the cosine similarity, P are all proxies (one a class), P+ those with a positive in the batch, X+_p and X-_p
    the embeddings of p's class and of all others. Half-precision embeddings are computed with in float32.
    """

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0):
        super().__init__()
        self.margin = margin
        self.alpha = alpha
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))  # (C, D)
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """embeddings (B, D), labels (B,) of 0 ... C - 1 -> scalar. Raises ValueError on other shapes."""
        num_classes, embedding_size = self.proxies.shape
        if embeddings.ndim != 2 or embeddings.shape[1] != embedding_size or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"Expected embeddings (B, {embedding_size}) and labels (B,), "
                f"found {tuple(embeddings.shape)} and {tuple(labels.shape)}"
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(torch.float32, torch.promote_types(embeddings.dtype, self.proxies.dtype))
            s = l2_normalize(embeddings.to(dtype)) @ l2_normalize(self.proxies.to(dtype)).T  # (B, C)
            positive = F.one_hot(labels, num_classes).bool()  # (B, C)
            with_positive = positive.any(dim=0).sum().clamp(min=1)  # |P+|
            pull = log_one_plus_sum_exp(-self.alpha * (s - self.margin), positive)  # (C,), 0 where p is not in P+
            push = log_one_plus_sum_exp(self.alpha * (s + self.margin), ~positive)  # (C,)
            return pull.sum() / with_positive + push.sum() / num_classes


def log_one_plus_sum_exp(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log(1 + sum of exp(logits) over the rows that the mask selects), for each column of (B, C), without overflow."""
    one = logits.new_zeros(1, logits.shape[1])
    return torch.logsumexp(torch.cat([one, logits.masked_fill(~mask, -torch.inf)]), dim=0)


class MinedLoss(nn.Module):
    """A loss over the pairs or triplets that a miner picks from the batch."""

    def __init__(self, loss: nn.Module, miner: nn.Module):
        super().__init__()
        self.loss = loss
        self.miner = miner

    def forward(self, embeddings, labels):
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


def options() -> argparse.ArgumentParser:
    """Command-line flags of the loss."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss", default="Proxy_Anchor", choices=LOSSES, help="the others have the settings of the paper's comparison"
    )
    group.add_argument(
        "--alpha", default=32.0, type=float, help="scale of Proxy-Anchor: how much harder examples weigh more"
    )
    group.add_argument("--mrg", default=0.1, type=float, help="margin of Proxy-Anchor, in cosine similarity")
    return parser


LOSSES = ("Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive", "Triplet", "NPair")


def create(name: str, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0) -> nn.Module:
    """A loss by its name in LOSSES: module (embeddings (B, D), labels (B,)) -> scalar.

    margin and alpha are Proxy-Anchor's; the others have the settings of the published comparison.
    """
    if name == "Proxy_Anchor":
        return ProxyAnchor(num_classes, embedding_size, margin, alpha)
    from pytorch_metric_learning import distances, losses, miners  # only the comparison needs it

    if name == "Proxy_NCA":
        return losses.ProxyNCALoss(num_classes, embedding_size, softmax_scale=32)
    if name == "MS":
        return MinedLoss(
            losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
        )
    if name == "Contrastive":
        return losses.ContrastiveLoss(neg_margin=0.5)
    if name == "Triplet":
        return MinedLoss(
            losses.TripletMarginLoss(margin=0.1), miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard")
        )
    if name == "NPair":
        # The library's default distance normalises, which its N-pairs loss refuses.
        return losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))
    raise ValueError(f"There is no loss '{name}'; there are {', '.join(LOSSES)}")
