"""Evaluate a checkpoint, ours or a published one: Recall@K beside the published figures."""

import argparse
import shlex
import sys
from pathlib import Path

import torch

import dataset
import net
from dataset.transforms import Normalize
from proxy_anchor import checkpoint, console, device, distributed, evaluation, logbook, published, report

EXAMPLES = """examples:
  a published checkpoint:
    python evaluate.py --dataset cub --model bn_inception --embedding-size 512 --resume cub_bn_inception_512.pth
  one of train.py, which says by itself what network it is of, with a page to look at:
    python evaluate.py --dataset cub --resume logs/logs_cub/RUN/cub_resnet50_best.pth --report report
"""


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="evaluate.py --resume PATH [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=console.HelpFormatter,
        parents=[dataset.options(training=False), net.options(training=False), device.options(), console.options()],
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--resume", required=True, metavar="PATH",
        help="checkpoint to evaluate; ours know --model, --embedding-size, --image-size and --l2-norm",
    )  # fmt: skip
    group.add_argument("--remark", default="", help="name of the line of figures, to tell tables apart")
    group.add_argument(
        "--report", metavar="DIR", help="write a page with queries, classes, similarities and a map into this folder"
    )
    args = parser.parse_args(argv)
    with console.errors_in_one_line("evaluate.py", args.debug):
        record = checkpoint.record(args.resume)
    args = console.parse_with_record(parser, argv, record)
    console.check_ranges(parser, args)
    net.check_arguments(parser, args)
    return args


def evaluate(args: argparse.Namespace, gpu: torch.device) -> dict[str, float]:
    print(device.describe(gpu))

    network = net.create(args.model, args.embedding_size, pretrained=None, l2_norm=bool(args.l2_norm))
    matched = checkpoint.load(args.resume, device.place(network, gpu))
    print(f"Loaded {args.resume}: all {matched} tensors match.")
    if args.compile:
        network.compile()
    precision = device.Precision(args.amp, gpu)
    normalize = Normalize(network.bgr).to(gpu)

    with distributed.first_process_first():
        choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
        eval_sets = dataset.eval_sets(args.dataset, args.data_root, args.image_size, **choice)
    if args.skip_bad_images:
        for images in eval_sets:
            console.leave_out_bad(images, lambda images: dataset.bad_images(images, args.workers))
    if args.cache:
        for images in eval_sets:
            images.use_cache(args.cache, args.workers, console.progress, report=print)
    share = distributed.rank(), distributed.count()
    loaders = [dataset.eval_loader(images, args.batch_size, args.workers, share) for images in eval_sets]
    bars = [console.progress(loader, "embedding") for loader in loaders]
    test_sets = [(device.feed(bar, gpu, normalize), len(images)) for bar, images in zip(bars, eval_sets)]
    if args.report and distributed.rank() == 0:
        report.open_folder(Path(args.report))  # before the work is done
    embedded = evaluation.embed_all(network, test_sets, precision)
    result = evaluation.measure(embedded, dataset.ALL[args.dataset].KS)

    name = args.remark or "this checkpoint"
    rows = {name: result.metrics}
    if figures := published.RESULTS.get((args.dataset, args.model)):
        # A line of its own, whatever the name above.
        authors = "published by the authors" if name == "published" else "published"
        rows[authors] = {f"R@{k}": recall / 100 for k, recall in figures.items()}
    print(logbook.table(rows) + "\n" + result.remark(), end="")
    if figures and (args.embedding_size, args.image_size) != (512, 224):
        print("The published figures are of 512 dimensions and 224 pixels.")
    if args.allow_partial:
        print("With --allow-partial: figures of a part of the data set compare with no others.")

    if args.report and distributed.rank() == 0:
        environment = {
            "command": shlex.join(["python", *sys.argv]),
            "checkpoint": args.resume,
            "sha256": checkpoint.identity(args.resume),
            "device": device.describe(gpu),
            "versions": ", ".join(f"{name} {version}" for name, version in logbook.versions().items()),
        }
        sizes = [f"{count:,} images of {classes:,} classes" for count, classes in map(dataset.size, eval_sets)]
        page = report.write(
            Path(args.report), f"{args.model} on {args.dataset}", f"{args.resume}; {' searched in '.join(sizes)}",
            rows, result, environment,
            *(report.TestSet(*embedded[2 * i : 2 * i + 2], images) for i, images in enumerate(eval_sets)),
        )  # fmt: skip
        print(f"The report is {page}")
    return result.metrics


def main(argv=None):
    args = parse(argv)
    distributed.launch_on_all_gpus(args.gpu_id)
    with console.errors_in_one_line("evaluate.py", args.debug), distributed.processes(args.gpu_id) as gpu:
        return evaluate(args, gpu)


if __name__ == "__main__":
    main()
