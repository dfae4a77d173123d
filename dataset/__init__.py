"""The data sets: a registry of them, and their images as torch Datasets and DataLoaders.

A benchmark is a module with
    FOLDER        its folder under the data root
    SIZES         split: (classes, images) of the published split
    KS            the K of its Recall@K
    SOURCE        where to get it
    LIKELY_CAUSE  what is probably wrong when the sizes disagree
    samples(folder, split)  (path, class) of each image; classes are what sorts, numbers or names
and, where needed, AUGMENTATION (arguments of transforms.RandomCrop) and check_images(paths).
One's own images, for which nothing is published, have splits(root) in place of all but KS and samples(root, split),
and may have remarks(root), lines for who checks them.
"""

import argparse
import signal
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset import cars, cub, folder, glyphs, inshop, sop, table, transforms
from dataset.cache import Cache
from dataset.check import inspect
from dataset.files import BadFile, missing_files, read_image
from dataset.sampler import BalancedBatches, RandomBatches

DATA_ROOT = Path(__file__).resolve().parent.parent / "data"
BENCHMARKS = {"cub": cub, "cars": cars, "SOP": sop, "Inshop": inshop, "glyphs": glyphs}
OWN = {"folder": folder, "csv": table}
ALL = BENCHMARKS | OWN


def options(training: bool) -> argparse.ArgumentParser:
    """Command-line flags of the data, for a script that trains or one that only evaluates."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="cub",
        choices=ALL,
        help="a benchmark, glyphs, which needs no download, or one's own images: folder or csv",
    )
    group.add_argument(
        "--data-root",
        default=str(DATA_ROOT),
        metavar="DIR",
        help="where the data sets are (default: data/ here); of one's own images, the folder or the CSV file",
    )
    group.add_argument(
        "--test-classes",
        metavar="FILE",
        help="with --dataset folder: names of the classes to test on, one a line (default: the second half)",
    )
    group.add_argument(
        "--allow-partial",
        action="store_true",
        help="go on with a part of a data set, to try things out; its figures do not compare",
    )
    group.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="look at every image first and leave out the damaged ones; for a data set that has some",
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help="keep the decoded images in this folder (CUB takes 7 GB); when the GPU waits for few or slow CPU cores",
    )
    group.add_argument(
        "--image-size",
        default=224,
        type=int,
        metavar="PIXELS",
        help="side of the square that the network sees; larger ones show more and take longer",
    )
    group.add_argument(
        "--batch-size", default=150, type=int, metavar="N", help="images a step; lower it when memory runs out"
    )
    group.add_argument(
        "--workers",
        default=4,
        type=int,
        metavar="N",
        help="processes that read images; about as many as there are CPU cores, 0 for none",
    )
    if training:
        group.add_argument(
            "--IPC",
            type=int,
            metavar="N",
            help="images of each class in a batch, for losses that compare images; without it, batches are random",
        )
    return parser


def splits(name: str, root: str | Path) -> list[str]:
    """The splits of a data set: of train, eval, query and gallery those that it has."""
    return list(BENCHMARKS[name].SIZES) if name in BENCHMARKS else OWN[name].splits(Path(root))


def eval_splits(name: str, root: str | Path) -> list[str]:
    """The splits that are embedded for evaluation: eval (each image queries all others), or query and gallery."""
    return [split for split in splits(name, root) if split != "train"]


class ImageDataset(Dataset):
    """Images uint8 (3, H, W) and labels, numbers of classes; an item is (transform(image), label).

    An item is asked for by its index or, where the transform is random, by a key (seed, epoch, index), which alone
    decides what the transform draws.
    """

    def __init__(self, paths: list[str], labels: np.ndarray, classes: list, transform=None, name: str = "images"):
        self.name = name
        self.paths = paths
        self.labels = labels
        self.classes = classes
        self.transform = transform
        self.cache = None
        self.total = len(paths)
        self.numbers = np.arange(len(paths))  # in the whole data set, whatever is left out

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index = key[-1] if isinstance(key, tuple) else key
        image = read_image(self.paths[index]) if self.cache is None else self.cache[index]
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                if isinstance(key, tuple):
                    entropy = (*key[:-1], int(self.numbers[index]))
                    torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                image = self.transform(image)
        return image, int(self.labels[index])

    def use_cache(self, folder: Path, workers: int, progress, report) -> None:
        """Take the images from a Cache in this folder, built first where need be; see Cache.build."""
        cache = Cache(folder, self.paths)
        cache.build(workers, progress, report)
        self.cache = cache

    def leave_out(self, paths) -> None:
        """Go on without these images, before a cache is used; the others stay what they are."""
        kept = np.array([path not in paths for path in self.paths], dtype=bool)
        self.paths = [path for path, keep in zip(self.paths, kept) if keep]
        self.labels, self.numbers = self.labels[kept], self.numbers[kept]


def load(
    name: str,
    root: str | Path,
    split: str,
    transform=None,
    allow_partial: bool = False,
    test_classes: str | None = None,
) -> ImageDataset:
    """Read a split (train, eval, query or gallery) of a benchmark under the data root, or of one's own images there.

    Test splits share one label space. Raises FileNotFoundError where files are missing and BadFile (a ValueError) where
    they are malformed or not those of the published split; with allow_partial any non-empty part of it will do.
    test_classes: a file, see dataset/folder.py.
    """
    source = ALL[name]
    choice = {}
    if test_classes:
        if name != "folder":
            raise ValueError(f"--test-classes is for --dataset folder: {name} has its own split")
        choice = {"test_classes": Path(test_classes)}
    if split not in splits(name, root):
        raise ValueError(f"{name} has no split '{split}'; it has {', '.join(splits(name, root))}")
    place = Path(root) / source.FOLDER if name in BENCHMARKS else Path(root)
    samples = source.samples(place, split, **choice)
    paths = [path for path, _ in samples]
    missing = set(missing_files(paths))
    if allow_partial:
        samples = [(path, label) for path, label in samples if path not in missing]
        paths = [path for path, _ in samples]
    found = len({label for _, label in samples}), len(samples)
    published = source.SIZES[split] if name in BENCHMARKS else found
    if found != published and not allow_partial:
        raise BadFile(
            f"{name} {split}: found {found[1]:,} images of {found[0]:,} classes in {place}, "
            f"expected {published[1]:,} of {published[0]:,}. "
            f"Likely cause: {source.LIKELY_CAUSE}. --allow-partial goes on with a part of the data set"
        )
    if not samples:
        raise BadFile(f"{name} {split}: found no images in {place}")
    if missing and not allow_partial:
        raise FileNotFoundError(
            f"{len(missing):,} of the {len(paths):,} images of {name} {split} are missing; the first is {min(missing)}"
        )
    if hasattr(source, "check_images"):
        source.check_images(paths)
    label_space = [split] if split == "train" else eval_splits(name, root)
    everything = [sample for other in label_space for sample in source.samples(place, other, **choice)]
    classes = sorted({label for _, label in everything})
    labels = np.searchsorted(classes, [label for _, label in samples])
    return ImageDataset(paths, labels, classes, transform, f"{name} {split}")


def size(images: ImageDataset) -> tuple[int, int]:
    """(images, classes with an image)."""
    return len(images), len(np.unique(images.labels))


def remark(test_sets: list[ImageDataset]) -> str:
    """A line where the result of a search says nothing about the network, or nothing."""
    if len({images.classes[label] for images in test_sets for label in np.unique(images.labels)}) > 1:
        return ""
    return "All test images are of one class: any network finds the right one, R@1 is 100% by definition.\n"


def train_set(name: str, root: str | Path, image_size: int, **choice) -> ImageDataset:
    """The training images with their random transform; choice: allow_partial and test_classes as in load."""
    augmentation = getattr(ALL[name], "AUGMENTATION", {})
    return load(name, root, "train", transforms.RandomCrop(image_size, **augmentation), **choice)


def eval_sets(name: str, root: str | Path, image_size: int, **choice) -> list[ImageDataset]:
    """The test images: [eval], or [query, gallery]; choice: allow_partial and test_classes as in load."""
    return [load(name, root, split, transforms.evaluation(image_size), **choice) for split in eval_splits(name, root)]


def bad_images(images: ImageDataset, workers: int) -> dict[str, str]:
    """{path: reason} of the images that cannot be read; all are decoded to find out."""
    return {image.path: image.problem for image in inspect(images.paths, workers) if image.problem}


def train_loader(
    images: ImageDataset, batch_size: int, images_per_class: int | None, seed: int, workers: int, share=(0, 1)
) -> DataLoader:
    """Batches (images (B, 3, H, W) uint8, labels (B,)); call batch_sampler.set_epoch before each epoch.

    share = (rank, processes): where several processes share the work, this one's part of every batch.
    """
    if images_per_class is None:
        batches = RandomBatches(images.labels, batch_size, seed, share)
    else:
        batches = BalancedBatches(images.labels, batch_size, images_per_class, seed, share)
    return DataLoader(images, batch_sampler=batches, **_worker_settings(workers))


def eval_loader(images: ImageDataset, batch_size: int, workers: int, share=(0, 1)) -> DataLoader:
    """Batches of all images in order, or of the part of the process share = (rank, processes).

    Raises BadFile where all images were left out.
    """
    if not len(images):
        raise BadFile(f"{images.name}: all {images.total:,} images are left out, which leaves none to evaluate on")
    rank, processes = share
    own = np.array_split(np.arange(len(images)), processes)[rank]
    return DataLoader(images, sampler=own.tolist(), batch_size=batch_size, **_worker_settings(workers))


def _worker_settings(workers):
    return {
        "num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _leave_signals_to_the_main_process if workers else None,
        "generator": torch.Generator(),  # each pass takes a number from it, otherwise from the global one
    }  # fmt: skip


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A signal to a whole job (Ctrl-C, SLURM) must not take the images away from a step that is to be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # which kills it, should nobody end it before
