"""The Proxy-Anchor loss (Kim et al., CVPR 2020, arXiv 2003.13911)."""

import torch
import torch.nn.functional as F
from torch import nn

from proxy_anchor import blocked
from proxy_anchor.vectors import norms, whole_numbers


def equation(
    embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor, margin=0.1, alpha=32.0
) -> torch.Tensor:
    """Equation 4 of the paper, see ProxyAnchor: embeddings (B, D), proxies (C, D), labels (B,) -> scalar.

    It has derivatives of any order, also with respect to margin and alpha. Half precision is converted to float32.
    Raises ValueError as ProxyAnchor does.
    """
    labels = checked_labels(labels, embeddings, *proxies.shape)
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings, proxies = in_full_precision(embeddings, proxies)

        s = embeddings / norms(embeddings) @ (proxies / norms(proxies)).T  # (B, C)
        positive = F.one_hot(labels, len(proxies)).bool()
        one = torch.zeros_like(s[:1])  # log(1 + sum exp(z)) is the logsumexp of z and a 0
        pull = torch.cat([one, (-alpha * (s - margin)).masked_fill(~positive, -torch.inf)]).logsumexp(dim=0)
        push = torch.cat([one, (alpha * (s + margin)).masked_fill(positive, -torch.inf)]).logsumexp(dim=0)
        return pull.sum() / positive.any(dim=0).sum() + push.mean()


class ProxyAnchor(nn.Module):
    """Proxy-Anchor loss, equation 4 of the paper.

        1/|P+| sum_{p in P+} log(1 + sum_{x in X+_p} exp(-alpha (s(x, p) - margin)))
      + 1/|P|  sum_{p in P}  log(1 + sum_{x in X-_p} exp( alpha (s(x, p) + margin)))

    s is the cosine similarity, P are all proxies (one per class), P+ those with a positive in the batch, X+_p and X-_p
    the embeddings of p's class and of all other classes. Half-precision embeddings are converted to float32.

    It computes `equation` in blocks of classes, with first derivatives only. For other derivatives, call `equation`.
    """

    proxy_lr = 100  # learning rate of the proxies, as a multiple of the network's
    clipped = True  # gradients of the proxies are clipped, as the network's are

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0):
        super().__init__()
        self.margin = margin
        self.alpha = alpha
        self.proxies = nn.Parameter(nn.init.kaiming_normal_(torch.empty(num_classes, embedding_size), mode="fan_out"))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """embeddings (B, D), labels (B,) of 0 ... C - 1 -> scalar. Raises ValueError on other shapes or labels."""
        labels = checked_labels(labels, embeddings, *self.proxies.shape)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, proxies = in_full_precision(embeddings, self.proxies)
            return blocked.equation(x, proxies, labels, self.margin, self.alpha)


def in_full_precision(embeddings: torch.Tensor, proxies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the same type: float32, or float64 if one of them is."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(embeddings.dtype, proxies.dtype))
    return embeddings.to(dtype), proxies.to(dtype)


def checked_labels(
    labels: torch.Tensor, embeddings: torch.Tensor, num_classes: int, embedding_size: int
) -> torch.Tensor:
    """The labels of a batch as int64. Raises ValueError for labels other than 0 ... num_classes - 1 or other shapes.

    On CUDA, labels out of range end the process by an assertion on the device: a check on the host would force a sync.
    """
    labels = whole_numbers(labels)
    fits = embeddings.ndim == 2 and embeddings.shape[1] == embedding_size and labels.shape == embeddings.shape[:1]
    if not fits or not len(labels):
        raise ValueError(
            f"Expected embeddings (B, {embedding_size}) and labels (B,) of one or more images, "
            f"found {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    in_range = ((labels >= 0) & (labels < num_classes)).all()
    if labels.is_cuda:
        torch._assert_async(in_range, f"Expected labels from 0 to {num_classes - 1}")
    elif not in_range:
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}, found {labels.min()} to {labels.max()}")
    return labels
