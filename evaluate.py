"""Measure Recall@K of a checkpoint, or of a backbone before training; write a report; calibrate a threshold."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import dataset
import net
from proxy_anchor import cli, hardware, metrics
from proxy_anchor.files import printable
from proxy_anchor.runs import logbook
from proxy_anchor.spec import Calibration, NetworkSpec

if TYPE_CHECKING:  # functions import them, with torch: --help does not wait for them
    import torch

    from proxy_anchor import evaluation
    from proxy_anchor.checkpoint import Checkpoint
    from proxy_anchor.collectives import Processes
    from proxy_anchor.thresholds import identification, verification
    from proxy_anchor.vectors import Embeddings

EXAMPLES = """examples:
  a published checkpoint:
    python evaluate.py --dataset cub --model bn_inception --embedding-size 512 --resume cub_bn_inception_best.pth
  a checkpoint of train.py, which records its network; with a report:
    python evaluate.py --dataset cub --resume logs/logs_cub/RUN --report report
  the networks of four folds, one by one and together:
    python evaluate.py --dataset cub --resume A.pth B.pth C.pth D.pth
  what a pretrained backbone can do before it is trained:
    python evaluate.py --dataset cub --model resnet50 --backbone-only
  choose the similarity that a known thing has to reach, for 1% of unknown queries that match, and record it:
    python evaluate.py --dataset cub --resume logs/logs_cub/RUN --calibrate 0.01
"""


def options() -> argparse.ArgumentParser:
    """Command-line flags of the evaluation."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--resume",
        nargs="+",
        metavar="PATH",
        default=[],
        help="checkpoint to evaluate, the folder of its run, or its .onnx or .safetensors file; those of train.py "
        "record --model, --embedding-size, --image-size and --l2-norm. Several of the same kind, such as those of "
        "folds, are evaluated one by one and together",
    )
    group.add_argument("--remark", default="", help="name of the checkpoint's row in the table")
    group.add_argument(
        "--report",
        type=cli.path,
        metavar="DIR",
        help="write a web page with queries, classes, similarities and a map to this folder",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="also print how well a threshold tells same-class from different-class pairs of images, and known from "
        "unknown queries, and how well images are sorted into things; takes five times as long as the recalls (implied "
        "by --calibrate and --report)",
    )
    cli.add_calibrate(
        group,
        "choose the threshold that at most this share (0.05 if not given) of unknown queries reach, those whose "
        "class is not in the gallery, and the one for `search.py group`; they are chosen on half of the classes, "
        "checked on the other half, and recorded in the checkpoint, for search.py",
    )
    return parser


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        usage="evaluate.py (--resume PATH | --backbone-only) [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=cli.HelpFormatter,
        parents=[
            options(),
            dataset.options(training=False, without=("--cache",)),
            net.options(training=False),
            hardware.options(without=("--compile",)),
        ],
    )
    args = parser.parse_args(argv)
    net.check_weights(parser, args)
    from proxy_anchor.checkpoint import Checkpoint, in_run
    from proxy_anchor.exported import is_exported

    with cli.errors_in_one_line("evaluate.py"):
        paths = [in_run(path) for path in args.resume]
        checkpoints = [Checkpoint(path) for path in paths]
    recorded, *others = [checkpoint.spec for checkpoint in checkpoints] or [None]
    for path, other in zip(paths[1:], others):
        if other != recorded:
            differing = other.differences(recorded) if other and recorded else "only one records its network"
            parser.error(f"argument --resume: {path} is of another kind than {paths[0]} ({differing})")
    args.resume, args.checkpoints = paths, checkpoints
    dataset.check_arguments(parser, args, args.dataset)
    args.spec = net.spec_of(parser, args, recorded, dataset.crop_of(args.dataset))
    if args.calibrate and len(args.resume) != 1:
        parser.error("argument --calibrate: the threshold is recorded in a checkpoint: give one with --resume")
    if args.calibrate and is_exported(args.resume[0]):
        parser.error(
            "argument --calibrate: the threshold is recorded in a checkpoint: calibrate it and export it again"
        )
    args.verify = bool(args.verify or args.calibrate or args.report)
    args.command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def load(checkpoint: Checkpoint, spec: NetworkSpec) -> torch.nn.Module:
    """The network of a checkpoint or an exported file; prints what was loaded."""
    path = printable(str(checkpoint.path))
    if Path(checkpoint.path).suffix == ".onnx":
        print(f"Loaded {path}: onnxruntime runs it on the CPU.")
        return checkpoint.open(spec, net.from_spec)
    network = net.from_spec(spec)
    print(f"Loaded {path}: all {checkpoint.load(network)} tensors match.")
    return network


def open_networks(args: argparse.Namespace) -> tuple[list[torch.nn.Module], str, str]:
    """The networks to evaluate, where they come from, and the identity of their weights."""
    import torch

    from proxy_anchor import collectives
    from proxy_anchor.weights import digest

    if not args.backbone_only:
        networks = [load(checkpoint, args.spec) for checkpoint in args.checkpoints]
        return networks, ", ".join(args.resume), ", ".join(checkpoint.identity for checkpoint in args.checkpoints)
    torch.manual_seed(1)  # for --pretrained none: the same network each time, and in each process
    with collectives.rank_zero_first():
        network = net.from_spec(args.spec, args.pretrained)
    source = f"{args.spec.model} alone, pretrained: {args.pretrained}"
    print(f"{printable(source)}; {network.embedding_size} pooled features.\n{network.model.remark}", end="")
    return [network], source, digest(network.state_dict())


def open_test_sets(args: argparse.Namespace) -> list[dataset.ImageDataset]:
    """The test images or, for some datasets, the queries and the gallery."""
    from proxy_anchor import collectives

    spec = args.spec
    with collectives.rank_zero_first():
        choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
        test_sets = dataset.eval_sets(args.dataset, args.data_root, spec.image_size, spec.geometry, **choice)
    if args.skip_bad_images:
        dataset.leave_out_bad(test_sets, args.workers, collectives.from_rank_zero)
    return test_sets


@dataclass
class Measurement:
    """The embeddings and the result of one network, or of several together, and the metrics of each row to print."""

    queries: Embeddings
    gallery: Embeddings | None
    distance: str
    result: evaluation.Result
    rows: dict[str, dict[str, float]]

    @property
    def images(self) -> Embeddings:
        """Queries and gallery together."""
        from proxy_anchor.vectors import concat_rows

        return concat_rows(self.queries, self.gallery)

    def all_gather(self, processes: Processes) -> Measurement:
        """With the embeddings of all processes."""
        gallery = None if self.gallery is None else all_gather(self.gallery, processes)
        return replace(self, queries=all_gather(self.queries, processes), gallery=gallery)


def all_gather(embeddings: Embeddings, processes: Processes) -> Embeddings:
    """The rows of all processes, in each of them."""
    import torch

    from proxy_anchor.vectors import Embeddings

    return Embeddings(**{k: torch.cat(processes.all_gather(x)) for k, x in vars(embeddings).items() if x is not None})


def measure(args: argparse.Namespace, networks: list[tuple[Embeddings, Embeddings | None]]) -> Measurement:
    """Measure the networks one by one and, if there are several, their embeddings as those of one network."""
    from proxy_anchor import evaluation
    from proxy_anchor.vectors import concat_columns

    ks = dataset.ALL[args.dataset].KS
    results = [evaluation.measure(queries, ks, gallery, args.spec.distance) for queries, gallery in networks]
    if len(networks) == 1:
        name = args.remark or ("backbone alone" if args.backbone_only else "this checkpoint")
        return Measurement(*networks[0], args.spec.distance, results[0], {name: results[0].metrics})
    rows = {f"checkpoint {number}": result.metrics for number, result in enumerate(results, start=1)}
    rows["mean"] = {name: fmean(row[name] for row in rows.values()) for name in results[0].metrics}
    queries = concat_columns([queries for queries, _ in networks])
    galleries = [gallery for _, gallery in networks if gallery is not None]
    gallery = concat_columns(galleries) if galleries else None
    result = evaluation.measure(queries, ks, gallery, "cosine")
    return Measurement(queries, gallery, "cosine", result, rows | {args.remark or "together": result.metrics})


def evaluate(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """The metrics of each checkpoint and, if there are several, of their mean and of all together, by row."""
    from proxy_anchor import collectives, evaluation
    from proxy_anchor.embedding import Embedder
    from proxy_anchor.report import page
    from proxy_anchor.thresholds import grouping, identification, verification
    from proxy_anchor.vectors import to_nearness

    print(hardware.describe(device))
    networks, source, weights = open_networks(args)
    embedders = [Embedder(network, device, args.amp) for network in networks]
    test_sets = open_test_sets(args)
    processes = collectives.world()
    share = processes.rank, processes.size
    loaders = [dataset.eval_loader(images, args.batch_size, args.workers, share) for images in test_sets]
    is_recorded = args.verify and len(args.resume) == 1 and not args.calibrate
    calibration = args.checkpoints[0].calibration if is_recorded else None  # before the work is done
    if args.report and collectives.rank() == 0:
        page.open_folder(Path(args.report))

    measured = measure(args, [evaluation.embed(embedder, loaders) for embedder in embedders])
    table = dict(measured.rows)
    if reference := metrics.PUBLISHED.get((args.dataset, args.spec.model)):
        name = "published by the authors" if "published" in table else "published"  # a remark may be this, too
        table[name] = {f"R@{k}": recall / 100 for k, recall in reference.items()}
    print(metrics.table(table) + "\n" + measured.result.remark() + dataset.remark(test_sets), end="")
    if args.verify:
        sides = measured.queries, measured.gallery, measured.distance
        identified = identification.identify(*sides, processes=processes)
        limits = [to_nearness(calibration.at(identified.size), measured.distance)] if calibration else []
        pairs = verification.verify(*sides, thresholds=limits, processes=processes)
        print(pairs.text(), end="")
        if pairs.auc:
            print(identified.text(), end="")
    if reference and (networks[0].embedding_size, args.spec.image_size) != (512, 224):
        print("The published results are for 512 dimensions and 224 pixels.")
    if args.allow_partial:
        print("With --allow-partial, only a part of the dataset was evaluated: do not compare the results with others.")

    if args.verify:
        measured = measured.all_gather(processes)
    if args.calibrate and collectives.rank() == 0:
        calibration = calibrate(args, measured, test_sets)
    if calibration and pairs.auc:
        limit = to_nearness(calibration.at(identified.size), measured.distance)
        print(identified.spread(limit, test_sets[0].classes), end="")
    things = ""
    if args.verify and pairs.auc and collectives.rank() == 0:
        things = grouping.describe(measured.images, measured.distance, calibration.groups if calibration else None)
        print(things, end="")
    if args.report and collectives.rank() == 0:
        environment = {"checkpoint": source, "weights": weights, "device": hardware.describe(device)}
        write_report(args, measured, (pairs, identified, things), calibration, table, test_sets, environment)
    return measured.rows


def calibrate(args: argparse.Namespace, measured: Measurement, test_sets: list[dataset.ImageDataset]) -> Calibration:
    """Choose and check a threshold, and record it in the checkpoint."""
    from proxy_anchor.checkpoint import save_calibration
    from proxy_anchor.index import clustering
    from proxy_anchor.thresholds import identification

    calibration = identification.calibrate(measured.queries, args.calibrate, measured.gallery, measured.distance)
    splits = dict(zip(dataset.eval_splits(args.dataset, args.data_root), test_sets))
    data = dataset.record(splits, args.data_root)["data"]
    chosen, _ = identification.halves(measured.images.labels)
    groups = clustering.best_threshold(measured.images.of_classes(chosen), measured.distance)
    calibration = replace(calibration, dataset=args.dataset, data=data, groups=groups)
    save_calibration(args.resume[0], calibration, args.checkpoints[0].identity)
    print(f"{identification.describe(calibration)}The threshold is recorded in {printable(args.resume[0])}")
    return calibration


def write_report(
    args: argparse.Namespace,
    measured: Measurement,
    verified: tuple[verification.Verification, identification.Identification, str],
    calibration: Calibration | None,
    rows: dict[str, dict[str, float]],
    test_sets: list[dataset.ImageDataset],
    environment: dict[str, str],
) -> None:
    from proxy_anchor.report import page

    pairs, identified, things = verified
    sizes = [f"{count:,} images of {classes:,} classes" for count, classes in map(dataset.size, test_sets)]
    versions = ", ".join(f"{name} {version}" for name, version in logbook.versions().items())
    embeddings = [side for side in (measured.queries, measured.gallery) if side is not None]
    path = page.write(
        Path(args.report),
        f"{args.spec.model} on {args.dataset}",
        f"{environment['checkpoint']}; {' searched in '.join(sizes)}, in {args.data_root}",
        rows,
        measured.result,
        pairs,
        identified,
        calibration,
        {"command": args.command} | environment | {"versions": versions},
        *(page.TestSet(side, images, measured.distance) for side, images in zip(embeddings, test_sets)),
        sorted_into_things=things,
    )
    print(f"The report is {printable(str(path))}")


def main(argv=None):
    args = parse(argv)
    hardware.launch_on_all_gpus(args.gpu_id, __file__, argv)
    with cli.errors_in_one_line("evaluate.py"), hardware.processes(args.gpu_id) as device:
        rows = evaluate(args, device)
    return rows if len(args.resume) > 1 else next(iter(rows.values()))


if __name__ == "__main__":
    main()
