"""Vectors on disk, each with the path and the stamp of its image: written in blocks, and mapped instead of loaded."""

import json
import mmap
from pathlib import Path

import numpy as np

from proxy_anchor.files import replacing

BLOCK = 2**14  # rows that are copied at a time
_as_line = json.JSONEncoder().encode


class Rows:
    """The rows of two files: vectors (N, size), float32, and lines, ["path", stamp] in JSON for each vector.

    Raises FileNotFoundError if one is missing, ValueError if they do not fit each other.
    """

    def __init__(self, vectors: Path, lines: Path, size: int):
        self.file = lines
        self._numbers, self._text = _mapped(vectors), _mapped(lines)
        self._ends = _ends_of_lines(self._text)
        if len(self._numbers) != 4 * size * len(self):
            raise ValueError(
                f"{vectors.name} has {len(self._numbers):,} bytes, expected {len(self):,} vectors of {size} numbers"
            )
        self.vectors = np.frombuffer(self._numbers, np.float32).reshape(len(self), size)
        self.release()

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, row: int) -> tuple[str, list[int]]:
        """The path and the stamp of a row. Raises ValueError if its line is damaged."""
        try:
            path, stamp = json.loads(self._line(row))
            if not isinstance(path, str):
                raise TypeError
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"The index in {self.file.parent} is damaged: line {row + 1} of {self.file.name} is "
                f"{self._line(row)[:80]!r}, expected a path and its stamp"
            ) from error
        return path, stamp

    def __iter__(self):
        for row in range(len(self)):
            if row % BLOCK == 0:
                self.release()
            yield self[row]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies of the vectors of some rows; of many rows, fast if they are sorted."""
        copies = np.empty((len(rows), self.vectors.shape[1]), np.float32)
        for start in range(0, len(rows), BLOCK):
            copies[start : start + BLOCK] = self.vectors[rows[start : start + BLOCK]]
            self.release()
        return copies

    def blocks(self, kept: np.ndarray):
        """Those rows, kept (N,), in blocks as write takes them."""
        for start in range(0, len(self), BLOCK):
            rows = start + np.flatnonzero(kept[start : start + BLOCK])
            yield b"".join(map(self._line, rows)), self.take(rows)

    def release(self) -> None:
        """Give back the memory of what was read; the files may be larger than all memory."""
        for mapped in (self._numbers, self._text):
            if len(mapped):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _line(self, row: int) -> bytes:
        return self._text[self._ends[row - 1] if row else 0 : self._ends[row]]


def block(stamps: dict[str, list[int]], vectors: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Rows as write takes them."""
    return "".join(f"{_as_line(row)}\n" for row in stamps.items()).encode(), vectors


def write(vectors: Path, lines: Path, blocks) -> None:
    """Write the files of Rows, that of the lines last, from blocks (lines, vectors)."""
    with replacing(lines) as text, replacing(vectors) as numbers, open(text, "wb") as a, open(numbers, "wb") as b:
        for own, some in blocks:
            a.write(own)
            b.write(np.ascontiguousarray(some, np.float32).data)


def _mapped(path: Path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _ends_of_lines(text) -> np.ndarray:
    """The places behind the line feeds."""
    step = 2**24
    ends = [start + 1 + np.flatnonzero(np.frombuffer(text[start : start + step], np.uint8) == ord("\n"))
            for start in range(0, len(text), step)]  # fmt: skip
    return np.concatenate([np.empty(0, int), *ends])
