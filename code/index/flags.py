"""The command-line flags of search.py."""

import argparse
import math
from pathlib import Path

from proxy_anchor import cli

PORT = 7860  # of the page


def index_options() -> argparse.ArgumentParser:
    """Command-line flags of `search.py index`."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("index")
    group.add_argument(
        "--resume", metavar="PATH", help="checkpoint to embed with, the folder of its run, or its .onnx or .safetensors"
    )
    group.add_argument("--images", metavar="DIR", help="folder of images, subfolders included")
    group.add_argument("--split", metavar="NAME", help="instead of a folder: a split of --dataset")
    group.add_argument(
        "--vectors",
        type=cli.path,
        metavar="PATH",
        help="instead of images: their vectors, in a .parquet file of `search.py export`, in all of a folder, or in a "
        ".npy file, float32 (N, D), with --paths and the network",
    )
    group.add_argument(
        "--paths", type=cli.path, metavar="FILE", help="the paths of a .npy file of --vectors, one per line, or as .npy"
    )
    group.add_argument(
        "--by-folder",
        action="store_true",
        help="one entry per folder: the mean of the embeddings of the images directly in it",
    )
    group.add_argument("--out", required=True, type=cli.path, metavar="INDEX", help="folder to write the index to")
    cli.add_calibrate(
        group,
        "if each folder shows one thing: leave each out in turn to choose the threshold that at most this share "
        "(0.05 if not given) of unknown queries reach, and store it in the index, with the one for `search.py group`",
    )
    group.add_argument(
        "--drop-missing",
        action="store_true",
        help="also drop images whose whole folder is gone or empty; without it they stay, as the disk of that folder "
        "may not be mounted; with --vectors: drop images that are gone and that the files do not list",
    )
    group.add_argument(
        "--moved-from",
        type=cli.path,
        metavar="DIR",
        help="the former folder of the images, if they have moved: those of the same size and modification time keep "
        "their vectors",
    )
    group.add_argument(
        "--index-factory",
        metavar="STRING",
        help="FAISS factory string, e.g. IVF1024,RaBitQ for millions of images; without it, search is exact",
    )
    group.add_argument(
        "--float16",
        dest="dtype",
        action="store_const",
        const="float16",
        help="store the vectors of a new index in half the bytes: similarities are then off by up to 0.0005, "
        "and distances by 0.0005 of the vectors' length",
    )
    return parser


def query_options() -> argparse.ArgumentParser:
    """Command-line flags of `search.py query`."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("query")
    group.add_argument("images", nargs="+", metavar="IMAGE", help="image, or folder of images")
    opening_options(group)
    group.add_argument(
        "--threshold",
        type=threshold,
        metavar="T",
        help="list only neighbours with at least this similarity (at most this distance), or say 'no match'; 'none' "
        "lists all (default: that of `search.py index --calibrate` or, for images, of evaluate.py --calibrate)",
    )
    group.add_argument("--by-folder", action="store_true", help="one query per folder: the mean of its images")
    group.add_argument("--json", action="store_true", help="print JSON instead of a table")
    group.add_argument(
        "--save", type=cli.path, metavar="FILE", help="draw the images and their neighbours, e.g. neighbours.png"
    )
    return parser


def group_options() -> argparse.ArgumentParser:
    """Command-line flags of `search.py group`."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("group")
    group.add_argument(
        "images", type=cli.path, metavar="INDEX|DIR", help="an index or, with a network, a folder of images"
    )
    group.add_argument(
        "--resume",
        metavar="PATH",
        help="for a folder: checkpoint to embed with, the folder of its run, or its .onnx or .safetensors",
    )
    group.add_argument(
        "--out",
        required=True,
        type=ending(".csv"),
        metavar="CSV",
        help="file to write the path of each image and the number of its thing to, e.g. groups.csv; 1 is the largest",
    )
    group.add_argument(
        "--page", type=ending(".html"), metavar="HTML", help="also write a page of contact sheets, e.g. groups.html"
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--things", type=cli.integer(1), metavar="N", help="sort into this many things, without a threshold"
    )
    either.add_argument(
        "--threshold",
        type=cli.finite,
        metavar="T",
        help="groups of images are one thing from this mean similarity on (up to this root-mean-square distance; "
        "default: that of `search.py index --calibrate` or of evaluate.py --calibrate)",
    )
    return parser


def export_options() -> argparse.ArgumentParser:
    """Command-line flags of `search.py export`."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("export")
    group.add_argument("index", type=cli.path, metavar="INDEX", help="folder that `search.py index` wrote")
    group.add_argument(
        "out",
        type=ending(".parquet"),
        metavar="PARQUET",
        help="file to write, e.g. vectors.parquet: a row with path, folder and vector for each entry",
    )
    group.add_argument(
        "--resume", metavar="PATH", help="the checkpoint of the index, if it has moved: its threshold is recorded"
    )
    return parser


def serve_options() -> argparse.ArgumentParser:
    """Command-line flags of `search.py serve`."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("serve")
    opening_options(group)
    group.add_argument(
        "--port", default=PORT, type=cli.integer(0, 65535), metavar="N", help="port of the page; 0 takes any free one"
    )
    return parser


def ending(suffix: str):
    """The type of a flag for a file to write; its ending keeps it from replacing photographs and files of an index."""

    def parse(text: str) -> str:
        if not text.lower().endswith(suffix):
            raise argparse.ArgumentTypeError(f"expected a name that ends in {suffix}, found '{text}'")
        if not Path(text).parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}")
        if Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder, expected a file to write")
        return text

    return parse


def opening_options(group) -> None:
    """The flags that `query` and `serve` open an index with."""
    group.add_argument(
        "--index", required=True, type=cli.path, metavar="INDEX", help="folder that `search.py index` wrote"
    )
    group.add_argument("--resume", metavar="PATH", help="the checkpoint or weights of the index, if they have moved")
    group.add_argument("--neighbours", "-k", default=10, type=cli.integer(1), metavar="K", help="neighbours per image")
    group.add_argument(
        "--nprobe",
        type=cli.integer(1),
        metavar="N",
        help="cells to search in an IVF index (default: 1); more cells find more neighbours and take longer",
    )


def threshold(text: str) -> float | str:
    """The value of --threshold. Raises ValueError unless it is a finite number or 'none'."""
    if text == "none" or math.isfinite(float(text)):
        return text if text == "none" else float(text)
    raise ValueError
