"""The datasets: a registry of them, and their images as torch Datasets and DataLoaders.

A benchmark is a module that gives
    FOLDER        its folder under the data root
    SIZES         {split: (classes, images)} of the published splits: train and eval, or train, query and gallery
    KS            the K of its Recall@K
    SOURCE        where to get it, a sentence for errors about missing files
    LIKELY_CAUSE  what is probably wrong when the sizes disagree
    samples(folder, split) -> [(path, class)]
                  the images of the split in a fixed order; classes are numbers or names, which sort.
                  Raises FileNotFoundError or BadFile for missing or malformed annotations; whether the images exist is
                  checked here
and may give
    AUGMENTATION  arguments of transforms.RandomCrop
    CROP          of transforms.evaluation, whatever the network's is
    RECIPE        {argument of train.py: its default for this dataset}
    check_images(paths)
                  raises BadFile for images that are not the benchmark's
    UPRIGHT       whether images are turned as their EXIF says; by default they are, as people see their photos. The
                  benchmarks' are not: published numbers depend on the images as they are stored
Your own images, for which nothing is published, come from a module that gives KS and
    splits(root) -> [split]
                  those of train, eval, query and gallery that exist
    samples(root, split) -> [(path, class)]
                  as above; root is the data root itself, a folder or a file
and may give
    validation_classes(root) -> [class]
                  those of the training classes that --fold val holds out
    groups(root, split) -> {path: group} or None
                  the names of groups of images that must not find each other, "" for an image alone; None: no groups
    remarks(root) -> [line]
                  what `python -m dataset check` should say of them
    left_out(root) -> line
                  on the files that are no images by their endings, "" if there are none
"""

import argparse
import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from dataset import cars, cub, folder, glyphs, inshop, names, sop, table, transforms, validation
from dataset.files import BadFile, missing_files
from dataset.images import ORIENTATIONS as ORIENTATIONS
from dataset.images import ImageDataset, describe, record, remark
from dataset.images import size as size
from dataset.loading import eval_loader, train_loader
from proxy_anchor import cli
from proxy_anchor.files import printable

DATA_ROOT = Path(__file__).resolve().parent.parent / "data"
BENCHMARKS = {"cub": cub, "cars": cars, "SOP": sop, "Inshop": inshop, "glyphs": glyphs}
OWN = {"folder": folder, "csv": table}
ALL = BENCHMARKS | OWN
OWN_ROOTS = {"folder": "the folder that has one folder per class", "csv": "the CSV file"}  # what --data-root is
# The cores that this process may use, as torch counts them: it warns of more workers.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(4, CORES)


def options(training: bool, without: Collection[str] = ()) -> argparse.ArgumentParser:
    """Command-line flags of the data, for a script that trains or one that only evaluates, without these flags."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("data")
    add = cli.adder(group, without)
    add(
        "--dataset",
        default="cub",
        **cli.one_of(*ALL),
        help="a benchmark; glyphs, which needs no download; or your own images: folder or csv",
    )
    add(
        "--data-root",
        type=cli.path,
        metavar="DIR",
        help="folder of the datasets (default: data/ in this repository); for your own images: folder or CSV file",
    )
    add(
        "--test-classes",
        type=cli.path,
        metavar="FILE",
        help="with --dataset folder: the names of the test classes, one per line (default: the second half)",
    )
    add(
        "--allow-partial",
        action="store_true",
        help="continue with a part of a dataset, to try things out; the results do not compare with others",
    )
    add("--skip-bad-images", action="store_true", help="look at every image first and leave out the damaged ones")
    add(
        "--cache",
        type=cli.path,
        metavar="DIR",
        help="keep decoded images in this folder (CUB takes 7 GB); helps if the GPU waits for few or slow CPU cores",
    )
    add(
        "--batch-size",
        default=150,
        type=cli.integer(1),
        metavar="N",
        help="images per step; lower it when memory runs out",
    )
    add(
        "--workers",
        default=WORKERS,
        type=cli.integer(0),
        metavar="N",
        help="processes that read images, 0 for none (default: as many as there are CPU cores, at most 4)",
    )
    if training:
        add(
            "--IPC",
            type=cli.integer(1),
            metavar="N",
            help="images per class in a batch, for losses that compare images; train.py without it: random batches",
        )
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
    """Fill in the default of --data-root; for your own images there is none, and leaving it out is a usage error."""
    if args.data_root is None and name in OWN:
        parser.error(f"argument --data-root: for your own images it is required: {OWN_ROOTS[name]}")
    args.data_root = args.data_root or str(DATA_ROOT)


def chosen_flags(args: argparse.Namespace) -> list[str]:
    """The flags that another script needs to read the same data; those with their default values are left out."""
    flags = ["--dataset", args.dataset]
    if args.data_root != str(DATA_ROOT):
        flags += ["--data-root", args.data_root]
    if args.test_classes:
        flags += ["--test-classes", args.test_classes]
    return flags + ["--allow-partial"] * args.allow_partial + ["--skip-bad-images"] * args.skip_bad_images


def splits(name: str, root: str | Path) -> list[str]:
    """The splits that a dataset has: those of train, eval, query and gallery that exist."""
    return list(BENCHMARKS[name].SIZES) if name in BENCHMARKS else OWN[name].splits(Path(root))


def eval_splits(name: str, root: str | Path) -> list[str]:
    """The splits that are embedded for evaluation: eval (each image queries all others), or query and gallery."""
    return [split for split in splits(name, root) if split != "train"]


def load(
    name: str,
    root: str | Path,
    split: str,
    transform=None,
    allow_partial: bool = False,
    test_classes: str | None = None,
    upright: bool | None = None,
) -> ImageDataset:
    """Read a split (train, eval, query or gallery) of a benchmark under the data root, or of your own images.

    Test splits share one label space. Raises FileNotFoundError where files are missing and BadFile (a ValueError) where
    they are malformed or not those of the published split; with allow_partial any part of it that is not empty will do.
    test_classes: a file, see dataset/folder.py. upright: other than the dataset's UPRIGHT, for what was made otherwise.
    """
    return _load(name, root, [split], transform, allow_partial, test_classes, upright)[0]


def _load(name, root, wanted, transform, allow_partial=False, test_classes=None, upright=None):
    """The training split, or some of the test splits; all test splits are read once, to know their classes."""
    source, choice = ALL[name], {}
    if test_classes:
        if name != "folder":
            raise ValueError(f"--test-classes is for --dataset folder: {name} has its own split")
        choice = {"test_classes": Path(test_classes)}
    own = splits(name, root)
    for split in wanted:
        if split not in own:
            raise ValueError(f"{name} has no split '{split}'; it has {', '.join(own)}")
    place = Path(root) / source.FOLDER if name in BENCHMARKS else Path(root)
    label_space = [split for split in own if (split == "train") == ("train" in wanted)]
    samples = {split: source.samples(place, split, **choice) for split in label_space}
    classes = sorted({label for part in samples.values() for _, label in part})
    numbers = _groups(source, place, label_space)
    upright = getattr(source, "UPRIGHT", True) if upright is None else upright
    # With the test images, once: where a fold is held out, nothing of the test classes is even listed.
    left_out = "" if "train" in wanted else getattr(source, "left_out", lambda place: "")(place)
    found = []
    for split in wanted:
        part, spellings = _present(name, place, split, samples[split], allow_partial)
        paths = [spellings.get(path, path) for path, _ in part]
        labels = np.searchsorted(classes, [label for _, label in part])
        groups = None if numbers is None else np.array([numbers[path] for path, _ in part])
        images = ImageDataset(paths, labels, classes, transform, f"{name} {split}", groups, upright)
        images.left_out = left_out
        found.append(images)
    return found


def _groups(source, place, splits) -> dict[str, int] | None:
    """{path: number of its group} of the images in these splits, which share groups; None where there are none."""
    names: list[Any] = [source.groups(place, split) for split in splits] if hasattr(source, "groups") else [None]
    if None in names:
        return None
    numbers: dict = {}
    return {
        path: numbers.setdefault(name or (path, "alone"), len(numbers)) for part in names for path, name in part.items()
    }


def _present(name, place, split, samples, allow_partial):
    """The samples, if all exist and are those of the published split; with allow_partial, those that exist.

    And {path: the path on disk}, of your own images that the disk spells in another way.
    """
    source = ALL[name]
    missing = set(missing_files([path for path, _ in samples]))
    spellings = names.spellings(missing) if name in OWN else {}
    missing -= spellings.keys()
    if allow_partial:
        samples = [(path, label) for path, label in samples if path not in missing]
    found = len({label for _, label in samples}), len(samples)
    published = source.SIZES[split] if name in BENCHMARKS else found
    if found != published and not allow_partial:
        raise BadFile(
            f"{name} {split}: found {found[1]:,} images of {found[0]:,} classes in {place}, "
            f"expected {published[1]:,} of {published[0]:,}. "
            f"Likely cause: {source.LIKELY_CAUSE}. --allow-partial accepts a part of the dataset"
        )
    if not samples:
        raise BadFile(f"{name} {split}: found no images in {place}")
    if missing and not allow_partial:
        raise FileNotFoundError(
            f"{len(missing):,} of the {len(samples):,} images of {name} {split} are missing; "
            f"the first is {min(missing)}{names.oddity(min(missing))}"
        )
    if hasattr(source, "check_images"):
        source.check_images([path for path, _ in samples])
    return samples, spellings


def train_set(name: str, root: str | Path, image_size: int, interpolation: str | None = None, **choice) -> ImageDataset:
    """The training images with their random transform; choice: allow_partial, test_classes and upright as in load."""
    augmentation = getattr(ALL[name], "AUGMENTATION", {}) | {"interpolation": interpolation}
    return load(name, root, "train", transforms.RandomCrop(image_size, **augmentation), **choice)


def eval_sets(
    name: str, root: str | Path, image_size: int, geometry: dict | None = None, **choice
) -> list[ImageDataset]:
    """The test images: [eval], or [query, gallery]; choice: allow_partial, test_classes and upright as in load.

    geometry: see NetworkSpec; by default, that of the published networks.
    """
    transform = transforms.evaluation(image_size, **(geometry or _own_geometry(name)))
    return _load(name, root, eval_splits(name, root), transform, **choice)


def _own_geometry(name: str) -> dict:
    return {"crop": crop_of(name) or transforms.CROP}


def crop_of(name: str) -> float | None:
    """The crop of a dataset that has its own, whatever a network expects; see transforms.evaluation."""
    return getattr(ALL[name], "CROP", None)


def recipe(name: str) -> dict:
    """The defaults that a dataset brings for the arguments of training; none for the benchmarks, as published."""
    return getattr(ALL[name], "RECIPE", {})


def open_splits(
    name: str, root: str | Path, image_size: int, fold: str | None = None, geometry: dict | None = None, **choice
) -> dict[str, ImageDataset]:
    """{split: images}, those to train on first; geometry: see NetworkSpec; choice: as in load.

    With a fold, see dataset/validation.py, the images of its classes are the other split, val, and those of the test
    set are not looked at. They are seen as test images are.
    """
    images = train_set(name, root, image_size, (geometry or {}).get("interpolation"), **choice)
    if fold is None:
        test_sets = eval_sets(name, root, image_size, geometry, **choice)
        return {"train": images} | dict(zip(eval_splits(name, root), test_sets))
    own = validation.own_classes(name, ALL[name], Path(root)) if fold == validation.OWN else None
    transform = transforms.evaluation(image_size, **(geometry or _own_geometry(name)))
    return validation.hold_out(images, fold, transform, own)


def leave_out_bad(image_sets, workers: int, once=lambda find: find()) -> None:
    """Leave out the images that cannot be read, and print which.

    once(find) -> find(): where several processes share the work, one of them looks for all.
    """
    for images in image_sets:
        bad = once(partial(images.find_bad, workers))
        images.leave_out(bad)
        print(
            f"Left out: {len(bad)} unreadable image{'s' * (len(bad) != 1)}", *map(printable, bad.values()), sep="\n  "
        )


def use_cache(image_sets, folder: str, workers: int, progress) -> None:
    """Keep decoded images in this folder; progress: see Cache.build."""
    for images in image_sets:
        images.use_cache(folder, workers, progress, report=lambda line: print(printable(line)))


class TrainingData(NamedTuple):
    """The data of a run. Where several processes share the work, the loaders give this process's share."""

    train_loader: DataLoader
    test_loaders: list[DataLoader]  # [eval], [query, gallery] or, of a fold, [val]
    num_classes: int  # to train on
    ks: Sequence[int]  # of Recall@K
    prefix: str  # of the names of metrics
    batch_size: int  # images of a batch, over all processes
    description: str  # lines to print
    record: dict  # for config.json, see images.record


def for_training(
    name: str,
    root: str,
    splits: dict[str, ImageDataset],
    *,
    batch_size: int,
    images_per_class: int | None,
    seed: int,
    workers: int,
    share: tuple[int, int] = (0, 1),
    views: int = 1,
) -> TrainingData:
    """The splits of open_splits with their loaders; images_per_class, seed, share, views: see loading.train_loader."""
    train_images, *test_images = splits.values()
    loader = train_loader(train_images, batch_size, images_per_class, seed, workers, share, views)
    batches: Any = loader.batch_sampler
    return TrainingData(
        loader,
        # Without gradients, twice the images fit into the memory.
        [eval_loader(images, 2 * batch_size, workers, share) for images in test_images],
        train_images.num_classes,
        ALL[name].KS,
        validation.PREFIX if validation.OWN in splits else "",
        batches.images_per_batch,
        f"{describe(splits)}\n{remark(test_images)}",
        record(splits, root),
    )
