"""Which network makes the embeddings, and how it wants to see images."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

CROP = 0.875  # the share of the resized shorter side that evaluation keeps: 224 of 256, as published
DISTANCES = ("cosine", "euclidean")
HEADS = ("linear", "orthogonal", "layernorm")  # see net/embedding_net.py
ORIENTATIONS = ("stored", "upright")  # indexed by ImageDataset.upright
WORDS = {
    "crop_mode": ("center", "squash"),
    "interpolation": ("bilinear", "bicubic"),
    "distance": DISTANCES,
    "head": HEADS,
    "orientation": ORIENTATIONS,
}
LIMITS = {"embedding_size": 2**16, "image_size": 2**14}  # larger ones would fill the memory before they are an error
SMALLEST_CROP = 0.1
LONGEST_NAME = 200  # of a network


@dataclass(frozen=True)
class NetworkSpec:
    """A network by its name and settings, with the input that it expects.

    Checkpoints, indexes and exported files store it as a record, see to_record. The defaults are those of the published
    networks, and of older records that lack an entry.

    head: see HEADS. distance: how its embeddings are compared. crop, crop_mode, interpolation: see
    dataset/transforms.py. mean, std: of the pixels, where they are not those of a backbone in net/. orientation: how
    images were seen in training, turned upright by their EXIF or as they are stored. backbone_only: without an
    embedding layer.
    """

    model: str
    embedding_size: int
    image_size: int
    l2_norm: int = 1
    head: str = "linear"
    distance: str = "cosine"
    crop: float = CROP
    crop_mode: str = "center"
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    orientation: str = "stored"
    backbone_only: bool = False

    @classmethod
    def from_record(cls, record: Any) -> "NetworkSpec":
        """The spec in a record; other entries are ignored. Raises ValueError naming the entry that is wrong."""
        if not isinstance(record, dict):
            raise ValueError(f"no entries: {str(record)[:80]!r}")
        for name in REQUIRED:
            if name not in record:
                raise ValueError(f"no {name}")
        entries = {name: record[name] for name in TYPES if name in record}
        for name, value in entries.items():
            if type(value) is not TYPES[name] or not _in_range(name, value):
                raise ValueError(f"{name} {str(value)[:80]!r}")
        return cls(**entries)

    def to_record(self) -> dict:
        """The spec as a dict of plain values, without entries that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def differences(self, other: "NetworkSpec") -> str:
        """The entries in which this spec differs from another: "crop 1.0 instead of 0.875, ..."."""
        names = [name for name in asdict(self) if getattr(self, name) != getattr(other, name)]
        return ", ".join(f"{name} {getattr(self, name)} instead of {getattr(other, name)}" for name in names)

    @property
    def geometry(self) -> dict:
        """How images are resized and cropped to image_size: the arguments of dataset.transforms.Evaluation."""
        return {name: getattr(self, name) for name in GEOMETRY}


GEOMETRY = ("crop", "crop_mode", "interpolation")
REQUIRED = ("model", "embedding_size", "image_size", "l2_norm")
TYPES = {field.name: type(field.default) for field in fields(NetworkSpec)} | {
    "model": str,
    "embedding_size": int,
    "image_size": int,
    "interpolation": str,
    "mean": list,
    "std": list,
}


def _in_range(name: str, value) -> bool:
    """Whether an entry of a record, of the right type, may have this value."""
    if name in LIMITS:
        return 0 < value <= LIMITS[name]
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
