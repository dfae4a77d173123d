"""Measure the cost of backbones: parameters, features, and images per second in training and in evaluation.

python benchmarks/backbones.py [--models resnet50 convnext_tiny] [--image-size 224] [--batch-size 16] [--gpu-id 0]

Weights and images are random and in memory, so there are no downloads and no waits for a disk. A training step includes
the network, 100 proxies, gradients of all parameters and the optimizer. Each number is the median over rounds.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import net
from benchmarks.timing import seconds
from proxy_anchor import hardware, loss_registry, training
from proxy_anchor.embedding import Embedder

MODELS = ("tf_efficientnet_lite0", "resnet18", "bn_inception", "resnet50", "vit_small_patch16_224", "convnext_tiny")
CLASSES, SIZE = 100, 512


def measure(name: str, args: argparse.Namespace, device: torch.device) -> tuple[float, int, float, float]:
    """(million trained parameters of the backbone, pooled features, training images/s, evaluation images/s)."""
    network = net.create(name, SIZE, image_size=args.image_size)
    embedder = Embedder(network, device, args.amp)
    criterion = loss_registry.create("Proxy_Anchor", CLASSES, SIZE).to(device)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    training.set_trainable(network, epoch=1, warm=1)
    images = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    batch = images.to(device), torch.arange(args.batch_size, device=device) % CLASSES

    def step():
        training.train_one_epoch(
            network, lambda x, y: criterion(embedder(x), y), [batch], optimizer, embedder.scaler, epoch=1
        )

    @torch.inference_mode()
    def embed():
        network.eval()
        embedder(batch[0])

    rates = []
    for run in (step, embed):
        run()  # not counted
        rates.append(args.batch_size / statistics.median(seconds(run) for _ in range(args.rounds)))
    sizes = {
        key: parameter.numel() for key, parameter in network.model.named_parameters() if parameter.grad is not None
    }
    backbone = sum(size for key, size in sizes.items() if not key.startswith("embedding."))
    return backbone / 1e6, network.model.num_features, *rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu-id", type=int, default=0)
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    args = parser.parse_args()
    device = hardware.select(args.gpu_id)
    print(hardware.describe(device), f"torch {torch.__version__}, {args.image_size} pixels, batch {args.batch_size}")
    print("| network | parameters, million | pooled features | training, images/s | evaluation, images/s |")
    print("|---|---|---|---|---|")
    for name in args.models:
        parameters, features, training_rate, evaluation_rate = measure(name, args, device)
        print(f"| {name} | {parameters:.1f} | {features:,} | {training_rate:.1f} | {evaluation_rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
