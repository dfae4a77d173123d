import argparse
import math
import os
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as library
from pytorch_metric_learning.losses import ProxyAnchorLoss

from proxy_anchor import blocked, loss_registry, losses
from proxy_anchor.losses import ProxyAnchor, equation


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


def value_and_gradients(function, embeddings, proxies):
    leaves = [embeddings.detach().clone().requires_grad_(), proxies.detach().clone().requires_grad_()]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def sample(batch, classes, size, dtype=torch.float64):
    return torch.randn(batch, size, dtype=dtype), torch.randint(classes, (batch,))


@pytest.mark.parametrize("batch, classes", [(12, 5), (7, 40), (4, 2), (5, 1), (1, 3)])
def test_proxy_anchor_is_the_equation(batch, classes):
    loss = ProxyAnchor(classes, 8, margin=0.2, alpha=16).double()
    x, y = sample(batch, classes, 8)
    expected = by_the_equation(x, loss.proxies, y, 0.2, 16)
    assert loss(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert equation(x, loss.proxies, y, 0.2, 16).item() == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("batch, classes", [(30, 50), (8, 1), (8, 2), (1, 7), (60, 5)])
def test_gradients_are_those_of_the_equation(batch, classes, block, monkeypatch):
    """Whatever the size of the blocks of classes."""
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    loss = ProxyAnchor(classes, 8, margin=0.2, alpha=20).double()
    x, y = sample(batch, classes, 8)
    ours = value_and_gradients(lambda x, p: torch.func.functional_call(loss, {"proxies": p}, (x, y)), x, loss.proxies)
    for a, b in zip(ours, value_and_gradients(lambda x, p: equation(x, p, y, 0.2, 20), x, loss.proxies)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def penalty(function, x):
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def product_with_the_hessian(function, x):
    return torch.autograd.functional.hvp(function, x, torch.ones_like(x))[1]


def step_of_maml(function, x):
    w = torch.eye(8, dtype=x.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x.detach() @ w), w, create_graph=True)
    return torch.autograd.grad(function(x.detach() @ (w - 0.1 * gradient)), w)[0]


@pytest.mark.parametrize("of", [penalty, product_with_the_hessian, step_of_maml])
def test_second_derivatives_are_those_of_the_equation_or_refused(of):
    loss = ProxyAnchor(6, 8, alpha=8).double()
    x, y = sample(12, 6, 8)
    x.requires_grad_()

    def plain(x):
        return equation(x, loss.proxies, y, alpha=8)

    with pytest.raises(NotImplementedError, match=r"first derivatives.* call proxy_anchor\.losses\.equation"):
        of(lambda x: loss(x, y), x)
    if of is product_with_the_hessian:
        ahead, behind = (
            torch.autograd.grad(plain(moved), moved)[0]
            for moved in ((x + sign * 1e-6).detach().requires_grad_() for sign in (1, -1))
        )
        torch.testing.assert_close(of(plain, x), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)
    else:
        assert of(plain, x).abs().sum() > 0


def test_the_equation_has_all_derivatives():
    """Of the first and second order, of margin and alpha too, with classes that have no image."""
    x, y = sample(5, 4, 3)
    numbers = [torch.tensor(value, dtype=torch.double) for value in (0.2, 4.0)]
    inputs = [tensor.requires_grad_() for tensor in (x, torch.randn(4, 3, dtype=torch.double), *numbers)]

    def function(x, proxies, margin, alpha):
        return equation(x, proxies, y, margin, alpha)

    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", ["margin", "alpha"])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda value: value.requires_grad_()])
def test_margin_and_alpha_are_not_trained_silently(name, kind):
    loss = ProxyAnchor(6, 8)
    x, y = sample(12, 6, 8, torch.float32)
    expected = loss(x, y).item()
    setattr(loss, name, kind(torch.tensor(float(getattr(loss, name)))))
    assert loss(x, y).item() == pytest.approx(expected)
    with pytest.raises(NotImplementedError, match="none with respect to margin or alpha"):
        loss(x, y).backward()


def test_frozen_proxies_or_embeddings():
    loss = ProxyAnchor(6, 8)
    x, y = sample(10, 6, 8, torch.float32)
    expected = loss(x.requires_grad_(), y).item()
    with torch.no_grad():
        assert loss(x, y).item() == pytest.approx(expected)
    loss.proxies.requires_grad_(False)
    loss(x, y).backward()
    assert x.grad is not None and loss.proxies.grad is None


def test_backward_twice():
    loss = ProxyAnchor(6, 8)
    x, y = sample(10, 6, 8, torch.float32)
    value = 3 * loss(x.requires_grad_(), y)
    value.backward(retain_graph=True)
    first = x.grad.clone()
    value.backward()
    torch.testing.assert_close(x.grad, 2 * first)


def test_labels_out_of_range_are_an_error():
    with pytest.raises(ValueError, match="labels from 0 to 5, found 0 to 6"):
        ProxyAnchor(6, 8)(torch.randn(2, 8), torch.tensor([0, 6]))


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_type(dtype):
    loss = ProxyAnchor(6, 8)
    x, y = sample(10, 6, 8, torch.float32)
    assert torch.equal(loss(x, y.to(dtype)), loss(x, y))


@pytest.mark.parametrize(
    "labels, found",
    [
        (torch.ones(4), "torch.float32"),
        (torch.ones(4).bool(), "torch.bool"),
        ([1, 2, 3, 4], "list"),
        (torch.ones(4).cfloat(), "torch.complex64"),
        (["a", "b", "a", "b"], "list"),
        (np.arange(4), "ndarray"),
    ],
)
def test_other_labels_are_an_error(labels, found):
    with pytest.raises(ValueError, match=f"labels as a tensor of whole numbers, found {found}"):
        ProxyAnchor(6, 8)(torch.randn(4, 8), labels)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_equation_takes_what_the_loss_takes(dtype):
    loss, x = ProxyAnchor(4, 8), torch.randn(6, 8)
    labels = torch.tensor([0, 0, 1, 2, 2, 1])
    torch.testing.assert_close(equation(x, loss.proxies, labels.to(dtype)), loss(x, labels))
    for wrong in (labels[:0], labels + 2, labels - 1, labels.float(), labels.bool()):
        with pytest.raises(ValueError, match=r"^Expected (embeddings \(B, 8\)|labels from 0 to 3|labels as a tensor)"):
            equation(x[: len(wrong)], loss.proxies, wrong)


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match=r"one or more images, found \(0, 8\) and \(0,\)"):
        ProxyAnchor(6, 8)(torch.randn(0, 8), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("long", ["embeddings", "proxies"])
def test_vectors_too_long_to_square_are_no_zeros(long):
    """Any of them; the training ends at a loss that is not finite."""
    loss = ProxyAnchor(6, 8)
    x, y = sample(10, 6, 8, torch.float32)
    vectors = x if long == "embeddings" else loss.proxies.data
    vectors[2] *= 1e20
    assert loss(x, y).isnan() and equation(x, loss.proxies, y).isnan()


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
    s = F.cosine_similarity(embeddings.double()[:, None], proxies.double()[None], dim=2)
    y = F.one_hot(labels, len(proxies)).bool()
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


@pytest.mark.parametrize("name", loss_registry.LOSSES)
def test_every_loss_trains(name):
    criterion = loss_registry.create(name, 6, 8)
    x = F.normalize(torch.randn(24, 8)).requires_grad_()
    y = torch.arange(24) % 6
    value = criterion(x, y)
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value) and x.grad.abs().sum() > 0


def test_settings_of_the_baselines():
    assert loss_registry.create("Proxy_NCA", 4, 8).softmax_scale == 32
    ms = loss_registry.create("MS", 4, 8)
    assert (ms.alpha, ms.beta, ms.base, ms.miner.epsilon) == (2, 50, 0.5, 0.1)
    assert loss_registry.create("Contrastive", 4, 8).neg_margin == 0.5
    triplet = loss_registry.create("Triplet", 4, 8)
    assert (triplet.margin, triplet.miner.margin, triplet.miner.type_of_triplets) == (0.1, 0.1, "semihard")
    assert not loss_registry.create("NPair", 4, 8).distance.normalize_embeddings


def by_default(name):
    """The baselines with no more settings than those of the comparison, the rest as the library 2.6 to 2.9 has it."""
    return {
        "Proxy_NCA": lambda: library.ProxyNCALoss(6, 8, softmax_scale=32),
        "MS": lambda: loss_registry.with_miner(
            library.MultiSimilarityLoss(2, 50, 0.5), miners.MultiSimilarityMiner(0.1)
        ),
        "Contrastive": lambda: library.ContrastiveLoss(neg_margin=0.5),
        "Triplet": lambda: loss_registry.with_miner(
            library.TripletMarginLoss(margin=0.1), miners.TripletMarginMiner(0.1, "semihard")
        ),
        "NPair": lambda: library.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False)),
    }[name]()


def outcome(make):
    """Value and gradients of a loss, of embeddings of any length."""
    torch.manual_seed(0)
    criterion = make()
    x = torch.randn(24, 8, requires_grad=True)
    value = criterion(x, torch.arange(24) % 6)
    value.backward()
    return [value, x.grad, *(p.grad for p in criterion.parameters())]


@pytest.mark.parametrize("name", loss_registry.LOSSES[1:])
def test_baselines_do_not_change_with_the_defaults_of_the_library(name, monkeypatch):
    """To the last bit as the defaults of 2.6 to 2.9 have it, with those defaults and with others."""
    expected = outcome(lambda: by_default(name))
    assert all(map(torch.equal, outcome(lambda: loss_registry.create(name, 6, 8)), expected))
    copied = pickle.loads(pickle.dumps(loss_registry.create(name, 6, 8)))
    assert outcome(lambda: copied)[0].isfinite()
    moved = {
        distances.BaseDistance: (False, 1, 3, False),  # normalize_embeddings, p, power, is_inverted
        library.MultiSimilarityLoss: (3, 40, 0.7),
        miners.MultiSimilarityMiner: (0.3,),
        library.ContrastiveLoss: (0.1, 0.9),
        library.TripletMarginLoss: (0.2, True, True, 1),
        miners.TripletMarginMiner: (0.3, "hard"),
    }
    for built, defaults in moved.items():
        assert len(built.__init__.__defaults__) == len(defaults)
        monkeypatch.setattr(built.__init__, "__defaults__", defaults)
    for built in (*vars(library).values(), *vars(miners).values()):
        for getter in ("get_default_distance", "get_default_reducer", "get_default_weight_init_func"):
            if hasattr(built, getter):
                monkeypatch.setattr(built, getter, None)
    assert all(map(torch.equal, outcome(lambda: loss_registry.create(name, 6, 8)), expected))


OWN = """
import torch

class Mine(torch.nn.Module):
    def __init__(self, num_classes, embedding_size, s=1, reduction="mean"):
        super().__init__()
        self.s, self.reduction = s, reduction

    def forward(self, embeddings, labels):
        loss = self.s * embeddings.square().sum(dim=1)
        return getattr(loss, self.reduction)() if self.reduction else loss

def no_module(num_classes, embedding_size):
    return lambda embeddings, labels: 0
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return loss_registry.name_or_file("own.py:Mine")


def test_loss_from_a_file(file, monkeypatch):
    """The path is that of the folder where the command was given; values are Python literals, or else texts."""
    assert file == f"{os.getcwd()}/own.py:Mine"
    assert [loss_registry.label(name) for name in (file, "MS")] == ["Mine", "MS"]
    monkeypatch.chdir("/")
    criterion = loss_registry.create(file, 6, 8, arguments="s=2.5 reduction=sum")
    x = torch.randn(4, 8)
    assert (criterion.s, criterion.reduction) == (2.5, "sum")
    torch.testing.assert_close(criterion(x, torch.arange(4)), 2.5 * x.square().sum())
    assert loss_registry.keywords("a=-1 b=None c='x' d=[1,2] e=1e-3 f=x=y g=") == {
        "a": -1,
        "b": None,
        "c": "x",
        "d": [1, 2],
        "e": 1e-3,
        "f": "x=y",
        "g": "",
    }


def test_a_file_of_a_loss_is_a_module(tmp_path):
    """It imports from its folder, defines dataclasses with annotations as text, and its loss can be pickled."""
    (tmp_path / "neighbour_of_own.py").write_text("SCALE = 3.0\n")
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from neighbour_of_own import SCALE\n"
        f"{OWN}\n@dataclass\nclass Settings:\n    s: float = SCALE\n\n"
        "class Other(Mine):\n    def __init__(self, *sizes):\n        super().__init__(*sizes, Settings().s)\n"
    )
    criterion = loss_registry.create(f"{tmp_path}/own.py:Other", 6, 8)
    assert pickle.loads(pickle.dumps(criterion)).s == 3.0


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("Yours", "", "own.py has no class Yours"),
        ("Mine", "t=1", "Mine does not accept the arguments num_classes, embedding_size, t: got an unexpected .* 't'"),
        ("no_module", "", "expected no_module to be a torch.nn.Module, found function"),
        ("Mine", "reduction=", r"Mine returned \(4,\), expected a scalar"),
        ("Mine", "reduction=tolist", "Mine returned list, expected a scalar"),
    ],
)
def test_loss_from_a_file_that_cannot_be_used(file, name, arguments, words):
    with pytest.raises(ValueError, match=words):
        loss_registry.create(file.replace("Mine", name), 6, 8, arguments=arguments)(torch.randn(4, 8), torch.arange(4))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--loss", "none.py:Mine"], "argument --loss: .*none.py: No such file"),
        (["--loss", "own.py"], "argument --loss: invalid choice: 'own.py'"),
        (["--loss", "own.py:1"], "argument --loss: invalid choice: 'own.py:1'"),
        (["--loss", "own.py:Mine", "--loss-args", "s", "3"], "argument --loss-args: expected NAME=VALUE, found 's'"),
        (["--loss-args", "s=3"], "argument --loss-args: Proxy_Anchor takes none"),
        (["--loss", "own.py:Mine", "--sample-proxies", "0.5"], "--sample-proxies: only Proxy_Anchor can .* not Mine"),
    ],
)
def test_usage_errors_of_a_loss_from_a_file(file, argv, words, capsys):
    parser = argparse.ArgumentParser(parents=[loss_registry.options(), loss_registry.later_options()])
    with pytest.raises(SystemExit):
        loss_registry.check_arguments(parser, parser.parse_args(argv))
    assert re.search(words, capsys.readouterr().err)


def test_settings_of_a_loss_from_a_file_are_in_the_name_of_the_run():
    assert loss_registry.settings_in_words("/a/own.py:Mine", 0.1, 32.0, "s=16 path=../x") == "s16_path..-x"
    assert loss_registry.settings_in_words("MS", 0.1, 32.0, "") == "alpha32_mrg0.1"  # as published


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equation_is_in_full_precision(dtype):
    x, y = sample(40, 30, 16, torch.float32)
    x, proxies = x.detach().to(dtype), torch.randn(30, 16)
    expected = losses.equation(x.float(), proxies, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.equation(x, proxies, y), expected)


def test_fast_path_is_the_equation_in_float32():
    loss = ProxyAnchor(300, 16)
    x, y = sample(40, 300, 16, torch.float32)
    ours = value_and_gradients(lambda x, p: blocked.equation(x, p, y, 0.1, 32.0), x, loss.proxies)
    for a, b in zip(ours, value_and_gradients(lambda x, p: equation(x, p, y), x, loss.proxies)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
