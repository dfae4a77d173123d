"""The embeddings of a set of images, their lengths and directions, and the similarity of two of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass
class Embeddings:
    """The vectors (N, D) of N images with their labels (N,) and, where images are grouped, the groups (N,).

    Labels and groups are whole numbers. With several processes, each has the rows of its share of the images.
    """

    vectors: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor | None = None

    def of_classes(self, classes: torch.Tensor) -> "Embeddings":
        """The rows whose labels are among the classes (C,)."""
        rows = torch.isin(self.labels, classes.to(self.labels.device))
        groups = None if self.groups is None else self.groups[rows.to(self.groups.device)]
        return Embeddings(self.vectors[rows.to(self.vectors.device)], self.labels[rows], groups)


def concat_columns(networks: list[Embeddings]) -> Embeddings:
    """The embeddings of the same images by several networks as those of one, (N, D1 + D2 + ...).

    Each network's vectors are scaled to unit length first. Raises ValueError if any is not finite.
    """
    vectors = torch.cat([unit_vectors(embeddings.vectors) for embeddings in networks], dim=1)
    return replace(networks[0], vectors=vectors)


def concat_rows(queries: Embeddings, gallery: Embeddings | None) -> Embeddings:
    """The vectors and labels of the queries and, if there is one, of the gallery."""
    if gallery is None:
        return queries
    return Embeddings(torch.cat([queries.vectors, gallery.vectors]), torch.cat([queries.labels, gallery.labels]))


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
    """Rows (N, D) as a distance of spec.DISTANCES sees them, in float32 or better: of unit length, or as they are.

    Raises ValueError if any is not finite.
    """
    if distance == "cosine":
        return unit_vectors(embeddings)
    return finite(embeddings).to(torch.promote_types(embeddings.dtype, torch.float32))


def comparable_array(embeddings: torch.Tensor, distance: str) -> np.ndarray:
    """Rows (N, D) as `comparable` gives them, in float32: what an index holds."""
    return comparable(embeddings, distance).float().cpu().numpy()


def finite(embeddings: torch.Tensor) -> torch.Tensor:
    """The embeddings (N, D). Raises ValueError if any is not finite."""
    check_finite(torch.isfinite(embeddings).all(dim=1))
    return embeddings


def check_finite(is_finite: torch.Tensor) -> None:
    """Raise ValueError unless all embeddings are finite; is_finite (N,): which are."""
    if not is_finite.all():
        rows = torch.nonzero(~is_finite)
        count = f"{len(rows)} of {len(is_finite)} embeddings"
        raise ValueError(f"{count} are not finite; the first is number {int(rows[0])}")


def similarity(a: torch.Tensor, b: torch.Tensor, distance: str) -> torch.Tensor:
    """The cosine of vectors (..., D) from `comparable`, or minus their Euclidean distance: larger is nearer."""
    return (a * b).sum(dim=-1) if distance == "cosine" else -torch.linalg.vector_norm(a - b, dim=-1)


def to_nearness(value, distance: str):
    """A cosine or a Euclidean distance as a similarity (larger is nearer), and the other way round."""
    return value if distance == "cosine" else 0.0 - value  # which is never -0.0


def as_tensor(values, name: str) -> torch.Tensor:
    """Numbers in a tensor, a numpy array or a list as a tensor. Raises TypeError for anything else."""
    try:
        if isinstance(values, np.ndarray):  # torch takes neither a foreign byte order nor backward strides
            return torch.from_numpy(np.require(values, values.dtype.newbyteorder("="), ["C", "W"]))
        if isinstance(values, list | tuple) and len(values):
            if isinstance(values[0], torch.Tensor):
                return torch.stack(list(values))
            if isinstance(values[0], np.ndarray | np.generic):
                return as_tensor(np.stack(values), name)
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Expected {name} as a tensor, a numpy array or a list of numbers, found {type(values).__name__} ({error})"
        ) from error


def whole_numbers(labels: torch.Tensor, name: str = "labels") -> torch.Tensor:
    """Labels of any integer type as int64. Raises ValueError for anything else."""
    kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels)
    if not isinstance(kind, torch.dtype) or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        found = kind if isinstance(kind, torch.dtype) else kind.__name__
        raise ValueError(f"Expected {name} as a tensor of whole numbers, found {found}")
    return labels.long()
