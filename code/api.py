"""The embedding as a library: the network of a checkpoint as a function of images, and the search in an index."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from proxy_anchor import hardware
from proxy_anchor.checkpoint import Checkpoint, calibration_in, in_run
from proxy_anchor.embedding import Embedder
from proxy_anchor.files import printable, quantity
from proxy_anchor.index import entries
from proxy_anchor.index.store import Index
from proxy_anchor.spec import Calibration, NetworkSpec
from proxy_anchor.vectors import comparable_array, to_nearness
from proxy_anchor.weights import digest

if TYPE_CHECKING:
    import dataset
    import net

    ImageLike = str | os.PathLike | Image.Image | np.ndarray
else:
    from proxy_anchor import dataset, net

BATCH = 32  # images that the network sees at a time
REFERENCES, DRIFT = 8, 1e-3  # entries that are embedded again, and the share of its length that a vector may move
DEEP = 100  # entries among which the second thing of a query is looked for


class ImageEmbedder:
    """The network of a checkpoint as a function: images -> embeddings, see __call__. `load` opens one.

    It can be pickled, and called by several threads. spec: which network, and how it sees images. identity: the sha256
    of the weights. transform: uint8 RGB (3, H, W) -> what the network sees, uint8 (3, S, S). network, device: the torch
    module, and where it is. path, recorded: the checkpoint, and its record of a calibration.
    """

    def __init__(self, network: Any, spec: NetworkSpec, identity: str, device: torch.device, path: str, recorded: Any):
        if device.type == "cuda":
            hardware.turn_off_tf32()
        self.spec, self.identity = spec, identity
        self.path, self.recorded = path, recorded
        self.network, self.device = network.eval(), device
        self.run = Embedder(network, device)
        self.transform = dataset.transform_of(spec)

    @property
    def calibration(self) -> Calibration | None:
        """That of evaluate.py --calibrate, None without one. Raises ValueError if the record is damaged or of pairs."""
        return calibration_in(self.recorded, self.path)

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """The embeddings of one image or of N, float32 (N, D), as search.py compares them: of unit length for cosine.

        An image is a path, a PIL image, or uint8 pixels (H, W, 3) or (H, W). Raises OSError or ValueError for an image
        that cannot be read, which a path names, and TypeError for anything else.
        """
        return comparable_array(self.embed(as_list(images)), self.spec.distance)

    @torch.inference_mode()
    def embed(self, images: list[ImageLike]) -> torch.Tensor:
        """The embeddings (N, D) as the network gives them, on the device."""
        vectors = [torch.empty(0, self.spec.embedding_size, device=self.device)]
        for start in range(0, len(images), BATCH):
            seen = torch.stack([self.transform(self.read(image)) for image in images[start : start + BATCH]])
            vectors.append(self.run(seen.to(self.device)))
        return torch.cat(vectors)

    def read(self, image: ImageLike) -> torch.Tensor:
        """The pixels of an image, uint8 RGB (3, H, W), upright if the network was trained on upright images."""
        upright = self.spec.orientation == "upright"
        if isinstance(image, (str, os.PathLike)):
            return dataset.files.read_image(os.fspath(image), upright)
        if isinstance(image, Image.Image):
            return dataset.files.to_tensor(image, upright)
        if not isinstance(image, np.ndarray):
            raise TypeError(f"Expected a path, a PIL image or uint8 pixels (H, W, 3), found {type(image).__name__}")
        if image.dtype != np.uint8 or not image.size or image.shape[2:] not in ((), (3,)) or image.ndim == 1:
            raise ValueError(f"Expected uint8 pixels (H, W, 3) or (H, W), found {image.dtype} {image.shape}")
        return dataset.files.to_tensor(Image.fromarray(image))

    def __reduce__(self):
        return ImageEmbedder, (self.network, self.spec, self.identity, self.device, self.path, self.recorded)


def load(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    *,
    backbone: str | None = None,
    embedding_size: int | None = None,
) -> ImageEmbedder:
    """The network of a checkpoint, of a run's folder, or of an exported file, .onnx or .safetensors.

    Its embeddings are those of search.py, to the bit on one device. onnxruntime runs an .onnx on the CPU, whatever the
    device. On a CUDA device, TF32 is turned off in this process, as in the scripts. Published checkpoints do not record
    backbone (train.py's --model) and embedding_size; the others do, and other values are refused. Raises OSError or
    ValueError for a file that is missing, damaged or of another network; it cannot run code.
    """
    checkpoint = Checkpoint(in_run(os.fspath(path)))
    if spec := checkpoint.spec:
        recorded = {"backbone": (backbone, spec.model), "embedding_size": (embedding_size, spec.embedding_size)}
        for name, (given, expected) in recorded.items():
            if given not in (None, expected):
                raise ValueError(f"{path} was trained with {name} {expected}, not {given}")
    elif backbone is None or embedding_size is None:
        raise ValueError(f"{path} does not record its network: give backbone=... and embedding_size=...")
    else:
        net.check_name(backbone)
        spec = NetworkSpec(backbone, embedding_size, **net.expects(backbone))
    net.check(spec)
    with torch.random.fork_rng(devices=[]):  # a network begins with random weights
        network = checkpoint.open(spec, net.from_spec, "backbone and embedding_size")
    return ImageEmbedder(network, spec, checkpoint.identity, torch.device(device), *recorded_in(checkpoint))


def recorded_in(checkpoint: Checkpoint) -> tuple[str, Any]:
    """(path, record of a calibration) of a checkpoint."""
    return str(checkpoint.path), checkpoint.content.get("threshold", {})


class Thing(NamedTuple):
    """A folder of an index, its best similarity or distance, and how many of the nearest entries are of it."""

    folder: str
    best: float
    images: int


class Answer(NamedTuple):
    """The entries of an index that are nearest to a query, (path, similarity or distance), and those that match.

    things: the folders of the matches, the best first, without those that were indexed as a whole; of an index of
    folders, the matches. probability: that the query shows the first thing, if the index has what it shows; None
    without a calibration, and where the nearest entry is of no thing.
    """

    query: str
    nearest: list[tuple[str, float]]
    matches: list[tuple[str, float]]
    things: list[Thing]
    probability: float | None = None

    def verdict(self, measure: str, threshold: float | None) -> tuple[str, str]:
        """The name of the best thing or "no match", and the numbers that say so; measure, threshold: see Search.

        Of matches that are of no thing, the best is named.
        """
        if self.matches:
            thing, best, images = self.things[0] if self.things else Thing(*self.matches[0], images=1)
            near = "" if thing == self.matches[0][0] else f", {images} of the {len(self.nearest)} nearest images"
            sure = (
                "" if self.probability is None else f"; {in_words(self.probability)} sure, if the index has the thing"
            )
            return printable(os.path.basename(thing)), f"{measure} {best:.4f}{near}{sure}"
        if not self.nearest:
            return "no match", ""
        return "no match", f"the best {measure} is {self.nearest[0][1]:.4f}, the threshold {threshold:.4f}"


def in_words(probability: float) -> str:
    """A probability in percent, never 100%."""
    return f"{probability:.0%}" if probability <= 0.99 else "over 99%"


class Search:
    """The search in an index of search.py, opened once; its answers are those of `search.py query`.

    embedder: the ImageEmbedder of the index. calibration: that of the index or of its checkpoint; None without one, and
    for an index of folders. threshold: what an entry has to reach to match, by the calibration for the size of
    the index; None without one, and you may set another. measure: "similarity", or "distance" where the network
    compares by Euclidean distance. checkpoint: its path, if it has moved. nprobe: cells to search in an IVF index.
    Raises OSError or ValueError if the index or its checkpoint is missing or damaged, or if one is not of the other;
    calibration raises as ImageEmbedder.calibration.
    """

    def __init__(
        self,
        index: str | os.PathLike,
        device: str | torch.device = "cpu",
        *,
        checkpoint: str | os.PathLike | None = None,
        nprobe: int | None = None,
    ):
        index, path = os.path.abspath(index), checkpoint and os.path.abspath(checkpoint)
        self.opened = partial(Search, index, device, checkpoint=path, nprobe=nprobe)
        self.index = Index.open_complete(Path(index))
        if nprobe:
            self.index.set_nprobe(nprobe)
        spec = self.index.spec
        try:
            net.check(spec)
        except ValueError as error:
            raise ValueError(f"The index in {index} is damaged, or of another version: {error}") from error
        path = in_run(path) if path else self.index.made["checkpoint"]
        if not checkpoint and path not in net.NOT_FILES and not os.path.exists(path):
            raise FileNotFoundError(
                f"The checkpoint {path} of {index} is gone: pass its new path with --resume or, to Search, as "
                "checkpoint"
            )
        opened = None if spec.backbone_only else Checkpoint(path)
        network, identity = open_network(spec, path, opened)
        self.index.check({"weights": identity, "network": spec.to_record(), "checkpoint": path})
        recorded = recorded_in(opened) if opened else (path, {})
        self.embedder = ImageEmbedder(network, spec, identity, torch.device(device), *recorded)
        self.path, self.measure = path, self.index.measure

    @cached_property
    def calibration(self) -> Calibration | None:
        if self.index.made["by_folder"]:  # it is one for queries that are folders too
            return None
        return self.index.calibration or self.embedder.calibration

    @cached_property
    def threshold(self) -> float | None:
        return self.calibration.at(len(self.index.images)) if self.calibration else None

    def query(self, image: ImageLike, count: int = 10) -> Answer:
        """The `count` (>= 1) entries nearest to an image, the best first; see ImageEmbedder.__call__ for errors."""
        if len(images := as_list(image)) != 1:
            raise ValueError(f"Expected one image, found {len(images)}: query_all takes several")
        return self.query_all(images, count)[0]

    def query_all(self, images: Iterable[ImageLike], count: int = 10) -> list[Answer]:
        """The answer for each of several images; the query of one that is no path is ""."""
        images = as_list(images)
        names = [os.fspath(image) if isinstance(image, (str, os.PathLike)) else "" for image in images]
        return self.answer(names, self.embedder.embed(images), count)

    def answer(self, names: list[str], embeddings: torch.Tensor, count: int) -> list[Answer]:
        """The answer for each of the embeddings (N, D), of queries with these names."""
        deep = max(count, DEEP) if self.calibration else count  # the probability alone needs more than are listed
        return [
            self.decide(name, found[:count], self.threshold, self.probability(found))
            for name, found in zip(names, self.index.search(embeddings, deep))
        ]

    def decide(
        self, name: str, nearest: list[tuple[str, float]], threshold: float | None, probability: float | None
    ) -> Answer:
        """The answer for a query with these nearest entries; threshold: any number, or None if all are to match."""
        limit = -math.inf if threshold is None else to_nearness(threshold, self.index.distance)
        matches = [near for near in nearest if to_nearness(near[1], self.index.distance) >= limit]
        things = [self.index.thing_of(path) for path, _ in nearest]
        best: dict[str, float] = {}
        for thing, (_, value) in zip(things, matches):  # the matches come first
            if thing:
                best.setdefault(thing, value)
        named = [Thing(thing, value, things.count(thing)) for thing, value in best.items()]
        return Answer(name, nearest, matches, named, probability)

    def probability(self, nearest: list[tuple[str, float]]) -> float | None:
        """That a query shows the thing of its nearest entry; at least this, if all of the entries are of that thing."""
        if not self.calibration or not (thing := self.index.thing_of(nearest[0][0])):
            return None
        others = (value for path, value in nearest if self.index.thing_of(path) != thing)
        return self.calibration.probability(abs(nearest[0][1] - next(others, nearest[-1][1])))

    def __reduce__(self):
        chosen = {name: value for name, value in vars(self).items() if name == "threshold"}
        return self.opened, (), chosen


def runtime(run: Embedder) -> dict[str, str]:
    """What the vectors of images depend on besides the network: device, precision, libraries that decode and run."""
    libraries = ("torch", "torchvision", "pillow", "onnxruntime")
    found = {"device": run.device.type, "amp": run.settings[0]}
    for name in libraries if getattr(run.network, "is_exported", False) else libraries[:-1]:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@torch.inference_mode()
def check_drift(index: Index, run: Embedder) -> str | None:
    """A warning if images of an index have other vectors when they are embedded here; "" if not.

    It embeds REFERENCES entries at even distances, if the index records another runtime. Returns None if it cannot
    compare any, because their files have changed, are gone or cannot be read.
    """
    if index.runtime == (here := runtime(run)):
        return ""
    run.network.eval()
    transform, upright = dataset.transform_of(index.spec), index.spec.orientation == "upright"
    moved: list[float] = []
    for row in np.linspace(0, len(index.images) - 1, min(REFERENCES, len(index.images))).round().astype(int).tolist():
        entry, stamp = index.images[row]
        try:
            paths = dataset.folder.images_directly_in(entry) if index.made["by_folder"] else [entry]
            if len(paths) > BATCH or entries.stamp(paths) != stamp:
                continue
            seen = torch.stack([transform(dataset.files.read_image(path, upright)) for path in paths])
        except (OSError, ValueError):
            continue
        _, embeddings = entries.embeddings_of({entry: paths}, paths, run(seen.to(run.device)), index.distance)
        (now,) = comparable_array(embeddings, index.distance)
        (before,) = index.images.take(np.array([row]))
        moved.append(float(np.linalg.norm(now - before)) / max(float(np.linalg.norm(before)), 1e-12))
    if not moved:
        return None
    if max(moved) <= DRIFT:
        return ""
    kind = "folder" if index.made["by_folder"] else "image"
    made, present = (", ".join(f"{name} {of}" for name, of in record.items()) for record in (index.runtime, here))
    return (
        f"The vectors of {quantity(len(moved), kind)} of {index.folder}, embedded again, moved by up to "
        f"{max(moved):.4f} of their length, where at most {DRIFT:g} is expected. The index was made with "
        f"{made or 'unknown versions'}; here is {present}. Similarities are off by as much: use those versions, or "
        "build a new index"
    )


def open_network(spec: NetworkSpec, path: str, checkpoint: Checkpoint | None) -> tuple[Any, str]:
    """The network that a spec describes, and its identity.

    checkpoint: its weights; or None for a backbone alone, whose pretrained weights are at the path.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # for --pretrained none: the same network each time
        if checkpoint:
            return checkpoint.open(spec, net.from_spec), checkpoint.identity
        network = net.from_spec(spec, path)
    return network, digest(network.state_dict())


def as_list(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """The images, or the one image, as a list."""
    is_one = isinstance(images, (str, os.PathLike, Image.Image))
    return [images] if is_one or getattr(images, "ndim", None) in (2, 3) else list(images)  # type: ignore[arg-type, list-item]
