"""Measure images per second: the network alone, training from files and from the cache, and the published loop.

python benchmarks/throughput.py [--gpu-id 0] [--amp none|bf16] [--models bn_inception resnet50] [--steps 50]
python benchmarks/throughput.py --loaders            only the loaders, in one process

JPEGs of 500 x 375 pixels and about 60 kB are cropped from photographs in scikit-learn. The minutes are for 60 epochs of
the CUB recipe (5,864 training and 5,924 test images) at the measured speeds.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as v1

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
import net
from benchmarks.timing import print_row, seconds
from dataset import transforms
from proxy_anchor import hardware, losses, training
from proxy_anchor.embedding import Embedder

BATCH = {"bn_inception": 180, "resnet50": 120}  # as published
CLASSES = 100
PREFETCHED = 2  # batches per worker of a DataLoader


def write_images(folder: Path, count: int) -> list[str]:
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width = int(random.integers(400, 641))
        height = width * 3 // 4
        left = int(random.integers(0, photograph.width - width + 1))
        top = int(random.integers(0, max(1, photograph.height - height + 1)))
        piece = photograph.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        paths.append(str(folder / f"{number:05d}.jpg"))
        piece.save(paths[-1], quality=92)
    return paths


class PublishedStyle(torch.utils.data.Dataset):
    """PIL, then floats in the worker; for BN-Inception, the worker also swaps channels and scales values to 0-255."""

    def __init__(self, paths, labels, bgr):
        swap = [v1.Lambda(lambda image: Image.merge("RGB", image.split()[::-1]))] if bgr else []
        scale = [v1.Lambda(lambda x: x * 255)] if bgr else []
        mean, std = ([104, 117, 128], [1, 1, 1]) if bgr else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.paths, self.labels = paths, labels
        self.transform = v1.Compose(
            [
                *swap,
                v1.RandomResizedCrop(224),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                *scale,
                v1.Normalize(mean, std),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index], formats=["JPEG"]).convert("RGB")), int(self.labels[index])


def published_step(network, criterion, optimizer, images, labels):
    loss = criterion(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(network.parameters(), 10)
    torch.nn.utils.clip_grad_value_(criterion.parameters(), 10)
    optimizer.step()
    return loss.item()


def loaders(paths, labels, cache_folder, seconds):
    """Images per second of each loader in this process, interleaved."""

    def ours(cached):
        images = dataset.ImageDataset(paths, labels, list(range(CLASSES)), transforms.RandomCrop(224))
        if cached:
            images.use_cache(cache_folder, 0, lambda batches, _: batches, print)
        return images

    sets = {"published style": PublishedStyle(paths, labels, True), "uint8, files": ours(False), "cache": ours(True)}
    torch.set_num_threads(1)
    rates = {name: [] for name in sets}
    for _ in range(5):
        for name, images in sets.items():
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                images[count % len(paths)]
                count += 1
            rates[name].append(count / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print_row(name, f"{rate:.0f} images/s", f"{rate / medians['published style']:.2f} x published")


def endless(loader):
    for epoch in range(10**6):
        with suppress(AttributeError):  # the published style has no epochs
            loader.batch_sampler.set_epoch(epoch)
        yield from loader


def training_speed(name, paths, labels, cache_folder, device, args):
    batch = args.batch_size or BATCH[name]
    network = net.create(name, 512)
    embedder = Embedder(network, device, args.amp, args.compile)
    criterion = losses.ProxyAnchor(CLASSES, 512).to(device)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    training.set_trainable(network, 1, 1)

    def loss_of(images, labels):
        return criterion(embedder(images), labels)

    def steps_on(batches):
        training.train_one_epoch(
            network, loss_of, batches, optimizer, embedder.scaler, epoch=1, clipped=[network, criterion]
        )

    def ours(cached):
        images = dataset.ImageDataset(paths, labels, list(range(CLASSES)), transforms.RandomCrop(224))
        if cached:
            images.use_cache(cache_folder, args.workers, lambda batches, _: batches, print)
        return endless(dataset.train_loader(images, batch, None, 1, args.workers))

    fixed = next(embedder.batches(ours(False)))
    files, cached = ours(False), ours(True)
    old = PublishedStyle(paths, labels, network.model.bgr)
    old = endless(
        torch.utils.data.DataLoader(
            old, batch, shuffle=True, num_workers=4, drop_last=True, pin_memory=device.type == "cuda"
        )
    )
    old_network = net.create(name, 512).to(device)
    old_optimizer = torch.optim.AdamW(old_network.parameters(), lr=1e-4, weight_decay=1e-4)
    old_network.train()

    def published(steps):
        for images, targets in islice(old, steps):
            published_step(old_network, criterion, old_optimizer, images.to(device), targets.to(device))

    def loss_of_contiguous(images, labels):
        images = old_network.normalize(images).contiguous()
        with torch.autocast(device.type, embedder.dtype, enabled=embedder.dtype is not None):
            embeddings = old_network(images)
        return criterion(embeddings, labels)

    def in_the_other_layout(steps):
        training.train_one_epoch(
            old_network,
            loss_of_contiguous,
            [fixed] * steps,
            old_optimizer,
            embedder.scaler,
            epoch=1,
            clipped=[old_network, criterion],
        )

    ways = {
        "(a) network alone": (lambda steps: steps_on([fixed] * steps), 1),
        "(a) not in channels_last": (in_the_other_layout, 1),
        "(b) from files": (lambda steps: steps_on(embedder.batches(islice(files, steps))), args.workers),
        "(c) from cache": (lambda steps: steps_on(embedder.batches(islice(cached, steps))), args.workers),
        "published style": (published, 4),
    }
    times = {way: [] for way in ways}
    for _ in range(3):
        for way, (run, workers) in ways.items():
            run(PREFETCHED * workers + 1)  # not timed: batches prefetched during the turns of others
            times[way].append(seconds(lambda run=run: run(args.steps)))
    rates = {way: args.steps * batch / statistics.median(values) for way, values in times.items()}

    images = dataset.ImageDataset(paths, labels, list(range(CLASSES)), transforms.Evaluation(224))
    images.use_cache(cache_folder, args.workers, lambda batches, _: batches, print)
    loader = dataset.eval_loader(images, 2 * batch, args.workers)
    embedder.embed(loader)
    embedding = len(paths) / statistics.median(seconds(lambda: embedder.embed(loader)) for _ in range(3))
    print(f"{name}, batch {batch}, amp {args.amp}, {args.workers} workers, {os.cpu_count()} cores")
    for way, rate in rates.items():
        share, faster = rate / rates["(a) network alone"], rate / rates["published style"]
        print_row(f"{name}, {way}", f"{rate:.1f} images/s", f"{share:.2f} of (a), {faster:.2f} x published")
    minutes = 60 * (5864 / rates["(c) from cache"] + 5924 / embedding) / 60
    print_row(f"{name}, embedding", f"{embedding:.1f} images/s")
    print_row(f"{name}, 60 epochs of the CUB recipe", f"{minutes:.1f} min")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", action="store_true")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2, help="duration of each turn of a loader")
    parser.add_argument("--models", nargs="+", default=list(BATCH), choices=net.BACKBONES)
    parser.add_argument("--batch-size", type=int, help="replaces the published batch sizes, for a CPU")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--gpu-id", type=int, default=0)
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = hardware.select(args.gpu_id)
    print(hardware.describe(device), f"torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), args.images)
        size = statistics.mean(os.path.getsize(path) for path in paths)
        print(f"{len(paths)} JPEGs of 500 x 375, {size / 1000:.0f} kB on average")
        labels = np.arange(len(paths)) % CLASSES
        if args.loaders:
            loaders(paths, labels, Path(folder, "cache"), args.seconds)
        else:
            for name in args.models:
                training_speed(name, paths, labels, Path(folder, "cache"), device, args)


if __name__ == "__main__":
    main()
