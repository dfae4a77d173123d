"""Search images by what they show: embed them with a checkpoint into an index, then find the neighbours of others."""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

import dataset
import net
from dataset import transforms
from dataset.files import read_image
from dataset.folder import images as images_in
from dataset.transforms import Normalize
from proxy_anchor import checkpoint, console, device, evaluation, figures
from proxy_anchor.index import IMAGES, RECALL_AT, Index, lock

EXAMPLES = """examples:
  python search.py index --resume RUN/cub_bn_inception_best.pth --images photographs --out photographs.index
  python search.py query --index photographs.index new.jpg --save neighbours.png
"""


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="search.py", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=console.HelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="index|query")
    form = {
        "parents": [device.options(), console.options()],
        "allow_abbrev": False, "formatter_class": console.HelpFormatter,
    }  # fmt: skip

    make = commands.add_parser(
        "index", help="embed images into an index",
        usage="search.py index --resume PATH (--images DIR | --split NAME) --out INDEX [--flag value ...]",
        epilog=EXAMPLES,
        description="Embed images with a checkpoint into an index; one that exists gets those that it lacks.",
        **form | {"parents": [dataset.options(training=False), net.options(training=False), *form["parents"]]},
    )  # fmt: skip
    group = make.add_argument_group("index")
    group.add_argument("--resume", required=True, metavar="PATH", help="checkpoint that embeds")
    group.add_argument("--images", metavar="DIR", help="folder of images, with the folders in it")
    group.add_argument("--split", metavar="NAME", help="in place of a folder, this split of --dataset")
    group.add_argument("--out", required=True, metavar="INDEX", help="folder of the index")
    group.add_argument(
        "--index-factory", metavar="STRING",
        help="kind of index, in FAISS's words, e.g. IVF256,Flat for millions of images; without it, exact search",
    )  # fmt: skip

    ask = commands.add_parser(
        "query", help="find the neighbours of images",
        usage="search.py query --index INDEX [--flag value ...] IMAGE [IMAGE ...]", epilog=EXAMPLES,
        description="Print the images of an index that are the most similar to each of these.", **form,
    )  # fmt: skip
    group = ask.add_argument_group("query")
    group.add_argument("images", nargs="+", metavar="IMAGE", help="image, or folder of images")
    group.add_argument("--index", required=True, metavar="INDEX", help="folder that `search.py index` wrote")
    group.add_argument("--resume", metavar="PATH", help="the checkpoint of the index, if it has moved")
    group.add_argument("--neighbours", "-k", default=10, type=int, metavar="K", help="how many for each image")
    group.add_argument("--json", action="store_true", help="print JSON in place of a table")
    group.add_argument("--save", metavar="FILE", help="draw the images and their neighbours, e.g. neighbours.png")
    group.add_argument(
        "--batch-size", default=32, type=int, metavar="N", help="images a step; lower it when memory runs out"
    )
    group.add_argument(
        "--workers", default=0, type=int, metavar="N", help="processes that read images; for thousands of queries"
    )

    args = parser.parse_args(argv)
    if args.command == "index":
        with console.errors_in_one_line("search.py", args.debug):
            record = checkpoint.record(args.resume)
        args = console.parse_with_record(parser, argv, record, at=1)
        net.check_arguments(parser, args)
        if bool(args.images) == bool(args.split):
            parser.error("what to index: --images DIR, or --dataset NAME --split SPLIT")
    console.check_ranges(parser, args)
    return args


def add_images(args: argparse.Namespace) -> None:
    """Embed the images that the index does not have yet, and add them to it."""
    made = {
        "checkpoint": os.path.abspath(args.resume),
        "sha256": checkpoint.identity(args.resume),
        "network": {name: getattr(args, name) for name in checkpoint.RECORD},
    }
    folder = Path(args.out)
    with lock(folder):
        if (folder / IMAGES).exists():
            index = Index.open(folder)
            index.check(made, args.index_factory)
        else:
            index = Index.new(folder, made, args.index_factory or "Flat")
        images = images_to_index(args)
        known = set(index.paths)
        images.leave_out(known)
        print(f"{len(known):,} images are in {folder}, {len(images):,} are new")
        if args.skip_bad_images:
            console.leave_out_bad(images, lambda images: dataset.bad_images(images, args.workers))
        if len(images) == 0:
            return
        if args.cache:
            images.use_cache(args.cache, args.workers, console.progress, report=print)
        embeddings = embed(images, made["network"], args.resume, args)
        index.add(images.paths, embeddings)
        print(f"Indexed {len(images):,} images")
        if not known and index.factory != "Flat":
            print(f"{index.factory} finds {index.recall(embeddings):.1%} of the {RECALL_AT} nearest images")


def images_to_index(args: argparse.Namespace) -> dataset.ImageDataset:
    if args.split:
        choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
        transform = transforms.evaluation(args.image_size)
        images = dataset.load(args.dataset, args.data_root, args.split, transform, **choice)
    else:
        images = unlabelled(images_at(args.images), args.image_size)
    images.paths = [os.path.abspath(path) for path in images.paths]  # they are looked for from anywhere
    return images


def images_at(place: str) -> list[str]:
    """The image files at a place: itself, or those in a folder. Raises FileNotFoundError where there are none."""
    if not os.path.exists(place):
        raise FileNotFoundError(f"There is no {place}")
    found = images_in(Path(place)) if os.path.isdir(place) else [place]
    if not found:
        raise FileNotFoundError(f"There are no images in {place}")
    return found


def unlabelled(paths: list[str], image_size: int) -> dataset.ImageDataset:
    """Images without labels, as evaluation sees them."""
    return dataset.ImageDataset(paths, np.zeros(len(paths), dtype=int), [""], transforms.evaluation(image_size))


def embed(images: dataset.ImageDataset, record: dict, path: str, args: argparse.Namespace) -> torch.Tensor:
    """Embeddings (N, D) of the images by the checkpoint at this path, whose network is that of the record."""
    gpu = device.select(args.gpu_id)
    network = net.create(record["model"], record["embedding_size"], pretrained=None, l2_norm=bool(record["l2_norm"]))
    checkpoint.load(path, device.place(network, gpu))
    if args.compile:
        network.compile()
    loader = dataset.eval_loader(images, args.batch_size, args.workers)
    batches = device.feed(console.progress(loader, "embedding"), gpu, Normalize(network.bgr).to(gpu))
    embeddings, _ = evaluation.embed(network, batches, len(images), device.Precision(args.amp, gpu))
    return embeddings


def query(args: argparse.Namespace) -> None:
    """Print the neighbours of each image."""
    index = Index.open(Path(args.index))
    network = index.made["network"]
    path = args.resume or index.made["checkpoint"]
    index.check({"sha256": checkpoint.identity(path), "network": network, "checkpoint": path})
    images = unlabelled([path for place in args.images for path in images_at(place)], network["image_size"])
    found = index.search(embed(images, network, path, args), args.neighbours)
    if args.json:
        print(json.dumps([
            {"query": path, "neighbours": [{"path": other, "similarity": value} for other, value in neighbours]}
            for path, neighbours in zip(images.paths, found)
        ], indent=1))  # fmt: skip
    else:
        for path, neighbours in zip(images.paths, found):
            print(path)
            for place, (other, value) in enumerate(neighbours, start=1):
                print(f"{place:>4}  {value:.4f}  {other}")
    if args.save:
        rows = [
            [(path, "query"), *((other, f"{value:.3f}") for other, value in neighbours)]
            for path, neighbours in zip(images.paths, found)
        ]
        figures.draw_images(rows, read_image, Path(args.save))
        print(f"The picture is {args.save}", file=sys.stderr)


def main(argv=None):
    args = parse(argv)
    with console.errors_in_one_line("search.py", args.debug):
        (add_images if args.command == "index" else query)(args)


if __name__ == "__main__":
    main()
