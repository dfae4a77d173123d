"""The upgrades of Proxy-Anchor, against their equations, resumed, and in several processes."""

import math
import random
import shutil
from types import SimpleNamespace

import kills
import numpy as np
import pytest
import torch
from helpers import arguments, assert_close, fails, in_processes, run_folder, run_train, save_backbone, stop_at
from pytorch_metric_learning.losses import ThresholdConsistentMarginLoss
from test_losses import by_the_equation, sample, value_and_gradients

import net
import train
import transfer
from net.embedding_net import Head
from proxy_anchor import checkpoint, collectives, loss_registry, losses, training
from proxy_anchor.embedding import Embedder
from proxy_anchor.runs import run_folders
from proxy_anchor.upgrades import flags
from proxy_anchor.upgrades.averaging import AveragedEmbedder
from proxy_anchor.upgrades.chosen import Upgrades
from proxy_anchor.upgrades.self_distillation import SelfDistillation
from proxy_anchor.upgrades.synthesis import SyntheticProxyAnchor, pairs
from proxy_anchor.upgrades.threshold_margin import threshold_margin

ALL = {"synthesis": 1, "self-distill": 1, "threshold-margin": 1, "average-weights": 0.9}
CPU = torch.device("cpu")


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def unit(a):
    return [x / math.hypot(*a) for x in a]


# Proxy Synthesis


def synthetic(ratio=1.0, classes=5, size=6, seed=3, share=1.0):
    torch.manual_seed(seed)
    return loss_registry.create(
        "Proxy_Anchor", classes, size, 0.2, 16.0, share=share, synthesis=ratio, seed=seed
    ).double()


def appended(x, proxies, labels, lam, ratio):
    """Embeddings, proxies and labels with the synthetic ones, by the paper: lists, image by image."""
    x, proxies, labels = [unit(row) for row in x.tolist()], [unit(row) for row in proxies.tolist()], labels.tolist()

    def mix(a, b):
        return [lam * p + (1 - lam) * q for p, q in zip(a, b)]

    number, count = {}, len(labels)  # of the synthetic classes
    for i in range(round(ratio * count)):
        later = [k % count for k in range(i + 1, i + count) if labels[k % count] != labels[i]]
        if later:
            j = later[0]
            pair = labels[i], labels[j]
            if pair not in number:
                number[pair] = len(proxies)
                proxies.append(mix(proxies[pair[0]], proxies[pair[1]]))
            x.append(unit(mix(x[i], x[j])))
            labels.append(number[pair])
    return torch.tensor(x, dtype=torch.double), torch.tensor(proxies, dtype=torch.double), torch.tensor(labels)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 3, 3, 0, 1], [2, 2, 2], [4, 4, 4, 4, 1]])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("sampled", [False, True])
def test_synthesis_is_the_equation(labels, ratio, sampled):
    """At two steps, each with a draw of its own; several images of the same two classes are of one synthetic class.

    A sample that has all classes by its share draws lambda from other numbers than the sample.
    """
    criterion, labels = synthetic(ratio, share=1 - 1e-12 if sampled else 1.0), torch.tensor(labels)
    x = torch.randn(len(labels), 6, dtype=torch.double)
    for step in range(2):
        lam = np.random.Generator(np.random.Philox(key=[3, step]).jumped(int(sampled))).beta(0.4, 0.4)
        proxies = criterion.rows["proxies"] if sampled else criterion.proxies.detach()
        together = appended(x, proxies, labels, lam, ratio)
        assert criterion(x, labels).item() == pytest.approx(by_the_equation(*together, 0.2, 16), rel=1e-10)


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_gradients_of_synthesis(ratio):
    criterion = synthetic(ratio, classes=4, size=3)
    labels = torch.tensor([0, 1, 1, 0, 3])

    def function(x, proxies):
        criterion.step = 2
        return torch.func.functional_call(criterion, {"proxies": proxies}, (x, labels))

    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, criterion.proxies.detach().clone().requires_grad_()))


@pytest.mark.parametrize("ratio, labels", [(0.0, [0, 1, 2, 3, 3, 1]), (1.0, [2, 2, 2, 2, 2, 2])])
def test_without_synthetic_images_it_is_proxy_anchor_to_the_bit(ratio, labels):
    """With a ratio of 0, and where the batch has one class."""
    x, labels = torch.randn(6, 8), torch.tensor(labels)
    criteria, after = [], []
    for make in (lambda: SyntheticProxyAnchor(5, 8, 0.1, 32.0, ratio=ratio, seed=0), lambda: losses.ProxyAnchor(5, 8)):
        torch.manual_seed(0)
        criteria.append(make())
        after.append(torch.rand(1))
    assert after[0] == after[1]  # the network that is made next is the same too
    ours, expected = (
        value_and_gradients(lambda x, p, c=c: torch.func.functional_call(c, {"proxies": p}, (x, labels)), x, c.proxies)
        for c in criteria
    )
    assert all(map(torch.equal, ours, expected))


def test_a_draw_of_one_repeats_images_and_proxies(monkeypatch):
    """lambda = 1: the loss of the batch with each image and its proxy once more, as a class of its own."""
    monkeypatch.setattr(np.random, "Generator", lambda philox: SimpleNamespace(beta=lambda a, b: 1.0))
    criterion, labels = synthetic(), torch.arange(5)
    x = torch.randn(5, 6, dtype=torch.double)
    proxies = torch.cat([criterion.proxies, criterion.proxies])
    expected = losses.equation(torch.cat([x, x]), proxies, torch.cat([labels, labels + 5]), 0.2, 16.0)
    torch.testing.assert_close(criterion(x, labels), expected, rtol=1e-12, atol=0)


def test_pairs_are_of_two_classes():
    labels = torch.tensor([3, 3, 1, 3, 1])
    i, j = pairs(labels)
    assert (i.tolist(), j.tolist()) == ([0, 1, 2, 3, 4], [2, 2, 3, 4, 0])


def test_draws_leave_the_random_states_alone():
    """A run with synthetic classes sees the images that the run without them sees."""
    criterion, x = synthetic(), torch.randn(4, 6, dtype=torch.double)
    states = [(torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(int)), random.getstate())]
    criterion(x, torch.arange(4))
    states += [(torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(int)), random.getstate())]
    kills.assert_identical(*states)


# The threshold-consistent margin


def by_pairs(x, labels):
    positive, negative = [], []
    for i, (a, y) in enumerate(zip(x.tolist(), labels.tolist())):
        for j, (b, z) in enumerate(zip(x.tolist(), labels.tolist())):
            s = cosine(a, b)
            if i != j and y == z and s <= 0.9:
                positive.append(0.9 - s)
            if y != z and s >= 0.5:
                negative.append(s - 0.5)
    return sum(sum(values) / len(values) for values in (positive, negative) if values)


@pytest.mark.parametrize("batch, classes, size", [(12, 4, 3), (6, 6, 2), (5, 1, 4), (1, 1, 3), (20, 3, 50)])
def test_threshold_margin_is_the_equation(batch, classes, size):
    x, labels = sample(batch, classes, size)
    assert threshold_margin(x, labels).item() == pytest.approx(by_pairs(x, labels), rel=1e-12)
    theirs = ThresholdConsistentMarginLoss()(x, labels)
    torch.testing.assert_close(threshold_margin(x, labels), torch.as_tensor(theirs).double(), rtol=1e-9, atol=1e-12)


def test_gradients_of_threshold_margin():
    x, labels = sample(9, 3, 3)
    assert by_pairs(x, labels) > 0
    assert torch.autograd.gradcheck(lambda x: threshold_margin(x, labels), x.requires_grad_())


def test_threshold_margin_of_clear_classes_is_nothing():
    x = torch.eye(3)[[0, 0, 1, 2]].requires_grad_()
    loss = threshold_margin(x, torch.tensor([0, 0, 1, 2]))
    loss.backward()
    assert loss == 0 and not x.grad.any()


# Self-distillation


def by_softmax(student, teacher):
    total, n = 0, len(student)
    for i in range(n):
        own, targets = (
            [math.exp(cosine(z[i], z[j]) / 0.1) for j in range(n) if j != i]
            for z in (student.tolist(), teacher.tolist())
        )
        total -= sum(t / sum(targets) * math.log(o / sum(own)) for o, t in zip(own, targets)) / n
    return total


@pytest.mark.parametrize("batch", [2, 3, 11])
def test_self_distillation_is_the_equation(batch):
    student, teacher = torch.randn(batch, 5, dtype=torch.double), torch.randn(batch, 7, dtype=torch.double)
    assert SelfDistillation()(student, teacher).item() == pytest.approx(by_softmax(student, teacher), rel=1e-12)


def test_gradients_of_self_distillation():
    """Of the student alone; none where it agrees with the teacher."""
    student, teacher = (torch.randn(5, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: SelfDistillation()(x, teacher), student)
    SelfDistillation()(student, teacher).backward()
    assert teacher.grad is None
    same = teacher.detach().clone().requires_grad_()
    SelfDistillation()(same, teacher).backward()
    assert same.grad.abs().max() < 1e-12


def test_batch_of_one_image_is_refused(capsys):
    with pytest.raises(ValueError, match="of two or more images"):
        SelfDistillation()(torch.randn(1, 4), torch.randn(1, 4))
    fails(lambda: train.parse(["--self-distill", "--batch-size", "1"]), capsys, "choose --batch-size 2 or more", code=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_terms_are_in_full_precision(dtype):
    x, labels = sample(8, 3, 16, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = threshold_margin(x, labels), SelfDistillation()(x, x.flip(0))
    expected = threshold_margin(x.float(), labels), SelfDistillation()(x.float(), x.flip(0).float())
    assert all(map(torch.equal, found, expected))


# Averaged weights


@pytest.mark.parametrize("bn_freeze", [True, False])
def test_average_is_that_of_the_steps_by_hand(bn_freeze):
    """In float64, of parameters and statistics; frozen layers and BatchNorm stay as they are, to the bit."""
    network = net.create("tiny", 8, bn_freeze=bn_freeze)
    network.freeze("layer1")
    embedder = Embedder(network, CPU)
    averaged = AveragedEmbedder(embedder, 0.8)
    criterion = losses.ProxyAnchor(4, 8)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-2, 1e-4)
    averaged.attach_optimizer(optimizer)
    start, expected = {k: v.clone() for k, v in network.state_dict().items()}, None
    for _ in range(5):
        network.train()
        loss = criterion(embedder(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = {name: tensor.double() for name, tensor in network.state_dict().items()}
        expected = {name: 0.8 * expected[name] + 0.2 * now[name] for name in now} if expected else now
    found = averaged.network.state_dict()
    moved = {name for name in found if not torch.equal(found[name], start[name])}
    for name in moved:
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    statistics = {name for name in moved if "running" in name}
    assert statistics == (
        set() if bn_freeze else {f"model.{n}.running_{s}" for n in ("bn1", "layer2.1") for s in ("mean", "var")}
    )
    assert "model.layer2.0.weight" in moved and not any(name.startswith("model.layer1") for name in moved)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_steps_that_fp16_skips_are_not_averaged(name):
    """Of fused optimizers, whose hooks are called for skipped steps too, and of others."""
    network = net.create("tiny", 8)
    averaged = AveragedEmbedder(Embedder(network, CPU), 0.9)
    optimizer = training.create_optimizer(name, network, losses.ProxyAnchor(4, 8), 1e-2, 1e-4)
    averaged.attach_optimizer(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (math.inf, 1.0, math.inf, 1.0, math.inf):
        optimizer.zero_grad()
        scaler.scale(factor * network.model.embedding.weight.square().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert averaged.average.n_averaged == 2


def test_averaged_head_shares_the_backbone():
    """Its embedding layer is a copy; its network, which is saved, has this layer and the backbone's own weights."""
    network = net.create("tiny", 8)
    averaged = AveragedEmbedder(Embedder(Head(network), CPU), 0.9)
    copy = averaged.network.network
    assert copy.model.embedding is averaged.network.embedding is not network.model.embedding
    shared = {name: tensor for name, tensor in copy.state_dict(keep_vars=True).items() if "model.embedding" not in name}
    assert all(tensor is network.state_dict(keep_vars=True)[name] for name, tensor in shared.items()) and shared
    features = torch.randn(3, 48)
    with torch.no_grad():
        assert torch.equal(averaged.network(features), network.embed(features))
        network.model.embedding.weight.zero_()
        assert averaged.network(features).norm(dim=1).min() > 0.9


def test_average_is_evaluated_and_saved_as_the_best(cub_root, tmp_path):
    """The best network is the average; last.pth has both, and the weights that train are those of a run without."""
    run_train(cub_root, tmp_path / "with", epochs=1, **{"average-weights": 0.5, "warm": 0, "bn-freeze": 0})
    run_train(cub_root, tmp_path / "without", epochs=1, **{"warm": 0, "bn-freeze": 0})
    ours, plain = (run_folder(tmp_path / name) for name in ("with", "without"))
    last, expected = (torch.load(folder / "last.pth") for folder in (ours, plain))
    kills.assert_identical(last["model_state_dict"], expected["model_state_dict"])
    best = torch.load(ours / "cub_tiny_best.pth")["model_state_dict"]
    average = {name.removeprefix("module."): x for name, x in last["average"].items() if name != "n_averaged"}
    kills.assert_identical(dict(best), average)
    assert not torch.equal(best["model.conv1.weight"], last["model_state_dict"]["model.conv1.weight"])
    assert last["average"]["n_averaged"] == 3
    with pytest.raises(ValueError, match=r"last.pth holds two networks, .*: give the \*_best.pth in its folder"):
        checkpoint.Checkpoint(ours / "last.pth")
    checkpoint.Checkpoint(plain / "last.pth")


# In a run


def step(**settings):
    """The weights after two steps of a network with these upgrades."""
    torch.manual_seed(0)
    network = net.create("tiny", 8, bn_freeze=False)
    embedder = Embedder(network, CPU)
    criterion = loss_registry.create("Proxy_Anchor", 4, 8, synthesis=settings.pop("synthesis", 0))
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-3, 1e-4)
    upgrades = Upgrades(embedder, **flags_of(settings))
    upgrades.attach_optimizer(optimizer)

    def loss_of(images, labels):
        embeddings = embedder(images)
        return upgrades.added(criterion(embeddings, labels), images, embeddings, labels)

    batches = [(torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6) % 4) for _ in range(2)]
    training.train_one_epoch(network, loss_of, batches, optimizer, embedder.scaler, 0)
    return network.state_dict() | criterion.state_dict() | {"random": torch.get_rng_state()}


def flags_of(settings):
    return {name: settings.get(name, 0.0) for name in ("threshold_margin", "self_distill", "average_weights")}


def test_average_does_not_change_the_training():
    kills.assert_identical(step(average_weights=0.99), step())


@pytest.mark.parametrize("name", ["synthesis", "self_distill", "threshold_margin"])
def test_terms_change_the_training(name):
    assert not torch.equal(step(**{name: 1.0})["proxies"], step()["proxies"])


def test_nothing_is_added_without_flags():
    embedder, loss = Embedder(net.create("tiny", 8), CPU), torch.zeros(())
    upgrades = Upgrades(embedder, 0.0, 0.0, 0.0)
    assert upgrades.added(loss, None, None, None) is loss and upgrades.state == {}
    assert upgrades.evaluated() is embedder and upgrades.network is None
    assert type(loss_registry.create("Proxy_Anchor", 4, 8)) is losses.ProxyAnchor


def test_teacher_sees_batchnorm_as_the_student_does():
    """Statistics of the batch where BatchNorm trains, its own where it is frozen; so a fresh one agrees to the bit."""
    for bn_freeze in (True, False):
        network = net.create("tiny", 8, bn_freeze=bn_freeze)
        for norm in network.model.norms():
            norm.running_mean.normal_()
        embedder = Embedder(network, CPU)
        teacher = AveragedEmbedder(embedder, 0.9)
        network.train()
        images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(teacher(images), embedder(images))


def test_average_has_the_precision_of_the_network_and_is_compiled_as_it_is(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    embedder = Embedder(net.create("tiny", 8), CPU, "bf16", compile=True)
    averaged = AveragedEmbedder(embedder, 0.9)
    assert averaged.dtype == torch.bfloat16 and compiled == [embedder.network, averaged.network]
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    embedder.network.train()
    assert torch.equal(averaged(images), embedder(images))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of backbone weights."""
    return save_backbone("tiny", tmp_path_factory.mktemp("weights") / "tiny.pth")


# An epoch is 3 batches of training and 2 or 3 of evaluation.
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("moment", [2, 8])
def test_stopped_run_goes_on_to_the_same_end(cub_root, weights, tmp_path, monkeypatch, frozen, moment):
    """In the middle of an epoch: the draws, the teacher and the average continue, to the last bit.

    With --frozen all classes are used, otherwise a sample.
    """
    changed = ALL if frozen else ALL | {"warm": 0, "bn-freeze": 0, "sample-proxies": 0.5}
    line = [*["--frozen"] * frozen, *arguments(cub_root, pretrained=weights, epochs=3, **changed)]
    train.main([*line, "--LOG_DIR", str(tmp_path / "one")])
    if frozen:
        shutil.copytree(tmp_path / "one" / "features_cub", tmp_path / "two" / "features_cub")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, moment + 3)  # after those that measure the backbone
        train.main([*line, "--LOG_DIR", str(tmp_path / "two")])
    train.main([*line, "--LOG_DIR", str(tmp_path / "two"), "--resume", "auto"])
    ours, expected = (kills.outcome(tmp_path / name) for name in ("two", "one"))
    kills.assert_identical(ours, expected)
    assert {"teacher", "average"} <= expected["last"].keys() and expected["last"]["criterion"]["step"] == 9


def test_frozen_head_is_averaged_alone(cub_root, weights, tmp_path):
    """The best checkpoint is the whole network, with the backbone as it was and the average as its embedding layer."""
    train.main(["--frozen", *arguments(cub_root, pretrained=weights, epochs=1, LOG_DIR=tmp_path, **ALL)])
    best = checkpoint.read(run_folder(tmp_path) / "cub_tiny_best.pth")["model_state_dict"]
    last = torch.load(run_folder(tmp_path) / "last.pth")
    assert set(last["average"]) == {"n_averaged", "module.embedding.weight", "module.embedding.bias"}
    assert torch.equal(best["model.embedding.weight"], last["average"]["module.embedding.weight"])
    for name, tensor in torch.load(weights).items():
        assert torch.equal(best[f"model.{name}"], tensor)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--synthesis --loss MS --IPC 4", "argument --synthesis: it mixes the proxies of Proxy_Anchor"),
        ("--synthesis 2", "argument --synthesis: 2 is not a share, from 0 to 1"),
        ("--average-weights 1", "argument --average-weights: 1 is not a decay, from 0 to less than 1"),
        ("--self-distill -1", "argument --self-distill: -1 is not 0 or more"),
        ("--threshold-margin x", "argument --threshold-margin: 'x' is not a number"),
        ("--proxy-lr 0", "argument --proxy-lr: 0 is not positive"),
        ("--proxy-lr 5 --loss Proxy_NCA", "argument --proxy-lr: it is for Proxy_Anchor; Proxy_NCA has its own"),
    ],
)
def test_what_does_not_combine_is_a_usage_error(capsys, line, words):
    fails(lambda: train.parse(line.split()), capsys, words, code=2)


def test_transfer_has_no_upgrades(capsys):
    fails(lambda: transfer.parse(["--synthesis"]), capsys, "unrecognized arguments: --synthesis", code=2)


def test_folders_tell_runs_apart():
    lines = [
        "",
        "--proxy-lr 1000",
        "--synthesis",
        "--synthesis 0.5",
        "--self-distill",
        "--threshold-margin",
        "--average-weights",
    ]
    lines += ["--average-weights 0.9", "--synthesis --self-distill --threshold-margin --average-weights"]
    names = [train.run_name(train.parse(line.split())) for line in lines]
    assert len(set(names)) == len(lines) and names[-1].endswith(
        "_synthesis1_self-distill1_threshold-margin1_average-weights0.99"
    )
    assert names[0] == "bn_inception_Proxy_Anchor_embedding512_alpha32_mrg0.1_adamw_lr0.0001_batch150"


def test_runs_of_earlier_versions_are_without_upgrades():
    """With proxies that learn at 100 times the rate of the network."""
    now = {name: value for name, value in vars(train.parse([])).items() if name != "spec"}
    earlier = {name: value for name, value in now.items() if name not in (*flags.OFF, "proxy_lr")}
    assert run_folders.differences(earlier, now) == []
    for name, value in {"proxy_lr": 1e4, "synthesis": 1.0, "self_distill": 1.0, "average_weights": 0.99}.items():
        assert [line.split(":")[0] for line in run_folders.differences(earlier, now | {name: value})] == [name]


def test_run_with_upgrades_is_resumed_by_its_path(cub_root, tmp_path):
    """The settings are read from config.json, off ones too."""
    run_train(cub_root, tmp_path, epochs=1, **{"average-weights": 0.9, "proxy-lr": 500})
    args = train.parse(["--resume", str(run_folder(tmp_path)), "--epochs", "2"])
    assert (args.average_weights, args.synthesis, args.proxy_lr) == (0.9, 0.0, 500)
    train.main(["--resume", str(run_folder(tmp_path)), "--epochs", "2"])


@pytest.mark.parametrize("more", [{}, {"share": 0.5}, {"synthesis": 1.0}, {"share": 0.5, "synthesis": 1.0}])
def test_rate_of_the_proxies(more):
    criterion = loss_registry.create("Proxy_Anchor", 4, 8, proxy_lr=1e4, **more)
    optimizer = training.create_optimizer("adamw", net.create("tiny", 8), criterion, 5e-6, 1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-6, 5e-6, 5e-2])
    assert loss_registry.create("Proxy_Anchor", 4, 8, **more).proxy_lr == 100 == losses.ProxyAnchor.proxy_lr


# Processes


def trained(dtype=torch.double):
    """Steps with all upgrades on whole batches, to which each process contributes its images."""
    torch.manual_seed(0)
    network = net.create("tiny", 8).to(dtype)
    network.normalize = torch.nn.Identity()
    embedder = Embedder(network, CPU)
    criterion = loss_registry.create("Proxy_Anchor", 5, 8, seed=1, synthesis=1.0).to(dtype)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-3, 1e-4)
    upgrades = Upgrades(embedder, 1.0, 1.0, 0.9)
    upgrades.attach_optimizer(optimizer)
    values = []

    def loss_of(images, labels):
        embeddings, labels = (collectives.gather_shards(x, 7) for x in (embedder(images), labels))
        return upgrades.added(criterion(embeddings, labels), images, embeddings, labels)

    images, labels = torch.randn(4, 7, 3, 32, 32, dtype=dtype), torch.randint(3, (4, 7))
    own = collectives.shard(7)
    batches = zip(images[:, own], labels[:, own])
    training.train_one_epoch(network, loss_of, batches, optimizer, embedder.scaler, 0, (), values)
    averages = {f"average of {k}": v for k, v in upgrades.evaluated().network.state_dict().items()}
    proxies = collectives.gather_shards(criterion.proxies.detach(), 5)
    parameters = {k: p.detach() for k, p in network.named_parameters()}
    return parameters | averages | {"proxies": proxies, "losses": torch.tensor(values, dtype=torch.double)}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_do_what_one_does(processes):
    """Neither 7 images nor 5 classes nor the synthetic ones are divided by 2 or 3; some classes have no image."""
    assert_close(in_processes(processes, trained), trained(), 1e-9)


def averages():
    """Of a network that differs from process to process, when it is evaluated."""
    torch.manual_seed(collectives.rank())
    upgrades = Upgrades(Embedder(net.create("tiny", 8), CPU), 0.0, 1.0, 0.9)
    upgrades.evaluated()
    return {f"{k} {name}": x for k, part in upgrades.state.items() for name, x in part.network.state_dict().items()}


def test_processes_have_the_averages_of_the_first():
    kills.assert_identical({k: torch.from_numpy(x) for k, x in in_processes(2, averages).items()}, averages())
