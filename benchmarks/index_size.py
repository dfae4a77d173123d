"""An index that need not fit in memory: time and memory of its build and its search, and recall against exact search.

python benchmarks/index_size.py --vectors 2000000 --size 256 --index-factory IVF1024,SQ8 [--queries 1000] [--out DIR]

Vectors are made block by block: 20 images per class around its centre, which lies in a space of 32 dimensions. Queries
are database vectors with noise. Memory is the largest resident set (VmHWM), with the mapped pages of files, and the
anonymous part of it (RssAnon, looked at every 20 ms), which the system cannot take back. Linux only.
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
    """Unit vectors (count, size) of the images from `start` on, always the same."""
    generator = np.random.default_rng(start + 1)
    space = np.random.default_rng(0).standard_normal((INTRINSIC, size), np.float32)
    classes = unit(generator.standard_normal((count // PER_CLASS + 1, INTRINSIC), np.float32) @ space)
    return noisy(classes[generator.integers(len(classes), size=count)], generator)


class Memory:
    """As a context: the megabytes at the peak, of all that is resident and of what is anonymous."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        self.anonymous, self.ended = self.now("RssAnon"), threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.watcher.join()
        self.resident = self.now("VmHWM")

    def watch(self):
        while not self.ended.wait(0.02):
            self.anonymous = max(self.anonymous, self.now("RssAnon"))

    @staticmethod
    def now(name: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024 / 1e6


def build(folder: Path, count: int, size: int, factory: str) -> Index:
    network = {"model": "resnet18", "embedding_size": size, "image_size": 224, "l2_norm": 1}
    made = {"checkpoint": "none", "weights": "none", "network": network, "by_folder": False}
    index = Index.new(folder, made, factory)
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
    parser.add_argument("--out", help="folder for the index; without it, a temporary one")
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
        opened = time.perf_counter() - start
        generator = np.random.default_rng(3)
        queries = torch.from_numpy(noisy(index.images.take(np.sort(rows)), generator))
        _, exact = Exact(index.images, faiss().METRIC_INNER_PRODUCT).search(queries.numpy(), RECALL_AT)
        print(f"opened in {opened:.1f} s; nearest {RECALL_AT} of {len(rows):,} queries:")
        print(f"| search | queries/s | ms, one query | recall@{RECALL_AT} | MB resident | MB anonymous |")
        print("|---" * 6 + "|")
        for nprobe in [nprobe for nprobe in NPROBES if nprobe <= index.cells] or [None]:
            if nprobe:
                index.set_nprobe(nprobe)
            with Memory() as memory:
                start = time.perf_counter()
                found = index.search(queries, RECALL_AT)
                seconds = time.perf_counter() - start
                start = time.perf_counter()
                for query in queries[:10]:
                    index.search(query[None], RECALL_AT)
                alone = (time.perf_counter() - start) / len(queries[:10])
            same = sum(len(dict(a).keys() & {index.images[i][0] for i in b}) for a, b in zip(found, exact, strict=True))
            print(
                f"| {f'--nprobe {nprobe}' if nprobe else args.index_factory} | {len(rows) / seconds:,.0f} "
                f"| {1000 * alone:,.0f} | {same / exact.size:.3f} | {memory.resident:,.0f} | {memory.anonymous:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
