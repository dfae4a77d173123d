"""Train an embedding network with the Proxy-Anchor loss, or a rival, and measure Recall@K after every epoch."""

import argparse
import time
from pathlib import Path

import torch

import dataset
import net
from dataset.transforms import Normalize
from proxy_anchor import console, device, distributed, evaluation, logbook, losses, randomness, runs, stopping, training

PROXY_LR = {"Proxy_Anchor": 100, "Proxy_NCA": 1}  # learning rate of the proxies, as a multiple of --lr


EXAMPLES = """examples:
  the published recipe for CUB-200-2011:
    python train.py --dataset cub --model bn_inception --batch-size 180 --lr 1e-4 --warm 1 --lr-decay-step 10
  one's own images, a folder a class, faster on a recent GPU; goes on where it stopped:
    python train.py --dataset folder --data-root photographs --model resnet50 --amp bf16 --resume auto
"""


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="train.py [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=console.HelpFormatter,
        parents=[
            dataset.options(training=True), net.options(training=True), losses.options(), training.options(),
            device.options(), logbook.options(), console.options(),
        ],
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.resume not in (None, "auto"):
        try:
            args.resume = str(runs.folder(args.resume))
            parser.set_defaults(**runs.arguments(args.resume))  # what is not given now is as it was
        except (OSError, ValueError) as error:
            parser.error(f"argument --resume: {error}")
        args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"resume": args.resume})
    console.check_ranges(parser, args)
    net.check_arguments(parser, args)
    if args.IPC is not None and args.batch_size < args.IPC:
        parser.error(f"argument --IPC: {args.IPC} images per class do not fit into a batch of {args.batch_size}")
    return args


def train(args: argparse.Namespace, gpu: torch.device) -> None:
    randomness.seed(args.seed)
    print(device.describe(gpu))
    share = distributed.rank(), distributed.count()
    print(distributed.describe(args.batch_size), end="")

    # Data: zero-shot retrieval, so training and test classes are disjoint.
    choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
    with distributed.first_process_first():
        train_set = dataset.train_set(args.dataset, args.data_root, args.image_size, **choice)
        eval_sets = dataset.eval_sets(args.dataset, args.data_root, args.image_size, **choice)
    if args.skip_bad_images:
        for images in [train_set, *eval_sets]:
            console.leave_out_bad(images, lambda images: dataset.bad_images(images, args.workers))
    if args.cache:
        for images in [train_set, *eval_sets]:
            images.use_cache(args.cache, args.workers, console.progress, report=print)
    train_loader = dataset.train_loader(train_set, args.batch_size, args.IPC, args.seed, args.workers, share)
    # Without gradients, twice the images fit into the memory.
    eval_loaders = [dataset.eval_loader(images, 2 * args.batch_size, args.workers, share) for images in eval_sets]
    splits = dataset.splits(args.dataset, args.data_root)
    sizes = dict(zip(splits, map(dataset.size, [train_set, *eval_sets])))
    print(", ".join(f"{split}: {images:,} images of {classes:,} classes" for split, (images, classes) in sizes.items()))
    print(dataset.remark(eval_sets), end="")

    # Network, loss, optimizer.
    bn_freeze = bool(args.bn_freeze)
    with distributed.first_process_first():
        network = net.create(args.model, args.embedding_size, args.pretrained, bool(args.l2_norm), bn_freeze)
    network = distributed.with_common_statistics(device.place(network, gpu), bn_freeze)
    if args.compile:
        network.compile()
    precision = device.Precision(args.amp, gpu)
    normalize = Normalize(network.bgr).to(gpu)
    criterion = losses.create(args.loss, train_set.num_classes, args.embedding_size, args.mrg, args.alpha).to(gpu)
    proxy_lr = args.lr * PROXY_LR.get(args.loss, 1)
    optimizer = training.create_optimizer(args.optimizer, network, criterion, args.lr, proxy_lr, args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_gamma)

    stop = stopping.Stop()

    def evaluate() -> evaluation.Result:
        bars = [stop.after_each(console.progress(loader, "evaluation"), everywhere=False) for loader in eval_loaders]
        test_sets = [(device.feed(bar, gpu, normalize), len(images)) for bar, images in zip(bars, eval_sets)]
        return evaluation.measure(evaluation.embed_all(network, test_sets, precision), dataset.ALL[args.dataset].KS)

    if args.epochs == 0:  # no run, nothing to write
        result = evaluate()
        print(logbook.table({"untrained": result.metrics}) + "\n" + result.remark(), end="")
        return

    log = logbook.open_logbook(
        Path(args.LOG_DIR), args.dataset, args.model,
        name=logbook.run_name(
            args.model, args.loss, args.embedding_size, args.alpha, args.mrg,
            args.optimizer, args.lr, args.batch_size, args.seed, args.remark,
        ),
        config=vars(args) | {"device": str(gpu), "processes": distributed.count(), "sizes": sizes},
        wandb_mode=args.wandb,
        resume=args.resume,
    )  # fmt: skip
    with log, stop:
        parts = {"criterion": criterion, "optimizer": optimizer, "scheduler": scheduler, "scaler": precision.scaler}
        progress = log.restore(network, parts)
        rows = progress["rows"]  # of metrics.csv, one of each epoch
        if progress["epoch"] >= args.epochs:
            raise ValueError(f"{log.folder} has finished its {progress['epoch']} epochs; to go on, raise --epochs")
        try:
            for epoch in range(progress["epoch"], args.epochs):
                start = time.perf_counter() - progress["seconds"]
                training.set_trainable(network, epoch, args.warm)
                train_loader.batch_sampler.set_epoch(epoch, done=len(progress["losses"]))
                bar = console.progress(train_loader, f"epoch {epoch}")
                loss = training.train_one_epoch(
                    network, criterion, stop.after_each(device.feed(bar, gpu, normalize)),
                    train_loader.batch_sampler.images_per_batch, optimizer, precision, epoch,
                    bn_freeze=bn_freeze,
                    clip_proxies=args.loss == "Proxy_Anchor",
                    losses=progress["losses"],
                    report=bar.show_loss,
                )  # fmt: skip
                distributed.broadcast(network)
                result = evaluate()
                row = {"epoch": epoch, "loss": loss, "lr": scheduler.get_last_lr()[0]}
                rows.append(row | {"seconds": round(time.perf_counter() - start, 2)} | result.metrics)
                scheduler.step()
                log.log_epoch(rows)
                # The published protocol picks the epoch on the test set, which flatters it: the last one is shown too.
                best = max(rows, key=lambda row: row["R@1"])  # the first of equals
                if best is rows[-1]:
                    log.save_best(best, network)
                progress |= {"epoch": epoch + 1, "losses": [], "seconds": 0.0}
                log.save_last(network, parts, progress)
        except stopping.Interrupted:
            progress["seconds"] = time.perf_counter() - start
            log.save_last(network, parts, progress)
            raise
    best = max(rows, key=lambda row: row["R@1"])
    ends = {f"best epoch ({best['epoch']})": best, f"last epoch ({rows[-1]['epoch']})": rows[-1]}
    print(logbook.table({name: logbook.metrics_of(row) for name, row in ends.items()}))
    print(result.remark(), end="")
    print(f"The best network is in {log.folder}")


def main(argv=None):
    args = parse(argv)
    distributed.launch_on_all_gpus(args.gpu_id)
    with console.errors_in_one_line("train.py", args.debug), distributed.processes(args.gpu_id) as gpu:
        train(args, gpu)


if __name__ == "__main__":
    main()
