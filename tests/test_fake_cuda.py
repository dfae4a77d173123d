"""What would go wrong on a GPU, found without one, by torch's fake tensors "on cuda:0".

They have a device, a shape and a type, but no values: operations that mix devices raise, and so does every look at a
value from the host, for which a GPU has to be waited for. The autograd engine's backward pass does not run with them.
"""

from contextlib import contextmanager

import pytest
import torch
from helpers import fakes_cuda
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import net
from proxy_anchor import loss_registry, losses, retrieval, tiles, training
from proxy_anchor.embedding import Embedder
from proxy_anchor.vectors import Embeddings

pytestmark = fakes_cuda
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def fake_cuda(monkeypatch):
    """Within `with fake_cuda():` tensors are fake. Modules are made before, and moved to the GPU within."""

    @contextmanager
    def context():
        with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
            # Else autocast and the scaler are idle.
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
            yield

    return context


class Looks(TorchDispatchMode):
    """Looks at values from the host: what they found is written down, or is given in answer to the same looks."""

    def __init__(self, answers=None):
        super().__init__()
        self.found, self.answers = [], iter(answers) if answers is not None else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def run():
            return function(*args, **(kwargs or {}))

        if not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            return run()
        if self.answers is None:
            self.found.append((function, run()))
            return self.found[-1][1]
        expected, found = next(self.answers)
        assert function is expected
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=args[0].device), found
        )


@pytest.fixture
def on_fake_cuda(fake_cuda, monkeypatch):
    """run(function, *arguments): what function returns for the arguments on the GPU.

    A look at values finds there what it finds on the CPU, where the function is run first.
    """

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", FakeTensor.tolist)  # a look for each value
            with Looks() as cpu:
                function(*arguments)
        with fake_cuda():
            arguments = [argument.to(GPU) for argument in arguments]
            with Looks(cpu.found):
                return function(*arguments)

    return run


def test_the_harness_finds_mixed_devices_and_looks_at_values(fake_cuda):
    with fake_cuda():
        x = torch.randn(4, 3, device=GPU)
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            x + torch.randn(4, 3)
        for look in (lambda: x.sum().item(), lambda: bool(x.isfinite().all()), lambda: x[x > 0], lambda: x[0].tolist()):
            with pytest.raises(Exception, match="aten.(_local_scalar_dense|nonzero)"):
                look()


def test_the_harness_answers_looks_alone(on_fake_cuda):
    x = torch.tensor([1.0, -2.0, 3.0])
    assert on_fake_cuda(lambda x: (x[x > 0].shape, x.sum().item(), x.tolist()), x) == ((2,), 2.0, [1.0, -2.0, 3.0])
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        on_fake_cuda(lambda x: x[x > 0] + torch.arange(2), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [7, 50_000])
def test_loss(fake_cuda, classes, dtype):
    """Forward, where the gradients are made too, without a look at a value; in one block of classes and in many."""
    loss = losses.ProxyAnchor(classes, 8)
    with fake_cuda(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.randn(30, 8, device=GPU, dtype=dtype, requires_grad=True)
        value = loss.to(GPU)(x, torch.randint(classes, (30,), device=GPU))
        assert value.device == GPU and value.shape == () and value.dtype == torch.float32
        gradients = value.grad_fn.saved_tensors
        assert [(g.device, g.shape) for g in gradients] == [(GPU, (30, 8)), (GPU, (classes, 8))]


def test_labels_out_of_range_are_refused_on_the_device(fake_cuda, monkeypatch):
    """By an assertion that the host does not wait for; of what it says, a CPU shows what it would find."""
    asserted, loss = [], losses.ProxyAnchor(7, 8)
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asserted.append((condition, message)))
    with fake_cuda():
        loss.to(GPU)(torch.randn(30, 8, device=GPU), torch.zeros(30, dtype=torch.uint8, device=GPU))
    ((condition, message),) = asserted
    assert condition.device == GPU and condition.shape == () and condition.dtype == torch.bool
    assert message == "Expected labels from 0 to 6"


def test_loss_of_labels_left_on_the_cpu(fake_cuda):
    loss = losses.ProxyAnchor(7, 8)
    with fake_cuda(), pytest.raises((RuntimeError, DataDependentOutputException)):
        loss.to(GPU)(torch.randn(30, 8, device=GPU), torch.zeros(30, dtype=torch.long))


@pytest.mark.parametrize("name", ("Proxy_NCA", "MS", "Contrastive", "Triplet"))  # NPair goes through numpy
def test_rivals(on_fake_cuda, name):
    criterion = loss_registry.create(name, 6, 8)
    value = on_fake_cuda(lambda x, y: criterion.to(x.device)(x, y), torch.randn(24, 8), torch.arange(24) % 6)
    assert value.device == GPU and value.shape == ()


class Batches(list):
    """A loader of two images in all; a DataLoader looks at a random number."""

    dataset = sampler = range(2)


@pytest.mark.parametrize("amp, dtype", [("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("name", ["bn_inception", "googlenet", "resnet50"])
def test_networks(fake_cuda, name, amp, dtype):
    """Evaluation in each precision, images as the loader gives them; they reach the network in channels_last."""
    network = net.create(name, 8)
    images, products = [], []
    network.register_forward_pre_hook(lambda module, inputs: images.extend(inputs))
    network.model.embedding.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    with fake_cuda():
        loader = Batches([(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.arange(2))])
        embedded = Embedder(network, GPU, amp).embed(loader)
        embeddings, labels = embedded.vectors, embedded.labels
        assert embeddings.device == labels.device == images[0].device == GPU
        assert embeddings.dtype == torch.float32 and embeddings.shape == (2, 8)
        assert images[0].is_contiguous(memory_format=torch.channels_last)
    assert products == [dtype]


@pytest.mark.parametrize("amp", ["none", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "adam"])  # of the others torch has no fused one, or no fake of it
def test_optimizers(fake_cuda, name, amp):
    """Unscaling, clipping and the step; with fp16 only a fused optimizer can skip a step without a look."""
    network, criterion = net.create("tiny", 8), losses.ProxyAnchor(4, 8)
    with fake_cuda():
        scaler = Embedder(network, GPU, amp).scaler
        optimizer = training.create_optimizer(name, network, criterion.to(GPU), 1e-4, 1e-4)
        assert scaler.is_enabled() == (amp == "fp16")
        for parameter in [*network.parameters(), *criterion.parameters()]:
            parameter.grad = torch.zeros_like(parameter)
        scaler.scale(torch.zeros((), device=GPU))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(network.parameters(), 10)
        scaler.step(optimizer)
        scaler.update()
        assert all(x.device in (GPU, CPU) for state in optimizer.state.values() for x in state.values())


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("search", [retrieval.best_positive_rank, retrieval.map_at_r])
def test_search(on_fake_cuda, search, within, monkeypatch):
    """In several tiles, or blocks of rows."""
    monkeypatch.setattr(tiles, "TILE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(retrieval, "PANEL", 64 * 320)
    queries = torch.randn(300, 8), torch.arange(300) // 5
    gallery = () if within else (torch.randn(200, 8), torch.arange(200) // 4)
    found = on_fake_cuda(search, *queries, *gallery)
    assert found.shape[-1] == 300


def test_search_looks_at_no_values_in_its_loops(monkeypatch):
    """As often in one tile as in many."""
    x, y, looks = torch.randn(600, 8), torch.arange(600) // 5, []
    for tile in 64, 640:
        monkeypatch.setitem(tiles.TILE, "cpu", tile)
        with Looks() as found:
            retrieval.search(Embeddings(x, y))
        looks.append(len(found.found))
    assert looks[0] == looks[1] > 0
