"""The vectors of an index in files that other programs read and write: Parquet, or numpy's .npy with a list of paths.

A row of a Parquet file is an entry of an index, see schema. Its metadata holds a record under KEY: "made", "folders"
and "calibration" as in an index, and "threshold", the number that a match has to reach among all rows, or null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proxy_anchor.files import printable, quantity, replacing
from proxy_anchor.index import entries
from proxy_anchor.index.rows import BLOCK
from proxy_anchor.index.store import IMAGES, MADE, Index, check_layout, digest
from proxy_anchor.spec import Calibration, NetworkSpec

if TYPE_CHECKING:  # optional
    import pyarrow as pa

KEY = b"proxy_anchor"
LAYOUT = {"made": MADE, "folders": list, "calibration": dict, "sha256": str}
PLAN = "plan.jsonl"  # of misc/embed_ray.py: a record, then the paths of each file to be
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

    folder: that of the image; in an index by folder, the entry itself. stamp: see entries.stamp. error: why the image
    could not be read; its vector is zeros.
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


class VectorFiles:
    """The vectors of one network in files, to be added to an index.

    source: where they are. made, folders, calibration: as in an index. stamps: {path: stamp} of all rows. errors:
    {path: reason} of the images that could not be read: these have no vector, and an index drops those that changed,
    but not those that were gone (stamp ""). remarks: lines to print.
    """

    def __init__(self, source: Path, made: dict):
        self.source, self.made = source, made
        self.spec = NetworkSpec.from_record(made["network"])
        self.folders: set[str] = set()
        self.calibration: Calibration | None = None
        self.stamps: dict[str, str | None] = {}
        self.errors: dict[str, str] = {}
        self.remarks: list[str] = []
        self._order: np.ndarray | None = None  # the numbers of the rows as an index has them, where not as read
        self._groups: list[Callable[[], np.ndarray]] = []  # each reads (N, D) vectors
        self._starts: list[int] = []  # the number of the first row of each group
        self._read = lru_cache(GROUPS)(lambda group: self._groups[group]())

    def _append(self, paths: list, stamps: list, errors: list, vectors: np.ndarray, read: Callable) -> None:
        """Take the rows of a group, whose vectors (N, D) are checked here and read again when they are needed.

        Raises ValueError for a path that was read before, and as check_vectors.
        """
        check_vectors(vectors, paths, self.spec.distance)
        self._starts.append(len(self.stamps))
        self._groups.append(read)
        for path, stamp, error in zip(paths, stamps, errors):
            if path in self.stamps:
                raise ValueError(f"{self.source} lists {printable(path)} twice, in one file or in two")
            self.stamps[path] = stamp
            if error is not None:
                self.errors[path] = error

    def set_checkpoint(self, path: str, weights: str, spec: NetworkSpec) -> None:
        """Record the path of a checkpoint. Raises ValueError if another one embedded the vectors."""
        network = replace(spec, orientation=self.spec.orientation).to_record()
        made = self.made | {"checkpoint": path, "weights": weights, "network": network}
        check_same(self.made, made, str(self.source), path)
        self.made = made

    def check(self, index: Index) -> None:
        """Raise ValueError if the vectors cannot be added to this index, before anything is."""
        check_same(index.made | {"network": index.spec.to_record()}, self.made, str(index.folder), str(self.source))
        gone = {path for path in self.errors if not self.stamps[path]}  # perhaps their disk was not mounted
        for path, stamp, _ in index.stored() if gone else ():
            if path in gone:
                self.stamps[path] = stamp

    def add_to(self, index: Index) -> int:
        """Add the rows that have a stamp and no error to an index, block by block; returns their number."""
        paths = list(self.stamps)
        is_new = np.fromiter(
            (stamp is not None and path not in self.errors for path, stamp in self.stamps.items()), bool, len(paths)
        )
        new = np.flatnonzero(is_new) if self._order is None else self._order[is_new[self._order]]
        if len(new):
            index.runtime = {}  # files do not record it
        for start in range(0, len(new), BLOCK):
            rows = new[start : start + BLOCK]
            stamps = {path: stamp for path in (paths[row] for row in rows) if (stamp := self.stamps[path]) is not None}
            index.add_vectors(stamps, self._vectors(rows))
        return len(new)

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors (N, D) of the rows with these numbers."""
        vectors = np.empty((len(rows), self.spec.embedding_size), np.float32)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups):
            chosen = groups == group
            vectors[chosen] = self._read(group)[rows[chosen] - self._starts[group]]
        return vectors


class ParquetFiles(VectorFiles):
    """The rows of a Parquet file, in their order, or of all in a folder, in the order of their paths.

    No calibration where the files have different ones. Raises FileNotFoundError if there is no file, ValueError if one
    is damaged or no such file, if they are of different networks, if a path is listed twice, or if they hold no vector.
    """

    def __init__(self, path: Path):
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not path.exists():
            raise FileNotFoundError(f"There is no {path}")
        if not files and (path / IMAGES).exists():
            raise FileNotFoundError(f"{path} is an index: `search.py export` writes its vectors to a .parquet file")
        if not files:
            raise FileNotFoundError(f"There is no .parquet file in {path}")
        first = _ParquetFile(files[0]).record()
        super().__init__(path, first["made"])
        has_one_calibration = True
        for parquet in map(_ParquetFile, files):
            record = parquet.record()
            check_same(self.made, record["made"], str(files[0]), str(parquet.file))
            has_one_calibration &= record["calibration"] == first["calibration"]
            self.folders.update(record["folders"])
            for number, (paths, stamps, errors, vectors) in enumerate(parquet.groups()):
                self._append(paths, stamps, errors, vectors, partial(parquet.vectors, number))
        if len(self.errors) == len(self.stamps):
            raise ValueError(f"{path} holds no vector: none of its {quantity(len(self.errors), 'image')} could be read")
        if len(files) > 1:
            paths, separator = list(self.stamps), "/" * self.made["by_folder"]  # folders in the order of their images
            self._order = np.array(sorted(range(len(paths)), key=lambda row: paths[row] + separator))
        if self.errors:
            image, reason = next(iter(self.errors.items()))
            count = quantity(len(self.errors), "image")
            self.remarks = [f"Left out, as they could not be read: {count}, such as {printable(image)}"]
            self.remarks += [printable(reason)]
        if (missing := _planned(path / PLAN) - len(files)) > 0:
            self.remarks += [f"Not written yet: {quantity(missing, 'file')} of {PLAN}; misc/embed_ray.py continues"]
        if not has_one_calibration:
            self.remarks += ["The files have different thresholds, which are left out: --calibrate chooses one"]
        elif first["calibration"]:
            self.calibration = Calibration.from_record(first["calibration"])


class NumpyFile(VectorFiles):
    """The vectors in a .npy file, float32 (N, D), of the images at N paths; made: by which network.

    They count as those of the images as they are now; an image that does not exist has the stamp "", so it is embedded
    once it does. No folders: their disk may not be mounted. Raises ValueError if the file is damaged, if it is not of
    this many vectors of the network, or if a path is listed twice.
    """

    def __init__(self, file: Path, paths: list[str], made: dict):
        super().__init__(file, made)
        try:
            vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is damaged, or no .npy file of numbers ({error})") from error
        expected = (len(paths), self.spec.embedding_size)
        if getattr(vectors, "shape", None) != expected or vectors.dtype != np.float32:
            found = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else "several arrays"
            raise ValueError(
                f"{file} holds {found}, expected float32 {expected}: a vector of the network for each of "
                f"{quantity(len(paths), 'path')}; .astype(np.float32) converts other numbers"
            )
        self._array = vectors
        for start in range(0, len(paths), BLOCK):
            rows = slice(start, start + BLOCK)
            stamps = [entries.stamp([path]) if os.path.isfile(path) else "" for path in paths[rows]]
            self._append(paths[rows], stamps, [None] * len(stamps), vectors[rows], partial(vectors.__getitem__, rows))
        if absent := [path for path, stamp in self.stamps.items() if not stamp]:
            count = f"{len(absent):,} of {quantity(len(paths), 'image')}"
            self.remarks = [f"Not found, but indexed: {count}, such as {printable(absent[0])}"]

    def check(self, index: Index) -> None:
        """As of all files; also raise ValueError if the index has another vector of an image that has not changed.

        The stamp of an image that does not exist becomes that of the index.
        """
        super().check(index)
        row_of = {path: row for row, path in enumerate(self.stamps)}
        for path, stamp, vector in index.stored():
            if self.stamps.get(path) in ("", stamp):
                self.stamps[path] = stamp
                if not np.array_equal(vector, self._array[row_of[path]].astype(index.dtype)):
                    raise ValueError(
                        f"{index.folder} has another vector of {printable(path)}, and the image has not changed: make "
                        "a new index"
                    )


class _ParquetFile:
    """A Parquet file of `write`. Its methods raise ValueError naming it if it is damaged, another one or replaced."""

    def __init__(self, file: Path):
        self.file, self.state = file, _state(file)

    @contextmanager
    def _opened(self):
        try:
            if _state(self.file) != self.state:
                raise ValueError("it was replaced while it was read")
            with arrow().parquet.ParquetFile(self.file, page_checksum_verification=True) as parquet:
                yield parquet
        except (arrow().ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None):  # not of the file's content
                raise
            reason = printable(str(error), longest=160)
            raise ValueError(
                f"{self.file} is damaged, or no file of `search.py export` ({reason}): write it again"
            ) from error

    def record(self) -> dict[str, Any]:
        """What its metadata records, see the module."""
        with self._opened() as parquet:
            columns = parquet.schema_arrow
            if KEY not in (columns.metadata or {}):
                raise ValueError("it has no record of the network; vectors of another program can come as .npy")
            content = json.loads(columns.metadata[KEY])
            check_layout(content, LAYOUT, "record")
            if content.pop("sha256") != digest(content):
                raise ValueError("its record has changed since it was written")
            for folder in content["folders"]:
                check_layout(folder, str, "folders")
                if not os.path.isabs(folder):
                    raise ValueError(f"its folder {folder!r} is not absolute")
            if type(content.get("threshold")) not in (int, float, type(None)):
                raise ValueError(f"its threshold is {content['threshold']!r}")
            if content["calibration"]:
                Calibration.from_record(content["calibration"])
            if not columns.equals(schema(content)):
                raise ValueError(f"its columns are {', '.join(f'{column.name} {column.type}' for column in columns)}")
            content["made"] = {name: content["made"][name] for name in MADE}
            return content

    def groups(self):
        """(paths, stamps, errors, vectors (N, D)) of each group of rows; vectors of unreadable images are zeros."""
        with self._opened() as parquet:
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                table.validate(full=True)
                paths, stamps, errors = (table[name].to_pylist() for name in ("path", "stamp", "error"))
                if any(path is None or stamp is None or not os.path.isabs(path) for path, stamp in zip(paths, stamps)):
                    raise ValueError("a path is missing or not absolute")
                yield paths, stamps, errors, _numbers(table["vector"])

    def vectors(self, group: int) -> np.ndarray:
        """The vectors (N, D) of a group of rows, also of unreadable images."""
        with self._opened() as parquet:
            table = parquet.read_row_group(group, columns=["vector"])
            table.validate(full=True)
            return _numbers(table["vector"])


def _planned(plan: Path) -> int:
    """The number of files in a plan; 0 without one."""
    if not plan.exists():
        return 0
    with open(plan, "rb") as lines:
        return sum(1 for _ in lines) - 1


def _state(file: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to, also where the times of another file are copied with it."""
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    whole = column.combine_chunks()
    return whole.values.to_numpy(zero_copy_only=False).reshape(len(whole), -1)


def check_same(made: dict, other: dict, name: str, name_of_other: str) -> None:
    """Raise ValueError if two sources, with names, are of different networks, or one of images and one of folders."""
    difference = NetworkSpec.from_record(made["network"]).differences(NetworkSpec.from_record(other["network"]))
    if made["weights"] != other["weights"]:
        difference = " and ".join(map(_in_words, (made, other)))
    if made["by_folder"] != other["by_folder"]:
        kinds = ["folders" if of["by_folder"] else "images" for of in (made, other)]
        raise ValueError(f"{name} is of {kinds[0]}, {name_of_other} of {kinds[1]}: they cannot be in one index")
    if difference:
        raise ValueError(
            f"{name} and {name_of_other} were embedded by different networks ({printable(difference)}): their vectors "
            "cannot be in one index"
        )


def _in_words(made: dict) -> str:
    """The network of a source: the path of its checkpoint, or the backbone."""
    spec = NetworkSpec.from_record(made["network"])
    return f"{spec.model} --pretrained {made['checkpoint']}" if spec.backbone_only else made["checkpoint"]


def check_vectors(vectors: np.ndarray, paths: list[str], distance: str) -> None:
    """Raise ValueError for vectors (N, D) that are not finite or, to be compared by cosine, not of unit length."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    is_valid = np.isfinite(lengths) if distance == "euclidean" else (lengths == 0) | (np.abs(lengths - 1) < UNIT)
    if not is_valid.all():
        row = int(np.argmin(is_valid))
        expected = "1: divide each vector by its length" if np.isfinite(lengths[row]) else "finite numbers"
        raise ValueError(f"The vector of {printable(paths[row])} has length {lengths[row]:g}, expected {expected}")


def read_paths(file: Path) -> list[str]:
    """The paths in a text file, one per line, or in a .npy file of texts. Raises ValueError for another file."""
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
        raise ValueError(f"{file} is damaged, or no list of paths ({error}): expected one path per line") from error
