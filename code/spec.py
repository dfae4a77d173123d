"""What checkpoints, indexes and exported files record: the network, how it sees images, and when a query is known."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

CROP = 0.875  # the share of the resized shorter side that evaluation keeps: 224 of 256, as published
MEASURES = {"cosine": "similarity", "euclidean": "distance"}
BOUNDS = {"cosine": "at least", "euclidean": "at most"}  # of what reaches a threshold
DISTANCES = tuple(MEASURES)
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
SHARE = 0.05  # of the unknown queries that may match, of --calibrate
SMALLEST_GAP = 1e-9  # between a threshold and a perfect match
GROWN = 1.25  # times the size that was measured, which lacks the query's own images: a larger gallery has grown


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


@dataclass(frozen=True)
class Calibration:
    """How near an image must be for a query to show a known thing: a cosine similarity or a distance, by gallery size.

    share: how many of the unknown queries, whose thing is not in the gallery, may match. sizes, values: numbers of
    images of other things, the largest first, and the threshold for each. unknown, known: what it achieved, each as
    (share, low, high): unknown queries that match, and known ones whose nearest image is of their thing and matches;
    known is () where nothing was known. odds: (offset, slope) of the log odds that a known query's nearest thing is
    right, over the gap to its second thing; () where nothing was known. classes: how many chose it, and how many
    checked it. dataset, data: what it was measured on, and the fingerprints of its splits. groups: how near two groups
    of images of one thing are at least, see index/clustering.py; None where no class had several images.
    """

    distance: str
    share: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    unknown: tuple[float, ...]
    known: tuple[float, ...]
    odds: tuple[float, ...]
    classes: tuple[int, ...]
    dataset: str
    data: dict
    groups: float | None = None

    @classmethod
    def from_record(cls, record: Any) -> "Calibration":
        """The calibration in a record. Raises ValueError with the record if it is damaged."""
        lists = ("sizes", "values", "unknown", "known", "odds", "classes")
        if (
            isinstance(record, dict)
            and record.keys() == {field.name for field in fields(cls)}
            and all(isinstance(record[name], list | tuple) for name in lists)
        ):
            calibration = cls(**(record | {name: tuple(record[name]) for name in lists}))
            if calibration._is_valid():
                return calibration
        raise ValueError(str(record)[:80])

    def to_record(self) -> dict:
        """The calibration as a dict of plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def at(self, size: int) -> float:
        """The threshold for a gallery of this many images.

        It is measured at `sizes`. Between and above them, the gap to a perfect match, 1 - cosine or the distance, is
        a power of the size: the nearest of n points in a space of m dimensions is at a distance of about n**(-1/m).
        Above, it is the power that fits all sizes best, by least squares of the logarithms. Below the smallest size it
        is the threshold of the smallest, which accepts fewer queries.
        """
        logs = [math.log(known) for known in self.sizes]
        gaps = [math.log(self._gap(value)) for value in self.values]
        at = max(math.log(size), logs[-1]) if size else logs[-1]
        if at > logs[0]:
            middle, mean = sum(logs) / len(logs), sum(gaps) / len(gaps)
            slope = sum((x - middle) * (y - mean) for x, y in zip(logs, gaps)) / sum((x - middle) ** 2 for x in logs)
            gap = math.exp(gaps[0] + slope * (at - logs[0]))
        else:
            first = sum(at < known for known in logs[1:-1])  # of the two sizes that it is between
            (larger, smaller), (near, far) = logs[first : first + 2], gaps[first : first + 2]
            gap = math.exp(far + (near - far) * (at - smaller) / (larger - smaller))
        return 1 - gap if self.distance == "cosine" else gap

    def promise(self, size: int) -> str:
        """What the threshold for a gallery of this many images promises, in words."""
        from_size = f" (extrapolated from {self.sizes[0]:,} images)" if size > GROWN * self.sizes[0] else ""
        return f"at most {100 * self.share:g}% of unknown queries are expected to reach it{from_size}"

    def probability(self, gap: float) -> float | None:
        """That a known query shows its nearest thing, which is this much nearer than the second; None if unknown."""
        if not self.odds:
            return None
        offset, slope = self.odds
        return 1 / (1 + math.exp(min(-(offset + slope * gap), 700)))

    def text(self) -> str:
        """The threshold for each size."""
        best, *others = (f"{value:.4f} for {size:,}" for size, value in zip(self.sizes, self.values))
        return f"{MEASURES[self.distance]} {best} images ({', '.join(others)})"

    def _gap(self, value: float) -> float:
        return max(1 - value if self.distance == "cosine" else value, SMALLEST_GAP)

    def _is_valid(self) -> bool:
        numbers = *self.values, *self.unknown, *self.known, *self.odds
        sizes_fall = all(larger > smaller > 0 for larger, smaller in zip(self.sizes, self.sizes[1:]))
        return (
            self.distance in DISTANCES
            and isinstance(self.share, float)
            and 0 < self.share < 1
            and all(isinstance(size, int) for size in (*self.sizes, *self.classes))
            and len(self.sizes) == len(self.values) > 1
            and sizes_fall
            and all(isinstance(number, float) and math.isfinite(number) for number in numbers)
            and len(self.unknown) == 3
            and len(self.known) in (0, 3)
            and len(self.odds) in (0, 2)
            and all(0 <= share <= 1 for share in (*self.unknown, *self.known))
            and isinstance(self.dataset, str)
            and isinstance(self.data, dict)
            and (self.groups is None or (isinstance(self.groups, float) and math.isfinite(self.groups)))
        )
