"""Entries of torch.hub, for other projects: the loss, and trained networks.

torch.hub.load(REPOSITORY, "proxy_anchor", num_classes=100, embedding_size=512, source="local")
torch.hub.load(REPOSITORY, "embedding", checkpoint="cub_resnet50_best.pth", source="local")
Modules have private names, see hub/proxy_anchor_hub.py.
"""

import contextlib
import hashlib
import importlib
import pathlib
import sys
import urllib.parse

dependencies = ["torch", "torchvision", "numpy", "PIL"]
_REPOSITORY = pathlib.Path(__file__).resolve().parent


def proxy_anchor(num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0):
    """The Proxy-Anchor loss: embeddings (B, D), labels (B,) -> scalar. Its proxies are parameters to optimize too."""
    with _only_our_names():
        return _module("losses").ProxyAnchor(num_classes, embedding_size, margin, alpha)


def embedding(checkpoint: str, backbone: str | None = None, embedding_size: int | None = None):
    """(network, transform) of a checkpoint of train.py, its .safetensors or .onnx file, or a published checkpoint.

    checkpoint: a path, or a URL, which is downloaded once into torch.hub's cache. Published checkpoints do not record
    backbone (train.py's --model) and embedding_size; the others do, and other values are refused.
    transform(PIL image) gives uint8 (3, S, S) as evaluation sees your own images, upright; it raises ValueError where
    evaluation refuses the image. network, in eval mode, maps a batch of these, uint8 (N, 3, S, S), to embeddings
    (N, D). Normalization is inside. Raises OSError or ValueError for a file that is damaged or of another network; it
    cannot run code.
    """
    with _only_our_names():
        from torchvision.transforms import v2

        path = _download(checkpoint, _module("checkpoint").read) if "://" in checkpoint else checkpoint
        embedder = _module("api").load(path, backbone=backbone, embedding_size=embedding_size)
        network = embedder.network
        if not isinstance(network, _module("exported").OnnxNet):  # which has its normalization inside already
            network = _module("exported").InferenceNet(network, embedder.spec.distance)
        return network.eval(), v2.Compose([_module("dataset.files").to_tensor, embedder.transform])


def _module(name: str):
    """A module of this repository, under a name that only it has; other processes that unpickle find it there too."""
    folder = str(_REPOSITORY / "hub")
    if folder not in sys.path:
        sys.path.append(folder)  # processes that this one spawns get it
    ours = importlib.import_module("proxy_anchor_hub")
    if pathlib.Path(str(ours.__file__)).resolve().parent != _REPOSITORY / "hub":
        raise ImportError(f"{ours.__path__[0]} is in use already: one process can load one checkout of this repository")
    return importlib.import_module(f"proxy_anchor_hub.{name}")


@contextlib.contextmanager
def _only_our_names():
    """torch.hub puts the repository at the front of sys.path while it loads.

    This takes it away meanwhile, so that other threads import nothing from it.
    """
    removed = [entry for entry in sys.path[:1] if pathlib.Path(entry).resolve() == _REPOSITORY]
    del sys.path[: len(removed)]
    try:
        yield
    finally:
        sys.path[:0] = removed  # torch.hub expects it there


def _download(url: str, check) -> pathlib.Path:
    """The file of a URL in torch.hub's cache, downloaded if it is not there. One that check refuses is not kept."""
    import torch

    name = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
        try:
            check(path)
        except ValueError:
            path.unlink()
            raise
    return path
