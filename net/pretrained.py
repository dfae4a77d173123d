"""Pretrained weights of the backbones: where they are published, and how a file of them is loaded."""

import hashlib
import socket
import urllib.error
import urllib.request
import zipfile
from contextlib import suppress
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
HUB_TIMEOUT = 10  # seconds until timm's hub answers


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


def hub_file(name: str, repository: str | None) -> Path:
    """The weights of a timm network in its hub's cache, downloaded if necessary: safetensors, which cannot hold code.

    Raises OSError, saying which file to fetch by hand, if there are none or the download fails.
    """
    if not repository:
        raise OSError(f"timm's hub has no weights of {name}: --pretrained takes the path of a file, or none")
    import huggingface_hub as hub  # comes with timm

    file = {"repo_id": repository, "filename": "model.safetensors"}
    with suppress(OSError):
        return Path(hub.hf_hub_download(**file, local_files_only=True))
    try:
        with suppress(urllib.error.HTTPError):  # an answer too; offline, hub would try again for a minute
            urllib.request.urlopen(hub.constants.ENDPOINT, timeout=HUB_TIMEOUT).close()
        return Path(hub.hf_hub_download(**file))
    except OSError as error:
        url = f"https://huggingface.co/{repository}/resolve/main/{file['filename']}"
        raise OSError(
            f"The weights of {name} could not be downloaded: {error}. Fetch {url} by hand, and say where it is with "
            "--pretrained PATH"
        ) from error


def _sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of weights, .pth or .safetensors; it cannot run code.

    Raises FileNotFoundError, or ValueError if the file is not a state dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no weights file {path}")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm

            return load_file(path)
        if zipfile.is_zipfile(path):  # torch does not look at the checksums
            with zipfile.ZipFile(path) as file:
                if part := file.testzip():
                    raise ValueError(f"the checksum of its part {part} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError(f"{path} is read with safetensors, which is missing: pip install safetensors") from error
    except Exception as error:  # torch.load raises nearly anything on damaged files, with advice that is not ours
        raise ValueError(
            f"{path} cannot be read as a weights file: it is damaged, or holds more than tensors"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"{path} is not a state dict of backbone weights; --pretrained takes those, --resume takes checkpoints"
        )
    return state


def load_weights(backbone: torch.nn.Module, path: Path) -> None:
    """Load a file of backbone weights (keys as in torchvision, or BN-Inception's Caffe names), strictly.

    Raises as read_weights, and ValueError if they are another network's.
    """
    state, expected = read_weights(path), backbone.state_dict()
    # Older copies of the BN-Inception file store BatchNorm tensors as [1, C].
    state = {
        key: value.squeeze(0) if key in expected and value.ndim == 2 and expected[key].ndim == 1 else value
        for key, value in state.items()
    }
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds weights of another network: {' '.join(str(error).split())[:300]}") from error
