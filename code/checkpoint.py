"""Checkpoints in the published layout, {"model_state_dict": ...}, with a record of how to use their network."""

import argparse
import hashlib
import math
import pickle
import re
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch

from proxy_anchor import exported
from proxy_anchor.files import locked, replacing
from proxy_anchor.vectors import DISTANCES

SHOWN = 3  # differences in an error
WRAPPERS = ("module", "_orig_mod")  # parts of names that DataParallel and torch.compile put there
# How to use a network: the arguments that a checkpoint records, and those that it may lack.
CONTRACT = {"model": str, "embedding_size": int, "image_size": int, "l2_norm": int}
# crop, crop_mode, interpolation: see dataset/transforms.py. mean, std: of the pixels. distance: or cosine.
# head: see net; or linear. backbone_only: no embedding layer. orientation: how the images of the training were seen,
# turned upright by their EXIF or as they are stored. Networks of ours have no crop_mode, interpolation, mean and std.
OPTIONAL = {
    "crop": float,
    "crop_mode": str,
    "interpolation": str,
    "mean": list,
    "std": list,
    "distance": str,
    "head": str,
    "backbone_only": bool,
    "orientation": str,
}
WORDS = {
    "crop_mode": ("center", "squash"),
    "interpolation": ("bilinear", "bicubic"),
    "distance": tuple(DISTANCES),
    "head": ("linear", "orthogonal", "layernorm"),
    "orientation": ("stored", "upright"),
}
LARGEST = {"embedding_size": 2**16, "image_size": 2**14}  # larger ones would fill the memory before they are an error
SMALLEST_CROP = 0.1
LONGEST_NAME = 200  # of a network
GEOMETRY = ("crop", "crop_mode", "interpolation")  # how evaluation sees the images
# Of our checkpoints and runs that do not record it: there was no other.
FORMER_CROP = 0.875
FORMER_ORIENTATION = "stored"
# What a threshold for pairs of images is and comes from, see decisions.Calibration.record; beside it, its data.
THRESHOLD = {
    "distance": str,
    "threshold": float,
    "interval": list,
    "asked_far": float,
    "far": float,
    "far_interval": list,
    "classes": list,
    "dataset": str,
    "data": dict,
}


def save(path: Path, network: torch.nn.Module, contract: dict) -> None:
    """Write the network's weights as a checkpoint that the published code loads too, with its contract."""
    with locked(path), replacing(path) as file:
        torch.save({"model_state_dict": network.state_dict(), "network": contract}, file)


def in_run(path: str) -> str:
    """The best checkpoint in the folder of a run, or the path itself. Raises FileNotFoundError for another folder."""
    if not Path(path).is_dir():
        return path
    checkpoints = sorted(Path(path).glob("*_best.pth"))
    if len(checkpoints) != 1:
        raise FileNotFoundError(
            f"{path} is a folder with {len(checkpoints)} files *_best.pth, expected one: give the checkpoint itself"
        )
    return str(checkpoints[0])


class Checkpoint:
    """One reading of a checkpoint, ours or a published one, or of an exported file.

    Its weights, record and threshold belong together, whatever becomes of the file meanwhile. path: for messages.
    contract: how to use its network, with the keys of CONTRACT and OPTIONAL; {} for a published checkpoint.
    Raises FileNotFoundError, ValueError for a file that is damaged or not a checkpoint, and as exported.read.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self.content = read(path)
        self.contract: dict = {}
        if (network := self.content.get("network", {})) != {}:
            if wrong := fault(network):
                raise ValueError(f"{path} is damaged: its record of the network has {wrong}")
            names = [name for name in CONTRACT | OPTIONAL if name in network]
            former = {"crop": FORMER_CROP, "orientation": FORMER_ORIENTATION}
            self.contract = former | {name: network[name] for name in names}

    @property
    def threshold(self) -> dict:
        """The threshold that was chosen for it, see THRESHOLD; {} without one. Raises ValueError if it is damaged."""
        threshold = self.content.get("threshold", {})
        if threshold != {} and not is_threshold(threshold):
            raise ValueError(
                f"{self.path} is damaged: its record of the threshold is {str(threshold)[:80]}; evaluate.py "
                "--calibrate replaces it"
            )
        return threshold

    @cached_property
    def identity(self) -> str:
        """What tells a network from all others: the sha256 of its weights, whatever else is in the file.

        That of an ONNX file, which has them in its own way, is of the whole file. Raises as load does.
        """
        return self.content.get("sha256") or digest(weights(self.path, self.content))

    def load(self, network: torch.nn.Module, flags: str = "--model and --embedding-size") -> int:
        """Load its weights into a network, strictly; returns the number of tensors, all of which matched.

        Names of weights may hold what DataParallel and torch.compile put into them, see WRAPPERS. flags: those that say
        the network, for messages.
        Raises ValueError if they are of another network, which is left as it was.
        """
        return load_weights(self.path, self.content, network, flags)


def save_threshold(path: str | Path, threshold: dict, identity: str) -> None:
    """Add the threshold of the weights of this identity to their checkpoint, all else of which stays.

    Raises ValueError if the file has other weights by now, and as Checkpoint does.
    """
    path = Path(path).resolve()  # a link stays one
    with locked(path):
        now = Checkpoint(path)
        if now.identity != identity:
            raise ValueError(f"{path} was replaced while it was measured, so its threshold is not recorded: run again")
        with replacing(path) as file:
            torch.save(now.content | {"threshold": threshold}, file)


def is_threshold(found) -> bool:
    """Whether this is a threshold: all of THRESHOLD, with values of their types, and ends of intervals."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in THRESHOLD.items()):
        return False
    intervals = found["interval"], found["far_interval"]
    ends = all(len(interval) == 2 and all(isinstance(end, float) for end in interval) for interval in intervals)
    rates = found["asked_far"], found["far"], *found["far_interval"]
    in_ranges = ends and not any(rate < 0 or rate > 1 for rate in rates)  # the ends may be NaN
    return in_ranges and math.isfinite(found["threshold"]) and found["distance"] in DISTANCES


def is_contract(found) -> bool:
    """Whether this says how to use a network: all of CONTRACT, what it has of OPTIONAL, with values in their ranges."""
    return not fault(found)


def fault(found) -> str:
    """The first entry with which this does not say how to use a network, in words; "" where it does."""
    if not isinstance(found, dict):
        return f"no entries: {str(found)[:80]!r}"
    for name, kind in (CONTRACT | OPTIONAL).items():
        if name in found and not (type(found[name]) is kind and in_range(name, found[name])):
            return f"{name} {str(found[name])[:80]!r}"
        if name in CONTRACT and name not in found:
            return f"no {name}"
    return ""


def in_range(name: str, value) -> bool:
    """Whether an entry of CONTRACT or OPTIONAL, of the right type, may have this value."""
    if name in LARGEST:
        return 0 < value <= LARGEST[name]
    if name in WORDS:
        return value in WORDS[name]
    if name in ("mean", "std"):
        numbers = len(value) == 3 and all(isinstance(part, float) and math.isfinite(part) for part in value)
        return numbers and (name == "mean" or min(value) > 0)
    if name == "crop":
        return SMALLEST_CROP <= value <= 1
    if name == "model":
        return value.isprintable() and 0 < len(value) <= LONGEST_NAME
    return name != "l2_norm" or value in (0, 1)


def digest(state: dict[str, torch.Tensor]) -> str:
    """The sha256 of weights: of their names, types, shapes and bytes, in their order."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="backslashreplace"))
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def load(path: str | Path, network: torch.nn.Module, flags: str = "--model and --embedding-size") -> int:
    """Load the weights of a checkpoint into a network; returns and raises as Checkpoint and its load do."""
    return Checkpoint(path).load(network, flags)


def read(path: str | Path, mmap: bool = False) -> dict:
    """The content of a checkpoint, with weights_only: the file cannot run code. Raises as Checkpoint does.

    mmap: little more of the file is read than what is used. Of an exported file it is the record, with the weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}")
    if exported.is_exported(path):
        return exported.read(path)
    try:
        with open(path, "rb") as file:  # once: it may be replaced meanwhile
            is_zip = zipfile.is_zipfile(file)  # as all of ours
            if is_zip and not mmap:  # torch does not look at the checksums
                with zipfile.ZipFile(file) as archive:
                    if part := archive.testzip():
                        raise ValueError(f"the checksum of its part {part} is wrong")
            file.seek(0)
            settings: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
            # The arguments of a training script, as timm's: they are unpickled into attributes, which runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                if is_zip and mmap:  # by a name that torch takes, which those of any bytes are not
                    content = torch.load(f"/dev/fd/{file.fileno()}", mmap=True, **settings)
                else:
                    content = torch.load(file, **settings)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, str(error))) from error
    except Exception as error:  # torch.load raises nearly anything on damaged files
        raise ValueError(
            f"{path} is damaged or not a checkpoint: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: expected a dict, found {type(content).__name__}")
    return content


def refusal(path: str | Path, reason: str) -> str:
    """Why torch.load does not read a file with weights_only, and what to do about it."""
    if not (held := re.search(r"GLOBAL ([\w.]{1,100})", reason)):
        return f"{path} is not a checkpoint, or it holds more than tensors and is refused, because it could run code"
    return (
        f"{path} is refused, because it could run code: it holds {held[1]}. Where you trust it, two lines save its "
        f"weights alone: content = torch.load({str(path)!r}, weights_only=False); "
        "torch.save({'model_state_dict': content['model_state_dict']}, 'weights.pth') (the entry may have another "
        "name; a whole network has content.state_dict() instead)"
    )


def weights(path: str | Path, content: dict, expected=()) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint's content, see unwrapped; path is for messages. Raises ValueError."""
    state = content.get("model_state_dict")
    if not is_state_dict(state):
        raise ValueError(f"{path} is not a checkpoint: expected an entry 'model_state_dict' of dense tensors")
    return unwrapped(path, state, expected)


def is_state_dict(found) -> TypeGuard[dict[str, torch.Tensor]]:
    """Whether this is a dict of tensors, with all their numbers, by their names."""
    return isinstance(found, dict) and all(isinstance(key, str) and is_dense(value) for key, value in found.items())


def is_dense(value) -> bool:
    """Whether this is a tensor with a number for each of its places, neither sparse nor nested nor without any."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return dense and not (value.is_meta or value.is_nested)


def unwrapped(path: str | Path, state: dict[str, torch.Tensor], expected=()) -> dict[str, torch.Tensor]:
    """The weights under their names without WRAPPERS, wherever these are; the names in `expected` stay what they are.

    The count of torch's AveragedModel is left out. Raises ValueError where two get one name; path is for messages.
    """
    plain: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key == "n_averaged" and key not in expected:
            continue
        name = key if key in expected else ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in plain:
            raise ValueError(f"{path} has two tensors {name}: under this name and behind {' or '.join(WRAPPERS)}")
        plain[name] = value
    return plain


def check_types(path: str | Path, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for weights that are not floating-point numbers where the network's are; path is for messages.

    load_state_dict would cast integers, and drop imaginary parts.
    """
    for key, value in state.items():
        if key in expected and expected[key].is_floating_point() and not value.is_floating_point():
            raise ValueError(
                f"{path} has {key} as {str(value.dtype).removeprefix('torch.')}: expected floating-point numbers, as "
                "the network was trained with"
            )


def with_counts(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with BatchNorm's counts of batches, which old files lack and nothing here uses."""
    return {key: value for key, value in expected.items() if key.endswith(".num_batches_tracked")} | state


def load_weights(
    path: str | Path, content: dict, network: torch.nn.Module, flags: str = "--model and --embedding-size"
) -> int:
    """Load the weights of a checkpoint's content; path and flags are for messages. Raises and returns as load does."""
    wanted = network.state_dict()
    state = weights(path, content, wanted)
    count, state = len(state), with_counts(state, wanted)
    expected = {key: tuple(value.shape) for key, value in wanted.items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    differing = [key for key in expected | found if expected.get(key) != found.get(key)]
    if differing:
        listed = "; ".join(
            f"{key}: expected {expected.get(key, 'none')}, found {found.get(key, 'none')}" for key in differing[:SHOWN]
        )
        raise ValueError(
            f"{path} is of another network: {len(differing)} of {len(expected | found)} tensors differ ({listed}). "
            f"Check {flags}"
        )
    check_types(path, state, wanted)
    network.load_state_dict(state)
    return count
