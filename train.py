"""Train an embedding network with the Proxy-Anchor loss, or another, and measure Recall@K after every epoch."""

import argparse

import torch

import dataset
import net
from proxy_anchor import cli, collectives, distributed, evaluation, hardware, losses, randomness, sharded, training
from proxy_anchor.embedding import Embedder
from proxy_anchor.runs import logbook, run_folders
from proxy_anchor.runs.run import Run

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
            dataset.validation.options(),
            net.options(training=True),
            losses.options(),
            training.options(),
            hardware.options(),
            logbook.options(),
            cli.options(),
        ],
    )
    args = cli.parse_with_recipe(parser, argv, dataset.recipe)
    cli.check_ranges(parser, args)
    dataset.check_arguments(parser, args, args.dataset)
    net.check_arguments(parser, args)
    losses.check_arguments(parser, args)
    training.check_arguments(parser, args)
    dataset.validation.check_arguments(parser, args)
    if args.IPC is not None and args.batch_size < args.IPC:
        parser.error(f"argument --IPC: {args.IPC} images per class do not fit into a batch of {args.batch_size}")
    if args.epochs == 0 and args.resume:
        parser.error("argument --epochs: 0 evaluates an untrained network, so there is no run to resume")
    return args


def run_name(args: argparse.Namespace) -> str:
    """The name of the folder of a new run."""
    return logbook.run_name(
        args.model,
        losses.label(args.loss),
        args.embedding_size,
        losses.settings_in_words(args.loss, args.mrg, args.alpha, args.loss_args),
        args.optimizer,
        args.lr,
        args.batch_size,
        args.seed,
        args.remark,
        args.fold,
    )


def train(args: argparse.Namespace, device: torch.device) -> None:
    randomness.seed(args.seed)
    print(hardware.describe(device))
    if args.recipe:
        print(f"Defaults of {args.dataset}: {args.recipe}")
    share = collectives.rank(), collectives.world_size()

    # Data: zero-shot retrieval, so training and test classes are disjoint. With --fold, some training classes test.
    expected = net.expects(args.model)
    geometry = dataset.geometry_of(args.dataset, expected)
    choice = {
        "allow_partial": args.allow_partial,
        "test_classes": args.test_classes,
        "upright": run_folders.upright(args.resume),
    }
    with collectives.rank_zero_first():
        splits = dataset.open(args.dataset, args.data_root, args.image_size, args.fold, geometry, **choice)
    train_set, *test_sets = splits.values()
    cli.make_ready(splits.values(), args.skip_bad_images, args.cache, args.workers)
    print(dataset.describe(splits), dataset.remark(test_sets), sep="\n", end="")
    train_loader = dataset.train_loader(train_set, args.batch_size, args.IPC, args.seed, args.workers, share)
    # Without gradients, twice the images fit into the memory.
    test_loaders = [dataset.eval_loader(images, 2 * args.batch_size, args.workers, share) for images in test_sets]
    ks, prefix = dataset.ALL[args.dataset].KS, dataset.validation.PREFIX if args.fold else ""
    batch_size = train_loader.batch_sampler.images_per_batch
    print(distributed.describe(batch_size), end="")

    # A run to resume has its weights in its own checkpoint.
    config = (
        expected
        | vars(args)
        | geometry
        | dataset.record(splits, args.data_root)
        | {
            "device": str(device),
            "processes": collectives.world_size(),
            "schedule": training.describe_schedule(args.lr_schedule, args.epochs),
        }
        | net.identity(args.pretrained)
    )
    resume = run_folders.to_resume(run_name(args), config)
    pretrained = None if resume and (resume / run_folders.LAST).exists() else args.pretrained

    # Network, loss, optimizer.
    with collectives.rank_zero_first():
        network = net.create(
            args.model,
            args.embedding_size,
            pretrained,
            bool(args.l2_norm),
            bool(args.bn_freeze),
            args.head,
            args.image_size,
        )
    net.check_identity(pretrained, config)
    print(network.model.remark, end="")
    network.freeze(args.freeze)
    distributed.sync_batchnorm(network, device, bool(args.bn_freeze))
    embedder = Embedder(network, device, args.amp, args.compile)
    criterion = sharded.create(
        args.loss,
        train_set.num_classes,
        args.embedding_size,
        args.mrg,
        args.alpha,
        args.loss_args,
        args.sample_proxies,
        args.seed,
    ).to(device)
    optimizer = training.create_optimizer(
        args.optimizer, network, criterion, args.lr, args.weight_decay, args.embedding_lr, args.eps
    )
    scheduler = training.create_scheduler(
        args.lr_schedule, optimizer, args.epochs, args.lr_decay_step, args.lr_decay_gamma
    )
    clipped = [network, criterion] if getattr(criterion, "clipped", False) else [network]

    def loss_of(images, labels):
        embeddings = collectives.gather_shards(embedder(images), batch_size)  # (B, D)
        return criterion(embeddings, collectives.gather_shards(labels, batch_size))

    if args.epochs == 0:  # no run, nothing to write
        result = evaluation.evaluate(embedder, test_loaders, ks, prefix=prefix)
        print(logbook.table({"untrained": result.metrics}) + "\n" + result.remark(), end="")
        return

    parts = {"criterion": criterion, "optimizer": optimizer, "scheduler": scheduler, "scaler": embedder.scaler}
    with Run(logbook.open_logbook(run_name(args), config, resume), network, args.by, **parts) as run:
        if args.pretrained != "none" and not args.skip_baseline:
            alone = Embedder(net.BackboneAlone(network.model), device, args.amp)
            run.measure_backbone(lambda: evaluation.evaluate(alone, test_loaders, ks, run.stop, prefix=prefix))
        for epoch in run.epochs(args.epochs):
            training.set_trainable(network, epoch, args.warm)
            loss = training.train_one_epoch(
                network,
                loss_of,
                embedder.batches(run.batches(train_loader)),
                optimizer,
                embedder.scaler,
                epoch,
                clipped,
                run.losses,
                run.show_loss,
            )
            print(embedder.scaler.remark(), end="")
            run.stop.check()
            result = evaluation.evaluate(embedder, test_loaders, ks, run.stop, prefix=prefix)
            run.end_epoch(loss, result)
    print(run.summary(dataset.chosen_flags(args)))


def main(argv=None):
    args = parse(argv)
    distributed.launch_on_all_gpus(args.gpu_id, __file__, argv)
    with (
        cli.errors_in_one_line("train.py", args.debug),
        cli.output_may_close(),
        distributed.processes(args.gpu_id) as device,
    ):
        try:
            train(args, device)
        except run_folders.Finished as finished:
            print(finished)


if __name__ == "__main__":
    main()
