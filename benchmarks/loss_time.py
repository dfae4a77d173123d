"""Time Proxy-Anchor forward + backward against its three bare matrix products and two other implementations.

python benchmarks/loss_time.py [--batch 180] [--classes 11318] [--size 512] [--rounds 15]
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import device_here, installed, interleaved, print_ratios
from proxy_anchor.losses import ProxyAnchor


def published_way(x, proxies, labels, margin=0.1, alpha=32):
    """The loss over dense one-hot masks, as the published code computes it."""
    x = x / torch.sqrt(x.square().sum(1, keepdim=True) + 1e-12)
    proxies = proxies / torch.sqrt(proxies.square().sum(1, keepdim=True) + 1e-12)
    cos = F.linear(x, proxies)
    positive = F.one_hot(labels, len(proxies)).float()
    negative = 1 - positive
    pull = torch.where(positive == 1, torch.exp(-alpha * (cos - margin)), torch.zeros_like(cos)).sum(dim=0)
    push = torch.where(negative == 1, torch.exp(alpha * (cos + margin)), torch.zeros_like(cos)).sum(dim=0)
    with_positive = len(torch.nonzero(positive.sum(dim=0) != 0))
    return torch.log(1 + pull).sum() / with_positive + torch.log(1 + push).sum() / len(proxies)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=180)
    parser.add_argument("--classes", type=int, default=11318)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = device_here()
    torch.manual_seed(0)
    x = F.normalize(torch.randn(args.batch, args.size, device=device)).requires_grad_()
    y = torch.randint(args.classes, (args.batch,), device=device)
    ours = ProxyAnchor(args.classes, args.size).to(device)
    p = ours.proxies.detach()
    slopes = torch.randn(args.batch, args.classes, device=device)

    def bare():
        (x.detach() @ p.T, slopes @ p, slopes.T @ x.detach())

    def step(function, parameter):
        def run():
            x.grad = parameter.grad = None
            function().backward()

        return run

    sizes = f"{args.batch} x {args.classes} x {args.size}"
    print(f"Forward + backward, {sizes}, {device}, {torch.get_num_threads()} threads")
    functions = {"three bare products": bare, "ours": step(lambda: ours(x, y), ours.proxies)}
    dense = ours.proxies.detach().clone().requires_grad_()
    functions["published way (dense masks)"] = step(lambda: published_way(x, dense, y), dense)
    row = "pytorch-metric-learning"
    if library := installed("pytorch_metric_learning.losses", row):
        theirs = library.ProxyAnchorLoss(args.classes, args.size).to(device)
        functions[row] = step(lambda: theirs(x, y), theirs.proxies)
    print_ratios(interleaved(functions, args.rounds), of="ours")


if __name__ == "__main__":
    main()
