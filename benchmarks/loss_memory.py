"""Peak memory of Proxy-Anchor forward + backward beyond proxies and gradients, against the number of classes.

    python benchmarks/loss_memory.py [--batch 180] [--size 512]

Printed in B x C float32 matrices. One process each, so that peaks do not add up. The last line trains a step with a
million classes.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.loss_time import published_way
from proxy_anchor.losses import ProxyAnchor


def peak() -> int:
    """Bytes: the high-water mark of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way, batch, classes, size, queue):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(batch, size)).requires_grad_()
    y = torch.randint(classes, (batch,))
    ours = ProxyAnchor(classes, size)
    ours.proxies.grad = torch.ones_like(ours.proxies)  # its memory counts as held (zeros would take none)
    small = ProxyAnchor(8, size)  # what a first step loads is not counted
    small(x, y % 8).backward()
    before = peak()
    ours.proxies.grad = None
    loss = ours(x, y) if way == "ours" else published_way(x, ours.proxies, y)
    loss.backward()
    queue.put((peak() - before) / (4 * batch * classes))


def million(batch, size, queue):
    torch.manual_seed(0)
    criterion = ProxyAnchor(1_000_000, size)
    optimizer = torch.optim.AdamW(criterion.parameters(), lr=1e-2, weight_decay=1e-4, foreach=False)
    x, y = F.normalize(torch.randn(batch, size)), torch.randint(1_000_000, (batch,))
    losses = []
    start = time.perf_counter()
    for _ in range(3):
        optimizer.zero_grad()
        loss = criterion(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    queue.put((losses, (time.perf_counter() - start) / 3, peak() / 2**30))


def in_a_process(function, *arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    process.join()
    return queue.get()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=180)
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    print("classes     ours   published way   (B x C matrices beyond proxies and gradients)")
    for classes in (11_318, 50_000, 200_000):
        figures = [in_a_process(measure, way, args.batch, classes, args.size) for way in ("ours", "published")]
        print(f"{classes:>7,} {figures[0]:8.2f} {figures[1]:15.2f}")
    losses, seconds, gigabytes = in_a_process(million, args.batch, args.size)
    shown = " ".join(f"{loss:.3f}" for loss in losses)
    print(f"1,000,000 classes: losses {shown}, {seconds:.1f} s a step with AdamW, {gigabytes:.1f} GiB at the peak")


if __name__ == "__main__":
    main()
