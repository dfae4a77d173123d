"""Train a smaller or better network, the student, on how a trained one, its teacher, relates images to each other."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import dataset
import net
from proxy_anchor import cli, hardware, loss_registry, training
from proxy_anchor.files import printable
from proxy_anchor.runs import logbook, run_folders
from proxy_anchor.spec import LIMITS, NetworkSpec
from train import configuration, create_network, create_optimizer, open_data, start

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    import torch

EXAMPLES = """examples:
  64 dimensions instead of 512, from a published network or one of train.py:
    python transfer.py --source-ckpt cub_bn_inception_best.pth --dataset cub --model bn_inception --embedding-size 64
  a small network from a large one:
    python transfer.py --source-ckpt cub_resnet50_best.pth --dataset cub --model resnet18 --embedding-size 128
"""
DEFAULTS = {  # published
    "batch_size": 90,
    "IPC": 2,
    "epochs": 90,
    "warm": 0,
    "seed": 0,
    "bn_freeze": 0,
    "l2_norm": 0,
    "head": "orthogonal",
}
# The rest of the published recipe, which has no flags here.
RECIPE = {
    "lr_schedule": "cosine",
    "lr_decay_step": 10,
    "lr_decay_gamma": 0.5,
    "embedding_lr": 1.0,
    "eps": None,
    "freeze": "",
    "frozen": False,
}
EPOCHS = {"SOP": 150}  # published
SOURCE_FLAGS = "--source-model and --source-embedding-size"


def options() -> argparse.ArgumentParser:
    """Command-line flags of the transfer."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("transfer")
    group.add_argument(
        "--source-ckpt",
        type=cli.path,
        metavar="PATH",
        help="checkpoint of the teacher, or the folder of its run (required)",
    )
    group.add_argument(
        "--source-model",
        metavar="NAME",
        help="backbone of the teacher, if its checkpoint does not record it (default: resnet50 if the student is a "
        "ResNet, else bn_inception)",
    )
    group.add_argument(
        "--source-embedding-size",
        type=cli.integer(1, LIMITS["embedding_size"]),
        metavar="D",
        help="dimensions of the teacher, if its checkpoint does not record them (default: 512)",
    )
    group.add_argument(
        "--view",
        default=2,
        type=cli.integer(1),
        metavar="N",
        help="random crops of each image in a batch; more show more relations and take longer",
    )
    # Published commands have these two. Every run is saved, and --target-norm is --l2-norm.
    group.add_argument("--save", default=1, **cli.one_of(1), help=argparse.SUPPRESS)
    group.add_argument("--target-norm", dest="l2_norm", **cli.one_of(0, 1), help=argparse.SUPPRESS)
    return parser


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        usage="transfer.py --source-ckpt PATH [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=cli.HelpFormatter,
        parents=[
            options(),
            dataset.options(training=True),
            net.options(training=True),
            loss_registry.transfer_options(),
            training.options(without=("--lr-decay-step", "--lr-decay-gamma")),
            hardware.options(),
            logbook.options(),
            net.later_options("network"),
        ],
    )
    parser.set_defaults(**DEFAULTS)
    args = run_folders.parse(parser, argv, recipe)
    recorded = {} if args.resume in (None, "auto") else run_folders.read_config(Path(args.resume))
    vars(args).update(RECIPE | {name: recorded[name] for name in RECIPE if name in recorded})  # older runs had flags
    dataset.check_arguments(parser, args, args.dataset)
    args.spec = net.spec_of(parser, args, crop=dataset.crop_of(args.dataset))
    args.image_size = args.spec.image_size
    if args.batch_size % args.IPC:
        parser.error(f"argument --IPC: the batch size, {args.batch_size}, is not a multiple of {args.IPC}")
    if args.epochs == 0 and args.resume:
        parser.error("argument --epochs: 0 evaluates an untrained network, so there is no run to resume")
    with cli.errors_in_one_line("transfer.py"):
        describe_teacher(parser, args)
    return args


def recipe(args: argparse.Namespace) -> dict:
    """The defaults of a dataset, with the published epochs."""
    return dataset.recipe(args.dataset) | ({"epochs": EPOCHS[args.dataset]} if args.dataset in EPOCHS else {})


def describe_teacher(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Complete the teacher's arguments from its checkpoint, or as published; a contradiction is a usage error."""
    if not args.source_ckpt:
        parser.error("the following argument is required: --source-ckpt")
    from proxy_anchor.checkpoint import Checkpoint, in_run

    args.source_ckpt = os.path.abspath(in_run(args.source_ckpt))  # the run may be resumed from another folder
    args.teacher = Checkpoint(args.source_ckpt)
    recorded = args.teacher.spec
    published = {"model": "resnet50" if args.model.startswith("resnet") else "bn_inception", "embedding_size": 512}
    for name, default in published.items():
        given, expected = getattr(args, f"source_{name}"), getattr(recorded, name, None)
        if None not in (given, expected) and given != expected:
            parser.error(
                f"argument --source-{name.replace('_', '-')}: the teacher was trained with {expected}, not {given}"
            )
        setattr(args, f"source_{name}", expected or given or default)
    spec = recorded or NetworkSpec(args.source_model, args.source_embedding_size, args.image_size)
    args.source_head = spec.head
    try:
        net.check(spec)
    except (ImportError, ValueError) as error:
        parser.error(f"argument --source-{'ckpt' if recorded else 'model'}: {error}")
    if spec.image_size != args.image_size:
        parser.error(
            f"argument --image-size: the teacher was trained at {spec.image_size} pixels, and both must see the "
            f"same size: set it to {spec.image_size}"
        )
    if not net.accepts(args.source_model, args.image_size):
        parser.error(f"argument --image-size: the teacher, {args.source_model}, cannot take {args.image_size} pixels")


def run_name(args: argparse.Namespace) -> str:
    """The name of the folder of a new run, with the teacher that it learns from."""
    source = f"{args.source_model}-{args.source_embedding_size}-{args.teacher.identity[:8]}"
    return logbook.run_name(
        model=args.model,
        loss=args.loss,
        embedding_size=args.embedding_size,
        settings=f"from_{source}_sigma{args.sigma:g}_delta{args.delta:g}",
        optimizer=args.optimizer,
        lr=args.lr,
        batch_size=args.batch_size,
        seed=args.seed,
        remark=args.remark,
    )


def load_teacher(args: argparse.Namespace) -> torch.nn.Module:
    spec = NetworkSpec(args.source_model, args.source_embedding_size, args.image_size, head=args.source_head)
    teacher = net.from_spec(spec).eval()
    matched = args.teacher.load(teacher, SOURCE_FLAGS)
    print(f"The teacher is {printable(args.source_ckpt)}: all {matched} tensors match.")
    return teacher


def train(args: argparse.Namespace, device: torch.device) -> None:
    import torch

    from net.embedding_net import PooledBackbone
    from proxy_anchor import collectives, distillation, evaluation
    from proxy_anchor.embedding import Embedder
    from proxy_anchor.runs.run import Run

    data = open_data(args, views=args.view)  # of the teacher's training classes; labels only balance the batches
    distance = "cosine" if args.l2_norm else "euclidean"
    config = configuration(args, data, device) | {"distance": distance, "teacher": args.teacher.identity}
    resume = run_folders.to_resume(run_name(args), config)
    network = create_network(args, config, resume, device)
    embedder = Embedder(network, device, args.amp, args.compile)
    teacher = Embedder(load_teacher(args), device, args.amp, args.compile)
    criterion = distillation.create(args.loss, args.sigma, args.delta)
    optimizer, scheduler = create_optimizer(args, network, criterion)

    def loss_of(images, labels):
        with torch.no_grad():
            targets = collectives.gather_shards(teacher(images), data.batch_size)  # (B, D)
        embeddings = collectives.gather_shards(embedder(images), data.batch_size)  # (B, d)
        return criterion(embeddings, targets)

    def evaluate(embedder, stop=None, distance=distance):
        return evaluation.evaluate(embedder, data.test_loaders, data.ks, stop, distance)

    if args.epochs == 0:  # no run, nothing to write
        return print(logbook.untrained(evaluate(embedder)), end="")

    state = {"optimizer": optimizer, "scheduler": scheduler, "scaler": embedder.scaler}
    with Run(logbook.open_logbook(run_name(args), config, resume), network, **state) as run:
        if args.pretrained != "none":
            backbone = Embedder(PooledBackbone(network.model), device, args.amp)
            run.measure_backbone(lambda: evaluate(backbone, run.stop, "cosine"))
        for epoch in run.epochs(args.epochs):
            training.set_trainable(network, epoch, args.warm)
            loss = training.train_one_epoch(
                network,
                loss_of,
                embedder.batches(run.batches(data.train_loader)),
                optimizer,
                embedder.scaler,
                epoch,
                losses=run.losses,
                report=run.show_loss,
            )
            print(embedder.scaler.remark(), end="")
            run.stop.check()
            run.end_epoch(loss, evaluate(embedder, run.stop))
    print(run.summary(dataset.chosen_flags(args)))


def main(argv=None):
    args = parse(argv)
    from proxy_anchor.runs.run import ending

    hardware.launch_on_all_gpus(args.gpu_id, __file__, argv)
    with (
        cli.errors_in_one_line("transfer.py"),
        cli.output_may_close(),
        hardware.processes(args.gpu_id) as device,
        ending("transfer.py"),
    ):
        start(args, device)
        train(args, device)


if __name__ == "__main__":
    main()
