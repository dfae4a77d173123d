"""Train an embedding network with the Proxy-Anchor loss, or a rival, and measure Recall@K after every epoch."""

import argparse
import time
from pathlib import Path

import torch

import dataset
import net
from dataset.transforms import Normalize
from proxy_anchor import console, device, distributed, evaluation, logbook, losses, training

PROXY_LR = {"Proxy_Anchor": 100, "Proxy_NCA": 1}  # learning rate of the proxies, as a multiple of --lr


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[
            dataset.options(training=True), net.options(training=True), losses.options(), training.options(),
            device.options(), logbook.options(), console.options(),
        ],
    )  # fmt: skip
    args = parser.parse_args(argv)
    console.check_ranges(parser, args)
    if not net.accepts(args.model, args.image_size):
        parser.error(
            f"argument --image-size: {args.model} cannot take images of {args.image_size} pixels; multiples of 32 work"
        )
    if args.IPC is not None and args.batch_size < args.IPC:
        parser.error(f"argument --IPC: {args.IPC} images per class do not fit into a batch of {args.batch_size}")
    return args


def train(args: argparse.Namespace, gpu: torch.device) -> None:
    torch.manual_seed(args.seed)
    print(device.describe(gpu))
    share = distributed.rank(), distributed.count()
    print(distributed.describe(args.batch_size), end="")

    # Data: zero-shot retrieval, so training and test classes are disjoint.
    with distributed.first_process_first():
        train_set = dataset.train_set(args.dataset, args.data_root, args.image_size, args.allow_partial)
        eval_sets = dataset.eval_sets(args.dataset, args.data_root, args.image_size, args.allow_partial)
    train_loader = dataset.train_loader(train_set, args.batch_size, args.IPC, args.seed, args.workers, share)
    eval_loaders = [dataset.eval_loader(images, args.batch_size, args.workers, share) for images in eval_sets]
    sizes = dict(zip(["train", *dataset.eval_splits(args.dataset)], map(dataset.size, [train_set, *eval_sets])))
    print(", ".join(f"{split}: {images:,} images of {classes:,} classes" for split, (images, classes) in sizes.items()))

    # Network, loss, optimizer.
    bn_freeze = bool(args.bn_freeze)
    with distributed.first_process_first():
        network = net.create(args.model, args.embedding_size, args.pretrained, bool(args.l2_norm), bn_freeze)
    network = distributed.with_common_statistics(network.to(gpu), bn_freeze)
    normalize = Normalize(network.bgr).to(gpu)
    criterion = losses.create(args.loss, train_set.num_classes, args.embedding_size, args.mrg, args.alpha).to(gpu)
    proxy_lr = args.lr * PROXY_LR.get(args.loss, 1)
    optimizer = training.create_optimizer(args.optimizer, network, criterion, args.lr, proxy_lr, args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_gamma)

    def evaluate() -> evaluation.Result:
        bars = [console.progress(loader, "evaluation") for loader in eval_loaders]
        test_sets = [(device.feed(bar, gpu, normalize), len(images)) for bar, images in zip(bars, eval_sets)]
        return evaluation.evaluate(network, dataset.BENCHMARKS[args.dataset].KS, test_sets)

    if args.epochs == 0:
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
    )  # fmt: skip
    results = []  # of each epoch
    best = 0  # epoch
    for epoch in range(args.epochs):
        start = time.perf_counter()
        training.set_trainable(network, epoch, args.warm)
        train_loader.batch_sampler.set_epoch(epoch)
        bar = console.progress(train_loader, f"epoch {epoch}")
        loss = training.train_one_epoch(
            network, criterion, device.feed(bar, gpu, normalize), train_loader.batch_sampler.images_per_batch,
            optimizer, epoch,
            bn_freeze=bn_freeze,
            clip_proxies=args.loss == "Proxy_Anchor",
            report=bar.show_loss,
        )  # fmt: skip
        lr = scheduler.get_last_lr()[0]
        scheduler.step()
        distributed.broadcast(network)
        result = evaluate()
        results.append(result.metrics)
        log.log_epoch(epoch, loss, lr, time.perf_counter() - start, result.metrics)
        # The published protocol picks the epoch on the test set, which flatters it: the last epoch is shown too.
        if epoch == 0 or results[epoch]["R@1"] > results[best]["R@1"]:
            best = epoch
            log.save_best(epoch, network, result.metrics)
    print(logbook.table({f"best epoch ({best})": results[best], f"last epoch ({epoch})": results[-1]}))
    print(result.remark(), end="")
    log.close()


def main(argv=None):
    args = parse(argv)
    distributed.launch_on_all_gpus(args.gpu_id)
    with console.errors_in_one_line("train.py", args.debug), distributed.processes(args.gpu_id) as gpu:
        train(args, gpu)


if __name__ == "__main__":
    main()
