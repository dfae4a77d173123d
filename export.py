"""Export a checkpoint as ONNX or safetensors, checked to give the same embeddings."""

from __future__ import annotations

import argparse
import shlex
import sys
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import dataset
import net
from dataset.folder import images_at
from proxy_anchor import cli, metrics
from proxy_anchor.files import locked, quantity, replacing
from proxy_anchor.report import card
from proxy_anchor.runs import logbook
from proxy_anchor.spec import NetworkSpec

if TYPE_CHECKING:  # functions import them: --help does not wait for them
    import torch

    from net.backbone import Backbone

CHECKED = 64  # images, spread over all of them
BATCHES = (1, 7, 64)  # sizes of batches that the file is run with
TOLERANCE = {False: 1e-5, True: 1e-3}  # of exported.difference, by --fp16
EXAMPLES = """examples:
  checked and measured on the dataset:
    python export.py --dataset cub --resume logs/logs_cub/RUN --out cub.onnx
  without the dataset, checked with other images:
    python export.py --resume cub_resnet50_best.pth --check photos --out cub.onnx
  half the size, and what that costs:
    python export.py --dataset cub --resume cub_resnet50_best.pth --fp16 --out cub_half.onnx
"""


def options() -> argparse.ArgumentParser:
    """Command-line flags of the export."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("export")
    group.add_argument("--resume", required=True, metavar="PATH", help="checkpoint to export, or the folder of its run")
    group.add_argument(
        "--out",
        required=True,
        type=cli.path,
        metavar="FILE",
        help="file to write, ending in .onnx or .safetensors; a model card is written next to it (for model.onnx: "
        "model-card.md)",
    )
    group.add_argument(
        "--check",
        type=cli.path,
        metavar="DIR",
        help="check the file with the images in this folder, instead of checking and measuring it on --dataset",
    )
    group.add_argument(
        "--fp16", action="store_true", help="weights in half precision: half the size; prints the loss in recall"
    )
    return parser


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        usage="export.py --resume PATH --out FILE [--flag value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=cli.HelpFormatter,
        parents=[
            options(),
            dataset.options(training=False, without=("--skip-bad-images", "--cache", "--batch-size", "--workers")),
            net.options(training=False, without=("--image-size", "--backbone-only", "--pretrained")),
        ],
    )
    args = parser.parse_args(argv)
    from proxy_anchor import exported
    from proxy_anchor.checkpoint import Checkpoint, in_run

    with cli.errors_in_one_line("export.py"):
        args.resume = in_run(args.resume)
        args.checkpoint = Checkpoint(args.resume)
    if not args.check:
        dataset.check_arguments(parser, args, args.dataset)
    args.spec = net.spec_of(parser, args, args.checkpoint.spec, dataset.crop_of(args.dataset))
    if Path(args.resume).suffix == ".onnx":
        parser.error(f"argument --resume: {args.resume} is exported already; give its checkpoint")
    if not exported.is_exported(args.out):
        parser.error(f"argument --out: {args.out} must end in {' or '.join(exported.ENDINGS)}")
    if not Path(args.out).parent.is_dir():
        parser.error(f"argument --out: there is no folder {Path(args.out).parent}")
    if args.fp16 and args.check:
        parser.error("argument --fp16: what it costs is measured on --dataset, without --check")
    args.command = shlex.join(["python", "export.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def export(args: argparse.Namespace) -> None:
    from proxy_anchor import exported

    out = Path(args.out)
    card.check(out)
    network = args.checkpoint.open(args.spec, net.from_spec)
    reference = exported.InferenceNet(network, args.spec.distance)
    record = describe(args, network.model)
    choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
    geometry = args.spec.image_size, args.spec.geometry
    test_sets = [] if args.check else dataset.eval_sets(args.dataset, args.data_root, *geometry, **choice)
    images = images_to_check(args, test_sets)

    copy = deepcopy(reference)
    if args.fp16:
        exported.halve(copy.network)
    count = len(images.unique(dim=0))  # not those taken several times
    checked = quantity(count, "image")
    with replacing(out) as file:
        exported.save(file, out.suffix, copy, args.spec.image_size, record)
        difference = check(open_file(file, out.suffix, args.spec), reference, images)
        if not difference <= TOLERANCE[args.fp16]:  # or it is not a number
            raise ValueError(
                f"{out} is not written: its embeddings of {checked} differ by up to {difference:.1g} from "
                f"those of {args.resume}; at most {TOLERANCE[args.fp16]:g} are allowed"
            )
        card.path(out).unlink(missing_ok=True)  # of an earlier file
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB. Its embeddings of {checked} differ by at most "
        f"{difference:.1g} from those of the checkpoint, in batches of {', '.join(map(str, BATCHES))}."
    )

    measured = measure(open_file(out, out.suffix, args.spec), reference, test_sets, args) if test_sets else ""
    with replacing(card.path(out)) as file:
        text = card.text(out, record, measured, net.license_of(args.spec.model), args.resume)
        file.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may be of any bytes
    print(f"Its card is {card.path(out)}")


def describe(args: argparse.Namespace, backbone: Backbone) -> dict:
    """The record of the file, see code/exported.py."""
    from dataset import transforms

    record = {
        "network": args.spec.to_record(),
        "preprocessing": transforms.recipe(args.spec.image_size, **args.spec.geometry),
        "normalization": {
            "channels": "BGR" if backbone.bgr else "RGB",
            "largest": 255 if backbone.bgr else 1,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "weights": "float16" if args.fp16 else "float32",
        "source": args.checkpoint.identity,
        "versions": logbook.versions(),
    }
    calibration = args.checkpoint.calibration
    return record | ({"threshold": calibration.to_record()} if calibration else {})


def images_to_check(args: argparse.Namespace, test_sets: list[dataset.ImageDataset]) -> torch.Tensor:
    """Images (n, 3, S, S) as evaluation sees them, spread over the folder of --check or the first test set."""
    import numpy as np
    import torch

    images = dataset.unlabelled(images_at(args.check), args.spec) if args.check else test_sets[0]
    chosen = np.linspace(0, len(images) - 1, CHECKED).round().astype(int)  # of fewer, some several times
    return torch.stack([images[i][0] for i in chosen])


def open_file(path: Path, ending: str, spec: NetworkSpec) -> torch.nn.Module:
    """The network in a file that was just written, from pixels to embeddings."""
    from proxy_anchor import exported
    from proxy_anchor.weights import read_safetensors

    if ending == ".onnx":
        return exported.OnnxNet(path, path.read_bytes(), spec.image_size, spec.embedding_size)
    network = net.from_spec(spec)
    network.load_state_dict(read_safetensors(path)[1])
    return exported.InferenceNet(network, spec.distance)


def check(file: torch.nn.Module, reference: torch.nn.Module, images: torch.Tensor) -> float:
    """How far the file's embeddings are from the network's, see exported.difference, in batches of several sizes."""
    import torch

    from proxy_anchor import exported

    with torch.inference_mode():
        expected = reference(images)
        embeddings = [torch.cat([file(batch) for batch in images.split(size)]) for size in BATCHES]
    return exported.difference(torch.cat(embeddings), expected.repeat(len(BATCHES), 1))


def measure(file: torch.nn.Module, reference: torch.nn.Module, test_sets: list[dataset.ImageDataset], args) -> str:
    """Print the metrics of the file and, with --fp16, of the network; returns them for the card."""
    import torch

    from proxy_anchor import evaluation
    from proxy_anchor.embedding import Embedder

    networks = {"checkpoint": reference} if args.fp16 else {}
    rows = {}
    for name, network in (networks | {Path(args.out).name: file}).items():
        loaders = [dataset.eval_loader(images, BATCHES[-1], dataset.WORKERS) for images in test_sets]
        embedder, ks = Embedder(network, torch.device("cpu")), dataset.ALL[args.dataset].KS
        rows[name] = evaluation.evaluate(embedder, loaders, ks, distance=args.spec.distance).metrics
    print(metrics.table(rows))
    splits = dataset.describe(dict(zip(dataset.eval_splits(args.dataset, args.data_root), test_sets)))
    paragraphs = [f"Measured by the export with this file, on {args.dataset} ({splits}):", card.table(rows)]
    if args.fp16:
        recalls = [row["R@1"] for row in rows.values()]
        paragraphs.append(f"Half precision costs {100 * (recalls[0] - recalls[1]):.2f} points of R@1.")
        print(paragraphs[-1])
    return "\n\n".join([*paragraphs, f"Command: `{args.command}`"])


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    # All files of a stem have one card.
    with cli.errors_in_one_line("export.py"), locked(out.with_name(out.stem)):
        export(args)


if __name__ == "__main__":
    main()
