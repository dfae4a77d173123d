"""Recall@K against the bare blocked matrix product, a faiss search, pytorch-metric-learning and the published way.

python benchmarks/recall_time.py [--images 20000] [--size 512] [--rounds 3]
python benchmarks/recall_time.py --memory [--images 60502]
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import device_here, installed, interleaved, peak_bytes, print_ratios, print_row
from proxy_anchor.retrieval import map_at_r, recall_at_k

KS = (1, 10, 100, 1000)


def bare_product(x, gallery, rows=1024):
    out = torch.empty(rows, len(gallery), device=x.device)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        torch.mm(block, gallery.T, out=out[: len(block)])


def published_way(x, y, rows=1024):
    """The top 1,001 of each row without the first, which is taken to be the query; then a loop over the queries."""
    neighbours = [y[(x[start : start + rows] @ x.T).topk(max(KS) + 1)[1][:, 1:]] for start in range(0, len(x), rows)]
    neighbours = torch.cat(neighbours)
    return {k: sum(bool((row[:k] == label).any()) for row, label in zip(neighbours, y)) / len(y) for k in KS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", action="store_true", help="peak memory beyond the embeddings, of our functions alone"
    )
    args = parser.parse_args()
    device = device_here()
    torch.manual_seed(0)
    y = torch.arange(args.images, device=device) // 5
    x = F.normalize(
        torch.randn(args.images, args.size, device=device)
        + torch.randn(args.images // 5 + 1, args.size, device=device)[y]
    )
    half = args.images // 2
    print(f"{args.images} images, {args.size} dimensions, {device}, {torch.get_num_threads()} threads")

    if args.memory:
        recall_at_k(x[:2000], y[:2000], KS), map_at_r(x[:2000], y[:2000])  # what a first call loads is not counted
        for name, function in (("Recall@K", lambda: recall_at_k(x, y, KS)), ("MAP@R", lambda: map_at_r(x, y))):
            print_row(f"{name}, peak memory beyond the embeddings", f"{peak_bytes(function) / 2**20:.0f} MiB")
        return

    functions = {
        "bare product": lambda: bare_product(x, x),
        "ours": lambda: recall_at_k(x, y, KS),
        "published way": lambda: published_way(x, y),
        "MAP@R and R-precision": lambda: map_at_r(x, y),
    }
    row = "faiss IndexFlatIP, top 1,000 (CPU)"
    if faiss := installed("faiss", row):
        vectors = x.cpu().numpy()

        def faiss_search():
            index = faiss.IndexFlatIP(args.size)
            index.add(vectors)
            index.search(vectors, max(KS))

        functions[row] = faiss_search
    row = "pytorch-metric-learning, precision at 1"
    if (library := installed("pytorch_metric_learning.utils.accuracy_calculator", row)) and faiss:  # which it needs
        calculator = library.AccuracyCalculator(include=("precision_at_1",), k=max(KS))
        functions[row] = lambda: calculator.get_accuracy(x, y)
    print_ratios(interleaved(functions, args.rounds), of="ours")
    functions = {
        "bare product, half against half": lambda: bare_product(x[:half], x[half:]),
        "ours, half against half": lambda: recall_at_k(x[:half], y[:half], KS, x[half:], y[half:]),
    }
    print_ratios(interleaved(functions, args.rounds), of="ours, half against half")


if __name__ == "__main__":
    main()
