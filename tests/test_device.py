import pytest
import torch
from torch import channels_last

import net
from dataset.transforms import Normalize
from proxy_anchor import device

CPU = torch.device("cpu")


@pytest.mark.parametrize("size, fast", [(32, False), (64, False), (96, True), (224, True)])
def test_large_images_are_fed_in_channels_last_on_a_cpu(size, fast):
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    ((fed, labels),) = device.feed([(images, torch.arange(2))], CPU, Normalize(bgr=True))
    assert fed.is_contiguous(memory_format=channels_last) == fast and fed.is_contiguous() != fast
    assert torch.equal(fed, Normalize(bgr=True)(images)) and torch.equal(labels, torch.arange(2))


@pytest.mark.parametrize("name", ["resnet18", "bn_inception", "googlenet"])
def test_the_images_layout_is_that_of_the_whole_network(name):
    """The convolutions of a network placed on a CPU take it over, and embeddings change by rounding alone."""
    network = device.place(net.create(name, 8), CPU).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = network.model.features(images.contiguous(memory_format=channels_last))
        assert features.is_contiguous(memory_format=channels_last)
        expected = network.model.features(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_layout_on_other_devices():
    assert device.memory_format(torch.device("cuda", 0), 32) == channels_last
    assert device.memory_format(torch.device("mps"), 224) == torch.contiguous_format
