"""Positions of images on a map: images with similar embeddings are close together."""

import numpy as np

ROUNDING = 1e-5  # upper bound of the differences between coordinates of equal embeddings


def by_similarity(embeddings: np.ndarray) -> np.ndarray:
    """Points (N, 2) by t-SNE; the first two coordinates if the embeddings are too few or equal for t-SNE."""
    from sklearn.manifold import TSNE  # slow to import, and needed only here

    count, dimensions = embeddings.shape
    if count > 2 and dimensions > 1 and np.ptp(embeddings, axis=0).max() > ROUNDING:
        tsne = TSNE(perplexity=min(30, (count - 1) / 3), init="pca", random_state=0)
        return tsne.fit_transform(embeddings)
    return np.pad(embeddings, ((0, 0), (0, 1)))[:, :2]


def on_grid(points: np.ndarray, side: int) -> np.ndarray:
    """Assign each point a different cell (column, row) of side x side, minimizing the sum of squared moves."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    low, high = points.min(axis=0), points.max(axis=0)
    points = ((points - (low + high) / 2) / np.maximum(high - low, ROUNDING) + 0.5) * (side - 1)
    cells = np.stack(np.divmod(np.arange(side**2), side), axis=1)
    return cells[linear_sum_assignment(cdist(points, cells, "sqeuclidean"))[1]]
