"""Measure an index larger than memory: time and memory of building and searching, and recall against exact search.

python benchmarks/index_size.py --vectors 2000000 --size 256 --index-factory IVF1024,SQ8 [--queries 1000] [--out DIR]

Vectors are generated in blocks: 20 images per class around its center, which lies in a space of 32 dimensions. Queries
are database vectors with noise. Memory is the peak resident set (VmHWM), which includes mapped pages of files, and its
anonymous share (RssAnon, sampled every 20 ms), which the system cannot reclaim. Linux only.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from proxy_anchor.index.neighbours import Exact, faiss
from proxy_anchor.index.store import RECALL_AT, Index

BLOCK, PER_CLASS, INTRINSIC, NOISE = 2**14, 20, 32, 0.6
NPROBES = (1, 4, 16, 64)


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

    @staticmethod
    def status(name: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024 / 1e6


def build(folder: Path, count: int, size: int, factory: str) -> Index:
    network = {"model": "resnet18", "embedding_size": size, "image_size": 224, "l2_norm": 1}
    spec = {"checkpoint": "none", "weights": "none", "network": network, "by_folder": False}
    index = Index.new(folder, spec, factory)
    for start in range(0, count, BLOCK):
        vectors = block_of_vectors(start, min(BLOCK, count - start), size)
        paths = [f"/photos/of/some/collection/{i // 1000:06}/{i:09}.jpg" for i in range(start, start + len(vectors))]
        index.add({path: f"{100_000 + i} {10**18 + i}" for i, path in enumerate(paths)}, torch.from_numpy(vectors))
    return index.finish()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=2_000_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--index-factory", default="IVF1024,SQ8")
    parser.add_argument("--out", help="folder for the index (default: a temporary one)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        with Memory() as memory:
            start = time.perf_counter()
            build(Path(folder), args.vectors, args.size, args.index_factory)
            minutes = (time.perf_counter() - start) / 60
        print(f"{args.vectors:,} x {args.size}, {args.index_factory}; {torch.get_num_threads()} threads")
        print(f"on disk: {sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6:,.0f} MB")
        print(f"build: {minutes:.1f} min, {memory.resident:,.0f} MB resident, {memory.anonymous:,.0f} MB anonymous")

        rows = np.random.default_rng(2).choice(args.vectors, min(args.queries, args.vectors), replace=False)
        start = time.perf_counter()
        index = Index.open(Path(folder))
        opening = time.perf_counter() - start
        generator = np.random.default_rng(3)
        queries = torch.from_numpy(noisy(index.images.take(np.sort(rows)), generator))
        _, exact = Exact(index.images, faiss().METRIC_INNER_PRODUCT).search(queries.numpy(), RECALL_AT)
        print(f"opened in {opening:.1f} s; nearest {RECALL_AT} of {len(rows):,} queries:")
        print(f"| search | queries/s | ms, one query | recall@{RECALL_AT} | MB resident | MB anonymous |")
        print("|---" * 6 + "|")
        for nprobe in [nprobe for nprobe in NPROBES if nprobe <= index.cells] or [None]:
            if nprobe:
                index.set_nprobe(nprobe)
            with Memory() as memory:
                start = time.perf_counter()
                results = index.search(queries, RECALL_AT)
                seconds = time.perf_counter() - start
                start = time.perf_counter()
                for query in queries[:10]:
                    index.search(query[None], RECALL_AT)
                single = (time.perf_counter() - start) / len(queries[:10])
            hits = sum(
                len(dict(a).keys() & {index.images[i][0] for i in b}) for a, b in zip(results, exact, strict=True)
            )
            print(
                f"| {f'--nprobe {nprobe}' if nprobe else args.index_factory} | {len(rows) / seconds:,.0f} "
                f"| {1000 * single:,.0f} | {hits / exact.size:.3f} "
                f"| {memory.resident:,.0f} | {memory.anonymous:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
