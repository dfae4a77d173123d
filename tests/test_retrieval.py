import numpy as np
import pytest
import torch
from proxy_anchor.retrieval import best_positive_rank, recall_at_k

from proxy_anchor import retrieval


def brute_force(queries, labels, gallery=None, gallery_labels=None):
    """Rank of the best positive by sorting all similarities of a query; of equals, negatives come first."""
    within = gallery is None
    gallery, gallery_labels = (queries, labels) if within else (gallery, gallery_labels)
    similarity = queries.astype(np.float64) @ gallery.astype(np.float64).T
    ranks = []
    for i in range(len(queries)):
        ranking = [
            (-similarity[i, j], gallery_labels[j] == labels[i]) for j in range(len(gallery)) if not (within and i == j)
        ]
        found = [positive for _, positive in sorted(ranking)]  # at equal similarity False sorts before True
        ranks.append(found.index(True) if True in found else -1)
    return ranks


def grid_embeddings(n, seed):
    """Unit vectors with exactly representable products, so that ties are ties in any precision; many are duplicates."""
    random = np.random.default_rng(seed)
    signs = random.choice([-0.5, 0.5], size=(n, 4))
    return np.hstack([signs, np.zeros((n, 12))]).astype(np.float32)


@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("block", [1, 37, 1 << 24])
def test_ranks_are_brute_force(kind, block, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", block)
    random = np.random.default_rng(0)
    x = grid_embeddings(60, 1) if kind == "ties" else random.normal(size=(60, 16))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x[30:40] = x[:10]  # duplicates, of the same class or not
    labels = random.integers(0, 12, size=60)
    labels[50:] = np.arange(100, 110)  # classes of one image
    tensors = torch.from_numpy(x), torch.from_numpy(labels)
    assert best_positive_rank(*tensors).tolist() == brute_force(x, labels)
    queries, gallery = (tensors[0][:25], tensors[1][:25]), (tensors[0][25:], tensors[1][25:])
    assert best_positive_rank(*queries, *gallery).tolist() == brute_force(x[:25], labels[:25], x[25:], labels[25:])


def test_recall_follows_from_ranks():
    x, y = torch.randn(80, 8), torch.randint(0, 20, (80,))
    ranks = best_positive_rank(x, y)
    recalls = recall_at_k(x, y, [1, 4, 1000])
    assert recalls[1] == pytest.approx((ranks == 0).double().mean().item())
    assert recalls[4] == pytest.approx(((ranks >= 0) & (ranks < 4)).double().mean().item())
    assert recalls[1000] == pytest.approx((ranks >= 0).double().mean().item())


def test_similarity_is_cosine():
    x, y = torch.randn(50, 8), torch.randint(0, 10, (50,))
    assert best_positive_rank(x * torch.rand(50, 1).add(0.1), y).tolist() == best_positive_rank(x, y).tolist()


def test_network_collapsed_to_a_point_finds_nothing():
    x, y = torch.ones(30, 8), torch.arange(30) % 3
    assert recall_at_k(x, y, [1, 8]) == {1: 0.0, 8: 0.0}
    assert recall_at_k(x[:10], y[:10], [1], x[10:], y[10:]) == {1: 0.0}


def test_duplicate_image_is_found():
    """Self is left out by index: another image with the same embedding is a neighbour, and the nearest."""
    x = torch.nn.functional.normalize(torch.randn(10, 8))
    x[1] = x[0]
    y = torch.arange(10)
    y[1] = y[0]
    assert best_positive_rank(x, y).tolist() == [0, 0] + [-1] * 8


def test_query_without_positive_is_a_miss():
    x, y = torch.randn(5, 8), torch.tensor([0, 0, 1, 2, 3])
    assert recall_at_k(x, y, [100])[100] == pytest.approx(2 / 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_an_error(value):
    x = torch.randn(5, 8)
    x[3, 2] = value
    with pytest.raises(ValueError, match="1 of 5 embeddings are not finite; the first is number 3"):
        best_positive_rank(x, torch.zeros(5, dtype=torch.long))
