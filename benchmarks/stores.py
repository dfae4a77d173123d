"""Time LanceDB and the store of search.py with the same vectors: build, query, update, delete; with memory and disk.

pip install lancedb
python benchmarks/stores.py --vectors 2000000 --size 256 [--out DIR]

Each runs in a process of its own. Both have 1,024 cells with one bit per dimension, and rank 100 candidates exactly.
A tenth of the vectors are replaced and a hundredth deleted; LanceDB then compacts its files. Vectors and memory are
those of index_size.py. Linux only.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import index_size
import numpy as np
import torch
from index_size import BLOCK, blocks, paths, stamps

CELLS, COUNT, QUERIES, EXACT_QUERIES, NPROBES = 1024, 10, 200, 100, (4, 16, 64)


class Measurement:
    """A context that prints a row: what was done, seconds, memory, and the size of a folder."""

    def __init__(self, store: str, what: str, folder: Path):
        self.store, self.what, self.folder = store, what, folder

    def __enter__(self):
        self.memory = index_size.Memory().__enter__()
        self.start = time.perf_counter()

    def __exit__(self, *error):
        seconds = time.perf_counter() - self.start
        self.memory.__exit__()
        disk = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()) / 1e6
        print(f"| {self.store} | {self.what} | {seconds:.1f} | {self.memory} | {disk:,.0f} |", flush=True)


def changes(rows: np.ndarray, size: int):
    """(rows, vectors) of the changed vectors, in blocks."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].tolist()
        yield block, index_size.unit(np.random.default_rng(start).standard_normal((len(block), size), np.float32))


def choose(count: int, share: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(count, count // share, replace=False))


def queries(count: int, size: int) -> np.ndarray:
    chosen = np.sort(np.random.default_rng(2).choice(count, QUERIES, replace=False))
    vectors = np.concatenate([x[np.isin(rows, chosen)] for rows, x in blocks(count, size)])
    return index_size.noisy(vectors, np.random.default_rng(3))


def ask(store: str, folder: Path, vectors: np.ndarray, search, exact: list[list[str]]) -> None:
    """Print how long the queries take one by one, and their recall; search(query, nprobe) -> paths."""
    for nprobe in NPROBES:
        with Measurement(store, f"{QUERIES} queries one by one, nprobe {nprobe}", folder):
            results = [search(query, nprobe) for query in vectors]
        hits = sum(len(set(a) & set(b)) for a, b in zip(results, exact))
        print(f"recall@{COUNT} {hits / COUNT / len(exact):.4f}", flush=True)


def run_own(folder: Path, count: int, size: int) -> None:
    from proxy_anchor.index.neighbours import Exact, faiss
    from proxy_anchor.index.store import Index

    name = "search.py"
    vectors = queries(count, size)
    with Measurement(name, "build", folder):
        index = index_size.build(folder, count, size, f"IVF{CELLS},RaBitQ")

    def search(query, nprobe):
        index.set_nprobe(nprobe)
        return [path for path, _ in index.search(torch.from_numpy(query[None]), COUNT)[0]]

    _, nearest = Exact(index.images, faiss().METRIC_INNER_PRODUCT).search(vectors[:EXACT_QUERIES], COUNT)
    ask(name, folder, vectors, search, [paths(rows) for rows in nearest.tolist()])
    changed, deleted = choose(count, 10, 5), choose(count, 100, 6)
    present = dict(zip(paths(range(count)), stamps(range(count))))
    present |= dict(zip(paths(changed.tolist()), stamps(changed.tolist(), 1)))
    for path in paths(deleted.tolist()):
        del present[path]
    with Measurement(name, "change a tenth, delete a hundredth", folder):
        index = Index.open(folder)
        index.compare(present, lambda path: False)
        for rows, x in changes(changed, size):
            is_left = np.isin(rows, deleted, invert=True)
            block = {path: present[path] for path in paths(np.array(rows)[is_left].tolist())}
            index.add(block, torch.from_numpy(x[is_left]))
        index.finish()


def run_lance(folder: Path, count: int, size: int) -> None:
    import lancedb
    import pyarrow as pa

    name = "LanceDB"
    texts = [pa.field(column, pa.string()) for column in ("path", "stamp")]
    schema = pa.schema([*texts, pa.field("vector", pa.list_(pa.float32(), size))])

    def batch(rows, x, version=0):
        numbers = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), size)
        return pa.record_batch([pa.array(paths(rows)), pa.array(stamps(rows, version)), numbers], schema=schema)

    vectors = queries(count, size)
    with Measurement(name, "build", folder):
        rows = pa.RecordBatchReader.from_batches(schema, (batch(*block) for block in blocks(count, size)))
        table = lancedb.connect(str(folder)).create_table("images", rows)
        table.create_index("vector", config=lancedb.index.IvfRq(distance_type="cosine", num_partitions=CELLS))

    def found(search):
        return search.distance_type("cosine").limit(COUNT).select(["path", "_distance"]).to_arrow()["path"].to_pylist()

    def search(query, nprobe):
        return found(table.search(query).nprobes(nprobe).refine_factor(10))

    ask(name, folder, vectors, search, [found(table.search(x).bypass_vector_index()) for x in vectors[:EXACT_QUERIES]])
    with Measurement(name, "change a tenth, delete a hundredth", folder):
        for rows, x in changes(choose(count, 10, 5), size):
            merge = table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(pa.Table.from_batches([batch(rows, x, 1)]))
        deleted = paths(choose(count, 100, 6).tolist())
        for start in range(0, len(deleted), 1000):
            names = ", ".join(f"'{path}'" for path in deleted[start : start + 1000])
            table.delete(f"path IN ({names})")
        table.optimize(cleanup_older_than=timedelta(0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=2_000_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", help="folder for both stores (default: a temporary one)")
    args = parser.parse_args()
    print(f"{args.vectors:,} x {args.size}; {torch.get_num_threads()} threads")
    print("| store | what | seconds | MB (anonymous) | disk, MB |")
    print("|---" * 5 + "|", flush=True)
    for run in (run_own, run_lance):
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            process = multiprocessing.get_context("spawn").Process(
                target=run, args=(Path(folder), args.vectors, args.size)
            )
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(1)


if __name__ == "__main__":
    main()
