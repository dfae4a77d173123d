"""Time Recall@K, MAP@R and R-precision against the bare blocked matrix product and other implementations of Recall@K.

python benchmarks/recall_time.py [--images 20000] [--per-class 5] [--size 512] [--rounds 3] [--ours]
python benchmarks/recall_time.py --memory [--images 60502]
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import device_here, installed, interleaved, peak_bytes, print_ratios, print_row
from proxy_anchor.retrieval import search
from proxy_anchor.vectors import Embeddings

KS = (1, 10, 100, 1000)


def bare_product(x, gallery, rows=1024):
    out = torch.empty(rows, len(gallery), device=x.device)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        torch.mm(block, gallery.T, out=out[: len(block)])


def published_way(x, y, rows=1024):
    """Recall@K in the published way: top 1,001 per row without the first (the query), then a loop over the queries."""
    neighbours = [y[(x[start : start + rows] @ x.T).topk(max(KS) + 1)[1][:, 1:]] for start in range(0, len(x), rows)]
    neighbours = torch.cat(neighbours)
    return {k: sum(bool((row[:k] == label).any()) for row, label in zip(neighbours, y)) / len(y) for k in KS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--per-class", type=int, default=5)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", action="store_true", help="only the peak memory of our functions, excluding the embeddings"
    )
    parser.add_argument("--ours", action="store_true", help="leave out other implementations")
    args = parser.parse_args()
    device = device_here()
    torch.manual_seed(0)
    y = torch.arange(args.images, device=device) // args.per_class
    x = F.normalize(
        torch.randn(args.images, args.size, device=device)
        + torch.randn(args.images // args.per_class + 1, args.size, device=device)[y]
    )
    half = args.images // 2
    threads = torch.get_num_threads()
    print(f"{args.images} images, {args.per_class} per class, {args.size} dimensions, {device}, {threads} threads")

    if args.memory:
        search(Embeddings(x[:2000], y[:2000]))  # the first call loads libraries, which must not count
        peak = peak_bytes(lambda: search(Embeddings(x, y)))
        print_row("peak memory beyond the embeddings", f"{peak / 2**20:.0f} MiB")
        return

    functions = {"bare product": lambda: bare_product(x, x), "ours": lambda: search(Embeddings(x, y))}
    if not args.ours:
        functions |= others(x, y)
    print_ratios(interleaved(functions, args.rounds), of="ours")
    functions = {
        "bare product, half against half": lambda: bare_product(x[:half], x[half:]),
        "ours, half against half": lambda: search(Embeddings(x[:half], y[:half]), Embeddings(x[half:], y[half:])),
    }
    print_ratios(interleaved(functions, args.rounds), of="ours, half against half")


def others(x, y):
    """Other implementations of some of the metrics."""
    functions = {"published way": lambda: published_way(x, y)}
    row = "faiss IndexFlatIP, top 1,000 (CPU)"
    if faiss := installed("faiss", row):
        vectors = x.cpu().numpy()

        def faiss_search():
            index = faiss.IndexFlatIP(x.shape[1])
            index.add(vectors)
            index.search(vectors, max(KS))

        functions[row] = faiss_search
    row = "pytorch-metric-learning, precision at 1"
    if (library := installed("pytorch_metric_learning.utils.accuracy_calculator", row)) and faiss:  # its dependency
        calculator = library.AccuracyCalculator(include=("precision_at_1",), k=max(KS))
        functions[row] = lambda: calculator.get_accuracy(x, y)
    return functions


if __name__ == "__main__":
    main()
