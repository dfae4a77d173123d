"""Compare a training step and a search in one process and in several, on CPUs (gloo) or GPUs (nccl).

python benchmarks/processes.py [--processes 2] [--model resnet18] [--image-size 64] [--batch-size 64] [--images 10000]
python benchmarks/processes.py --classes 1000000 [--processes 1 2 4] [--size 128] [--batch-size 180]
    [--sample-proxies 1]

With --classes it measures the Proxy-Anchor loss with that number of classes, sharded over the processes. It also counts
operations and transferred bytes. On a CPU all processes have one thread, so the ratio shows the cost of sharing.
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import net
from benchmarks.timing import interleaved, print_row, synchronize
from proxy_anchor import collectives, loss_registry, retrieval, training
from proxy_anchor.embedding import Embedder
from proxy_anchor.vectors import Embeddings

CLASSES, SIZE = 1000, 512
STEPS = 3  # of the loss


def join(rank: int, count: int) -> torch.device:
    """Join the process group; returns the process's device."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=count)
    return device


@register_flop_formula(torch.ops.aten.addmm_)  # torch has a formula only for addmm
def flop_of_addmm_(_, a, b, **__):
    return 2 * a[0] * a[1] * b[1]


class Counter(FlopCounterMode):
    """Counts the operations of matrix products, and by name the collectives with the bytes of their results."""

    def __init__(self):
        super().__init__(display=False)
        self.calls = {}

    def __enter__(self):
        self.collectives = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "broadcast")}
        for name, collective in self.collectives.items():
            setattr(dist, name, partial(self.call, name, collective))
        return super().__enter__()

    def __exit__(self, *error):
        for name, collective in self.collectives.items():
            setattr(dist, name, collective)
        return super().__exit__(*error)

    def call(self, name, collective, result, *arguments, **keywords):
        number, size = self.calls.get(name, (0, 0))
        nbytes = sum(tensor.nbytes for tensor in result) if isinstance(result, list) else result.nbytes
        self.calls[name] = number + 1, size + nbytes
        return collective(result, *arguments, **keywords)

    def describe(self) -> str:
        calls = [f"{number} {name} of {size:,} B" for name, (number, size) in self.calls.items()]
        return f"{self.get_total_flops() / 1e9:,.1f} GFLOP; " + (", ".join(calls) or "nothing") + " sent"


def measure_loss(rank: int, count: int, classes: int, size: int, batch_size: int, share: float, results):
    """Memory, loss, operations and seconds of a step of the loss and AdamW on this process's classes."""
    device = join(rank, count)
    before = allocated(device)
    torch.manual_seed(0)
    criterion = loss_registry.create("Proxy_Anchor", classes, size, 0.1, 32.0, share=share, seed=0).to(device)
    network = torch.nn.Module()
    network.model = torch.nn.Module()
    network.model.embedding = torch.nn.Linear(1, 1)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    shard = collectives.shard(batch_size)
    counter, seconds, losses = Counter(), [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        x = torch.randn(batch_size, size)[shard].to(device).requires_grad_()
        labels = torch.randint(classes, (batch_size,))[shard].to(device)
        synchronize()
        start = time.perf_counter()
        with nullcontext() if step else counter:
            loss = criterion(collectives.gather_shards(x, batch_size), collectives.gather_shards(labels, batch_size))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    results[rank] = allocated(device) - before, peak(device) - before, losses[-1], counter.describe(), min(seconds)
    if count > 1:
        dist.destroy_process_group()


def allocated(device: torch.device) -> int:
    """Bytes allocated on the GPU, or the resident memory of the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """Bytes of an entry of Linux's /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def print_loss(args: argparse.Namespace) -> None:
    print(f"{args.classes:,} classes, {args.size} dimensions, batch {args.batch_size}, share {args.sample_proxies:g}")
    for count in args.processes or (1, 2, 4):
        with mp.Manager() as manager:
            results = manager.dict()
            settings = (args.classes, args.size, args.batch_size, args.sample_proxies)
            mp.spawn(measure_loss, (count, *settings, results), nprocs=count)
            per_process = [results[rank] for rank in range(count)]
        memory, most = (max(values) / 1e6 for values in list(zip(*per_process))[:2])
        _, _, loss, work, seconds = per_process[0]
        formula = 16 * args.classes * args.size / count / 1e6
        print_row(
            f"processes: {count}, memory of each", f"{memory:,.0f} MB", f"16 C D / N: {formula:,.0f}, peak {most:,.0f}"
        )
        print_row(f"processes: {count}, loss", f"{loss:.6f}")
        print_row(
            f"processes: {count}, images/s", f"{args.batch_size / seconds:,.0f}", f"{1e3 * seconds:,.0f} ms per step"
        )
        print(f"  a step: {work}; 6 B C D / N: {6e-9 * args.batch_size * args.classes * args.size / count:,.1f}")


def work(rank: int, count: int, model: str, image_size: int, batch_size: int, images: int, rounds: int, results):
    """Median seconds of a training step and of a search on this process's shard."""
    device = join(rank, count)
    torch.manual_seed(0)
    network = net.create(model, SIZE)
    embedder = Embedder(network, device)
    criterion = loss_registry.create("Proxy_Anchor", CLASSES, SIZE, 0.1, 32.0).to(device)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    shard_size = collectives.shard_sizes(batch_size)[rank]
    pixels = torch.randint(256, (shard_size, 3, image_size, image_size), dtype=torch.uint8, device=device)
    targets = torch.randint(CLASSES, (shard_size,), device=device)
    labels = torch.arange(images, device=device)[collectives.shard(images)] // 5

    def loss_of(images, labels):
        embeddings = collectives.gather_shards(embedder(images), batch_size)
        return criterion(embeddings, collectives.gather_shards(labels, batch_size))

    epoch = partial(
        training.train_one_epoch,
        network,
        loss_of,
        [(pixels, targets)] * 2,
        optimizer,
        embedder.scaler,
        epoch=0,
        clipped=[network, criterion],
    )
    epoch()
    before = peak(device)
    embeddings = F.normalize(torch.randn(len(labels), SIZE, device=device))
    search = partial(retrieval.search, Embeddings(embeddings, labels), processes=collectives.world())
    search()
    memory = peak(device) - before
    with Counter() as counter:
        search()
    medians = interleaved({"two training steps": epoch, "search": search}, rounds)
    if rank == 0:
        results.put((medians, memory, counter.describe()))
    if count > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--model", default="resnet18", choices=net.BACKBONES)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--sample-proxies", type=float, default=1)
    args = parser.parse_args()
    args.batch_size = args.batch_size or (180 if args.classes else 64)
    if args.classes:
        return print_loss(args)
    settings = (args.model, args.image_size, args.batch_size, args.images, args.rounds)
    medians = []
    (processes,) = args.processes or [torch.cuda.device_count() or 2]
    for count in (1, processes):
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(work, (count, *settings, results), nprocs=count)
        medians.append(results.get())
    print(f"{args.model}, {args.image_size} px, batch {args.batch_size}; search in {args.images:,} images")
    for name, seconds in medians[0][0].items():
        shared = medians[1][0][name]
        print_row(f"{name}, 1 process", f"{1e3 * seconds:.1f} ms")
        print_row(f"{name}, {processes} processes", f"{1e3 * shared:.1f} ms", f"this / 1: {shared / seconds:.2f}")
    single, per_process = (memory / 2**20 for _, memory, _ in medians)
    print_row("memory of the search, 1 process", f"{single:.0f} MiB")
    label = f"memory of the search, {processes} processes, each"
    print_row(label, f"{per_process:.0f} MiB", f"this / 1: {per_process / single:.2f}")
    print(f"  a search: {medians[1][2]}; 2 Q M D / N: {2e-9 * args.images**2 * SIZE / processes:,.1f}")


if __name__ == "__main__":
    main()
