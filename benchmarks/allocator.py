"""Measure what it is worth on a CPU to keep freed memory: images per second of CPU time, and peak memory.

python benchmarks/allocator.py [--models tf_efficientnet_lite0 resnet50] [--batch-sizes 8 60 240] [--largest 60]

Each row is measured in two fresh processes of one thread, one with hardware.keep_freed_memory, one without. CPU time
includes the page faults and, unlike wall time, hardly depends on what else the machine does. Weights and images are
random; a training step includes the network, 100 proxies and the optimizer. Only glibc, on Linux, makes a difference.
"""

import argparse
import multiprocessing
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import net
from proxy_anchor import hardware, loss_registry, training
from proxy_anchor.embedding import Embedder

MODELS = ("tf_efficientnet_lite0", "resnet18", "resnet50", "bn_inception")
CLASSES, SIZE = 100, 512
WARM, STEPS = 2, 2  # the first steps bring the memory that the others use


def measure(name: str, batch_size: int, image_size: int, keep: bool, train: bool) -> tuple[float, float]:
    """(images per second of CPU time, peak memory in GB) of training or evaluation."""
    torch.set_num_threads(1)
    if keep:
        hardware.keep_freed_memory()
    network = net.create(name, SIZE, image_size=image_size)
    embedder = Embedder(network, torch.device("cpu"))
    criterion = loss_registry.create("Proxy_Anchor", CLASSES, SIZE)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    training.set_trainable(network, epoch=1, warm=1)
    images = torch.randint(256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
    labels = torch.arange(batch_size) % CLASSES

    def steps(count: int) -> None:
        if train:
            batches = [(images, labels)] * count
            training.train_one_epoch(
                network, lambda x, y: criterion(embedder(x), y), batches, optimizer, embedder.scaler, epoch=1
            )
        else:
            network.eval()
            with torch.inference_mode():
                for _ in range(count):
                    embedder(images)

    steps(WARM)
    start = cpu_seconds()
    steps(STEPS)
    rate = STEPS * batch_size / (cpu_seconds() - start)
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(8, 60, 240), metavar="B")
    parser.add_argument("--largest", type=int, default=60, metavar="B", help="largest batch that is trained on")
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {args.image_size} pixels, one thread")
    print("| network | batch | | images/CPU s, returned | images/CPU s, kept | ratio | GB, returned | GB, kept |")
    print("|---|---|---|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for name in args.models:
        for batch_size in args.batch_sizes:
            for train in (True, False)[batch_size > args.largest :]:
                results = []
                for keep in (False, True):
                    with spawn.Pool(1) as pool:
                        results.append(pool.apply(measure, (name, batch_size, args.image_size, keep, train)))
                (rate, peak), (kept_rate, kept_peak) = results
                print(
                    f"| {name} | {batch_size} | {'training' if train else 'evaluation'} | {rate:.1f} | {kept_rate:.1f} "
                    f"| {kept_rate / rate:.2f} | {peak:.1f} | {kept_peak:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
