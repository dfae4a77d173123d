"""Vectors on disk, each with the path and the stamp of its image, written and read in blocks."""

import json
import mmap
import os
from collections.abc import Iterable
from itertools import compress
from pathlib import Path

import numpy as np

from proxy_anchor.files import replacing

BLOCK = 2**14  # rows that are copied at a time
DTYPES = ("float32", "float16")
_as_line = json.JSONEncoder().encode


class Rows:
    """The rows of two files: vectors (N, size), and a line ["path", stamp] in JSON for each vector.

    The ending of the first is the type of its numbers, see DTYPES; vectors are read as float32. Raises
    FileNotFoundError if one is missing, ValueError if they do not fit each other.
    """

    def __init__(self, vectors: Path, lines: Path, size: int):
        self.file, dtype = lines, np.dtype(vectors.suffix[1:])
        self._vectors, self._lines = open(vectors, "rb"), open(lines, "rb")  # noqa: SIM115 (they may be deleted)
        self._ends = _ends_of_lines(self._lines)
        if (length := os.fstat(self._vectors.fileno()).st_size) != dtype.itemsize * size * len(self):
            raise ValueError(f"{vectors.name} has {length:,} bytes, expected {len(self):,} vectors of {size} numbers")
        self._mapped = mmap.mmap(self._vectors.fileno(), 0, access=mmap.ACCESS_READ) if length else None
        self._stored = np.frombuffer(self._mapped or b"", dtype).reshape(len(self), size)

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, row: int) -> tuple[str, str]:
        """The path and the stamp of a row. Raises ValueError if its line is damaged."""
        try:
            path, stamp = json.loads(self._read_lines(row, row + 1))
            if not isinstance(path, str):
                raise TypeError
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"The index in {self.file.parent} is damaged: line {row + 1} of {self.file.name} is "
                f"{self._read_lines(row, row + 1)[:80]!r}, expected a path and its stamp"
            ) from error
        return path, stamp

    def __iter__(self):
        return (self[row] for row in range(len(self)))

    @property
    def shape(self) -> tuple[int, int]:
        return self._stored.shape

    @property
    def vectors(self) -> np.ndarray:
        """All vectors (N, size), mapped where they are float32."""
        return self._stored.astype(np.float32, copy=False)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies of the vectors of some rows, read one by one: mapping could load megabytes for each."""
        copies = np.empty((len(rows), self.shape[1]), self._stored.dtype)
        for copy, row in zip(copies, rows.tolist()):
            os.preadv(self._vectors.fileno(), [copy.data], row * copy.nbytes)
        return copies.astype(np.float32, copy=False)

    def slices(self, rows: int, start: int = 0, stop: int | None = None):
        """(start, vectors) of this many rows at a time, mapped until the next is asked for."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, rows):
            yield first, self._stored[first : min(first + rows, stop)].astype(np.float32, copy=False)
            if self._mapped:
                self._mapped.madvise(mmap.MADV_DONTNEED)

    def blocks(self, kept: np.ndarray):
        """The rows of a mask (N,), in blocks as write takes them."""
        for start, vectors in self.slices(BLOCK):
            chosen = kept[start : start + len(vectors)]
            lines = self._read_lines(start, start + len(vectors)).splitlines(keepends=True)
            yield b"".join(compress(lines, chosen)), vectors[chosen]

    def _read_lines(self, start: int, stop: int) -> bytes:
        first = int(self._ends[start - 1]) if start else 0
        return os.pread(self._lines.fileno(), int(self._ends[stop - 1]) - first, first)


def block(stamps: dict[str, str], vectors: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Rows as write takes them."""
    return lines(stamps.items()), vectors


def lines(stamps: Iterable[tuple[str, str]]) -> bytes:
    """The lines of pairs (path, stamp)."""
    return "".join(f"{_as_line(row)}\n" for row in stamps).encode()


def write(vectors: Path, lines: Path, blocks) -> None:
    """Write the files of Rows, that of the lines last, from blocks (lines, vectors)."""
    with replacing(lines) as text, replacing(vectors) as numbers, open(text, "wb") as a, open(numbers, "wb") as b:
        for block_lines, block_vectors in blocks:
            a.write(block_lines)
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(block_vectors, vectors.suffix[1:])
            if stored.dtype == np.float16 and not np.isfinite(stored).all():
                raise ValueError("A number of a vector is too large for float16: make a new index without --float16")
            b.write(stored.data)


def _ends_of_lines(file) -> np.ndarray:
    """The offsets behind the line feeds."""
    ends, start = [np.empty(0, int)], 0
    while text := file.read(2**20):
        ends.append(start + 1 + np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")))
        start += len(text)
    return np.concatenate(ends)
