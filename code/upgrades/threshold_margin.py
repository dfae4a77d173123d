"""The threshold-consistent margin loss (Zhang et al., ICLR 2024, arXiv 2307.04047), a term beside another loss."""

import torch
import torch.nn.functional as F

POSITIVE, NEGATIVE = 0.9, 0.5  # the margins, published for all datasets


def threshold_margin(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, D), labels (B,) -> scalar: how far pairs are from margins that are the same for all classes.

        mean_{same-class pairs, s <= 0.9} (0.9 - s)  +  mean_{different-class pairs, s >= 0.5} (s - 0.5)

    s is the cosine similarity; a mean over no pair is 0. Half-precision embeddings are converted to float32.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
        s = x @ x.T  # (B, B): each pair twice
        same = labels == labels[:, None]
        other_image = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        positive = mean(POSITIVE - s, same & other_image & (s <= POSITIVE))
        return positive + mean(s - NEGATIVE, ~same & (s >= NEGATIVE))


def mean(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    return torch.where(among, values, 0).sum() / among.sum().clamp(min=1)
