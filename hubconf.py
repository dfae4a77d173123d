"""Entries of torch.hub, for other projects: the loss, and trained networks.

torch.hub.load(REPOSITORY, "proxy_anchor", num_classes=100, embedding_size=512, source="local")
torch.hub.load(REPOSITORY, "embedding", checkpoint="cub_resnet50_best.pth", source="local")
"""

import contextlib
import hashlib
import pathlib
import runpy
import sys
import urllib.parse

dependencies = ["torch", "torchvision", "numpy", "PIL"]


def proxy_anchor(num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0):
    """The Proxy-Anchor loss: embeddings (B, D), labels (B,) -> scalar. Its proxies are parameters to optimize too."""
    with _own_modules():
        from proxy_anchor.losses import ProxyAnchor

    return ProxyAnchor(num_classes, embedding_size, margin, alpha)


def embedding(checkpoint: str, model: str | None = None, embedding_size: int | None = None):
    """(network, transform) of a checkpoint of train.py, its .safetensors file, or a published checkpoint.

    checkpoint: a path, or a URL, which is downloaded once into torch.hub's cache. Published checkpoints do not record
    model and embedding_size; the others do, and other values are refused.
    transform(PIL image) gives uint8 (3, S, S) as evaluation sees one's own images, upright; it raises ValueError where
    evaluation refuses the image. network, in eval mode, maps a batch of these, uint8 (N, 3, S, S), to embeddings
    (N, D). Normalization is inside. Raises OSError or ValueError for a file that is damaged or of another network; it
    cannot run code.
    """
    with _own_modules():
        from torchvision.transforms import v2

        import net
        from dataset import transforms
        from proxy_anchor import checkpoint as checkpoints
        from proxy_anchor.exported import Served

        path = _download(checkpoint, checkpoints.read) if "://" in checkpoint else checkpoint
        read = checkpoints.Checkpoint(path)
        contract, told = read.contract, {"model": model, "embedding_size": embedding_size}
        for name, value in told.items():
            if value is None and name not in contract:
                raise ValueError(f"{checkpoint} does not record its {name}: give it to torch.hub.load")
            if value not in (None, contract.setdefault(name, value)):
                raise ValueError(f"{checkpoint} was trained with {name} {contract[name]}, not {value}")
        net.check_record(contract["model"], contract)
        contract = net.expects(contract["model"]) | contract
        network = net.create(
            contract["model"], contract["embedding_size"], l2_norm=bool(contract.get("l2_norm", 1)),
            head=contract.get("head", "linear"), image_size=contract["image_size"],
        )  # fmt: skip
        read.load(network, "model and embedding_size")
        geometry = {key: contract[key] for key in checkpoints.GEOMETRY if key in contract}
        seen = transforms.evaluation(contract["image_size"], **geometry)
        served = Served(network, contract.get("distance", "cosine"))
        return served.eval(), v2.Compose([_FromPillow(), seen])


class _FromPillow:
    """dataset.files.to_tensor, which is pickled by this file's path: its module is none of the caller's."""

    def __init__(self):
        file = pathlib.Path(__file__).with_name("dataset") / "files.py"
        self.to_tensor = runpy.run_path(str(file))["to_tensor"]

    def __call__(self, image):
        return self.to_tensor(image)

    def __reduce__(self):
        return eval, (f"__import__('runpy').run_path({__file__!r})['_FromPillow']()",)


@contextlib.contextmanager
def _own_modules():
    """In this context modules of these names are this repository's; the caller's stay his own."""
    theirs = _taken()
    try:
        yield
    finally:
        _taken()
        sys.modules.update(theirs)


def _taken() -> dict:
    """Take the modules of these names, with all in them, out of sys.modules."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("net", "dataset", "proxy_anchor")]
    return {name: sys.modules.pop(name) for name in names}


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
