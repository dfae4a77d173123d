"""The nearest vectors: exact search, or an index of FAISS in shards; neither needs all vectors in memory."""

import shutil
from itertools import takewhile
from pathlib import Path

import numpy as np

from proxy_anchor.files import numbered, replacing
from proxy_anchor.index.rows import Rows

EXACT = "Flat"
SHARD = 2**27  # bytes of vectors, or of their codes, in memory at a time


def faiss():
    """The library. Raises ImportError with how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"search.py needs faiss, which cannot be imported ({error}): pip install faiss-cpu, 1.8 for numpy below 2"
        ) from error
    return faiss


class Exact:
    """Exact search in the vectors of Rows; metric: one of FAISS's."""

    cells = 0

    def __init__(self, images: Rows, metric: int):
        faiss()
        self.images, self.metric = images, metric

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's values and the rows of the `count` nearest of each query (N, D), the best first."""
        best = _best(len(queries), count, self.metric)
        for start, vectors in self.images.slices(_rows_per_shard(self.images)):
            values, rows = faiss().knn(queries, vectors, min(count, len(vectors)), self.metric)
            best.add_result(values, rows + start)
        best.finalize()
        return best.D, best.I


class FaissFiles:
    """FAISS's index in one or more files, shards: path, path_2, path_3, ..., which may be deleted once they are open.

    Each search reads them one by one: whole or, where the kind has cells, only the cells that it visits. Raises
    RuntimeError or FileNotFoundError if they cannot be read, ValueError if they are not of `shape`, (N, D).
    """

    def __init__(self, path: Path, shape: tuple[int, int]):
        self.files = [open(file, "rb") for file in takewhile(Path.exists, numbered(path))]  # noqa: SIM115 (kept open)
        if not self.files:
            raise FileNotFoundError(f"there is no {path.name}")
        self.nprobe: int | None = None
        self.cells, total = 0, 0
        for shard in self:
            if shard.d != shape[1]:
                raise ValueError(f"expected vectors of {shape[1]} numbers in FAISS's index, found {shard.d}")
            self.metric, self.cells = shard.metric_type, getattr(faiss().try_extract_index_ivf(shard), "nlist", 0)
            total += shard.ntotal
        if total != shape[0]:
            raise ValueError(f"expected {shape[0]:,} vectors in FAISS's index, found {total:,}")

    def __iter__(self):
        return (_read(file, mapped=True) for file in self.files)

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See Exact.search; where fewer are found, the rest of a row is -1."""
        best, start = _best(len(queries), count, self.metric), 0
        for shard in self:
            if self.nprobe:
                faiss().extract_index_ivf(shard).nprobe = min(self.nprobe, self.cells)
            values, rows = shard.search(queries, min(count, shard.ntotal))
            best.add_result(values, np.where(rows < 0, -1, rows + start))
            start += shard.ntotal
        best.finalize()
        return best.D, best.I


def create(factory: str, size: int, metric: int):
    """An empty index of FAISS. Raises ValueError for an unknown factory string."""
    try:
        return faiss().index_factory(size, factory, metric)
    except RuntimeError as error:
        raise ValueError(f"FAISS knows no index '{factory}': {reason(error)}") from error


def build(path: Path, images: Rows, empty) -> None:
    """Train an empty index, add all rows, and write the files of FaissFiles. Raises RuntimeError where FAISS does."""
    if not empty.is_trained:
        empty.train(sample(images))
    _write(numbered(path), images, 0, empty)


def extend(path: Path, images: Rows, former: FaissFiles) -> None:
    """Write the files of FaissFiles: those of a former index of the first rows, and the other rows."""
    files = numbered(path)
    *full, last = former.files
    for file in full:
        with replacing(next(files)) as temporary:
            shutil.copyfile(_path(file), temporary)
    index = _read(last, mapped=False)
    done = sum(shard.ntotal for shard in former)
    _write(files, images, done, index)


def sample(images: Rows) -> np.ndarray:
    """The vectors that an index is trained on: all or, at random but always the same, as many as fit in a shard."""
    rows, most = np.arange(len(images)), _rows_per_shard(images)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    return images.take(rows)


def reason(error: Exception) -> str:
    """FAISS's message without the position in its source."""
    return str(error).rsplit(": ", 1)[-1] if "Error in" in str(error) else str(error)


def _write(files, images, done, index):
    """Add the rows after the first `done` to the last shard and to new ones after it, and write each."""
    cells = faiss().try_extract_index_ivf(index)
    size = SHARD // (cells.code_size + 8) if cells else _rows_per_shard(images)  # codes, with their numbers
    while True:
        stop = min(done + max(size - index.ntotal, 0), len(images))
        for _, vectors in images.slices(_rows_per_shard(images), done, stop):
            index.add(vectors)
        done = stop
        with replacing(next(files)) as temporary:
            faiss().write_index(index, str(temporary))
        if done == len(images):
            return
        index.reset()  # stays trained


def _rows_per_shard(images):
    return max(SHARD // (4 * images.shape[1]), 1)


def _best(queries, count, metric):
    """Merges the results of shards as FAISS merges within one: in the same order, among equal values too."""
    return faiss().ResultHeap(queries, count, keep_max=metric == faiss().METRIC_INNER_PRODUCT)


def _read(file, mapped):
    file.seek(0)
    return faiss().read_index(_path(file), faiss().IO_FLAG_MMAP if mapped else 0)


def _path(file):
    """A path to an open file, valid even after the file is deleted."""
    return f"/dev/fd/{file.fileno()}"
