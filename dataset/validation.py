"""Validation without the test set, on training classes that are held out."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_anchor import cli

from .files import BadFile

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    from .images import ImageDataset

VAL_FOLD = "val"  # the fold that a dataset defines itself
PREFIX, PREFIX_TRAINED = "val/", "train/"  # of the names of metrics, of held-out classes and of the training images


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
    """Command-line flags of validation that only recipes later than the paper use."""
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
    """The type of --fold. Raises ArgumentTypeError for an invalid fold."""
    try:
        if text != VAL_FOLD:
            parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse(fold: str) -> tuple[int, int]:
    """(K, N) of "K/N". Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", fold)
    number, total = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= total or total < 2:
        raise ValueError(f"'{fold}' is not a fold: expected K/N, the K-th of N >= 2 parts, e.g. 2/2 or 1/4")
    return number, total


def fold_classes(num_classes: int, fold: str) -> range:
    """The classes of fold K/N among C sorted training classes: from (K-1) C / N to K C / N, rounded down.

    N = 2 gives the halves of ProxyNCA++ (2020), N = 4 the quarters of "A Metric Learning Reality Check" (2020).
    Raises ValueError for more parts than classes.
    """
    number, total = parse(fold)
    if total > num_classes:
        raise ValueError(f"--fold {fold}: {num_classes:,} training classes cannot be divided into {total:,} parts")
    return range((number - 1) * num_classes // total, number * num_classes // total)


def hold_out(train_set: ImageDataset, fold: str, transform, val_classes: list | None = None) -> dict[str, ImageDataset]:
    """Split the training set by class: {"train": remaining classes, "val": classes of the fold, with this transform}.

    val_classes: the classes of the fold "val". Both splits number their classes from 0. Raises ValueError or BadFile if
    one of them has no images.
    """
    import numpy as np

    classes = train_set.classes
    if val_classes is None:
        val_classes = [classes[number] for number in fold_classes(len(classes), fold)]
    in_fold = np.isin(classes, val_classes)
    splits = {
        "train": train_set.select_classes(~in_fold, train_set.name, train_set.transform),
        "val": train_set.select_classes(in_fold, f"{train_set.name}, fold {fold}", transform),
    }
    for name, images in splits.items():
        if not len(images):
            use = "training" if name == "train" else "validation"
            raise BadFile(f"--fold {fold}: {train_set.name} has no images for {use}")
    return splits


def validation_classes(name: str, source, root: Path) -> list:
    """The classes of the dataset's own validation split. Raises ValueError if it has none."""
    if not hasattr(source, "validation_classes"):
        raise ValueError(f"--fold {VAL_FOLD} is for --dataset csv: {name} has no split 'val'. Choose a part, e.g. 2/2")
    return source.validation_classes(root)
