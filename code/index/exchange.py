"""The vectors of an index in files that other programs read and write: Parquet, or numpy's .npy with a list of paths.

A row of a Parquet file is an entry of an index, see schema. Its metadata holds a record under KEY: "made", "folders"
and "calibration" as in an index, and "threshold", the number that a match has to reach among all rows, or null.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proxy_anchor.files import printable, quantity, replacing
from proxy_anchor.index import entries
from proxy_anchor.index.rows import BLOCK
from proxy_anchor.index.store import MADE, Index, check_layout, digest
from proxy_anchor.spec import Calibration, NetworkSpec

if TYPE_CHECKING:  # optional
    import pyarrow as pa

KEY = b"proxy_anchor"
LAYOUT = {"made": MADE, "folders": list, "calibration": dict, "sha256": str}
UNIT = 1e-3  # the largest difference of a length from 1
GROUPS = 8  # groups of rows in memory, of BLOCK rows each: files of interleaved entries are read side by side


def arrow():
    """The library that reads and writes Parquet. Raises ImportError with how to install it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Parquet needs pyarrow, which cannot be imported ({error}): pip install pyarrow") from error
    return pyarrow


def record(made: dict, folders: Iterable[str], calibration: Calibration | None, threshold: float | None) -> dict:
    """What the metadata of a file records, see the module."""
    content = {
        "made": made,
        "folders": sorted(folders),
        "calibration": calibration.to_record() if calibration else {},
        "threshold": threshold,
    }
    return content | {"sha256": digest(content)}


def schema(content: dict) -> pa.Schema:
    """The columns of a file with this record.

    folder: that of an image, or an entry that is one. stamp: see entries.stamp. vector: zeros where there is an error,
    which says why the image could not be read.
    """
    pa = arrow()
    size = NetworkSpec.from_record(content["made"]["network"]).embedding_size
    texts = [pa.field(name, pa.string(), nullable=False) for name in ("path", "folder", "stamp")]
    vector = pa.field("vector", pa.list_(pa.float32(), size), nullable=False)  # older pyarrows write no null here
    return pa.schema([*texts, vector, pa.field("error", pa.string())], {KEY: json.dumps(content)})


def write(file: Path, content: dict, blocks: Iterable[tuple[list, list, np.ndarray, list]]) -> None:
    """Write a Parquet file with this record, completely or not at all.

    blocks: (paths, stamps, vectors (N, D), errors) of N rows each; an error is a text, or None for an image that could
    be read. Raises ValueError for a path that is no UTF-8, as Parquet holds no other.
    """
    pa, columns = arrow(), schema(content)
    with (
        replacing(file) as temporary,
        pa.parquet.ParquetWriter(temporary, columns, use_dictionary=["folder"], write_page_checksum=True) as writer,
    ):
        for paths, stamps, vectors, errors in blocks:
            folders = paths if content["made"]["by_folder"] else [os.path.dirname(path) for path in paths]
            numbers = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
            arrays = [
                *(pa.array(texts, pa.string()) for texts in map(_utf8, (paths, folders, stamps))),
                pa.FixedSizeListArray.from_arrays(numbers, type=columns.field("vector").type),
                pa.array(_utf8(errors), pa.string()),
            ]
            writer.write_table(pa.table(arrays, schema=columns), row_group_size=BLOCK)


def _utf8(texts: list) -> list:
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise ValueError(f"The name {printable(text)} is not UTF-8, which Parquet needs: rename the file") from None
    return texts


def export(index: Index, file: Path, calibration: Calibration | None) -> None:
    """Write the rows of an index, in their order, to a Parquet file. calibration: the one in use, if any."""
    threshold = calibration.at(len(index.images)) if calibration else None
    made = {name: index.made[name] for name in MADE} | {"network": index.spec.to_record()}

    def blocks():
        for lines, vectors in index.images.blocks(np.ones(len(index.images), bool)):
            paths, stamps = zip(*map(json.loads, lines.splitlines()))
            yield list(paths), list(stamps), vectors, [None] * len(paths)

    write(file, record(made, index.folders, index.calibration, threshold), blocks())


class Parts:
    """Vectors of one network, from one or more files that were written apart.

    stamps: {path: stamp} of the entries, in the order of their file or, of several files, of their paths, as an index
    made at once has it. errors: {path: reason} of images that could not be read, which are left out. made, folders,
    calibration: as in an index; no calibration where the files have different ones, is_mixed.
    """

    def __init__(self, made: dict, folders: set[str], calibrations: list[dict], rows: list, groups: list, errors: dict):
        """rows: (path, stamp, number of its group, row in it). groups: functions that read (N, D) vectors."""
        self.made, self.folders, self.errors = made, folders, errors
        self.spec = NetworkSpec.from_record(made["network"])
        self.is_mixed = any(other != calibrations[0] for other in calibrations)
        recorded = {} if self.is_mixed else calibrations[0]
        self.calibration = Calibration.from_record(recorded) if recorded else None
        self.stamps: dict[str, str | None] = {path: stamp for path, stamp, *_ in rows}
        self._group_of = np.array([group for *_, group, _ in rows], np.int64)
        self._row_of = np.array([row for *_, row in rows], np.int64)
        self._read = lru_cache(GROUPS)(lambda number: groups[number]())

    @classmethod
    def open(cls, path: Path) -> Parts:
        """Those of a Parquet file, or of all in a folder.

        Raises FileNotFoundError if there is none, ValueError if a file is damaged or no such file, if the files are of
        different networks, if an entry is in them twice, or if they hold none.
        """
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"There is no .parquet file in {path}")
        made: dict = {}
        folders: set[str] = set()
        calibrations, rows = [], []
        groups: list[Callable[[], np.ndarray]] = []
        errors: dict[str, str] = {}
        for file in files:
            part = _Part(file)
            made = made or part.content["made"]
            check_same(made, part.content["made"], str(files[0]), str(file))
            folders.update(part.content["folders"])
            calibrations.append(part.content["calibration"])
            for number, texts in enumerate(part.texts()):
                for row, (name, stamp, error) in enumerate(texts):
                    if error is None:
                        rows.append((name, stamp, len(groups), row))
                    else:
                        errors[name] = error
                groups.append(partial(part.vectors, number))
        if not rows:
            raise ValueError(f"{path} holds no vectors, but {quantity(len(errors), 'unreadable image')}")
        if len(files) > 1:
            separator = "/" * made["by_folder"]  # folders in the order of their images
            rows.sort(key=lambda row: row[0] + separator)
        check_unique([name for name, *_ in rows], path)
        return cls(made, folders, calibrations, rows, groups, errors)

    @classmethod
    def from_numpy(cls, file: Path, paths: list[str], made: dict) -> Parts:
        """Those in a .npy file, float32 (N, D), of images at these paths; made: by which network.

        The vectors count as those of the files as they are now; one that is not there yet is embedded when it is found.
        Raises ValueError if the file is damaged, or is not of this many vectors of the network.
        """
        try:
            vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is damaged, or no .npy file of numbers ({error})") from error
        expected = (len(paths), made["network"]["embedding_size"])
        if getattr(vectors, "shape", None) != expected or vectors.dtype != np.float32:
            found = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else "several arrays"
            raise ValueError(
                f"{file} holds {found}, expected float32 {expected}: a vector of the network for each of "
                f"{quantity(len(paths), 'path')}"
            )
        check_unique(paths, file)
        rows = [(path, entries.stamp([path]) if os.path.isfile(path) else "", 0, row) for row, path in enumerate(paths)]
        folders = {os.path.commonpath([os.path.dirname(path) for path in paths])} if paths else set()
        return cls(made, folders, [{}], rows, [lambda: vectors], {})

    def add_to(self, index: Index) -> int:
        """Add the entries that have a stamp to an index, block by block, and save each; returns their number."""
        new = [(number, path, stamp) for number, (path, stamp) in enumerate(self.stamps.items()) if stamp is not None]
        for start in range(0, len(new), BLOCK):
            block = new[start : start + BLOCK]
            vectors = self._vectors([number for number, *_ in block], [path for _, path, _ in block])
            index.add_vectors({path: stamp for _, path, stamp in block}, vectors)
        return len(new)

    def _vectors(self, numbers: list[int], paths: list[str]) -> np.ndarray:
        """The vectors (N, D) of the entries with these numbers and paths. Raises ValueError as check_vectors."""
        vectors = np.empty((len(numbers), self.spec.embedding_size), np.float32)
        groups, rows = self._group_of[numbers], self._row_of[numbers]
        for group in np.unique(groups):
            vectors[groups == group] = self._read(group)[rows[groups == group]]
        check_vectors(vectors, paths, self.spec.distance)
        return vectors


class _Part:
    """One Parquet file: content, its record. Raises ValueError naming the file if it is damaged, or none of ours."""

    def __init__(self, file: Path):
        self.file, self.time = file, os.stat(file).st_mtime_ns
        self.content = self._checked(self._read_record)

    def texts(self) -> list[list[tuple[str, str, str | None]]]:
        """(path, stamp, error) of the rows of each group."""
        return self._checked(self._read_texts)

    def vectors(self, group: int) -> np.ndarray:
        """The vectors (N, D) of a group of rows, also of those with an error."""
        return self._checked(lambda: self._read_vectors(group))

    def _checked(self, read):
        try:
            return read()
        except FileNotFoundError:
            raise
        except (arrow().ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            reason = printable(str(error), longest=160)
            raise ValueError(
                f"{self.file} is damaged, or no file of `search.py export` ({reason}): write it again"
            ) from error

    def _open(self):
        if os.stat(self.file).st_mtime_ns != self.time:
            raise ValueError("it was replaced while it was read")
        return arrow().parquet.ParquetFile(self.file, page_checksum_verification=True)

    def _read_record(self) -> dict[str, Any]:
        with self._open() as parquet:
            columns = parquet.schema_arrow
        content = json.loads((columns.metadata or {})[KEY])
        check_layout(content, LAYOUT, "record")
        for folder in content["folders"]:
            check_layout(folder, str, "folders")
        if content.pop("sha256") != digest(content):
            raise ValueError("its record has changed since it was written")
        if content["calibration"]:
            Calibration.from_record(content["calibration"])
        if not columns.equals(schema(content)):
            raise ValueError(f"its columns are {', '.join(f'{column.name} {column.type}' for column in columns)}")
        return content

    def _read_texts(self):
        with self._open() as parquet:
            groups = []
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=["path", "stamp", "error"])
                table.validate(full=True)
                columns = [table[name].to_pylist() for name in ("path", "stamp", "error")]
                if any(path is None or stamp is None or not os.path.isabs(path) for path, stamp in zip(*columns[:2])):
                    raise ValueError("a path is missing or not absolute")
                groups.append(list(zip(*columns)))
        return groups

    def _read_vectors(self, group):
        with self._open() as parquet:
            table = parquet.read_row_group(group, columns=["vector"])
        table.validate(full=True)
        column = table["vector"].combine_chunks()
        return column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def check_same(made: dict, other: dict, name: str, name_of_other: str) -> None:
    """Raise ValueError if two parts, with names, were not embedded by the same network, or are of other entries."""
    difference = NetworkSpec.from_record(made["network"]).differences(NetworkSpec.from_record(other["network"]))
    if made["weights"] != other["weights"]:
        difference = f"{made['checkpoint']} and {other['checkpoint']}"
    if made["by_folder"] != other["by_folder"]:
        difference = "images and folders"
    if difference:
        raise ValueError(
            f"{name} and {name_of_other} were embedded by different networks, or are of different entries "
            f"({printable(difference)}): their vectors cannot be in one index"
        )


def check_unique(paths: list[str], source: Path) -> None:
    """Raise ValueError if a path is listed twice."""
    if len(set(paths)) < len(paths):
        ((twice, count),) = Counter(paths).most_common(1)
        raise ValueError(f"{source} has {count} vectors of {printable(twice)}: expected each path once")


def check_vectors(vectors: np.ndarray, paths: list[str], distance: str) -> None:
    """Raise ValueError for vectors (N, D) that are not finite or, to be compared by cosine, not of unit length."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    is_valid = np.isfinite(lengths) if distance == "euclidean" else (lengths == 0) | (np.abs(lengths - 1) < UNIT)
    if not is_valid.all():
        row = int(np.argmin(is_valid))
        expected = "unit length" if distance == "cosine" else "finite numbers"
        raise ValueError(
            f"The vector of {printable(paths[row])} has length {lengths[row]:g}, expected {expected}: vectors as "
            "proxy_anchor.load gives them"
        )


def read_paths(file: Path) -> list[str]:
    """The paths in a text file, one a line, or in a .npy file of texts. Raises ValueError for another file."""
    try:
        if file.suffix == ".npy":
            paths = np.load(file, allow_pickle=False)
            if paths.ndim != 1 or paths.dtype.kind != "U":
                raise ValueError(f"{paths.dtype} {paths.shape}")
            return paths.tolist()
        paths = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if "" in paths:
            raise ValueError(f"line {paths.index('') + 1} is empty")
        return paths
    except (ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{file} is damaged, or no list of paths ({error}): expected one path a line") from error
