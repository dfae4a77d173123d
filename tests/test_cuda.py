"""Parity of a CUDA device with the CPU. Skipped without one; `benchmarks/gpu.sh` runs it where there is one."""

import csv
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pages import REPOSITORY
from torch.utils.data import DataLoader, TensorDataset

import net
from proxy_anchor import hardware, loss_registry, losses, retrieval, training
from proxy_anchor.embedding import Embedder

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

pytestmark = [
    pytest.mark.cuda,  # conftest.py hides CUDA from the other tests
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(autouse=True)
def without_tf32():
    hardware.select(0)


@contextmanager
def no_waiting():
    """An error where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(ours, expected, tolerance):
    """Relative to the largest value."""
    ours, expected = ours.detach().cpu().double(), expected.detach().cpu().double()
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


# The loss


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("classes", [7, 50_000])
def test_loss(classes, dtype, tolerance):
    """Value and gradients against the CPU's in float64; half precision rounds the embeddings' gradient alone."""
    loss = losses.ProxyAnchor(classes, 64)
    x, y = torch.randn(90, 64).to(dtype), torch.randint(classes, (90,))
    outcomes = []
    for criterion, embeddings, labels in (
        (losses.ProxyAnchor(classes, 64).to(GPU), x.to(GPU), y.to(GPU)),
        (losses.ProxyAnchor(classes, 64).double(), x.double(), y),
    ):
        criterion.load_state_dict(loss.state_dict())
        value = criterion(embeddings.requires_grad_(), labels)
        value.backward()
        outcomes.append((value, criterion.proxies.grad, embeddings.grad))
    for ours, expected, allowed in zip(*outcomes, (1e-5, 1e-5, tolerance)):
        assert_close(ours, expected, allowed)


@pytest.mark.parametrize("synthesis", [0, 1])
@pytest.mark.parametrize("share", [1, 0.3])
def test_loss_of_a_sample_and_of_synthetic_classes(share, synthesis):
    """Two steps against the CPU's in float64, with the same draws."""
    x, y = torch.randn(2, 30, 16), torch.randint(40, (2, 30))
    outcomes = []
    for device, dtype in ((GPU, torch.float32), (torch.device("cpu"), torch.double)):
        torch.manual_seed(1)
        criterion = loss_registry.create("Proxy_Anchor", 40, 16, share=share, synthesis=synthesis)
        criterion.to(device, dtype)
        for embeddings, labels in zip(x.to(device, dtype), y.to(device)):
            criterion.zero_grad()
            value = criterion(embeddings.requires_grad_(), labels)
            value.backward()
            outcomes.append((value, criterion.proxies.grad, embeddings.grad))
    for ours, expected in zip(outcomes[:2], outcomes[2:]):
        for found, wanted in zip(ours, expected):
            assert_close(found, wanted, 1e-5)


# The search


@pytest.mark.parametrize("within", [True, False])
def test_search(within):
    """Vectors of plus and minus one: similarities are exact, with ties everywhere, and so are ranks and scores."""
    x, y = torch.randint(2, (9000, 64)) * 2.0 - 1, torch.randint(3000, (9000,))
    parts = [(x, y)] if within else [(x[:4200], y[:4200]), (x[4200:], y[4200:])]
    cpu = [tensor for part in parts for tensor in part]
    gpu = [tensor.to(GPU) for tensor in cpu]
    ranks = retrieval.best_positive_rank(*gpu)
    assert ranks.device == GPU and torch.equal(ranks.cpu(), retrieval.best_positive_rank(*cpu))
    assert torch.equal(retrieval.map_at_r(*gpu).cpu(), retrieval.map_at_r(*cpu))
    queries, *gallery = zip(gpu[::2], gpu[1::2])
    assert retrieval.recall_at_k(*queries, (1, 10), *(gallery[0] if gallery else ())) == pytest.approx(
        retrieval.recall_of_ranks(ranks.cpu(), (1, 10))
    )


def test_equal_images_are_equally_similar():
    """A network that maps all images to one point finds nothing: products do not depend on their place."""
    x, y = torch.randn(1, 512, device=GPU).expand(9000, -1), torch.arange(9000, device=GPU) // 3
    assert (retrieval.best_positive_rank(x, y) == 8997).all()
    assert not retrieval.map_at_r(x, y).any()


def test_search_of_gaussian_embeddings():
    """Rounding may exchange neighbours, hardly ever."""
    y = torch.arange(6000) // 6
    x = torch.randn(6000, 512) + torch.randn(1000, 512)[y]
    ours, expected = retrieval.best_positive_rank(x.to(GPU), y.to(GPU)).cpu(), retrieval.best_positive_rank(x, y)
    assert (ours != expected).float().mean() < 0.01
    assert_close(retrieval.map_at_r(x.to(GPU), y.to(GPU)).mean(dim=1), retrieval.map_at_r(x, y).mean(dim=1), 1e-3)


# The networks


def build(name, device, amp="none", compiled=False):
    """An Embedder of a network with the BatchNorm statistics of images, without which its values overflow fp16."""
    torch.manual_seed(0)
    network = net.create(name, 64)
    for norm in network.model.norms():
        norm.train()
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        network(network.normalize(photographs(8, 96)))
    return Embedder(network, device, amp, compiled)


def photographs(count, size):
    """uint8 images that are smooth, as photographs are."""
    small = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    return (255 * torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1)).to(torch.uint8)


@pytest.mark.parametrize(
    "name, amp, tolerance",
    [*((name, "none", 1e-3) for name in net.BACKBONES), ("resnet18", "bf16", 0.2), ("resnet18", "fp16", 0.1)],
)
def test_embeddings(name, amp, tolerance):
    embeddings = []
    loader = DataLoader(TensorDataset(photographs(4, 224), torch.arange(4)), batch_size=4)
    for device, precision in ((GPU, amp), (CPU, "none")):
        found = build(name, device, precision).embed(loader)
        assert found.vectors.device == device and torch.equal(found.labels.cpu(), torch.arange(4))
        embeddings.append(found.vectors)
    assert_close(*embeddings, tolerance)


def step(name, device, amp="none", compiled=False):
    """Loss and gradients of a step of training."""
    embedder = build(name, device, amp, compiled)
    network, criterion = embedder.network.train(), losses.ProxyAnchor(4, 64).to(device)
    ((images, labels),) = embedder.batches([(photographs(8, 96), torch.arange(8) % 4)])
    loss = criterion(embedder(images), labels)
    scale = 256 if amp == "fp16" else 1  # else small gradients are lost
    (scale * loss).backward()
    parameters = [*network.parameters(), *criterion.parameters()]
    gradients = [p.grad.flatten() / scale for p in parameters if p.grad is not None]
    return loss.detach().cpu(), torch.cat(gradients).cpu()


@pytest.mark.parametrize("name", net.BACKBONES)
def test_step(name):
    ours, expected = step(name, GPU), step(name, CPU)
    assert_close(ours[0], expected[0], 1e-4)
    assert torch.nn.functional.cosine_similarity(ours[1], expected[1], dim=0) > 0.999


@pytest.mark.parametrize(
    "name, change, tolerance",
    [("resnet18", {"amp": "bf16"}, 0.2), ("resnet18", {"amp": "fp16"}, 0.1), ("resnet18", {"compiled": True}, 1e-3)],
)
def test_faster_step(name, change, tolerance):
    ours, expected = step(name, GPU, **change), step(name, GPU)
    assert_close(ours[0], expected[0], tolerance)
    assert torch.nn.functional.cosine_similarity(ours[1], expected[1], dim=0) > 1 - tolerance


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_no_step_waits_for_the_gpu(amp, optimizer):
    """Network, loss, backward pass, unscaling, clipping and the fused optimizer."""
    embedder = build("resnet18", GPU, amp)
    network, scaler, criterion = embedder.network.train(), embedder.scaler, losses.ProxyAnchor(4, 64).to(GPU)
    optimizer = training.create_optimizer(optimizer, network, criterion, 1e-4, 1e-4)
    images, labels = photographs(8, 64).to(GPU), torch.arange(8, device=GPU) % 4

    def one():
        loss = criterion(embedder(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(network.parameters(), 10)
        scaler.step(optimizer)
        scaler.update()

    one()  # what is made at first may wait
    with no_waiting():
        one()


# The scripts


def flags(root, logs, *more):
    return [
        "--allow-partial",
        "--data-root",
        str(root),
        "--model",
        "resnet18",
        "--embedding-size",
        "8",
        "--image-size",
        "64",
        "--workers",
        "2",
        "--batch-size",
        "8",
        "--pretrained",
        "none",
        "--epochs",
        "2",
        "--warm",
        "0",
        "--wandb",
        "disabled",
        "--LOG_DIR",
        str(logs),
        *more,
    ]


def rows(logs):
    (path,) = Path(logs).glob("**/metrics.csv")
    with open(path, newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("more", [(), ("--amp", "bf16"), ("--amp", "fp16"), ("--compile",), ("--bn-freeze", "0")])
def test_training_and_evaluation(more, cub_root, tmp_path):
    import evaluate
    import train

    train.main(flags(cub_root, tmp_path, *more))
    (checkpoint,) = tmp_path.glob("**/*_best.pth")
    amp = more if "--amp" in more else ()
    metrics = evaluate.main(
        [
            "--allow-partial",
            "--data-root",
            str(cub_root),
            "--model",
            "resnet18",
            "--embedding-size",
            "8",
            "--image-size",
            "64",
            "--workers",
            "0",
            "--batch-size",
            "8",
            "--resume",
            str(checkpoint),
            *amp,
        ]
    )
    best = max(rows(tmp_path), key=lambda row: row["R@1"])
    assert {name: best[name] for name in metrics} == pytest.approx(metrics, abs=0.1)


def test_one_nccl_process(cub_root, tmp_path):
    """Under torchrun: as without it but for the order of sums."""
    commands = {"one": [], "nccl": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]}
    for name, launcher in commands.items():
        script = [str(REPOSITORY / "train.py"), *flags(cub_root, tmp_path / name, "--optimizer", "sgd")]
        done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "CUDA device 0" in done.stdout
    for ours, expected in zip(rows(tmp_path / "nccl"), rows(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-3)
