"""ImageNet weights of the backbones: where they are published, and how a file of them is loaded."""

import hashlib
import socket
import zipfile
from pathlib import Path

import torch

URLS = {
    "bn_inception": "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth",
    "googlenet": "https://download.pytorch.org/models/googlenet-1378be20.pth",
    # The weights of the published runs: torchvision's IMAGENET1K_V1, not V2, which is its default today.
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
TIMEOUT = 60  # seconds without a byte


def imagenet_file(name: str) -> Path:
    """The backbone's ImageNet weights in torch's cache, downloaded if necessary.

    The file is checked against the hash in its name. Raises OSError, saying which file to fetch by hand and where to
    put it, if the download fails.
    """
    url = URLS[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    sha256 = path.stem.rsplit("-", 1)[1]  # its first digits
    by_hand = f"Fetch {url} by hand (sha256 {sha256}...) and put it at {path}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(TIMEOUT)  # torch.hub has no timeout of its own
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash does not agree
            raise OSError(f"The ImageNet weights of {name} could not be downloaded: {error}. {by_hand}.") from error
        finally:
            socket.setdefaulttimeout(timeout)
    elif not (digest := _sha256(path)).startswith(sha256):
        raise OSError(f"{path} is damaged (its sha256 is {digest[: len(sha256)]}...). {by_hand}, or remove it.")
    return path


def _sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_weights(backbone: torch.nn.Module, path: Path) -> None:
    """Load a file of backbone weights (keys as in torchvision, or BN-Inception's Caffe names), strictly.

    Raises FileNotFoundError, or ValueError if the file is not such a state dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no weights file {path}")
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the checksums
            with zipfile.ZipFile(path) as file:
                if part := file.testzip():
                    raise ValueError(f"the checksum of its part {part} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on damaged files, with advice that is not ours
        raise ValueError(
            f"{path} cannot be read as a weights file: it is damaged, or holds more than tensors"
        ) from error
    expected = backbone.state_dict()
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"{path} is not a state dict of backbone weights; --pretrained takes those, --resume takes checkpoints"
        )
    # Older copies of the BN-Inception file store BatchNorm tensors as [1, C].
    state = {
        key: value.squeeze(0) if key in expected and value.ndim == 2 and expected[key].ndim == 1 else value
        for key, value in state.items()
    }
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds weights of another network: {' '.join(str(error).split())[:300]}") from error
