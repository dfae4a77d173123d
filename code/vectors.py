"""Embeddings as vectors: their lengths, their directions, and how near two of them are."""

import torch

from proxy_anchor.collectives import ProcessGroup

DISTANCES = ("cosine", "euclidean")


def norms(x: torch.Tensor) -> torch.Tensor:
    """Lengths of the rows of (N, D) as (N, 1), with the published epsilon, which keeps them from 0.

    NaN where the squares overflow: divided by infinity, a row would be a vector of zeros.
    """
    squares = torch.linalg.vector_norm(x, dim=1, keepdim=True).square()
    return torch.sqrt(squares + 0 * squares + 1e-12)


def unit_vectors(embeddings: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) divided by their length, in float32 or better. Raises ValueError if any is not finite."""
    embeddings = finite(embeddings).to(torch.promote_types(embeddings.dtype, torch.float32))
    lengths = norms(embeddings)
    if lengths.isnan().any():  # too long to square
        largest = embeddings.abs().amax(dim=1, keepdim=True)
        return unit_vectors(embeddings / torch.where(lengths.isnan(), largest, 1))
    return embeddings / lengths


def comparable(embeddings: torch.Tensor, distance: str) -> torch.Tensor:
    """Rows (N, D) as a distance of DISTANCES sees them, in float32 or better: of unit length, or as they are.

    Raises ValueError if any is not finite.
    """
    if distance == "cosine":
        return unit_vectors(embeddings)
    return finite(embeddings).to(torch.promote_types(embeddings.dtype, torch.float32))


def finite(embeddings: torch.Tensor, processes: ProcessGroup | None = None) -> torch.Tensor:
    """The embeddings (N, D). Raises ValueError if any is not finite, in all processes if those of one of them are."""
    finite_rows = torch.cat((processes or ProcessGroup()).all_gather(torch.isfinite(embeddings).all(dim=1)))
    if not finite_rows.all():
        rows = torch.nonzero(~finite_rows)
        raise ValueError(
            f"{len(rows)} of {len(finite_rows)} embeddings are not finite; the first is number {int(rows[0])}"
        )
    return embeddings


def nearness(a: torch.Tensor, b: torch.Tensor, distance: str) -> torch.Tensor:
    """Of the vectors (..., D), as `comparable` gives them."""
    return (a * b).sum(dim=-1) if distance == "cosine" else -torch.linalg.vector_norm(a - b, dim=-1)


def to_nearness(value, distance: str):
    """A similarity or a distance as nearness, or nearness as the one or the other, by a distance of DISTANCES."""
    return value if distance == "cosine" else 0.0 - value  # which is never -0.0
