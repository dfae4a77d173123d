"""Evaluate a checkpoint, or a backbone before training: Recall@K beside the published results, thresholds for pairs."""

import argparse
import shlex
import sys
from pathlib import Path
from statistics import fmean

import torch

import dataset
import net
from proxy_anchor import cli, collectives, distributed, evaluation, exported, hardware, published, verification
from proxy_anchor.checkpoint import Checkpoint, in_run, save_threshold
from proxy_anchor.embedding import Embedder
from proxy_anchor.files import printable
from proxy_anchor.report import page
from proxy_anchor.runs import logbook
from proxy_anchor.spec import NetworkSpec
from proxy_anchor.weights import digest

EXAMPLES = """examples:
  a published checkpoint:
    python evaluate.py --dataset cub --model bn_inception --embedding-size 512 --resume cub_bn_inception_512.pth
  a checkpoint of train.py, which records its network; with a report:
    python evaluate.py --dataset cub --resume logs/logs_cub/RUN --report report
  the networks of four folds, one by one and together:
    python evaluate.py --dataset cub --resume A.pth B.pth C.pth D.pth
  what a pretrained backbone can do before it is trained:
    python evaluate.py --dataset cub --model resnet50 --backbone-only
  choose the similarity from which two images show one thing, for 1% false accepts, and keep it in the checkpoint:
    python evaluate.py --dataset cub --resume logs/logs_cub/RUN --calibrate --far 0.01
"""


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        usage="evaluate.py (--resume PATH | --backbone-only) [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=cli.HelpFormatter,
        parents=[dataset.options(training=False), net.options(training=False), hardware.options()],
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--resume",
        nargs="+",
        metavar="PATH",
        default=[],
        help="checkpoint to evaluate, the folder of its run, or its .onnx or .safetensors; those of train.py record "
        "--model, --embedding-size, --image-size and --l2-norm. Several of one kind, such as those of folds, are "
        "evaluated one by one and together",
    )
    group.add_argument("--remark", default="", help="name of this checkpoint's row in the table")
    group.add_argument(
        "--report",
        type=cli.path,
        metavar="DIR",
        help="write a web page with queries, classes, similarities and a map to this folder",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="also print how well a threshold tells same-class from different-class pairs of images; takes three times "
        "as long as the recalls, and comes with --calibrate and --report",
    )
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="choose a threshold for pairs of images on half of the classes, check it on the other half, and record it "
        "in the checkpoint, for search.py",
    )
    group.add_argument(
        "--far",
        type=float,
        metavar="RATE",
        help="with --calibrate: the share of different-class pairs that the threshold may accept (default: 0.01)",
    )
    args = parser.parse_args(argv)
    net.check_weights(parser, args)
    with cli.errors_in_one_line("evaluate.py"):
        paths = [in_run(path) for path in args.resume]
        checkpoints = [Checkpoint(path) for path in paths]
    recorded, *others = [checkpoint.spec for checkpoint in checkpoints] or [None]
    for path, other in zip(paths[1:], others):
        if other != recorded:
            differing = differences(other, recorded)
            parser.error(f"argument --resume: {path} is of another kind than {paths[0]} ({differing})")
    args.resume, args.checkpoints = paths, checkpoints
    dataset.check_arguments(parser, args, args.dataset)
    args.spec = net.spec_of(parser, args, recorded, dataset.crop_of(args.dataset))
    if args.calibrate and len(args.resume) != 1:
        parser.error("argument --calibrate: the threshold is recorded in a checkpoint: give one with --resume")
    if args.calibrate and exported.is_exported(args.resume[0]):
        parser.error(
            "argument --calibrate: the threshold is recorded in a checkpoint: calibrate it and export it again"
        )
    if args.far is not None and not args.calibrate:
        parser.error("--far requires --calibrate")
    args.far = 0.01 if args.far is None else args.far
    if not 0 < args.far < 1:
        parser.error(f"argument --far: {args.far} is not between 0 and 1")
    args.command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def differences(spec: NetworkSpec | None, other: NetworkSpec | None) -> str:
    """The entries in which two specs differ."""
    records = [each.to_record() if each else {} for each in (spec, other)]
    names = [name for name in records[0] | records[1] if records[0].get(name) != records[1].get(name)]
    return ", ".join(f"{name} {records[0].get(name)} instead of {records[1].get(name)}" for name in names)


def load(checkpoint: Checkpoint, spec: NetworkSpec) -> torch.nn.Module:
    network = checkpoint.open(spec, net.from_spec)
    tensors = len(network.state_dict())
    how = f"all {tensors} tensors match" if tensors else "onnxruntime runs it on the CPU"
    print(f"Loaded {printable(str(checkpoint.path))}: {how}.")
    return network


def evaluate(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """The metrics of each checkpoint and, of several, of their mean and of all together, by the names of their rows."""
    print(hardware.describe(device))
    if args.backbone_only:
        torch.manual_seed(1)  # for --pretrained none: the same network each time, and in each process
        with collectives.rank_zero_first():
            network = net.from_spec(args.spec, args.pretrained)
        source, identity = f"{args.spec.model} alone, pretrained: {args.pretrained}", digest(network.state_dict())
        print(f"{printable(source)}; {network.embedding_size} pooled features.\n{network.model.remark}", end="")
        networks = [network]
    else:
        networks = [load(checkpoint, args.spec) for checkpoint in args.checkpoints]
        source, identity = ", ".join(args.resume), ", ".join(checkpoint.identity for checkpoint in args.checkpoints)
    embedders = [Embedder(network, device, args.amp, args.compile) for network in networks]

    spec = args.spec
    with collectives.rank_zero_first():
        choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
        test_sets = dataset.eval_sets(args.dataset, args.data_root, spec.image_size, spec.geometry, **choice)
    dataset.make_ready(test_sets, args.skip_bad_images, args.cache, args.workers)
    share = collectives.rank(), collectives.world_size()
    loaders = [dataset.eval_loader(images, args.batch_size, args.workers, share) for images in test_sets]
    if args.report and collectives.rank() == 0:
        page.open_folder(Path(args.report))  # before the work is done
    ks, distance = dataset.ALL[args.dataset].KS, spec.distance
    of_each = [[tensor for loader in loaders for tensor in embedder.embed(loader)] for embedder in embedders]
    groups = [images.groups for images in test_sets]
    results = [evaluation.measure(embedded, ks, distance, groups) for embedded in of_each]

    rows = {}
    name = args.remark or ("backbone alone" if args.backbone_only else "this checkpoint")
    embedded, result = of_each[0], results[0]
    if len(results) > 1:
        rows = {f"checkpoint {number}": result.metrics for number, result in enumerate(results, start=1)}
        rows["mean"] = {name: fmean(row[name] for row in rows.values()) for name in result.metrics}
        name = args.remark or "together"
        embedded, distance = evaluation.side_by_side(of_each), "cosine"
        result = evaluation.measure(embedded, ks, groups=groups)
    rows[name] = result.metrics
    shown = dict(rows)
    if reference := published.RESULTS.get((args.dataset, spec.model)):
        # Never the row above under the same name.
        authors = "published by the authors" if name == "published" else "published"
        shown[authors] = {f"R@{k}": recall / 100 for k, recall in reference.items()}
    print(logbook.table(shown) + "\n" + result.remark() + dataset.remark(test_sets), end="")
    if args.verify or args.calibrate or args.report:
        pairs = verification.verify(**evaluation.arguments(embedded, distance, groups), group=collectives.world())
        print(pairs.text(), end="")
    if reference and (networks[0].embedding_size, spec.image_size) != (512, 224):
        print("The published results are for 512 dimensions and 224 pixels.")
    if args.allow_partial:
        print("With --allow-partial: results on a part of the dataset do not compare with others.")

    if args.calibrate or args.report:
        embedded = evaluation.whole(embedded)
    if args.calibrate and collectives.rank() == 0:
        calibrate(args, embedded, test_sets, groups)

    if args.report and collectives.rank() == 0:
        environment = {
            "command": args.command,
            "checkpoint": source,
            "weights": identity,
            "device": hardware.describe(device),
            "versions": ", ".join(f"{name} {version}" for name, version in logbook.versions().items()),
        }
        sizes = [f"{count:,} images of {classes:,} classes" for count, classes in map(dataset.size, test_sets)]
        path = page.write(
            Path(args.report),
            f"{spec.model} on {args.dataset}",
            f"{source}; {' searched in '.join(sizes)}",
            shown,
            result,
            pairs,
            args.checkpoints[0].threshold if len(args.resume) == 1 else {},
            environment,
            *(page.TestSet(*embedded[2 * i : 2 * i + 2], images, distance) for i, images in enumerate(test_sets)),
        )
        print(f"The report is {printable(str(path))}")
    return rows


def calibrate(args: argparse.Namespace, embedded: list[torch.Tensor], test_sets: list, groups: list) -> None:
    """Choose and check a threshold, and record it in the checkpoint."""
    found = verification.calibrate(embedded, args.far, args.spec.distance, groups)
    splits = dict(zip(dataset.eval_splits(args.dataset, args.data_root), test_sets))
    data = {"dataset": args.dataset, "data": dataset.record(splits, args.data_root)["data"]}
    save_threshold(args.resume[0], found.record() | data, args.checkpoints[0].identity)
    print(f"{found.text()}The threshold is recorded in {printable(args.resume[0])}")


def main(argv=None):
    args = parse(argv)
    distributed.launch_on_all_gpus(args.gpu_id, __file__, argv)
    with cli.errors_in_one_line("evaluate.py"), distributed.processes(args.gpu_id) as device:
        rows = evaluate(args, device)
    return rows if len(args.resume) > 1 else next(iter(rows.values()))


if __name__ == "__main__":
    main()
