"""A training step and a search in one process and in several that share the work, on CPUs (gloo) or GPUs (nccl).

python benchmarks/processes.py [--processes 2] [--model resnet18] [--image-size 64] [--batch-size 64] [--images 10000]

On a CPU each process has one thread, also the single one: the ratio says what sharing costs, not what threads do.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import net
from benchmarks.timing import interleaved, print_row
from proxy_anchor import distributed, losses, retrieval, training
from proxy_anchor.embedding import Embedder

CLASSES, SIZE = 1000, 512


def work(rank: int, count: int, model: str, image_size: int, batch_size: int, images: int, rounds: int, results):
    """Median seconds of a training step and of a search, on this process's share of the work."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=count)
    torch.manual_seed(0)
    network = net.create(model, SIZE)
    embedder = Embedder(network, device)
    criterion = losses.ProxyAnchor(CLASSES, SIZE).to(device)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    share = distributed.sizes(batch_size)[rank]
    pixels = torch.randint(256, (share, 3, image_size, image_size), dtype=torch.uint8, device=device)
    targets = torch.randint(CLASSES, (share,), device=device)
    labels = torch.arange(images, device=device) // 5
    embeddings = F.normalize(torch.randn(images, SIZE, device=device))

    def loss_of(images, labels):
        return criterion(distributed.gather(embedder(images), batch_size), distributed.gather(labels, batch_size))

    epoch = partial(
        training.train_one_epoch, network, loss_of, [(pixels, targets)] * 2, optimizer, embedder.scaler,
        epoch=0, clipped=[network, criterion],
    )  # fmt: skip
    search = partial(retrieval.best_positive_rank, embeddings, labels, group=distributed.group())
    medians = interleaved({"two training steps": epoch, "search": search}, rounds)
    if rank == 0:
        results.put(medians)
    if count > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--model", default="resnet18", choices=net.BACKBONES)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    settings = (args.model, args.image_size, args.batch_size, args.images, args.rounds)
    medians = []
    for count in (1, args.processes):
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(work, (count, *settings, results), nprocs=count)
        medians.append(results.get())
    print(f"{args.model}, {args.image_size} px, batch {args.batch_size}; search in {args.images:,} images")
    for name, seconds in medians[0].items():
        shared = medians[1][name]
        print_row(f"{name}, 1 process", f"{1e3 * seconds:.1f} ms")
        print_row(f"{name}, {args.processes} processes", f"{1e3 * shared:.1f} ms", f"this / 1: {shared / seconds:.2f}")


if __name__ == "__main__":
    main()
