"""Time an epoch of train.py --frozen on random features, of Stanford Online Products' size by default.

python benchmarks/frozen.py [--images 59551] [--classes 11318] [--features 512] [--batch-size 180]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import device_here, print_row, seconds
from dataset.images import ImageDataset
from dataset.loading import eval_loader, train_loader
from net.backbone import Backbone
from net.embedding_net import EmbeddingNet, Head
from proxy_anchor import training
from proxy_anchor.embedding import Embedder
from proxy_anchor.losses import ProxyAnchor


class NoBackbone(Backbone, nn.Module):
    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=59551)
    parser.add_argument("--classes", type=int, default=11318)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=180)
    args = parser.parse_args()
    device = device_here()
    torch.manual_seed(0)
    images = ImageDataset([""] * args.images, np.arange(args.images) % args.classes, list(range(args.classes)))
    images.features = torch.randn(args.images, args.features)
    network = EmbeddingNet(NoBackbone(args.features), args.embedding_size)
    head = Embedder(Head(network), device)
    criterion = ProxyAnchor(args.classes, args.embedding_size).to(device)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    batches = train_loader(images, args.batch_size, None, seed=1, workers=0)

    def loss_of(features, labels):
        return criterion(head(features), labels)

    def train():
        training.train_one_epoch(
            network, loss_of, head.batches(batches), optimizer, head.scaler, 0, [network, criterion]
        )

    sizes = f"{args.images:,} x {args.features} features of {args.classes:,} classes, batches of {args.batch_size}"
    print(f"{sizes}, {device}, {torch.get_num_threads()} threads")
    work = {"training": train, "embedding": lambda: head.embed(eval_loader(images, 2 * args.batch_size, 0))}
    for name, function in work.items():
        cpu = time.process_time()
        elapsed = seconds(function)
        print_row(name, f"{elapsed:.1f} s", f"{time.process_time() - cpu:.1f} s of CPU time")


if __name__ == "__main__":
    main()
