"""Checkpoints in the published layout, {"model_state_dict": ...}, with the spec of their network."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from proxy_anchor import exported, weights
from proxy_anchor.files import locked, replacing
from proxy_anchor.spec import Calibration, NetworkSpec

FLAGS = "--model and --embedding-size"  # which choose the network, for messages


def save(path: Path, network: torch.nn.Module, spec: NetworkSpec) -> None:
    """Write the network's weights as a checkpoint that the published code loads too, with its spec."""
    with locked(path), replacing(path) as file:
        torch.save({"model_state_dict": network.state_dict(), "network": spec.to_record()}, file)


def in_run(path: str) -> str:
    """The best checkpoint in the folder of a run, or the path itself. Raises FileNotFoundError for another folder."""
    if not Path(path).is_dir():
        return path
    checkpoints = sorted(Path(path).glob("*_best.pth"))
    if len(checkpoints) != 1:
        raise FileNotFoundError(
            f"{path} has {len(checkpoints) or 'no'} *_best.pth, expected one: give a checkpoint or the folder of a run"
        )
    return str(checkpoints[0])


class Checkpoint:
    """A checkpoint, of train.py or published, or an exported file, read once.

    So its weights, spec and calibration belong together even if the file is replaced meanwhile. path: for messages.
    spec: None for a published checkpoint, which does not record it. Raises FileNotFoundError, ValueError for a file
    that is damaged or not a checkpoint, or is the last.pth of a run with averaged weights, and as exported.read.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self.content = read(path)
        if "average" in self.content:
            raise ValueError(
                f"{path} holds two networks, the one that trains and its average (--average-weights), whose results "
                "the run shows: give the *_best.pth in its folder, which is the average"
            )
        self.spec: NetworkSpec | None = None
        if (record := self.content.get("network", {})) != {}:
            try:
                self.spec = NetworkSpec.from_record(record)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: its record of the network has {error}") from error

    @property
    def calibration(self) -> Calibration | None:
        """That of evaluate.py --calibrate, None without one. Raises as calibration_in."""
        return calibration_in(self.content.get("threshold", {}), self.path)

    @cached_property
    def identity(self) -> str:
        """The sha256 of the weights, whatever else is in the file; of an ONNX file, the sha256 of the whole file.

        Raises as load does.
        """
        return self.content.get("sha256") or weights.digest(weights.weights_in(self.path, self.content))

    def load(self, network: torch.nn.Module, flags: str = FLAGS) -> int:
        """Load its weights into a network, strictly; returns the number of tensors, all of which matched.

        Names of weights may contain what DataParallel and torch.compile add, see weights.WRAPPERS. flags: those that
        choose the network, for messages. Raises ValueError if they are of another network, which stays as it was.
        """
        return weights.load(self.path, self.content, network, flags)

    def open(
        self, spec: NetworkSpec, create: Callable[[NetworkSpec], torch.nn.Module], flags: str = FLAGS
    ) -> torch.nn.Module:
        """The network in the file, with its weights; create(spec) makes one without them, such as net.from_spec.

        An ONNX file is run by onnxruntime. Raises as load and exported.OnnxNet do; flags: see load.
        """
        if session := self.content.get("session"):
            sizes = spec.image_size, spec.embedding_size
            return exported.OnnxNet(self.path, self.content["onnx"], *sizes, session)
        network = create(spec)
        self.load(network, flags)
        return network


def calibration_in(record, path: str | Path) -> Calibration | None:
    """The calibration that a checkpoint records, None for {}. Raises ValueError if it is damaged or one for pairs."""
    if record == {}:
        return None
    if isinstance(record, dict) and "asked_far" in record:
        raise ValueError(
            f"{path} has a threshold for pairs of images, but a query is compared with a whole index. Choose one for "
            f"queries: python evaluate.py --dataset {record.get('dataset')} --resume {path} --calibrate (an exported "
            "file: its checkpoint, and export it again)"
        )
    try:
        return Calibration.from_record(record)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: its record of the threshold is {error}; evaluate.py --calibrate replaces it"
        ) from error


def save_calibration(path: str | Path, calibration: Calibration, identity: str) -> None:
    """Record a calibration in the checkpoint whose weights have this identity; nothing else in it changes.

    Raises ValueError if the file has other weights by now, and as Checkpoint does.
    """
    path = Path(path).resolve()  # a link stays one
    with locked(path):
        now = Checkpoint(path)
        if now.identity != identity:
            raise ValueError(f"{path} was replaced while it was measured, so its threshold is not recorded: run again")
        with replacing(path) as file:
            torch.save(now.content | {"threshold": calibration.to_record()}, file)


def load(path: str | Path, network: torch.nn.Module, flags: str = FLAGS) -> int:
    """Load the weights of a checkpoint into a network; returns and raises as Checkpoint and its load do."""
    return Checkpoint(path).load(network, flags)


def read(path: str | Path) -> dict:
    """The content of a checkpoint or, of an exported file, its record with the weights. Raises as Checkpoint does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}")
    return exported.read(path) if exported.is_exported(path) else weights.read(path)
