"""Measure the peak memory of Proxy-Anchor forward + backward, excluding proxies and gradients, by number of classes.

    python benchmarks/loss_memory.py [--batch 180] [--size 512] [--classes 11318 50000 200000] [--most 1000000]

The unit is a B x C float32 matrix. Each measurement runs in a separate process, so that peaks do not add up. The last
rows measure training steps with a million classes.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.loss_time import published_way
from benchmarks.timing import device_here, peak_bytes, print_row, seconds
from proxy_anchor.losses import ProxyAnchor


def measure(way, batch, classes, size, queue):
    device = device_here()
    torch.manual_seed(0)
    x = F.normalize(torch.randn(batch, size)).to(device).requires_grad_()
    y = torch.randint(classes, (batch,)).to(device)
    ours = ProxyAnchor(classes, size).to(device)
    ours.proxies.grad = torch.ones_like(ours.proxies)  # memory in use beforehand (zeros would not be allocated)
    small = ProxyAnchor(8, size).to(device)  # the first step loads libraries, which must not count
    small(x, y % 8).backward()

    def step():
        ours.proxies.grad = None
        loss = ours(x, y) if way == "ours" else published_way(x, ours.proxies, y)
        loss.backward()

    queue.put(peak_bytes(step) / (4 * batch * classes))


def measure_training(batch, classes, size, queue):
    """Losses of three training steps, seconds of the last one, and peak GiB without the libraries."""
    device = device_here()
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(batch, size)).to(device), torch.randint(classes, (batch,)).to(device)
    ProxyAnchor(8, size).to(device)(x, y % 8)
    losses, times = [], []

    def train():
        criterion = ProxyAnchor(classes, size).to(device)
        optimizer = torch.optim.AdamW(criterion.parameters(), lr=1e-2, weight_decay=1e-4, foreach=False)

        def step():
            optimizer.zero_grad()
            loss = criterion(x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        times.extend(seconds(step) for _ in range(3))

    peak = peak_bytes(train)
    queue.put((losses, times[-1], peak / 2**30))


def in_a_process(function, *arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=180)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, nargs="+", default=[11_318, 50_000, 200_000])
    parser.add_argument("--most", type=int, default=1_000_000, help="classes of the training steps")
    args = parser.parse_args()
    print(f"B x C matrices beyond proxies and gradients, {args.batch} x C x {args.size}, {device_here()}")
    for classes in args.classes:
        ours, published = (in_a_process(measure, way, args.batch, classes, args.size) for way in ("ours", "published"))
        print_row(f"{classes:,} classes, ours", f"{ours:.2f} B x C")
        print_row(f"{classes:,} classes, published way", f"{published:.2f} B x C")
    losses, duration, gigabytes = in_a_process(measure_training, args.batch, args.most, args.size)
    print("Losses of the last rows:", " ".join(f"{loss:.3f}" for loss in losses))
    print_row(f"{args.most:,} classes, a step with AdamW", f"{1e3 * duration:.0f} ms")
    print_row(f"{args.most:,} classes, peak memory", f"{gigabytes:.1f} GiB")


if __name__ == "__main__":
    main()
