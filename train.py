"""Train an embedding network with the Proxy-Anchor loss, or another, and measure Recall@K after every epoch."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dataset
import net
from proxy_anchor import cli, hardware, loss_registry, training
from proxy_anchor.runs import logbook, run_folders
from proxy_anchor.upgrades import flags as upgrade_flags

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    import torch

EXAMPLES = """examples:
  a first run, without a download:
    python train.py --dataset glyphs
  the published recipe for CUB-200-2011:
    python train.py --dataset cub --model bn_inception --batch-size 180 --lr 1e-4 --warm 1 --lr-decay-step 10
  your own images, one folder per class, faster on a recent GPU; resumes where it stopped:
    python train.py --dataset folder --data-root photos --model resnet50 --amp bf16 --resume auto
"""


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        usage="train.py [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=cli.HelpFormatter,
        parents=[
            dataset.options(training=True),
            net.options(training=True),
            loss_registry.options(),
            training.options(),
            hardware.options(),
            logbook.options(),
            dataset.validation.options(),
            net.later_options(),
            loss_registry.later_options(),
            training.later_options(),
            upgrade_flags.options(),
            dataset.validation.later_options(),
        ],
    )
    args = run_folders.parse(parser, argv, recipe)
    dataset.check_arguments(parser, args, args.dataset)
    args.spec = net.spec_of(parser, args, crop=dataset.crop_of(args.dataset))
    args.image_size = args.spec.image_size
    loss_registry.check_arguments(parser, args)
    training.check_arguments(parser, args)
    upgrade_flags.check_arguments(parser, args)
    if args.IPC is not None and args.batch_size < args.IPC:
        parser.error(f"argument --IPC: {args.IPC} images per class do not fit into a batch of {args.batch_size}")
    if args.epochs == 0 and args.resume:
        parser.error("argument --epochs: 0 evaluates an untrained network, so there is no run to resume")
    return args


def recipe(args: argparse.Namespace) -> dict:
    """The defaults of the dataset and of --frozen, which comes first."""
    return dataset.recipe(args.dataset) | (training.FROZEN if args.frozen else {})


def run_name(args: argparse.Namespace) -> str:
    """The name of the folder of a new run."""
    return logbook.run_name(
        model=args.model,
        loss=loss_registry.label(args.loss),
        embedding_size=args.embedding_size,
        settings=loss_registry.settings_in_words(args.loss, args.mrg, args.alpha, args.loss_args, args.proxy_lr),
        optimizer=args.optimizer,
        lr=args.lr,
        batch_size=args.batch_size,
        seed=args.seed,
        remark="_frozen" * args.frozen + upgrade_flags.in_words(args) + args.remark,
        fold=args.fold,
    )


def open_data(args: argparse.Namespace, fold: str | None = None, views: int = 1) -> dataset.TrainingData:
    """The data of a run; a resumed run keeps the orientation of its images."""
    from proxy_anchor import collectives
    from proxy_anchor.progress import progress

    with collectives.rank_zero_first():
        splits = dataset.open_splits(
            args.dataset,
            args.data_root,
            args.spec.image_size,
            fold,
            args.spec.geometry,
            allow_partial=args.allow_partial,
            test_classes=args.test_classes,
            upright=run_folders.upright(args.resume),
        )
    if args.skip_bad_images:
        dataset.leave_out_bad(splits.values(), args.workers, collectives.from_rank_zero)
    if args.cache:
        dataset.use_cache(splits.values(), args.cache, args.workers, progress)
    data = dataset.for_training(
        args.dataset,
        args.data_root,
        splits,
        batch_size=args.batch_size,
        images_per_class=args.IPC,
        seed=args.seed,
        workers=0 if args.frozen else args.workers,
        share=(collectives.rank(), collectives.world_size()),
        views=views,
    )
    print(data.description + hardware.describe_batch(data.batch_size), end="")
    return data


def configuration(args: argparse.Namespace, data: dataset.TrainingData, device: torch.device) -> dict:
    """What config.json records of a run."""
    from proxy_anchor import collectives

    config = vars(args) | args.spec.to_record() | data.record | net.identity(args.pretrained)
    del config["spec"]
    return config | {
        "device": str(device),
        "processes": collectives.world_size(),
        "schedule": training.describe_schedule(args.lr_schedule, args.epochs),
    }


def create_network(args: argparse.Namespace, config: dict, resume: Path | None, device: torch.device):
    """The network to train; a run to resume has its weights in its own checkpoint."""
    from proxy_anchor import collectives
    from proxy_anchor.embedding import sync_batchnorm

    pretrained = None if resume and (resume / run_folders.LAST).exists() else args.pretrained
    with collectives.rank_zero_first():
        network: Any = net.from_spec(args.spec, pretrained, bool(args.bn_freeze))
    net.check_identity(pretrained, config)
    print(network.model.remark, end="")
    network.freeze(args.freeze)
    sync_batchnorm(network, device, bool(args.bn_freeze))
    return network


def use_features(
    args: argparse.Namespace, data: dataset.TrainingData, network, device: torch.device, resume: Path | None
) -> None:
    """Put the pooled features of the frozen backbone in the place of the images; each image is embedded once."""
    from net.embedding_net import PooledBackbone
    from proxy_anchor import collectives, weights
    from proxy_anchor.embedding import Embedder
    from proxy_anchor.runs import features

    if resume and (last := resume / run_folders.LAST).exists():
        weights.load(last, weights.read(last), network)
    spec = dataclasses.replace(args.spec, orientation=data.record["orientation"])
    backbone = Embedder(PooledBackbone(network.model), device)
    share = (collectives.rank(), collectives.world_size())

    def embed(paths):
        images = dataset.unlabelled(paths, spec)
        return backbone.embed(dataset.eval_loader(images, args.batch_size, args.workers, share), "features").vectors

    image_sets: Any = [loader.dataset for loader in (data.train_loader, *data.test_loaders)]
    paths = [path for images in image_sets for path in images.paths]
    folder = features.folder(Path(args.LOG_DIR, f"features_{args.dataset}"), spec, network)
    rows = features.of_images(folder, paths, backbone.network.embedding_size, embed)
    for images, of_split in zip(image_sets, rows.split([len(images) for images in image_sets])):
        images.features = of_split


def create_criterion(args: argparse.Namespace, num_classes: int) -> torch.nn.Module:
    return loss_registry.create(
        args.loss,
        num_classes,
        args.embedding_size,
        margin=args.mrg,
        alpha=args.alpha,
        arguments=args.loss_args,
        share=args.sample_proxies,
        seed=args.seed,
        proxy_lr=args.proxy_lr,
        synthesis=args.synthesis,
    )


def create_optimizer(args: argparse.Namespace, network, criterion):
    """The optimizer and the schedule of its learning rate."""
    optimizer = training.create_optimizer(
        args.optimizer, network, criterion, args.lr, args.weight_decay, args.embedding_lr, args.eps
    )
    scheduler = training.create_scheduler(
        args.lr_schedule, optimizer, args.epochs, args.lr_decay_step, args.lr_decay_gamma
    )
    return optimizer, scheduler


def train(args: argparse.Namespace, device: torch.device) -> None:
    from net.embedding_net import Head, PooledBackbone
    from proxy_anchor import collectives, evaluation
    from proxy_anchor.embedding import Embedder
    from proxy_anchor.runs.run import Run
    from proxy_anchor.upgrades.chosen import Upgrades

    data = open_data(args, args.fold)  # zero-shot retrieval: training and test classes are disjoint
    config = configuration(args, data, device)
    resume = run_folders.to_resume(run_name(args), config)
    network = create_network(args, config, resume, device)
    if args.frozen:
        use_features(args, data, network, device, resume)
    embedder = Embedder(Head(network) if args.frozen else network, device, args.amp, args.compile)
    criterion = create_criterion(args, data.num_classes).to(device)
    optimizer, scheduler = create_optimizer(args, network, criterion)
    clipped = [network, criterion] if getattr(criterion, "clipped", False) else [network]
    upgrades = Upgrades(embedder, args.threshold_margin, args.self_distill, args.average_weights)  # none by default

    def loss_of(images, labels):
        embeddings = collectives.gather_shards(embedder(images), data.batch_size)  # (B, D)
        labels = collectives.gather_shards(labels, data.batch_size)  # (B,)
        return upgrades.added(criterion(embeddings, labels), images, embeddings, labels)

    def evaluate(embedder, stop=None):
        return evaluation.evaluate(embedder, data.test_loaders, data.ks, stop, prefix=data.prefix)

    if args.epochs == 0:  # no run, nothing to write
        return print(logbook.untrained(evaluate(embedder)), end="")

    state = {"criterion": criterion, "optimizer": optimizer, "scheduler": scheduler, "scaler": embedder.scaler}
    log = logbook.open_logbook(run_name(args), config, resume)
    with Run(log, network, args.by, evaluated=upgrades.network, **state, **upgrades.state) as run:
        upgrades.attach_optimizer(optimizer)  # not earlier: a resumed Run begins with a step that must not count
        if args.pretrained != "none":
            pooled = PooledBackbone(network.model)
            backbone = Embedder(Head(pooled) if args.frozen else pooled, device, args.amp)
            run.measure_backbone(lambda: evaluate(backbone, run.stop))
        for epoch in run.epochs(args.epochs):
            training.set_trainable(network, epoch, args.warm)
            loss = training.train_one_epoch(
                network,
                loss_of,
                embedder.batches(run.batches(data.train_loader)),
                optimizer,
                embedder.scaler,
                epoch,
                clipped,
                run.losses,
                run.show_loss,
            )
            print(embedder.scaler.remark(), end="")
            run.stop.check()
            run.end_epoch(loss, evaluate(upgrades.evaluated(), run.stop))
    print(run.summary(dataset.chosen_flags(args)))


def start(args: argparse.Namespace, device: torch.device) -> None:
    """Seed everything, and print what a run starts with."""
    from proxy_anchor.runs import randomness

    randomness.seed(args.seed)
    print(hardware.describe(device))
    if args.recipe:
        print(f"Defaults of {args.dataset}{', --frozen' * args.frozen}: {args.recipe}")


def main(argv=None):
    args = parse(argv)
    from proxy_anchor.runs.run import ending

    hardware.launch_on_all_gpus(args.gpu_id, __file__, argv)
    with (
        cli.errors_in_one_line("train.py"),
        cli.output_may_close(),
        hardware.processes(args.gpu_id) as device,
        ending("train.py"),
    ):
        start(args, device)
        train(args, device)


if __name__ == "__main__":
    main()
