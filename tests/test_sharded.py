"""Classes divided over processes, or sampled, against all of them in one process."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, in_processes
from torch import nn

import train
from proxy_anchor import collectives, loss_registry, losses, sharded, training
from proxy_anchor.embedding import Replica
from proxy_anchor.runs import resuming
from proxy_anchor.spec import NetworkSpec
from proxy_anchor.upgrades.synthesis import SyntheticProxyAnchor

SPEC = NetworkSpec("tiny", 4, 32)

SIZE, EPOCHS = 8, 5
# Classes, images in a batch, share of the classes, synthetic images per image. The classes are uneven over the
# processes, or so few that a process may have none in a step.
CASES = {
    "all": (7, 9, 1, 0),
    "few": (3, 10, 1, 0),
    "synthetic": (7, 9, 1, 1),
    "sampled": (23, 6, 0.4, 0),
    "few, sampled": (2, 4, 0.5, 0),
    "synthetic, sampled": (23, 6, 0.4, 1),
    "few, synthetic, sampled": (4, 5, 0.1, 1),
}


class Tiny(nn.Module):
    """A network with a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.backbone, self.model.embedding = nn.Linear(5, 6), nn.Linear(6, SIZE)
        self.model.never = nn.Linear(2, 2)

    def frozen_parameters(self):
        return []

    def forward(self, x):
        return self.model.embedding(self.model.backbone(x).relu())


class Training:
    """Epochs of two steps of a whole batch, to which each process contributes its images."""

    def __init__(self, num_classes, batch_size, share, synthesis=0, optimizer="adamw"):
        torch.manual_seed(0)
        self.num_classes, self.batch_size, self.losses = num_classes, batch_size, []
        self.network = Tiny().double()
        self.criterion = loss_registry.create(
            "Proxy_Anchor", num_classes, SIZE, 0.1, 32.0, share=share, synthesis=synthesis, seed=3
        ).double()
        self.optimizer = training.create_optimizer(optimizer, self.network, self.criterion, 1e-3, 1e-4)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.replica = Replica(self.network)
        self.parts = {"criterion": self.criterion, "optimizer": self.optimizer}

    def loss_of(self, images, labels):
        return self.criterion(
            collectives.gather_shards(self.replica(images), self.batch_size),
            collectives.gather_shards(labels, self.batch_size),
        )

    def epochs(self, first, last):
        """With warm-up in the first: its end unfreezes parameters."""
        start = sum(collectives.shard_sizes(self.batch_size)[: collectives.rank()])
        own = slice(start, start + collectives.shard_sizes(self.batch_size)[collectives.rank()])
        for step in range(first, last):
            random = np.random.default_rng(step)
            images = torch.from_numpy(random.standard_normal((2, self.batch_size, 5)))
            # Only the first classes, so that the last process has no positive.
            labels = torch.from_numpy(random.integers(max(1, self.num_classes // 2), size=(2, self.batch_size)))
            training.set_trainable(self.network, step, warm=1)
            training.train_one_epoch(
                self.network,
                self.loss_of,
                zip(images[:, own], labels[:, own]),
                self.optimizer,
                self.scaler,
                step,
                [self.network, self.criterion],
                self.losses,
            )
        return self

    def result(self):
        of_all = lambda rows: collectives.gather_shards(rows.detach(), self.num_classes)
        if isinstance(self.criterion, sharded.SampledProxyAnchor):
            rows = {name: of_all(rows) for name, rows in self.criterion.rows.items()}
        else:
            state = self.optimizer.state[self.criterion.proxies]
            rows = {name: of_all(value) for name, value in state.items() if value.ndim == 2}
            rows |= {"proxies": of_all(self.criterion.proxies)}
            rows |= {"gradient of proxies": of_all(self.criterion.proxies.grad)}
        named = dict(self.network.named_parameters())
        gradients = {f"gradient of {name}": p.grad for name, p in named.items() if p.grad is not None}
        parameters = {name: p.detach() for name, p in named.items()}
        return parameters | gradients | rows | {"losses": torch.tensor(self.losses)}


def cases(folder: Path):
    """All cases, and what four processes have saved, continued by this number of them."""
    results = {}
    for name, case in CASES.items():
        trained = Training(*case).epochs(0, EPOCHS).result()
        results |= {f"{name}: {key}": value for key, value in trained.items()}
        last = folder / f"{name}.pth"
        if collectives.world_size() == 4:
            half = Training(*case).epochs(0, 3)
            progress = {"epoch": 3, "losses": [], "seconds": 0.0, "rows": []}
            resuming.save(last, half.network, SPEC, half.parts, progress)
            dist.barrier()
        resumed = Training(*case)
        assert resuming.load(last, resumed.network, resumed.parts)["epoch"] == 3
        resumed.optimizer.step()  # as a run does, without gradients
        continued = resumed.epochs(3, EPOCHS).result()
        results |= {f"{name}, resumed: {key}": value for key, value in continued.items()}
    return results


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return {count: in_processes(count, cases, folder) for count in (4, 3, 2, 1)}


@pytest.mark.parametrize("processes", [4, 3, 2])
def test_processes_do_what_one_does(by_processes, processes):
    """Losses, all gradients, parameters and moments after five steps of AdamW, also where they resumed."""
    assert_close(by_processes[processes], by_processes[1], 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_resumed_by_another_number_of_processes(by_processes, name):
    """What four have saved, against steps never interrupted."""
    for results in by_processes.values():
        losses = results[f"{name}: losses"]
        np.testing.assert_allclose(results[f"{name}, resumed: losses"], losses[6:], rtol=1e-6)
        for key in (key for key in results if key.startswith(f"{name}: ") and not key.endswith("losses")):
            resumed = results[key.replace(": ", ", resumed: ", 1)]
            np.testing.assert_allclose(resumed, results[key], rtol=1e-6, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("num_classes, size", [(1, 5), (7, 3), (101, 7), (100, 16)])
def test_initial_proxies_are_those_of_one_process(monkeypatch, count, num_classes, size):
    monkeypatch.setattr(sharded, "BLOCK", 16)
    monkeypatch.setattr(collectives, "world_size", lambda: count)
    torch.manual_seed(1)
    expected, after = losses.ProxyAnchor(num_classes, size).proxies, torch.rand(1)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        torch.manual_seed(1)
        parts.append(sharded.ShardedProxyAnchor(num_classes, size, 0.1, 32.0).proxies)
        assert torch.equal(torch.rand(1), after)  # the network that is made next is the same too
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("synthesis", [0, 1])
def test_sample_is_an_unbiased_estimate(synthesis, monkeypatch):
    """Loss and gradients, over many draws, are those of all classes; the error of a mean falls with their number."""
    monkeypatch.setattr(SyntheticProxyAnchor, "draw_lambda", lambda self: 0.3)
    torch.manual_seed(0)
    whole, sampled = (
        loss_registry.create("Proxy_Anchor", 40, SIZE, 0.1, 32.0, share=share, synthesis=synthesis, seed=1).double()
        for share in (1, 0.3)
    )
    sampled.rows = {"proxies": whole.proxies.detach().clone()}
    x, labels = torch.randn(6, SIZE, dtype=torch.double, requires_grad=True), torch.tensor([0, 0, 3, 17, 39, 39])

    def measured(criterion):
        x.grad = criterion.proxies.grad = None
        loss = criterion(x, labels)
        loss.backward()
        by_x, by_proxies = x.grad, criterion.proxies.grad
        if criterion is sampled:
            by_proxies = torch.zeros_like(whole.proxies).index_add(0, sampled.sample, by_proxies)
        return torch.cat([loss[None], by_x.flatten(), by_proxies.flatten()]).detach()

    expected, draws = measured(whole), torch.stack([measured(sampled) for _ in range(2000)])
    error, spread = draws.mean(dim=0) - expected, draws.std(dim=0) / len(draws) ** 0.5
    varies = spread > 1e-12
    assert varies.float().mean() > 0.8 and (error[~varies].abs() < 1e-12).all()
    z = error[varies] / spread[varies]
    assert z.abs().max() < 5 and 0.5 < z.std() < 1.5


def test_proxies_that_were_not_drawn_rest():
    trained = Training(23, 6, 0.4).epochs(0, 3)
    before, drawn = copy.deepcopy(trained.criterion.rows), torch.zeros(23, dtype=torch.bool)
    draw = trained.criterion.draw
    trained.criterion.draw = lambda local: (draw(local), drawn.index_fill_(0, trained.criterion.sample, True))
    trained.epochs(3, 4)
    assert 0 < drawn.sum() < 23 and set(before) == {"proxies", "exp_avg", "exp_avg_sq"}
    for name, rows in trained.criterion.rows.items():
        assert torch.equal(rows[~drawn], before[name][~drawn])
        assert (rows[drawn] != before[name][drawn]).any(dim=1).all()


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_sample_of_all_is_exact(optimizer, monkeypatch):
    """With any optimizer: its state follows the proxies."""
    expected = Training(5, 6, 1, optimizer=optimizer).epochs(0, 4)
    monkeypatch.setattr(
        loss_registry,
        "create",
        lambda name, *settings, synthesis, **sample: sharded.SampledProxyAnchor(*settings, **sample),
    )
    found = Training(5, 6, 1, optimizer=optimizer).epochs(0, 4)
    assert found.losses == pytest.approx(expected.losses, rel=1e-12)
    torch.testing.assert_close(found.criterion.rows["proxies"], expected.criterion.proxies.data, rtol=1e-12, atol=0)


def test_killed_between_the_files_of_a_checkpoint(tmp_path, monkeypatch):
    """The earlier one is still whole; the next removes what was left over."""
    last, values = tmp_path / "last.pth", [None, None]

    def of_each(value):
        values[collectives.rank()] = value
        return list(values)

    monkeypatch.setattr(collectives, "all_gather_object", of_each)

    def rank_of_two(rank):
        monkeypatch.setattr(collectives, "world_size", lambda: 2)
        monkeypatch.setattr(collectives, "rank", lambda: rank)

    def save(epoch, ranks=(1, 0)):
        for rank in ranks:
            rank_of_two(rank)
            progress = {"epoch": epoch, "losses": [], "seconds": 0.0, "rows": []}
            resuming.save(last, halves[rank].network, SPEC, halves[rank].parts, progress)

    def load():
        with monkeypatch.context() as patch:
            patch.setattr(collectives, "world_size", lambda: 1)
            patch.setattr(collectives, "rank", lambda: 0)
            one = Training(7, 9, 1)
            torch.nn.init.zeros_(one.criterion.proxies)
            return resuming.load(last, one.network, one.parts)["epoch"], one.criterion.proxies.detach()

    halves = {}
    for rank in (1, 0):
        rank_of_two(rank)
        halves[rank] = Training(7, 9, 1)
    save(1)
    whole = torch.cat([halves[0].criterion.proxies, halves[1].criterion.proxies]).detach()
    with torch.no_grad():
        halves[1].criterion.proxies.add_(1)
    save(2, ranks=[1])  # and is killed
    epoch, found = load()
    assert epoch == 1 and torch.equal(found, whole)
    save(3)
    epoch, found = load()
    assert epoch == 3 and torch.equal(found[:4], whole[:4]) and torch.equal(found[4:], whole[4:] + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-3.0-1of2.pth", "last-3.0-2of2.pth", "last.pth"]
    shutil.copy(last, tmp_path / "last-backup.pth")
    (tmp_path / "last-3.0-2of2.pth").rename(tmp_path / "away.pth")
    shutil.copy(tmp_path / "last-3.0-1of2.pth", tmp_path / "last-3.0-2of2.pth")
    torch.save({"criterion proxies": torch.zeros(4, 9)}, tmp_path / "other.pth")
    for part in ("away.pth", "other.pth"):  # the other half, then rows of another run
        shutil.copy(tmp_path / part, tmp_path / "last-3.0-1of2.pth")
        with pytest.raises(ValueError, match="last-3.0-1of2.pth (does not belong to it|has 3 rows of)"):
            load()
    (tmp_path / "last-3.0-2of2.pth").unlink()
    shutil.copy(last, tmp_path / "last-3.0-1of2.pth.bak")
    save(4)
    assert (tmp_path / "last-backup.pth").exists() and (tmp_path / "last-3.0-1of2.pth.bak").exists()
    (tmp_path / "last-4.0-2of2.pth").unlink()
    with pytest.raises(ValueError, match="does not fit this run: There is no file .*last-4.0-2of2.pth"):
        load()


@pytest.mark.parametrize("share", [None, 0.5])
def test_labels_and_empty_batches_are_those_of_the_whole_loss(share):
    """Of divided classes and of a sample: labels of any integer type, and errors for others and for no images."""

    def loss():
        torch.manual_seed(0)
        if share is None:
            return sharded.ShardedProxyAnchor(20, 8, 0.1, 32.0)
        return sharded.SampledProxyAnchor(20, 8, 0.1, 32.0, share, 0)

    x, y = torch.randn(6, 8), torch.arange(6)
    assert torch.equal(loss()(x, y.byte()), loss()(x, y))
    with pytest.raises(ValueError, match="labels as a tensor of whole numbers, found torch.float32"):
        loss()(x, y.float())
    with pytest.raises(ValueError, match="of one or more images"):
        loss()(x[:0], y[:0])
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match="first derivatives"):
        torch.autograd.grad(loss()(x, y), x, create_graph=True)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sample-proxies", "0"], "argument --sample-proxies: 0 is not a share, from 1e-15 to 1"),
        (["--sample-proxies", "1e-300"], "argument --sample-proxies: 1e-300 is not a share, from 1e-15 to 1"),
        (["--sample-proxies", "nan"], "argument --sample-proxies: nan is not a share"),
        (["--sample-proxies", "1.5"], "argument --sample-proxies: 1.5 is not a share"),
        (["--sample-proxies", "0.5", "--loss", "Proxy_NCA"], "only Proxy_Anchor can sample its proxies, not Proxy_NCA"),
    ],
)
def test_samples_that_cannot_be_taken(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        train.parse(flags)
    assert ended.value.code == 2 and words in capsys.readouterr().err
