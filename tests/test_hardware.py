import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import channels_last

import net
from proxy_anchor.embedding import Embedder, memory_format, to_device

CPU = torch.device("cpu")


class Recorder(torch.nn.Module):
    """A network that writes down which images reach it."""

    def __init__(self):
        super().__init__()
        self.normalize = net.backbone.Normalize((104, 117, 128), (1, 1, 1), bgr=True)

    def forward(self, images):
        self.reached = images
        return images.flatten(1)


@pytest.mark.parametrize("size, fast", [(32, False), (64, False), (96, True), (224, True)])
def test_large_images_reach_the_network_in_channels_last_on_a_cpu(size, fast):
    images, network = torch.randint(256, (2, 3, size, size), dtype=torch.uint8), Recorder()
    embeddings = Embedder(network, CPU)(images)
    reached = network.reached
    assert reached.is_contiguous(memory_format=channels_last) == fast and reached.is_contiguous() != fast
    assert torch.equal(reached, network.normalize(images)) and torch.equal(embeddings, reached.flatten(1))


@pytest.mark.parametrize("name", ["resnet18", "bn_inception", "googlenet"])
def test_the_images_layout_is_that_of_the_whole_network(name):
    """The convolutions of a network placed on a CPU take it over, and embeddings change by rounding alone."""
    network = to_device(net.create(name, 8), CPU).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = network.model.features(images.contiguous(memory_format=channels_last))
        assert features.is_contiguous(memory_format=channels_last)
        expected = network.model.features(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_layout_on_other_devices():
    assert memory_format(torch.device("cuda", 0), 32) == channels_last
    assert memory_format(torch.device("mps"), 224) == torch.contiguous_format


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has mallopt")
def test_freed_memory_serves_the_next_tensors():
    """In a fresh process: page faults of 40 large tensors, before and after, and what returns to the kernel."""
    code = """
import resource, torch
from proxy_anchor import hardware
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(1 << 24)  # 64 MiB: 16,384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
torch.ones(1)
returned = faults()
hardware.keep_freed_memory()
faults()
print(returned, faults(), resident())
hardware.return_freed_memory()
print(resident())
"""
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    returned, kept, before, after = map(int, result.stdout.split())
    assert 10 * kept < returned
    assert after < before - 50  # MiB
