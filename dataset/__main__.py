"""Check a dataset, or prepare one from its archives."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_anchor import cli
from proxy_anchor.files import printable, quantity

from . import ALL, BENCHMARKS, WORKERS, check_arguments, files, load, names, prepare, splits

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    from .check import Image
    from .images import ImageDataset

SHOWN = 10  # problems of each kind


EXAMPLES = """examples:
  counts, sizes, unreadable files, images in both training and test:
    python -m dataset check cub
  verify an archive, extract it, then check the dataset:
    python -m dataset prepare cub CUB_200_2011.tgz
"""


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m dataset",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=cli.HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|prepare")
    check = commands.add_parser(
        "check",
        help="check every image",
        description="Decode every image; report counts, sizes, damaged files and duplicates.",
        allow_abbrev=False,
    )
    check.set_defaults(archives=[])
    check.add_argument("name", choices=ALL, help="the dataset")
    check.add_argument(
        "--data-root",
        type=cli.path,
        metavar="DIR",
        help="folder of the datasets (default: data/ in this repository); for folder and csv, the folder or the file",
    )
    check.add_argument(
        "--workers",
        default=WORKERS,
        type=cli.integer(0),
        metavar="N",
        help="processes that read images, 0 for none (default: as many as there are CPU cores, at most 4)",
    )
    check.add_argument(
        "--test-classes", type=cli.path, metavar="FILE", help="with folder: a file with the names of the test classes"
    )
    make = commands.add_parser(
        "prepare",
        help="extract the archives of a dataset",
        description="Verify the archives of a dataset, extract them into its folder, and check the result.",
        allow_abbrev=False,
    )
    make.add_argument("name", choices=prepare.LAYOUTS, help="the dataset")
    make.add_argument(
        "--data-root", type=cli.path, metavar="DIR", help="folder to extract into (default: data/ in this repository)"
    )
    make.set_defaults(test_classes=None, workers=WORKERS)
    make.add_argument(
        "archives", nargs="+", type=Path, metavar="ARCHIVE", help="tar or zip archive, or single file, e.g. a list"
    )
    args = parser.parse_args(argv)
    check_arguments(parser, args, args.name)
    return args


def run_prepare(name: str, root: str, archives: list[Path]) -> None:
    from proxy_anchor.progress import progress

    folder = BENCHMARKS[name].FOLDER
    for _ in progress(prepare.prepare(name, Path(root), folder, archives), "extracting", unit="file"):
        pass
    print(f"Laid out in {Path(root) / folder}")


def checksum_warning(archives: list[Path]) -> str:
    """A line on archives with the names of published files but other checksums; empty if there are none."""
    changed = [str(archive) for archive in archives if archive.is_file() and prepare.checksum_differs(archive)]
    if not changed:
        return ""
    return (
        f"Warning: the checksum differs from the published file's: {', '.join(changed)}. Likely cause: an incomplete "
        "download, or a repacked copy\n"
    )


def run_check(name: str, root: str, workers: int, test_classes: str | None) -> int:
    """Print statistics and problems of the dataset; returns the number of problems."""
    from proxy_anchor.progress import progress

    from .check import in_several, inspect, with_several_labels
    from .duplicates import available
    from .images import remark, size

    published = BENCHMARKS[name].SIZES if name in BENCHMARKS else {}
    problems = []
    results: dict[str, list[Image]] = {"train": []}
    sets = {}
    test_sets = []
    for split in splits(name, root):
        images = load(name, root, split, allow_partial=bool(published), test_classes=test_classes)
        inspected = list(progress(inspect(images.paths, workers, images.upright, available()), split))
        results[split], sets[split] = inspected, images
        if split != "train":
            test_sets.append(images)
        unreadable = [image.problem for image in inspected if image.problem]
        problems += unreadable
        count, classes = size(images)
        print(f"{split}: {quantity(count, 'image')} of {quantity(classes, 'class')}", end="")
        if published:
            print(f"; published: {published[split][1]:,} of {published[split][0]:,}", end="")
            if (classes, count) != published[split]:
                cause = BENCHMARKS[name].LIKELY_CAUSE
                problems.append(f"{split} is not the published split; likely cause: {cause}")
        print()
        sizes = sorted((image.width, image.height) for image in inspected if not image.problem)
        if sizes:
            widths, heights = (sorted(side) for side in zip(*sizes))
            print(
                f"  width {widths[0]} to {widths[-1]}, median {widths[len(widths) // 2]}; "
                f"height {heights[0]} to {heights[-1]}, median {heights[len(heights) // 2]}; "
                f"{len(unreadable)} unreadable"
            )
    print(remark(test_sets), end="")
    for line in getattr(ALL[name], "remarks", lambda root: [])(Path(root)):
        print_line(line)
    if not published:
        for line in names.describe_similar("Classes", {label for images in sets.values() for label in images.classes}):
            print_line(line)
        problems += with_several_labels(results, sets)
    tests = [image for split, images in results.items() if split != "train" for image in images]
    shared = in_several({"train": results["train"], "test": tests})
    print(f"Images in both training and test: {len(shared)}")
    for paths in shared[:SHOWN]:
        print_line(f"  {' = '.join(paths)}")
    for line in duplicate_lines(results, sets):
        print_line(line)
    for problem in problems[:SHOWN]:
        print_line(f"  {problem}")
    if len(problems) > SHOWN:
        print(f"  ... and {len(problems) - SHOWN:,} more problems")
    return len(problems)


def print_line(text: str) -> None:
    """Print a text with names from files as one line of limited length."""
    print(printable(text, cli.LONGEST))


def duplicate_lines(results: dict[str, list[Image]], sets: dict[str, ImageDataset]) -> list[str]:
    """Lines on duplicates among the readable images of the splits."""
    from . import duplicates

    rows = [
        (image, split != "train", data.classes[data.labels[i]], -1 if data.groups is None else data.groups[i])
        for split, data in sets.items()
        for i, image in enumerate(results[split])
        if not image.problem
    ]
    return duplicates.describe(*map(list, zip(*rows))) if rows else []


def main(argv=None):
    args = parse(argv)
    with cli.errors_in_one_line("python -m dataset"):
        warning = checksum_warning(args.archives)
        try:
            if args.command == "prepare":
                run_prepare(args.name, args.data_root, args.archives)
            if problems := run_check(args.name, args.data_root, args.workers, args.test_classes):
                raise files.BadFile(f"{args.name} has {quantity(problems, 'problem')}, listed above")
            print(f"This is the published {args.name}." if args.name in BENCHMARKS else "No problems found.")
        finally:  # last, and also if an archive is damaged
            print(warning, end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
