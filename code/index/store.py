"""An index of embedded images, or of their folders: paths, vectors, and the checkpoint that embedded them.

In its folder, images.json records the checkpoint, a NUMBER and the seals of the other files. images-NUMBER.jsonl and
vectors-NUMBER.float32, or .float16, are the rows, and vectors-NUMBER.faiss is FAISS's index of them, unless its kind is
Flat. Each time the index is written, the number is new and images.json is replaced last. Until then new rows wait in
blocks, block-NUMBER.0.float32 and .jsonl, block-NUMBER.1.float32 ...; NUMBER is that of the index that they will be
added to.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from proxy_anchor.files import is_intact, lock_folder, numbered, replacing, seal
from proxy_anchor.index import clustering, entries, neighbours, rows
from proxy_anchor.index.neighbours import EXACT, Exact, FaissFiles
from proxy_anchor.index.rows import Rows
from proxy_anchor.spec import MEASURES, Calibration, NetworkSpec
from proxy_anchor.thresholds.identification import calibration_of, identify
from proxy_anchor.vectors import Embeddings, comparable_array

IMAGES = "images.json"
MADE = {"checkpoint": str, "weights": str, "network": dict, "by_folder": bool}
LAYOUT = {"made": MADE, "factory": str, "number": int}  # of images.json
SINCE = {
    "folders": list,
    "files": dict,
    "calibration": dict,
    "runtime": dict,
    "dtype": str,
    "sha256": str,
}  # what older ones lack; sha256: of all other entries
UNFINISHED = r"\.lock|(vectors|images)-0\.(float32|float16|jsonl)|\..*\.tmp"  # files of an index that was just begun
CANDIDATES, CANDIDATES_PER_NEIGHBOUR = 100, 10  # of a kind that is not exact, ranked exactly: the larger number
CALIBRATION_QUERIES = 2**14
RECALL_QUERIES, RECALL_AT = 1000, 10  # of the recall against exact search


class Index:
    """The index in a folder: images, its Rows (path, stamp) with their vectors (N, D); its factory string.

    Vectors are compared by the network's distance: unit vectors by cosine similarity, others by Euclidean distance;
    measure is the name of that number. stamp: see entries.stamp; it changes with the files.
    made: "checkpoint", its path; "weights", its identity; "network", the record of its spec; "by_folder": whether each
    entry is a folder, with the mean of the images in it.
    folders: those whose images were indexed. files: {name: seal} of its other files, see files.seal. calibration: the
    threshold that was measured on its entries, if any. runtime: the versions that embedded its images, see api.runtime;
    {} if unknown. dtype: of its vectors on disk, one of rows.DTYPES.
    """

    images: Rows
    neighbours: Exact | FaissFiles

    def __init__(
        self,
        folder: Path,
        made: dict,
        factory: str,
        number: int,
        folders=(),
        files=None,
        calibration=None,
        runtime=None,
        dtype="float32",
    ):
        self.folder, self.made, self.factory, self.number = folder, made, factory, number
        orientation = {name: made[name] for name in ("orientation",) if name in made}  # where older ones have it
        self.spec = NetworkSpec.from_record(made["network"] | orientation)
        self.folders: list[str] = list(folders)
        self.files: dict[str, dict] = files or {}
        self.calibration = Calibration.from_record(calibration) if calibration else None
        self.runtime: dict[str, str] = runtime or {}
        self.dtype: str = dtype
        self._now: Callable[[str], str] | None = None  # where an entry is, if some have moved; see move

    @classmethod
    def new(cls, folder: Path, made: dict, factory: str, dtype: str = "float32") -> "Index":
        """An index without images, also in place of another without any.

        Raises ValueError for a factory string that FAISS does not know.
        """
        index = cls(folder, made, factory, number=0, dtype=dtype)
        index._new_faiss_index()
        rows.write(*index._files(), [])
        index.describe()
        index._delete_others()
        for former in rows.DTYPES:  # of an index without images, which this one replaces
            if former != dtype:
                index._file("vectors", former).unlink(missing_ok=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """The index in a folder. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
        if not (folder / IMAGES).is_file():
            raise FileNotFoundError(f"There is no index in {folder}: it has no {IMAGES}")
        text = (folder / IMAGES).read_bytes()
        try:
            content = json.loads(text)
            check_layout(content, LAYOUT | {name: kind for name, kind in SINCE.items() if name in content})
            if unknown := content.keys() - LAYOUT.keys() - SINCE.keys():
                raise ValueError(f"it has an entry {sorted(unknown)[0][:80]!r}")
            if content.pop("sha256", None) not in (None, digest(content)):
                raise ValueError(f"{IMAGES} has changed since it was written")
            index = cls(folder, **content)
            if index.dtype not in rows.DTYPES:
                raise ValueError(f"its dtype is {index.dtype[:80]!r}")
            index._check_files()
            index._read_vectors()
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            if (folder / IMAGES).read_bytes() != text:  # another process has written it meanwhile
                return cls.open(folder)
            raise ValueError(
                f"The index in {folder} is damaged, of an older version or no index ({neighbours.reason(error)}): "
                "index the images again, into another folder"
            ) from error
        return index

    @classmethod
    def open_complete(cls, folder: Path) -> "Index":
        """The index in a folder, to search. Raises as open, and FileNotFoundError if nothing is complete in it yet."""
        index = cls.open(folder)
        if not len(index.images):
            raise FileNotFoundError(f"{folder} holds no complete index: run the `search.py index` command again")
        return index

    def _check_files(self):
        """Raise ValueError if a file was damaged since it was written."""
        for name, sealed in self.files.items():
            if not is_intact(self.folder / name, sealed):
                raise ValueError(f"{name} has changed since it was written")

    def _read_vectors(self):
        self.images = Rows(*self._files(), self.size)
        if self.factory == EXACT or not len(self.images):
            self.neighbours = Exact(self.images, self._metric)
        else:
            self.neighbours = FaissFiles(self._file("vectors", "faiss"), self.images.shape)

    def check(self, made: dict, factory: str | None = None, dtype: str | None = None) -> None:
        """Raise ValueError if this index was made with another checkpoint, or is of another kind than asked for.

        It keeps the orientation that it was made with.
        """
        spec = replace(NetworkSpec.from_record(made["network"]), orientation=self.spec.orientation)
        if made["weights"] != self.made["weights"]:
            raise ValueError(
                f"{self.folder} was built with another checkpoint ({self.made['checkpoint']}), not with "
                f"{made['checkpoint']}: their embeddings cannot be compared. Build a new index"
            )
        if spec != self.spec:
            raise ValueError(
                f"{self.folder} was built with another network ({self.spec.differences(spec)}): their embeddings "
                "cannot be compared. Build a new index"
            )
        if made.get("by_folder", self.made["by_folder"]) != self.made["by_folder"]:
            has, flag = ("folders", "with") if self.made["by_folder"] else ("images", "without")
            raise ValueError(f"{self.folder} is an index of {has}: update it {flag} --by-folder, or make a new one")
        if dtype not in (None, self.dtype):
            raise ValueError(f"{self.folder} holds vectors in {self.dtype}, not {dtype}; make a new one")
        if factory not in (None, self.factory):
            if not len(self.images):  # embedded for a kind that could not be made, perhaps
                self.factory = factory
                self._new_faiss_index()
                return
            raise ValueError(f"{self.folder} holds an index {self.factory}, not {factory}; make a new one")

    def move(self, old: str, new: str, stamps: dict[str, str | None]) -> int:
        """Treat entries in the folder `old` as being at the same place in `new`, if the present {path: stamp} has them.

        Returns their number. What the index has in `new` already stays as it is. Raises ValueError if no entry has
        moved, or if one of the folders is within the other.
        """
        if entries.within(old, new) or entries.within(new, old):
            raise ValueError(f"{old} and {new} are not two separate folders: build a new index")
        paths = [path for images in self._all_rows() for path, _ in images]
        indexed = {path for path in paths if entries.within(path, new)}

        def now(path: str) -> str:
            moved = entries.relocate(path, old, new)
            return moved if moved in stamps and moved not in indexed else path

        staying = [path for path in paths if now(path) == path]
        if len(staying) == len(paths):
            raise ValueError(
                f"No image of {self.folder} has moved from {old} to {new}: it has {len(indexed):,} in {new} already, "
                f"and its folders are {', '.join(self.folders) or 'unknown'}"
            )
        here = [folder for folder in self.folders if any(entries.within(path, folder) for path in staying)]
        self.folders = sorted({*here, *(entries.relocate(folder, old, new) for folder in self.folders)})
        self._now = now
        return len(paths) - len(staying)

    def compare(self, stamps: dict[str, str | None], exists) -> tuple[int, int, int, int]:
        """The numbers of images that are new, changed, deleted and done, for the present {path: stamp}.

        Done are those of the new and changed ones that an interrupted run has embedded. Stamps of images that need no
        embedding become None; finish leaves out what is deleted or out of date.
        exists(path): whether an indexed path that is not among the stamps still has its images.
        """
        now = self._now or (lambda path: path)
        kept, *of_blocks = self._kept
        elsewhere, done = set(), 0  # of other folders, embedded by an interrupted run
        for number, kept_of_block in reversed([*enumerate(of_blocks)]):
            for row, (path, stamp) in enumerate(self._block(number)):
                path = now(path)
                if path in stamps:
                    kept_of_block[row] = stamps[path] is not None and stamps[path] == stamp
                    done += kept_of_block[row]
                    stamps[path] = None if kept_of_block[row] else stamps[path]
                else:
                    kept_of_block[row] = path not in elsewhere and exists(path)
                    elsewhere.add(path)
        known = changed = deleted = 0
        for row, (path, stamp) in enumerate(self.images):
            path = now(path)
            if path in stamps:
                known += 1
                kept[row] = stamps[path] is not None and stamps[path] == stamp
                changed += not kept[row]
                stamps[path] = None if kept[row] else stamps[path]
            else:
                present = exists(path)
                kept[row] = present and path not in elsewhere
                deleted += not present
        return len(stamps) - known, changed, deleted, int(done)

    def stored(self):
        """(path, stamp, vector (D)) of what an interrupted run has added, the latest block first, and of its images."""
        for images in self._all_rows():
            for start, vectors in images.slices(rows.BLOCK):
                for row, vector in enumerate(vectors, start):
                    yield *images[row], vector

    def add(self, stamps: dict[str, str], embeddings: torch.Tensor) -> None:
        """Write a block: images, {path: stamp}, with their embeddings (N, D). It survives an interruption."""
        self.add_vectors(stamps, self._vectors_of(embeddings))

    def add_vectors(self, stamps: dict[str, str], vectors: np.ndarray) -> None:
        """Write a block of images with their vectors (N, D), as the index compares them, to the bit."""
        if stamps:
            kept = self._kept  # also of the blocks that exist
            rows.write(*self._files_of_block(len(kept) - 1), [rows.block(stamps, vectors)])
            kept.append(np.ones(len(stamps), dtype=bool))

    def finish(self) -> "Index":
        """Write the index with all blocks, without the images that are gone according to compare, and open it.

        A kind that needs training is trained on a sample of all images. Most kinds cannot drop images: they are built
        again. Raises ValueError where there are too few images; the former index and the blocks then remain.
        """
        if not any(kept.any() for kept in self._kept):
            raise ValueError(f"No image would be left in {self.folder}: delete the folder instead")
        self._delete_others()  # leftovers of a run that was interrupted here
        index = Index(self.folder, self.made, self.factory, self.number + 1, self.folders, dtype=self.dtype)
        index.calibration, index.runtime = self.calibration, self.runtime
        try:
            rows.write(*index._files(), self._blocks_to_keep())
            if self.factory != EXACT:
                former = self.neighbours
                index._write_neighbours(former if isinstance(former, FaissFiles) and self._kept[0].all() else None)
            index._read_vectors()
        except Exception:
            self._delete_others()
            raise
        index.describe()  # from here on, it is the new one
        index._delete_others()
        return index

    def _blocks_to_keep(self):
        """Blocks of rows.write: what is kept of the images, then of each block."""
        for number, kept in enumerate(self._kept, start=-1):
            for lines, vectors in (self.images if number < 0 else self._block(number)).blocks(kept):
                if now := self._now:
                    lines = rows.lines((now(path), stamp) for path, stamp in map(json.loads, lines.splitlines()))
                yield lines, vectors

    def _write_neighbours(self, former: FaissFiles | None):
        """Write FAISS's index of the rows; former: the index of the first of them, if it is still valid."""
        path, images = self._file("vectors", "faiss"), Rows(*self._files(), self.size)
        try:
            if former:
                neighbours.extend(path, images, former)
            else:
                neighbours.build(path, images, self._new_faiss_index())
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot make the index '{self.factory}': {neighbours.reason(error)}") from error

    @cached_property
    def _kept(self) -> list[np.ndarray]:
        """Masks (N,) of what the next index keeps, of the images and of each block; everything at first."""
        kept = [np.ones(len(self.images), dtype=bool)]
        while self._files_of_block(len(kept) - 1)[1].exists():
            kept.append(np.ones(len(self._block(len(kept) - 1)), dtype=bool))
        return kept

    def _all_rows(self):
        """The rows of each block, the latest first, then of the images; one block is open at a time."""
        yield from map(self._block, reversed(range(len(self._kept) - 1)))
        yield self.images

    def _block(self, number: int) -> Rows:
        try:
            return Rows(*self._files_of_block(number), self.size)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"Blocks of an interrupted run in {self.folder} are damaged ({error}): delete the files block-*"
            ) from error

    def _files_of_block(self, number: int) -> tuple[Path, Path]:
        return self._file("block", f"{number}.{self.dtype}"), self._file("block", f"{number}.jsonl")

    def _files(self) -> tuple[Path, Path]:
        return self._file("vectors", self.dtype), self._file("images", "jsonl")

    def _faiss_files(self) -> list[Path]:
        return list(itertools.takewhile(Path.exists, numbered(self._file("vectors", "faiss"))))

    def describe(self) -> None:
        """Write images.json, which makes the present files those of the index."""
        self.files = {file.name: seal(file) for file in (*self._files(), *self._faiss_files())}
        content = {name: getattr(self, name) for name in LAYOUT | SINCE if name != "sha256"}
        content["calibration"] = self.calibration.to_record() if self.calibration else {}
        content["sha256"] = digest(content)
        with replacing(self.folder / IMAGES) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def _delete_others(self):
        """Delete leftovers of killed processes, of the index before this one and of the next, and no other file.

        The last of numbered files goes first, so that the others can still be counted if this process is killed too.
        """
        for number in (self.number - 1, self.number + 1):
            other = Index(self.folder, self.made, self.factory, number, dtype=self.dtype)
            blocks = itertools.takewhile(lambda files: files[0].exists(), map(other._files_of_block, itertools.count()))
            files = [*other._files(), *itertools.chain(*blocks), *other._faiss_files()]
            for file in reversed(files):
                file.unlink(missing_ok=True)

    def thing_of(self, entry: str) -> str | None:
        """What an entry shows: the folder of an image, or a folder itself; None for one in what was indexed itself."""
        if self.made["by_folder"]:
            return entry
        folder = os.path.dirname(entry)
        return None if folder in self.folders else folder

    def embeddings(self) -> Embeddings:
        """The embeddings (N, D) of the entries that show a thing, with the number of the thing as label."""
        things = [self.thing_of(path) for path, _ in self.images]
        rows = [row for row, thing in enumerate(things) if thing]
        number_of = {thing: number for number, thing in enumerate(dict.fromkeys(things[row] for row in rows))}
        labels = torch.tensor([number_of[things[row]] for row in rows], dtype=torch.long)
        return Embeddings(torch.from_numpy(self.images.vectors[rows]), labels)

    def calibrate(self, share: float) -> Calibration:
        """Choose the threshold at which this share of unknown queries match, from its entries, each thing left out.

        Of many entries, CALIBRATION_QUERIES at random are queries. Raises ValueError as calibration_of.
        """
        embeddings = self.embeddings()
        if not len(rows := torch.arange(len(embeddings.labels))):
            raise ValueError(f"No image of {self.folder} is in a folder of its own thing, as --calibrate needs")
        gallery = replace(embeddings, groups=rows)  # none meets itself
        chosen = np.random.default_rng(0).permutation(len(rows))[:CALIBRATION_QUERIES]
        queries = Embeddings(gallery.vectors[chosen], gallery.labels[chosen], rows[chosen])
        calibration = calibration_of(share, identify(queries, gallery, self.distance))
        self.calibration = replace(calibration, groups=clustering.best_threshold(gallery, self.distance))
        return self.calibration

    def search(self, embeddings: torch.Tensor, count: int) -> list[list[tuple[str, float]]]:
        """The (path, similarity or distance) of the images nearest to each of the embeddings (N, D), the best first."""
        return [
            [(self.images[row][0], float(value)) for row, value in zip(rows, values)]
            for rows, values in self._search(self._vectors_of(embeddings), count)
        ]

    def _search(self, queries: np.ndarray, count: int):
        """The rows nearest to each of the queries (N, D), the best first, and their similarities or distances."""
        cosine = self.distance == "cosine"
        exact = cosine and self.factory == EXACT
        candidates = count if exact else max(CANDIDATES, CANDIDATES_PER_NEIGHBOUR * count)
        values, rows = self.neighbours.search(queries, min(candidates, len(self.images)))
        for query, measured, indices in zip(queries, values, rows):
            if not exact:  # FAISS's may be of vectors that it has compressed, or the difference of large squares
                indices = indices[indices >= 0]
                vectors = self.images.take(indices)
                measured = vectors @ query if cosine else np.linalg.norm(vectors - query, axis=1)
            order = np.argsort(-measured if cosine else measured, kind="stable")[:count]
            yield indices[order], measured[order]

    @property
    def is_empty(self) -> bool:
        """Whether it has no images, nor those of an interrupted run."""
        return not len(self.images) and len(self._kept) == 1

    @property
    def is_upright(self) -> bool:
        """Whether its images are turned upright by their EXIF."""
        return self.spec.orientation == "upright"

    @property
    def records_orientation(self) -> bool:
        """Whether it records how its images are seen; older ones do not, and see them as stored."""
        return "orientation" in self.made or "orientation" in self.made["network"]

    @property
    def size(self) -> int:
        """The dimensions of its vectors."""
        return self.spec.embedding_size

    @property
    def distance(self) -> str:
        """One of spec.DISTANCES."""
        return self.spec.distance

    @property
    def measure(self) -> str:
        """The name of the number that search returns with each image."""
        return MEASURES[self.distance]

    @property
    def _metric(self) -> int:
        """Its distance in FAISS's terms."""
        faiss = neighbours.faiss()
        return faiss.METRIC_INNER_PRODUCT if self.distance == "cosine" else faiss.METRIC_L2

    def _vectors_of(self, embeddings):
        return comparable_array(embeddings, self.distance)

    @property
    def cells(self) -> int:
        """The number of cells that the vectors are divided into, of which a search visits nprobe; 0 without cells."""
        return self.neighbours.cells

    def set_nprobe(self, nprobe: int) -> None:
        """Search this many cells instead of one. Raises ValueError for a kind without cells."""
        if not (isinstance(self.neighbours, FaissFiles) and self.cells):
            raise ValueError(f"{self.folder} is an index {self.factory}: --nprobe needs an IVF index")
        self.neighbours.nprobe = nprobe

    def recall(self) -> float:
        """The share of the exact nearest neighbours that the search finds, over a sample of its images."""
        total, count = len(self.images), min(RECALL_AT, len(self.images))
        queries = self.images.take(np.linspace(0, total - 1, min(RECALL_QUERIES, total)).astype(int))
        _, exact = Exact(self.images, self._metric).search(queries, count)
        approximate = (indices for indices, _ in self._search(queries, count))
        return sum(np.isin(a, b).sum() for a, b in zip(exact, approximate)) / exact.size

    def _new_faiss_index(self):
        return neighbours.create(self.factory, self.size, self._metric)

    def _file(self, name, ending):
        return self.folder / f"{name}-{self.number}.{ending}"


def lock(folder: Path):
    """Hold the folder, so that no other process writes to it; see files.lock_folder.

    Raises FileExistsError for anything but a folder, and for one that holds something else.
    """
    if os.path.lexists(folder) and not folder.is_dir():  # a file, or a link to nothing
        raise FileExistsError(f"{folder} is a file: --out must be a folder, existing or new")
    if folder.is_dir() and not _is_ours(folder):
        raise FileExistsError(f"{folder} is neither empty nor an index: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return lock_folder(folder, "choose another --out")


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds an index, damaged or not, leftovers of one that was just begun, or nothing."""
    if (folder / IMAGES).exists():
        return all(f'"{name}"'.encode() in (folder / IMAGES).read_bytes() for name in LAYOUT)
    return all(re.fullmatch(UNFINISHED, file.name) for file in folder.iterdir())


def digest(content: dict) -> str:
    """The sha256 of plain values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_layout(content, layout, name=IMAGES):
    """Raise ValueError if the content of images.json, or a part of this name, does not have this layout."""
    kind = dict if isinstance(layout, dict) else layout
    if not isinstance(content, kind):
        raise ValueError(f"'{name}' is {str(content)[:80]}, expected {kind.__name__}")
    for part in layout if isinstance(layout, dict) else ():
        check_layout(content.get(part), layout[part], part)
