import math

import pytest
import torch
from proxy_anchor.losses import LOSSES, ProxyAnchor
from pytorch_metric_learning.losses import ProxyAnchorLoss

from proxy_anchor import losses


def by_the_equation(embeddings, proxies, labels, margin, alpha):
    """The loss as the paper writes it, in Python's double precision, pair by pair."""

    def s(x, p):
        dot = sum(a * b for a, b in zip(x, p))
        return dot / math.sqrt(sum(a * a for a in x) + 1e-12) / math.sqrt(sum(b * b for b in p) + 1e-12)

    embeddings, proxies, labels = embeddings.double().tolist(), proxies.double().tolist(), labels.tolist()
    positive_terms, negative_terms = [], []
    for c, p in enumerate(proxies):
        positives = [s(x, p) for x, y in zip(embeddings, labels) if y == c]
        negatives = [s(x, p) for x, y in zip(embeddings, labels) if y != c]
        if positives:
            positive_terms.append(math.log(1 + sum(math.exp(-alpha * (v - margin)) for v in positives)))
        negative_terms.append(math.log(1 + sum(math.exp(alpha * (v + margin)) for v in negatives)))
    return sum(positive_terms) / len(positive_terms) + sum(negative_terms) / len(proxies)


def sample(batch, classes, size, dtype=torch.float64):
    return torch.randn(batch, size, dtype=dtype), torch.randint(classes, (batch,))


@pytest.mark.parametrize("batch, classes", [(12, 5), (7, 40), (4, 2), (5, 1), (1, 3)])
def test_proxy_anchor_is_the_equation(batch, classes):
    loss = ProxyAnchor(classes, 8, margin=0.2, alpha=16).double()
    x, y = sample(batch, classes, 8)
    assert loss(x, y).item() == pytest.approx(by_the_equation(x, loss.proxies, y, 0.2, 16), rel=1e-12)


def test_batch_of_one_class():
    loss = ProxyAnchor(5, 8).double()
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.full((6,), 3)
    assert loss(x, y).item() == pytest.approx(by_the_equation(x, loss.proxies, y, 0.1, 32), rel=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 6])
def test_gradcheck(classes):
    loss = ProxyAnchor(classes, 4, alpha=8).double()
    x, y = sample(5, classes, 4)

    def function(embeddings, proxies):
        return torch.func.functional_call(loss, {"proxies": proxies}, (embeddings, y))

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), loss.proxies.detach().clone().requires_grad_()))


def test_agrees_with_pytorch_metric_learning():
    ours = ProxyAnchor(20, 16, margin=0.1, alpha=32)
    theirs = ProxyAnchorLoss(20, 16, margin=0.1, alpha=32)
    theirs.proxies.data.copy_(ours.proxies.data)
    x, y = sample(30, 20, 16, torch.float32)
    results = []
    for loss in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y)
        value.backward()
        results.append((value, leaf.grad, loss.proxies.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_large_alpha_stays_finite():
    loss = ProxyAnchor(10, 8, alpha=1000)
    x, y = sample(16, 10, 8, torch.float32)
    x.requires_grad_()
    value = loss(x, y)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(x.grad).all() and torch.isfinite(loss.proxies.grad).all()
    assert value.item() == pytest.approx(by_the_equation_in_logs(x, loss.proxies, y, 0.1, 1000), rel=1e-4)


def by_the_equation_in_logs(embeddings, proxies, labels, margin, alpha):
    """With so large an alpha the largest exponent decides: log(1 + sum exp(z)) is max(0, z) to within log(n)."""
    s = torch.nn.functional.cosine_similarity(embeddings.double()[:, None], proxies.double()[None], dim=2)
    y = torch.nn.functional.one_hot(labels, len(proxies)).bool()
    pull = torch.where(y, -alpha * (s - margin), -torch.inf).amax(0).clamp(min=0)
    push = torch.where(~y, alpha * (s + margin), -torch.inf).amax(0).clamp(min=0)
    return (pull.sum() / y.any(0).sum() + push.mean()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    loss = ProxyAnchor(10, 8)
    x, y = sample(16, 10, 8, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(x.float(), y), rtol=1e-6, atol=1e-6)


def test_proxies_start_kaiming_normal_fan_out():
    proxies = ProxyAnchor(400, 300).proxies
    assert proxies.shape == (400, 300)
    assert proxies.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(B, 8\)"):
        ProxyAnchor(3, 8)(torch.randn(4, 7), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name):
    criterion = losses.create(name, 6, 8)
    x = torch.nn.functional.normalize(torch.randn(24, 8)).requires_grad_()
    y = torch.arange(24) % 6
    value = criterion(x, y)
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value) and x.grad.abs().sum() > 0


def test_settings_of_the_rivals():
    assert losses.create("Proxy_NCA", 4, 8).softmax_scale == 32
    ms = losses.create("MS", 4, 8)
    assert (ms.loss.alpha, ms.loss.beta, ms.loss.base, ms.miner.epsilon) == (2, 50, 0.5, 0.1)
    assert losses.create("Contrastive", 4, 8).neg_margin == 0.5
    triplet = losses.create("Triplet", 4, 8)
    assert (triplet.loss.margin, triplet.miner.margin, triplet.miner.type_of_triplets) == (0.1, 0.1, "semihard")
    assert not losses.create("NPair", 4, 8).distance.normalize_embeddings
