"""Measure an index larger than memory: time and memory of building and searching, and recall against exact search.

python benchmarks/index_size.py --vectors 2000000 --size 256 --index-factory IVF1024,SQ8 IVF1024,RaBitQ [--out DIR]

Several kinds are built one after the other, and then searched in turn, three times, so that their times can be
compared. Vectors are generated in blocks: 20 images per class around its center, which lies in a space of 32
dimensions. Queries are database vectors with noise. Memory is the peak resident set (VmHWM), which includes mapped
pages of files, and its anonymous share (RssAnon, sampled every 20 ms), which the system cannot reclaim. Linux only.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from proxy_anchor.index.neighbours import Exact, faiss
from proxy_anchor.index.store import RECALL_AT, Index

BLOCK, PER_CLASS, INTRINSIC, NOISE = 2**14, 20, 32, 0.6
NPROBES, ROUNDS = (1, 4, 16, 64), 3


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def noisy(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return unit(x + NOISE * unit(generator.standard_normal(x.shape, np.float32)))


def block_of_vectors(start: int, count: int, size: int) -> np.ndarray:
    """Unit vectors (count, size) of the images from `start` on; deterministic."""
    generator = np.random.default_rng(start + 1)
    space = np.random.default_rng(0).standard_normal((INTRINSIC, size), np.float32)
    classes = unit(generator.standard_normal((count // PER_CLASS + 1, INTRINSIC), np.float32) @ space)
    return noisy(classes[generator.integers(len(classes), size=count)], generator)


class Memory:
    """A context that measures the peaks of resident and anonymous memory, in megabytes."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.anonymous, self.end = self.status("RssAnon"), threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *error):
        self.end.set()
        self.watcher.join()
        self.resident = self.status("VmHWM")

    def watch(self):
        while not self.end.wait(0.02):
            self.anonymous = max(self.anonymous, self.status("RssAnon"))

    def __str__(self):
        return f"{self.resident:,.0f} ({self.anonymous:,.0f})"

    @staticmethod
    def status(name: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024 / 1e6


def blocks(count: int, size: int):
    """(rows, vectors) of all images, in blocks."""
    for start in range(0, count, BLOCK):
        vectors = block_of_vectors(start, min(BLOCK, count - start), size)
        yield range(start, start + len(vectors)), vectors


def paths(rows) -> list[str]:
    return [f"/photos/of/some/collection/{i // 1000:06}/{i:09}.jpg" for i in rows]


def stamps(rows, version: int = 0) -> list[str]:
    return [f"{100_000 + i} {10**18 + version}" for i in rows]


def build(folder: Path, count: int, size: int, factory: str) -> Index:
    network = {"model": "resnet18", "embedding_size": size, "image_size": 224, "l2_norm": 1}
    made = {"checkpoint": "none", "weights": "none", "network": network, "by_folder": False}
    index = Index.new(folder, made, factory)
    for rows, vectors in blocks(count, size):
        index.add(dict(zip(paths(rows), stamps(rows))), torch.from_numpy(vectors))
    return index.finish()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=2_000_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--index-factory", nargs="+", default=["IVF1024,SQ8"])
    parser.add_argument("--out", help="folder for the indexes (default: a temporary one)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        indexes = {}
        print(f"{args.vectors:,} x {args.size}; {torch.get_num_threads()} threads")
        print("| index | disk, MB | of it FAISS's | build, min | build, MB (anonymous) |")
        print("|---" * 5 + "|")
        for number, factory in enumerate(args.index_factory):
            path = Path(folder, str(number))
            path.mkdir()
            with Memory() as memory:
                start = time.perf_counter()
                indexes[factory] = build(path, args.vectors, args.size, factory)
                minutes = (time.perf_counter() - start) / 60
            disk, of_faiss = (
                sum(file.stat().st_size for file in path.glob(files)) / 1e6 for files in ("*", "*.faiss*")
            )
            print(f"| {factory} | {disk:,.0f} | {of_faiss:,.0f} | {minutes:.1f} | {memory} |", flush=True)

        images = next(iter(indexes.values())).images
        rows = np.sort(np.random.default_rng(2).choice(args.vectors, min(args.queries, args.vectors), replace=False))
        queries = noisy(images.take(rows), np.random.default_rng(3))
        _, exact = Exact(images, faiss().METRIC_INNER_PRODUCT).search(queries, RECALL_AT)
        print(f"\nThe {RECALL_AT} nearest of {len(rows):,} queries:")
        print(f"| search | queries/s | ms, one query | recall@{RECALL_AT} | search, MB (anonymous) |")
        print("|---" * 5 + "|")
        for nprobe in NPROBES if any(index.cells for index in indexes.values()) else NPROBES[:1]:
            runs = {factory: [] for factory, index in indexes.items() if index.cells or nprobe == NPROBES[0]}
            for factory in [*runs] * ROUNDS:
                runs[factory].append(measure(indexes[factory], nprobe, queries, exact))
            for factory, measured in runs.items():
                seconds, single = (median(values) for values in list(zip(*measured))[:2])
                _, _, recall, memory = measured[-1]
                name = f"{factory} --nprobe {nprobe}" if indexes[factory].cells else factory
                print(
                    f"| {name} | {len(rows) / seconds:,.0f} | {1000 * single:,.0f} | {recall:.3f} | {memory} |",
                    flush=True,
                )


def measure(index: Index, nprobe: int, queries: np.ndarray, exact: np.ndarray) -> tuple[float, float, float, Memory]:
    """Seconds for all queries, and for one alone; recall of their exact neighbours; memory."""
    if index.cells:
        index.set_nprobe(nprobe)
    batch = torch.from_numpy(queries)
    with Memory() as memory:
        start = time.perf_counter()
        results = index.search(batch, RECALL_AT)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        for query in batch[:10]:
            index.search(query[None], RECALL_AT)
        single = (time.perf_counter() - start) / len(batch[:10])
    hits = sum(len(dict(a).keys() & {index.images[i][0] for i in b}) for a, b in zip(results, exact, strict=True))
    return seconds, single, hits / exact.size, memory


if __name__ == "__main__":
    main()
