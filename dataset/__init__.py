"""The datasets: a registry of them, and their images as torch Datasets and DataLoaders.

The module of a benchmark defines
    FOLDER        the name of its folder under the data root
    SIZES         {split: (classes, images)} of the published splits: train and eval, or train, query and gallery
    KS            the values of K for Recall@K
    SOURCE        a sentence on where to get the data, for errors about missing files
    LIKELY_CAUSE  the probable reason if the sizes differ from SIZES
    samples(folder, split) -> [(path, class)]
                  the images of the split in a fixed order; classes are sortable numbers or names. Raises
                  FileNotFoundError or BadFile for missing or malformed annotations; need not check that images exist
and optionally
    AUGMENTATION  arguments of transforms.RandomCrop
    CROP          the crop of transforms.Evaluation, which overrides the network's
    RECIPE        {argument of train.py: its default for this dataset}
    UPRIGHT       whether images are rotated according to EXIF, as viewers show them (default). False for the
                  benchmarks, because the published numbers depend on the images as stored
    check_images(paths)
                  raises BadFile for images that do not belong to the benchmark
The module of user images, which have no published splits, defines KS and
    splits(root) -> [split]
                  the existing ones of train, eval, query and gallery
    samples(root, split) -> [(path, class)]
                  as above; root is the data root itself, a folder or a file
and optionally
    validation_classes(root) -> [class]
                  the training classes that --fold val holds out
    groups(root, split) -> {path: group} or None
                  names of groups whose images are not compared; "" for an ungrouped image; None without groups
    remarks(root) -> [line]
                  notes for `python -m dataset check`
    left_out(root) -> line
                  a note on files skipped because of their extensions, "" if there are none
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from proxy_anchor import cli
from proxy_anchor.files import printable, quantity
from proxy_anchor.spec import CROP, NetworkSpec

from . import cars, cub, folder, glyphs, inshop, names, sop, table, validation
from .files import BadFile, missing_files

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from .images import ImageDataset as ImageDataset
    from .images import describe as describe
    from .images import record as record
    from .images import remark as remark
    from .images import size as size
    from .loading import eval_loader as eval_loader
    from .loading import train_loader as train_loader

FROM_MODULES = {
    ".images": ("ImageDataset", "describe", "record", "remark", "size"),
    ".loading": ("eval_loader", "train_loader"),
}
DATA_ROOT = Path(__file__).resolve().parent.parent / "data"
BENCHMARKS = {"cub": cub, "cars": cars, "SOP": sop, "Inshop": inshop, "glyphs": glyphs}
CUSTOM = {"folder": folder, "csv": table}
ALL = BENCHMARKS | CUSTOM
CUSTOM_ROOTS = {"folder": "the folder that has one folder per class", "csv": "the CSV file"}  # of --data-root
# The cores available to this process, as torch counts them; it warns about more workers.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(4, CORES)


def __getattr__(name: str):
    """Import what needs torch when it is first used: --help does not wait for it."""
    for module, names_in_it in FROM_MODULES.items():
        if name in names_in_it:
            return getattr(import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def options(training: bool, without: Collection[str] = ()) -> argparse.ArgumentParser:
    """Command-line flags of the data for scripts that train or only evaluate; `without` names flags to leave out."""
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
        help="with --dataset folder: a file with the names of the test classes, one per line, or none to train on all "
        "classes (default: the second half)",
    )
    add(
        "--allow-partial",
        action="store_true",
        help="continue with an incomplete dataset, to try things out; the results are not comparable with others",
    )
    add("--skip-bad-images", action="store_true", help="check every image first and leave out damaged ones")
    add(
        "--cache",
        type=cli.path,
        metavar="DIR",
        help="keep decoded images in this folder (4.5 GB for CUB); helps if the GPU waits for few or slow CPU cores",
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
    """Fill in the default of --data-root; user images have none, so they require the flag."""
    if args.data_root is None and name in CUSTOM:
        parser.error(f"argument --data-root: for your own images it is required: {CUSTOM_ROOTS[name]}")
    args.data_root = args.data_root or str(DATA_ROOT)


def chosen_flags(args: argparse.Namespace) -> list[str]:
    """The flags with which another script reads the same data, without those at their defaults."""
    flags = ["--dataset", args.dataset]
    if args.data_root != str(DATA_ROOT):
        flags += ["--data-root", args.data_root]
    if args.test_classes:
        flags += ["--test-classes", args.test_classes]
    return flags + ["--allow-partial"] * args.allow_partial + ["--skip-bad-images"] * args.skip_bad_images


def splits(name: str, root: str | Path) -> list[str]:
    """The splits of a dataset: the existing ones of train, eval, query and gallery."""
    return list(BENCHMARKS[name].SIZES) if name in BENCHMARKS else CUSTOM[name].splits(Path(root))


def eval_splits(name: str, root: str | Path) -> list[str]:
    """The splits for evaluation: eval (each image queries all others), or query and gallery."""
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

    Test splits share one label space. test_classes: a file, see dataset/folder.py. upright overrides the dataset's
    UPRIGHT. Raises FileNotFoundError for missing files and BadFile (a ValueError) for malformed files or those of
    another split than the published one; with allow_partial, any non-empty subset is accepted.
    """
    return _load(name, root, [split], transform, allow_partial, test_classes, upright)[0]


def _load(name, root, requested, transform, allow_partial=False, test_classes=None, upright=None):
    """The training split, or some of the test splits; the labels depend on the classes of all test splits."""
    import numpy as np

    from .images import ImageDataset

    source, choice = ALL[name], {}
    if test_classes:
        if name != "folder":
            raise ValueError(f"--test-classes is for --dataset folder: {name} has its own split")
        choice = {"test_classes": test_classes}
    available = splits(name, root)
    for split in requested:
        if split not in available:
            raise ValueError(f"{name} has no split '{split}'; it has {', '.join(available)}")
    location = Path(root) / source.FOLDER if name in BENCHMARKS else Path(root)
    label_space = [split for split in available if (split == "train") == ("train" in requested)]
    samples = {split: source.samples(location, split, **choice) for split in label_space}
    classes = sorted({label for rows in samples.values() for _, label in rows})
    group_numbers = _groups(source, location, label_space)
    upright = getattr(source, "UPRIGHT", True) if upright is None else upright
    # Only with the test images: a run on a fold must not even list the test classes.
    left_out = "" if "train" in requested else getattr(source, "left_out", lambda root: "")(location)
    image_sets = []
    for split in requested:
        rows, spellings = _present(name, location, split, samples[split], allow_partial)
        paths = [spellings.get(path, path) for path, _ in rows]
        labels = np.searchsorted(classes, [label for _, label in rows])
        groups = None if group_numbers is None else np.array([group_numbers[path] for path, _ in rows])
        images = ImageDataset(paths, labels, classes, transform, f"{name} {split}", groups, upright)
        images.left_out = left_out
        image_sets.append(images)
    return image_sets


def _groups(source, location, splits) -> dict[str, int] | None:
    """{path: number of its group}; the splits share groups. None if the dataset has none."""
    names: list[Any] = [source.groups(location, split) for split in splits] if hasattr(source, "groups") else [None]
    if None in names:
        return None
    numbers: dict = {}
    return {
        path: numbers.setdefault(name or (path, "alone"), len(numbers)) for rows in names for path, name in rows.items()
    }


def _present(name, location, split, samples, allow_partial):
    """(samples, {path: its spelling on disk, if different}).

    Raises BadFile or FileNotFoundError if they are incomplete; with allow_partial, returns the existing ones.
    """
    source = ALL[name]
    missing = set(missing_files([path for path, _ in samples]))
    spellings = names.spellings(missing) if name in CUSTOM else {}
    missing -= spellings.keys()
    if allow_partial:
        samples = [(path, label) for path, label in samples if path not in missing]
    sizes = len({label for _, label in samples}), len(samples)
    published = source.SIZES[split] if name in BENCHMARKS else sizes
    if sizes != published and not allow_partial:
        raise BadFile(
            f"{name} {split}: found {quantity(sizes[1], 'image')} of {quantity(sizes[0], 'class')} in {location}, "
            f"expected {published[1]:,} of {published[0]:,}. "
            f"Likely cause: {source.LIKELY_CAUSE}. --allow-partial accepts a part of the dataset"
        )
    if not samples:
        raise BadFile(f"{name} {split}: found no images in {location}")
    if missing and not allow_partial:
        raise FileNotFoundError(
            f"Missing images of {name} {split}: {len(missing):,} of {len(samples):,}; "
            f"the first is {min(missing)}{names.oddity(min(missing))}"
        )
    if hasattr(source, "check_images"):
        source.check_images([path for path, _ in samples])
    return samples, spellings


def train_set(name: str, root: str | Path, image_size: int, interpolation: str | None = None, **choice) -> ImageDataset:
    """The training images with random augmentation; choice: allow_partial, test_classes and upright as in load."""
    from . import transforms

    augmentation = getattr(ALL[name], "AUGMENTATION", {}) | {"interpolation": interpolation}
    return load(name, root, "train", transforms.RandomCrop(image_size, **augmentation), **choice)


def eval_sets(
    name: str, root: str | Path, image_size: int, geometry: dict | None = None, **choice
) -> list[ImageDataset]:
    """The test images: [eval], or [query, gallery]; choice: allow_partial, test_classes and upright as in load.

    geometry: see NetworkSpec; None for the geometry of the published networks.
    """
    from . import transforms

    transform = transforms.Evaluation(image_size, **(geometry or _default_geometry(name)))
    return _load(name, root, eval_splits(name, root), transform, **choice)


def _default_geometry(name: str) -> dict:
    return {"crop": crop_of(name) or CROP}


def unlabelled(paths: list[str], spec: NetworkSpec) -> ImageDataset:
    """Images without labels, as a network sees them."""
    import numpy as np

    from .images import ImageDataset

    labels = np.zeros(len(paths), dtype=int)
    return ImageDataset(paths, labels, [""], transform_of(spec), upright=spec.orientation == "upright")


def transform_of(spec: NetworkSpec) -> Callable:
    """What an image goes through before a network sees it: uint8 (3, H, W) -> (3, image_size, image_size)."""
    from . import transforms

    return transforms.Evaluation(spec.image_size, **spec.geometry)


def crop_of(name: str) -> float | None:
    """The crop that a dataset requires, whatever the network expects, or None; see transforms.Evaluation."""
    return getattr(ALL[name], "CROP", None)


def recipe(name: str) -> dict:
    """{argument of train.py: its default for this dataset}; empty for benchmarks with the published recipe."""
    return getattr(ALL[name], "RECIPE", {})


def open_splits(
    name: str, root: str | Path, image_size: int, fold: str | None = None, geometry: dict | None = None, **choice
) -> dict[str, ImageDataset]:
    """{split: images}, the training split first; geometry: see NetworkSpec; choice: as in load.

    With a fold (see dataset/validation.py), its classes form the split val, transformed like test images, and the test
    set is not touched.
    """
    from . import transforms

    images = train_set(name, root, image_size, (geometry or {}).get("interpolation"), **choice)
    if fold is None:
        test_sets = eval_sets(name, root, image_size, geometry, **choice)
        return {"train": images} | dict(zip(eval_splits(name, root), test_sets))
    classes = validation.validation_classes(name, ALL[name], Path(root)) if fold == validation.VAL_FOLD else None
    transform = transforms.Evaluation(image_size, **(geometry or _default_geometry(name)))
    return validation.hold_out(images, fold, transform, classes)


def leave_out_bad(image_sets, workers: int, once=lambda find: find()) -> None:
    """Leave out and print unreadable images.

    once(find) -> find(): with several processes, one of them calls find for all.
    """
    for images in image_sets:
        bad = once(partial(images.find_bad, workers))
        images.leave_out(bad)
        print(f"Left out: {quantity(len(bad), 'unreadable image')}", *map(printable, bad.values()), sep="\n  ")


def use_cache(image_sets, folder: str, workers: int, progress) -> None:
    """Use caches of decoded images in this folder; progress: see Cache.build."""
    for images in image_sets:
        images.use_cache(folder, workers, progress, report=lambda line: print(printable(line)))


class TrainingData(NamedTuple):
    """The data of a run; with several processes, the loaders yield this process's share."""

    train_loader: DataLoader
    test_loaders: list[DataLoader]  # [eval], [query, gallery] or, with a fold, [val]
    num_classes: int  # of the training split
    ks: Sequence[int]  # of Recall@K
    prefix: str  # of metric names
    batch_size: int  # images per batch, over all processes
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
    from .images import describe, record, remark
    from .loading import eval_loader, train_loader

    train_images, *test_images = splits.values()
    prefix, notes = validation.PREFIX if validation.VAL_FOLD in splits else "", remark(test_images)
    if test_images[0].paths == train_images.paths:
        prefix = validation.PREFIX_TRAINED
        notes = f"No class is held out: {prefix}R@1 shows how well the training images are learned.\n{notes}"
    loader = train_loader(train_images, batch_size, images_per_class, seed, workers, share, views)
    batches: Any = loader.batch_sampler
    return TrainingData(
        loader,
        # Without gradients, twice as many images fit into memory.
        [eval_loader(images, 2 * batch_size, workers, share) for images in test_images],
        train_images.num_classes,
        ALL[name].KS,
        prefix,
        batches.images_per_batch,
        f"{describe(splits)}\n{notes}",
        record(splits, root),
    )
