"""Reads weights from files without running code in them, under the names and types that a network expects."""

import argparse
import hashlib
import importlib
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch

RECORD = "record"  # in the metadata of an exported file
SHOWN_DIFFERENCES = 3  # in an error
WRAPPERS = ("module", "_orig_mod")  # parts of names that DataParallel and torch.compile put there


def read(path: str | Path, mmap: bool = False) -> dict:
    """The dict in a file of torch.save, read with weights_only: the file cannot run code.

    mmap: little more of the file is read than what is used. Raises FileNotFoundError, and ValueError for a file that is
    damaged, holds code or something other than a dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}")
    try:
        with open(path, "rb") as file:  # once: it may be replaced meanwhile
            is_zip = zipfile.is_zipfile(file)  # as torch.save writes
            if is_zip and not mmap:  # torch does not look at the checksums
                with zipfile.ZipFile(file) as archive:
                    if part := archive.testzip():
                        raise ValueError(f"the checksum of its part {part} is wrong")
            file.seek(0)
            settings: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
            # The arguments of a training script, as timm's: they are unpickled into attributes, which runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                if is_zip and mmap:  # torch cannot map a file whose name is not UTF-8, but takes this name
                    content = torch.load(f"/dev/fd/{file.fileno()}", mmap=True, **settings)
                else:
                    content = torch.load(file, **settings)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, str(error))) from error
    except Exception as error:  # torch.load raises nearly anything on damaged files
        raise ValueError(f"{path} is damaged or not a checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: expected a dict, found {type(content).__name__}")
    return content


def refusal(path: str | Path, reason: str) -> str:
    """The error for a file that torch.load refuses with weights_only, with the remedy."""
    if not (name := re.search(r"GLOBAL ([\w.]{1,100})", reason)):
        return f"{path} is not a checkpoint, or it holds more than tensors and is refused, because it could run code"
    return (
        f"{path} is refused, because it could run code: it holds {name[1]}. Where you trust it, two lines save its "
        f"weights alone: content = torch.load({str(path)!r}, weights_only=False); "
        "torch.save({'model_state_dict': content['model_state_dict']}, 'weights.pth') (the entry may have another "
        "name; a whole network has content.state_dict() instead)"
    )


def read_safetensors(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metadata and the tensors of a .safetensors file. Raises as read does."""
    safetensors = require("safetensors")[0]
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and others on damaged files
        raise ValueError(f"{path} is damaged or not a safetensors file: {first_line(error)}") from error


def record_in(path: str | Path, metadata: dict | None) -> dict:
    """The record in a file's metadata; path is for messages. Raises ValueError if there is none."""
    try:
        record = json.loads((metadata or {})[RECORD])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no record of its network: export.py writes it") from error
    if not isinstance(record, dict) or not isinstance(record.get("network"), dict):
        raise ValueError(f"{path} is damaged: its record is {str(record)[:80]}")
    return record


def require(*names):
    """The modules of these packages. Raises ImportError with what to install."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(f"This needs {', '.join(names)} ({error}): pip install {' '.join(names)}") from error


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def weights_in(path: str | Path, content: dict, expected=()) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint's content, see unwrapped; path is for messages. Raises ValueError."""
    state = content.get("model_state_dict")
    if not is_state_dict(state):
        raise ValueError(f"{path} is not a checkpoint: expected an entry 'model_state_dict' of dense tensors")
    return unwrapped(path, state, expected)


def is_state_dict(content) -> TypeGuard[dict[str, torch.Tensor]]:
    """Whether this is a dict of tensors, with all their numbers, by their names."""
    return isinstance(content, dict) and all(isinstance(key, str) and is_dense(value) for key, value in content.items())


def is_dense(value) -> bool:
    """Whether this is a tensor with all its numbers in memory, neither sparse nor nested nor meta."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return dense and not (value.is_meta or value.is_nested)


def unwrapped(path: str | Path, state: dict[str, torch.Tensor], expected=()) -> dict[str, torch.Tensor]:
    """The weights under their names without WRAPPERS, wherever these occur; names in `expected` are not changed.

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


def load(path: str | Path, content: dict, network: torch.nn.Module, flags: str = "--model and --embedding-size") -> int:
    """Load the weights in a checkpoint's content into a network, strictly; returns the number of their tensors.

    path, flags: for messages. Raises ValueError if the weights are of another network; this one stays as it was.
    """
    wanted = network.state_dict()
    state = weights_in(path, content, wanted)
    count, state = len(state), with_counts(state, wanted)
    expected = {key: tuple(value.shape) for key, value in wanted.items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    differing = [key for key in expected | found if expected.get(key) != found.get(key)]
    if differing:
        listed = "; ".join(
            f"{key}: expected {expected.get(key, 'none')}, found {found.get(key, 'none')}"
            for key in differing[:SHOWN_DIFFERENCES]
        )
        raise ValueError(
            f"{path} is of another network: {len(differing)} of {len(expected | found)} tensors differ ({listed}). "
            f"Check {flags}"
        )
    check_types(path, state, wanted)
    network.load_state_dict(state)
    return count


def digest(state: dict[str, torch.Tensor]) -> str:
    """The sha256 of weights: of their names, types, shapes and bytes, in their order."""
    sha256 = hashlib.sha256()
    for name, tensor in state.items():
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="backslashreplace"))
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
