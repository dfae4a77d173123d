"""Checkpoints in the published layout: {"model_state_dict": ...}."""

import pickle
from pathlib import Path

import torch
from proxy_anchor.files import replacing

SHOWN = 3  # differing keys in an error


def save(path: Path, network: torch.nn.Module) -> None:
    """Write the network's weights as a checkpoint that the published code loads too."""
    with replacing(path) as file:
        torch.save({"model_state_dict": network.state_dict()}, file)


def load(path: str | Path, network: torch.nn.Module) -> int:
    """Load a checkpoint, ours or a published one, strictly; returns the number of tensors, all of which matched.

    Keys may carry the `module.` prefix of DataParallel. The file is read with weights_only: it cannot run code.
    Raises FileNotFoundError, or ValueError for a file that is damaged or of another network, which is left as it was.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a checkpoint, or it holds more than tensors and is refused, because it could run code"
        ) from error
    except Exception as error:  # torch.load raises nearly anything on damaged files
        raise ValueError(
            f"{path} is damaged or not a checkpoint: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{path} is not a checkpoint: expected a dict with the entry 'model_state_dict' of tensors")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    differing = [key for key in expected | found if expected.get(key) != found.get(key)]
    if differing:
        listed = "; ".join(
            f"{key}: expected {expected.get(key, 'none')}, found {found.get(key, 'none')}" for key in differing[:SHOWN]
        )
        raise ValueError(
            f"{path} is of another network: {len(differing)} of {len(expected | found)} tensors differ ({listed}). "
            "Check --model and --embedding-size"
        )
    network.load_state_dict(state)
    return len(state)
