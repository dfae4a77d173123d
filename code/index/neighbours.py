"""The nearest vectors: exact search, or an index of FAISS in parts; neither needs the memory of all vectors."""

import shutil
from itertools import takewhile
from pathlib import Path

import numpy as np

from proxy_anchor.files import replacing
from proxy_anchor.index.rows import Rows
from proxy_anchor.runs.run_folders import numbered

EXACT = "Flat"
PART = 2**27  # bytes of vectors, or of their codes, that are in memory at a time


def faiss():
    """The library. Raises ImportError saying how to get it."""
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
        for start, vectors in self.images.slices(_rows_per_part(self.images)):
            values, rows = faiss().knn(queries, vectors, min(count, len(vectors)), self.metric)
            best.add_result(values, rows + start)
        best.finalize()
        return best.D, best.I


class FaissFiles:
    """FAISS's index in one or more files: path, path_2, path_3, ..., which may be deleted from now on.

    They are read one by one for each search: whole or, where the kind has cells, what is searched of them. Raises
    RuntimeError or FileNotFoundError if they cannot be read, ValueError if they are not of `shape`, (N, D).
    """

    def __init__(self, path: Path, shape: tuple[int, int]):
        self.files = [open(file, "rb") for file in takewhile(Path.exists, numbered(path))]  # noqa: SIM115 (kept open)
        if not self.files:
            raise FileNotFoundError(f"there is no {path.name}")
        self.nprobe: int | None = None
        self.cells, total = 0, 0
        for part in self:
            if part.d != shape[1]:
                raise ValueError(f"expected vectors of {shape[1]} numbers in FAISS's index, found {part.d}")
            self.metric, self.cells = part.metric_type, getattr(faiss().try_extract_index_ivf(part), "nlist", 0)
            total += part.ntotal
        if total != shape[0]:
            raise ValueError(f"expected {shape[0]:,} vectors in FAISS's index, found {total:,}")

    def __iter__(self):
        return (_read(file, mapped=True) for file in self.files)

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See Exact.search; of each query, what is not found is -1 at the end."""
        best, start = _best(len(queries), count, self.metric), 0
        for part in self:
            if self.nprobe:
                faiss().extract_index_ivf(part).nprobe = min(self.nprobe, self.cells)
            values, rows = part.search(queries, min(count, part.ntotal))
            best.add_result(values, np.where(rows < 0, -1, rows + start))
            start += part.ntotal
        best.finalize()
        return best.D, best.I


def create(factory: str, size: int, metric: int):
    """An empty index of FAISS. Raises ValueError for a factory string that it does not know."""
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
    done = sum(part.ntotal for part in former)
    _write(files, images, done, index)


def sample(images: Rows) -> np.ndarray:
    """The vectors that an index is trained on: all or, at random but always the same, as many as fit in a part."""
    rows, most = np.arange(len(images)), _rows_per_part(images)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    return images.take(rows)


def reason(error: Exception) -> str:
    """FAISS's messages without the place in its source."""
    return str(error).rsplit(": ", 1)[-1] if "Error in" in str(error) else str(error)


def _write(files, images, done, index):
    """Add the rows after the first `done` to the last part, and to others after it; write each of them."""
    cells = faiss().try_extract_index_ivf(index)
    size = PART // (cells.code_size + 8) if cells else _rows_per_part(images)  # codes, with their numbers
    while True:
        stop = min(done + max(size - index.ntotal, 0), len(images))
        for _, vectors in images.slices(_rows_per_part(images), done, stop):
            index.add(vectors)
        done = stop
        with replacing(next(files)) as temporary:
            faiss().write_index(index, str(temporary))
        if done == len(images):
            return
        index.reset()  # stays trained


def _rows_per_part(images):
    return max(PART // (4 * images.vectors.shape[1]), 1)


def _best(queries, count, metric):
    """Merges the results of parts as FAISS merges within one: in the same order, among equal values too."""
    return faiss().ResultHeap(queries, count, keep_max=metric == faiss().METRIC_INNER_PRODUCT)


def _read(file, mapped):
    file.seek(0)
    return faiss().read_index(_path(file), faiss().IO_FLAG_MMAP if mapped else 0)


def _path(file):
    """Of an open file, which may have been deleted meanwhile."""
    return f"/dev/fd/{file.fileno()}"
