"""An index of embedded images: a FAISS index, and beside it the images' paths and the checkpoint that embedded them."""

import json
from pathlib import Path

import torch

from proxy_anchor import runs
from proxy_anchor.files import replacing
from proxy_anchor.retrieval import unit_vectors

IMAGES = "images.json"
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
    """The index in a folder: the paths of its images; its factory string; made: by which checkpoint.

    made: "checkpoint", its path then; "sha256", its identity; "network", its record (see checkpoint.RECORD).
    """

    def __init__(self, folder: Path, made: dict, factory: str, paths: list[str], vectors):
        self.folder, self.made, self.factory, self.paths, self.vectors = folder, made, factory, paths, vectors

    @classmethod
    def new(cls, folder: Path, made: dict, factory: str) -> "Index":
        """An empty one, not written yet. Raises ValueError for a factory string that FAISS does not know."""
        try:
            vectors = faiss().index_factory(made["network"]["embedding_size"], factory, faiss().METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"FAISS knows no index '{factory}': {_reason(error)}") from error
        return cls(folder, made, factory, [], vectors)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Raises FileNotFoundError where there is none, ValueError for one that is damaged."""
        path = folder / IMAGES
        if not path.is_file():
            raise FileNotFoundError(f"There is no index in {folder}: it has no {IMAGES}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            vectors = faiss().read_index(str(folder / content["vectors"]))
            index = cls(folder, content["made"], content["factory"], content["images"], vectors)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"The index in {folder} is damaged: {_reason(error)}") from error
        if vectors.ntotal != len(index.paths):
            raise ValueError(f"The index in {folder} is damaged: {vectors.ntotal} vectors of {len(index.paths)} images")
        return index

    def check(self, made: dict, factory: str | None = None) -> None:
        """Raise ValueError if this index was made with another checkpoint, or is of another kind."""
        if made["sha256"] != self.made["sha256"] or made["network"] != self.made["network"]:
            raise ValueError(
                f"{self.folder} was made with another checkpoint than {made['checkpoint']}, the one that was at "
                f"{self.made['checkpoint']} with {self.made['network']}: their embeddings do not compare"
            )
        if factory not in (None, self.factory):
            raise ValueError(f"{self.folder} is an index {self.factory}, not {factory}; make a new one")

    def add(self, paths: list[str], embeddings: torch.Tensor) -> None:
        """Add images and their embeddings (N, D), and write the index.

        The first ones train it, where its kind needs that. Raises ValueError where they are too few to.
        """
        unit = unit_vectors(embeddings).cpu().numpy()
        try:
            if not self.vectors.is_trained:
                self.vectors.train(unit)
            self.vectors.add(unit)
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot make the index '{self.factory}': {_reason(error)}") from error
        self.paths = self.paths + paths
        name = f"vectors-{len(self.paths)}.faiss"
        with replacing(self.folder / name) as temporary:
            faiss().write_index(self.vectors, str(temporary))
        with replacing(self.folder / IMAGES) as temporary:  # from here on, the new ones are in
            content = {"made": self.made, "factory": self.factory, "vectors": name, "images": self.paths}
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        for old in self.folder.glob("vectors-*.faiss"):
            if old.name != name:
                old.unlink()

    def search(self, embeddings: torch.Tensor, count: int) -> list[list[tuple[str, float]]]:
        """The (path, cosine similarity) of the images most similar to each of the embeddings (N, D), the best first."""
        values, found = self.vectors.search(unit_vectors(embeddings).cpu().numpy(), min(count, len(self.paths)))
        return [
            [(self.paths[i], value) for value, i in zip(*row) if i >= 0] for row in zip(values.tolist(), found.tolist())
        ]

    def recall(self, embeddings: torch.Tensor) -> float:
        """The share of the exact nearest neighbours that this index finds; embeddings (N, D) are those in it."""
        unit = unit_vectors(embeddings).cpu()
        queries = unit[torch.linspace(0, len(unit) - 1, min(RECALL_QUERIES, len(unit))).long()]
        count = min(RECALL_AT, len(unit))
        exact = (queries @ unit.T).topk(count).indices.tolist()
        _, found = self.vectors.search(queries.numpy(), count)
        return sum(len(set(a) & set(b)) for a, b in zip(exact, found.tolist())) / (count * len(queries))


def lock(folder: Path):
    """Hold the folder, so that no other process writes to it; see runs.lock. Raises FileExistsError for a file."""
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: an index is written to a folder, which need not exist")
    folder.mkdir(parents=True, exist_ok=True)
    return runs.lock(folder)


def _reason(error: Exception) -> str:
    """FAISS's messages without the place in its source."""
    return str(error).rsplit(": ", 1)[-1] if "Error in" in str(error) else str(error)
