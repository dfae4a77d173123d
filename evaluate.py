"""Evaluate a checkpoint, ours or a published one: Recall@K beside the published results, and thresholds for pairs."""

import proxy_anchor.startup  # noqa: F401 (before the slow imports)

# isort: split
import argparse
import shlex
import sys
from pathlib import Path

import torch

import dataset
import net
from proxy_anchor import checkpoint, console, decisions, distributed, evaluation, hardware, logbook, published, report
from proxy_anchor.embedding import Embedder

EXAMPLES = """examples:
  a published checkpoint:
    python evaluate.py --dataset cub --model bn_inception --embedding-size 512 --resume cub_bn_inception_512.pth
  a checkpoint of train.py, which records its network; with a report:
    python evaluate.py --dataset cub --resume logs/logs_cub/RUN/cub_resnet50_best.pth --report report
  choose the similarity from which two images show one thing, for 1% false accepts, and keep it in the checkpoint:
    python evaluate.py --dataset cub --resume logs/logs_cub/RUN/cub_resnet50_best.pth --calibrate --far 0.01
"""


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="evaluate.py --resume PATH [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=console.HelpFormatter,
        parents=[dataset.options(training=False), net.options(training=False), hardware.options(), console.options()],
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--resume", required=True, metavar="PATH",
        help="checkpoint to evaluate; those of train.py record --model, --embedding-size, --image-size and --l2-norm",
    )  # fmt: skip
    group.add_argument("--remark", default="", help="name of this checkpoint's row in the table")
    group.add_argument(
        "--report", metavar="DIR", help="write a web page with queries, classes, similarities and a map to this folder"
    )
    group.add_argument(
        "--calibrate", action="store_true",
        help="choose a threshold for pairs of images on half of the classes, check it on the other half, and record it "
        "in the checkpoint, for search.py",
    )  # fmt: skip
    group.add_argument(
        "--far", type=float, metavar="RATE",
        help="with --calibrate: the share of pairs of two classes that the threshold may accept (default: 0.01)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    with console.errors_in_one_line("evaluate.py", args.debug):
        contract = checkpoint.contract(args.resume)
    args = console.parse_with_contract(parser, argv, contract)
    console.check_ranges(parser, args)
    net.check_arguments(parser, args)
    if args.far is not None and not args.calibrate:
        parser.error("argument --far: it is for --calibrate")
    args.far = 0.01 if args.far is None else args.far
    if not 0 < args.far < 1:
        parser.error(f"argument --far: {args.far} is not between 0 and 1")
    return args


def evaluate(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    print(hardware.describe(device))

    network = net.create(args.model, args.embedding_size, pretrained=None, l2_norm=bool(args.l2_norm))
    matched = checkpoint.load(args.resume, network)
    print(f"Loaded {args.resume}: all {matched} tensors match.")
    embedder = Embedder(network, device, args.amp, args.compile)

    with distributed.first_process_first():
        choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
        test_sets = dataset.eval_sets(args.dataset, args.data_root, args.image_size, args.crop, **choice)
    console.make_ready(test_sets, args.skip_bad_images, args.cache, args.workers)
    share = distributed.rank(), distributed.count()
    loaders = [dataset.eval_loader(images, args.batch_size, args.workers, share) for images in test_sets]
    if args.report and distributed.rank() == 0:
        report.open_folder(Path(args.report))  # before the work is done
    embedded = [tensor for loader in loaders for tensor in embedder.embed(loader)]
    result = evaluation.measure(embedded, dataset.ALL[args.dataset].KS, args.distance)
    pairs = decisions.verify(*[*embedded, None, None][:4], args.distance, group=distributed.group())

    name = args.remark or "this checkpoint"
    rows = {name: result.metrics}
    if reference := published.RESULTS.get((args.dataset, args.model)):
        # Never the row above under the same name.
        authors = "published by the authors" if name == "published" else "published"
        rows[authors] = {f"R@{k}": recall / 100 for k, recall in reference.items()}
    print(logbook.table(rows) + "\n" + result.remark() + dataset.remark(test_sets), end="")
    print(pairs.text(), end="")
    if reference and (args.embedding_size, args.image_size) != (512, 224):
        print("The published results are for 512 dimensions and 224 pixels.")
    if args.allow_partial:
        print("With --allow-partial: results on a part of the dataset do not compare with others.")

    if args.calibrate and distributed.rank() == 0:
        calibrate(args, embedded, test_sets)

    if args.report and distributed.rank() == 0:
        environment = {
            "command": shlex.join(["python", *sys.argv]),
            "checkpoint": args.resume,
            "weights": checkpoint.identity(args.resume),
            "device": hardware.describe(device),
            "versions": ", ".join(f"{name} {version}" for name, version in logbook.versions().items()),
        }
        sizes = [f"{count:,} images of {classes:,} classes" for count, classes in map(dataset.size, test_sets)]
        page = report.write(
            Path(args.report), f"{args.model} on {args.dataset}", f"{args.resume}; {' searched in '.join(sizes)}",
            rows, result, pairs, checkpoint.threshold(args.resume), environment,
            *(
                report.TestSet(*embedded[2 * i : 2 * i + 2], images, args.distance)
                for i, images in enumerate(test_sets)
            ),
        )  # fmt: skip
        print(f"The report is {page}")
    return result.metrics


def calibrate(args: argparse.Namespace, embedded: list[torch.Tensor], test_sets: list) -> None:
    """Choose and check a threshold, and record it in the checkpoint."""
    found = decisions.calibrate(embedded, args.far, args.distance)
    splits = dict(zip(dataset.eval_splits(args.dataset, args.data_root), test_sets))
    data = {"dataset": args.dataset, "data": dataset.record(splits, args.data_root)["data"]}
    checkpoint.save_threshold(args.resume, found.record() | data)
    print(f"{found.text()}The threshold is recorded in {args.resume}")


def main(argv=None):
    args = parse(argv)
    distributed.launch_on_all_gpus(args.gpu_id)
    with console.errors_in_one_line("evaluate.py", args.debug), distributed.processes(args.gpu_id) as device:
        return evaluate(args, device)


if __name__ == "__main__":
    main()
