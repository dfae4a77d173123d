"""Validation without the test set: some of the training classes are held out and take its place."""

import argparse
import re
from pathlib import Path

import numpy as np

from dataset.files import BadFile
from dataset.images import ImageDataset
from proxy_anchor import cli

OWN = "val"  # the fold that a dataset brings itself
PREFIX = "val/"  # of the names of metrics


def options() -> argparse.ArgumentParser:
    """Command-line flags of validation."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--fold",
        type=fold_name,
        metavar="K/N|val",
        help="hold out part K of N of the training classes, or the split val of your CSV file, and measure on it; the "
        "test set stays untouched",
    )
    return parser


def later_options() -> argparse.ArgumentParser:
    """Command-line flags of validation in recipes after the paper."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("further settings")
    group.add_argument(
        "--by",
        default="R@1",
        **cli.one_of("R@1", "MAP@R"),
        help="metric that chooses the best epoch, whose network is saved; published results use R@1",
    )
    return parser


def fold_name(text: str) -> str:
    """The type of --fold. Raises ArgumentTypeError for a fold that there cannot be."""
    try:
        if text != OWN:
            parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse(fold: str) -> tuple[int, int]:
    """(K, N) of "K/N". Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", fold)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts or parts < 2:
        raise ValueError(f"'{fold}' is no fold: expected K/N, the K-th of N >= 2 parts, as in 2/2 or 1/4")
    return part, parts


def held_out(classes: int, fold: str) -> range:
    """The numbers, among the sorted training classes, of those in fold K/N: from (K-1) C / N to K C / N, rounded down.

    N = 2 gives the halves of ProxyNCA++ (2020), N = 4 the quarters of "A Metric Learning Reality Check" (2020).
    Raises ValueError for more parts than classes.
    """
    part, parts = parse(fold)
    if parts > classes:
        raise ValueError(f"--fold {fold}: {classes:,} training classes cannot be divided into {parts:,} parts")
    return range((part - 1) * classes // parts, part * classes // parts)


def hold_out(train_set: ImageDataset, fold: str, transform, own: list | None = None) -> dict[str, ImageDataset]:
    """{"train": ..., "val": ...}: the training images without those of the fold's classes, and these, transformed.

    own: the classes of fold "val". The parts have label spaces of their own. Raises ValueError or BadFile where one of
    them has no image.
    """
    classes = train_set.classes
    own = [classes[number] for number in held_out(len(classes), fold)] if own is None else own
    chosen = np.isin(classes, own)
    parts = {
        "train": train_set.of_classes(~chosen, train_set.name, train_set.transform),
        "val": train_set.of_classes(chosen, f"{train_set.name}, fold {fold}", transform),
    }
    for name, images in parts.items():
        if not len(images):
            raise BadFile(
                f"--fold {fold} leaves no image of {train_set.name} {'to train' if name == 'train' else 'in it'}"
            )
    return parts


def own_classes(name: str, source, root: Path) -> list:
    """The classes of the validation split that the module of a dataset brings. Raises ValueError if it has none."""
    if not hasattr(source, "validation_classes"):
        raise ValueError(f"--fold {OWN} is for --dataset csv: {name} has no split '{OWN}'. Choose a part, as in 2/2")
    return source.validation_classes(root)
