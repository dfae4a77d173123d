"""An index of embedded images, or of their folders: paths, vectors, and the checkpoint that embedded them.

images.json in its folder describes it; vectors-NUMBER.float32 has the vectors, and vectors-NUMBER.faiss FAISS's index
of them, unless its kind is Flat. Each time the index is written, the number is new and images.json is replaced last.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proxy_anchor import checkpoint, runs
from proxy_anchor.files import replacing
from proxy_anchor.tiles import comparable

IMAGES = "images.json"
MADE = {"checkpoint": str, "weights": str, "network": dict, "by_folder": bool}
LAYOUT = {"made": MADE, "factory": str, "number": int, "images": dict}  # of images.json
EXACT = "Flat"
CANDIDATES, CANDIDATES_PER_NEIGHBOUR = 100, 10  # of a kind that is not exact, ranked exactly: the larger number
RECALL_QUERIES, RECALL_AT = 1000, 10  # of the recall against exact search


def faiss():
    """The library. Raises ImportError saying how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"search.py needs faiss, which cannot be imported ({error}): pip install faiss-cpu, 1.8 for numpy below 2"
        ) from error
    return faiss


class Index:
    """The index in a folder: images, {path: stamp}, and in their order the vectors (N, D); its factory string.

    They are compared by the network's distance: unit vectors by their cosine similarity, embeddings as they are by
    their Euclidean distance; measure says which.
    stamp: of entries.stamp, which tells whether the files have changed since.
    made: "checkpoint", its path then; "weights", its identity; "network", its contract (see checkpoint.CONTRACT);
    "by_folder": whether each of the images stands for all images in a folder, whose path it has.
    """

    vectors: np.ndarray
    faiss_index: Any

    def __init__(self, folder: Path, made: dict, factory: str, number: int, images: dict[str, list[int]]):
        self.folder, self.made, self.factory, self.number, self.images = folder, made, factory, number, images

    @classmethod
    def new(cls, folder: Path, made: dict, factory: str) -> "Index":
        """An empty index, not written yet. Raises ValueError for a factory string that FAISS does not know."""
        index = cls(folder, made, factory, number=0, images={})
        index.vectors = np.empty((0, made["network"]["embedding_size"]), dtype=np.float32)
        index.faiss_index = index._new_faiss_index()
        return index

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """The index in a folder. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
        if not (folder / IMAGES).is_file():
            raise FileNotFoundError(f"There is no index in {folder}: it has no {IMAGES}")
        text = (folder / IMAGES).read_bytes()
        try:
            content = json.loads(text)
            _check(content, LAYOUT)
            if not checkpoint.is_contract(network := content["made"]["network"]):
                raise ValueError(f"'network' is {str(network)[:80]}")
            index = cls(folder, **{name: content[name] for name in LAYOUT})
            index._read_vectors()
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            if (folder / IMAGES).read_bytes() != text:  # another process has written it meanwhile
                return cls.open(folder)
            raise ValueError(
                f"The index in {folder} is damaged or of an older version ({_reason(error)}): "
                "delete the folder and index the images again"
            ) from error
        return index

    def _read_vectors(self):
        expected = len(self.images), self.made["network"]["embedding_size"]
        numbers = np.memmap(self._file("float32"), np.float32, "r")
        if len(numbers) != expected[0] * expected[1]:
            raise ValueError(f"expected {expected} vectors, found {len(numbers)} numbers")
        self.vectors = np.asarray(numbers).reshape(expected)  # a plain array: libraries that patch FAISS insist on it
        if self.factory == EXACT:
            self.faiss_index = self._new_faiss_index()
            self.faiss_index.add(self.vectors)
            return
        self.faiss_index = faiss().read_index(str(self._file("faiss")))
        if (found := (self.faiss_index.ntotal, self.faiss_index.d)) != expected:
            raise ValueError(f"expected {expected} vectors in FAISS's index, found {found}")

    def check(self, made: dict, factory: str | None = None) -> None:
        """Raise ValueError if this index was made with another checkpoint, or, where told, is of another kind."""
        if made["weights"] != self.made["weights"] or made["network"] != self.made["network"]:
            raise ValueError(
                f"{self.folder} was made with another checkpoint than {made['checkpoint']}: with the one that was at "
                f"{self.made['checkpoint']}, with {self.made['network']}. Their embeddings do not compare"
            )
        if made.get("by_folder", self.made["by_folder"]) != self.made["by_folder"]:
            has, flag = ("folders", "with") if self.made["by_folder"] else ("images", "without")
            raise ValueError(f"{self.folder} is an index of {has}: update it {flag} --by-folder, or make a new one")
        if factory not in (None, self.factory):
            raise ValueError(f"{self.folder} is an index {self.factory}, not {factory}; make a new one")

    def compare(
        self, stamps: dict[str, list[int]], exists
    ) -> tuple[dict[str, list[int]], dict[str, list[int]], list[str]]:
        """Of what is there, {path: stamp}, that which is new and that which has changed; the paths of what is gone.

        exists(path) says whether an indexed path that is not among them still has its images.
        """
        new = {path: stamp for path, stamp in stamps.items() if path not in self.images}
        changed = {path: stamp for path, stamp in stamps.items() if stamp != self.images.get(path, stamp)}
        return new, changed, [path for path in self.images if path not in stamps and not exists(path)]

    def update(self, dropped: set[str], stamps: dict[str, list[int]], embeddings: torch.Tensor) -> None:
        """Drop images, add those of `stamps` with their embeddings (N, D), and write the index.

        A kind that needs training is trained on the first images. Most kinds cannot drop images: they are built again.
        Raises ValueError where images are too few, before anything is written.
        """
        kept = np.array([path not in dropped for path in self.images], dtype=bool)
        added = self._vectors_of(embeddings)
        self.images = {path: stamp for path, stamp in self.images.items() if path not in dropped} | stamps
        self.vectors = np.concatenate([self.vectors[kept], added])
        if not self.images:
            raise ValueError(f"No image would be left in {self.folder}: delete the folder instead")
        if dropped:
            self.faiss_index, added = self._new_faiss_index(), self.vectors
        try:
            if not self.faiss_index.is_trained:
                self.faiss_index.train(added)
            self.faiss_index.add(added)
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot make the index '{self.factory}': {_reason(error)}") from error
        self.number += 1
        with replacing(self._file("float32")) as temporary:
            self.vectors.tofile(temporary)
        if self.factory != EXACT:
            with replacing(self._file("faiss")) as temporary:
                faiss().write_index(self.faiss_index, str(temporary))
        with replacing(self.folder / IMAGES) as temporary:  # from here on, it is the new one
            temporary.write_text(json.dumps({name: getattr(self, name) for name in LAYOUT}, indent=1), encoding="utf-8")
        for old in {*self.folder.glob("vectors-*")} - {self._file("float32"), self._file("faiss")}:
            old.unlink()

    def search(self, embeddings: torch.Tensor, count: int) -> list[list[tuple[str, float]]]:
        """The (path, similarity or distance) of the images nearest to each of the embeddings (N, D), the best first."""
        paths, queries, cosine = list(self.images), self._vectors_of(embeddings), self.distance == "cosine"
        exact = cosine and self.factory == EXACT
        candidates = count if exact else max(CANDIDATES, CANDIDATES_PER_NEIGHBOUR * count)
        values, found = self.faiss_index.search(queries, min(candidates, len(paths)))
        nearest = []
        for query, measured, indices in zip(queries, values, found):
            if not exact:  # FAISS's may be of vectors that it has compressed, or the difference of large squares
                indices = indices[indices >= 0]
                vectors = self.vectors[indices]
                measured = vectors @ query if cosine else np.linalg.norm(vectors - query, axis=1)
            order = np.argsort(-measured if cosine else measured, kind="stable")[:count]
            nearest.append([(paths[i], float(value)) for i, value in zip(indices[order], measured[order])])
        return nearest

    @property
    def distance(self) -> str:
        """One of retrieval.DISTANCES."""
        return self.made["network"].get("distance", "cosine")

    @property
    def measure(self) -> str:
        """What search returns of each image."""
        return "similarity" if self.distance == "cosine" else "distance"

    @property
    def _metric(self) -> int:
        """Its distance in FAISS's terms."""
        return faiss().METRIC_INNER_PRODUCT if self.distance == "cosine" else faiss().METRIC_L2

    def _vectors_of(self, embeddings):
        return comparable(embeddings, self.distance).float().cpu().numpy()

    @property
    def cells(self) -> int:
        """How many cells the vectors are divided into (a search looks in nprobe of them); 0 for kinds without cells."""
        return getattr(faiss().try_extract_index_ivf(self.faiss_index), "nlist", 0)

    def set_nprobe(self, nprobe: int) -> None:
        """Search so many cells instead of one. Raises ValueError for a kind without cells."""
        if not self.cells:
            raise ValueError(f"{self.folder} is an index {self.factory}: only those with IVF in it take --nprobe")
        faiss().extract_index_ivf(self.faiss_index).nprobe = min(nprobe, self.cells)

    def recall(self) -> float:
        """The share of the exact nearest neighbours that it finds, over some of its images."""
        paths, count = list(self.images), min(RECALL_AT, len(self.images))
        queries = self.vectors[np.linspace(0, len(paths) - 1, min(RECALL_QUERIES, len(paths))).astype(int)]
        _, exact = faiss().knn(queries, self.vectors, count, self._metric)
        found = self.search(torch.from_numpy(queries), count)
        return sum(len({paths[i] for i in a} & dict(b).keys()) for a, b in zip(exact, found)) / exact.size

    def _new_faiss_index(self):
        size = self.made["network"]["embedding_size"]
        try:
            return faiss().index_factory(size, self.factory, self._metric)
        except RuntimeError as error:
            raise ValueError(f"FAISS knows no index '{self.factory}': {_reason(error)}") from error

    def _file(self, ending):
        return self.folder / f"vectors-{self.number}.{ending}"


def lock(folder: Path):
    """Hold the folder, so that no other process writes to it; see runs.lock. Raises FileExistsError for a file."""
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: an index is written to a folder, which need not exist")
    folder.mkdir(parents=True, exist_ok=True)
    return runs.lock(folder, instead="choose another --out")


def _check(content, layout, name=IMAGES):
    """Raise ValueError if the content of images.json does not have this layout."""
    kind = dict if isinstance(layout, dict) else layout
    if not isinstance(content, kind):
        raise ValueError(f"'{name}' is {str(content)[:80]}, expected {kind.__name__}")
    for part in layout if isinstance(layout, dict) else ():
        _check(content.get(part), layout[part], part)


def _reason(error: Exception) -> str:
    """FAISS's messages without the place in its source."""
    return str(error).rsplit(": ", 1)[-1] if "Error in" in str(error) else str(error)
