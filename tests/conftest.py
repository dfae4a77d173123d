import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small: threads only wait for each other

import helpers
import pytest
import torch
import torchvision  # noqa: F401 - it cannot be imported while torch.cuda is changed
import trees

import net
from proxy_anchor import tiles


@pytest.fixture(autouse=True)
def no_credentials(request, monkeypatch, tmp_path_factory):
    """Tests neither find the user's wandb credentials nor his downloaded weights, and leave no random state behind."""
    monkeypatch.setenv("NETRC", str(tmp_path_factory.getbasetemp() / "no-netrc"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "no-weights"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a GPU's sums differ from run to run
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    torch.manual_seed(0)


@pytest.fixture
def no_checkpoint_needed(monkeypatch):
    """Commands can be parsed without the checkpoints that they name."""
    monkeypatch.setattr("proxy_anchor.checkpoint.read", lambda path: {})


@pytest.fixture(scope="session")
def cub_root(tmp_path_factory):
    """A data root with a small CUB: 4 training and 3 test classes of 6 images each."""
    return trees.cub(tmp_path_factory.mktemp("cub"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with two checkpoints of a small network, a.pth and b.pth, to index images with."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("a.pth", "b.pth")):
        torch.manual_seed(seed)
        trees.save_checkpoint(folder / name, net.create("tiny", 8), helpers.RECORD)
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder of 18 images of three classes."""
    return trees.folder(tmp_path / "images", classes=("ant", "bee", "cat"))


@pytest.fixture(params=[960, 33])
def tile(request, monkeypatch):
    """Of the product: all at once, and many of them, whose edges cut classes in two."""
    monkeypatch.setitem(tiles.TILE, "cpu", request.param)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
