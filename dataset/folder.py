"""User images in one folder per class: the first half of the sorted classes is for training, the second for testing.

With --test-classes FILE, the file lists the folders of the test classes, one per line. With --test-classes none, no
class is held out: all images are for training, and tests are of the same images.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from proxy_anchor.files import quantity

from . import files
from .files import BadFile, is_hidden, is_image, read_lines, require
from .names import by_form, form, strip

NONE = "none"  # instead of a file of test classes
KS = (1, 2, 4, 8, 16, 32)
SHOWN = 5  # folders in an error
# Words in the names of folders that are no classes, but splits or components of a dataset.
NO_CLASSES = set(
    "train training trainset val valid validate validation valset test testing testset dev eval query "
    "gallery image images img imgs mask masks label labels annotation annotations".split()
)


def splits(root: Path) -> list[str]:
    return ["train", "eval"]


def samples(root: Path, split: str, test_classes: str | None = None) -> list[tuple[str, str]]:
    """(path, class) of each image of the split: all files below a class folder with the extension of an image.

    test_classes: a file, or NONE. Raises BadFile for a class without images, for fewer than two classes, and for test
    classes that do not exist or leave no training class.
    """
    require(root, "--data-root must be a folder with one folder per class.")
    classes = _classes(root)
    if len(classes) < 2:
        raise BadFile(f"{root} has too few folders ({len(classes)}): expected one per class, and at least two classes")
    if test_classes == NONE:
        chosen = set(classes)
    else:
        tests = set(classes[len(classes) // 2 :]) if test_classes is None else _read_classes(test_classes, classes)
        chosen = tests if split == "eval" else set(classes) - tests
    rows = []
    for name in classes:
        if name in chosen:
            contents = scan(root / name)
            if not contents.images:
                remark = files.describe_skipped(contents.skipped)
                raise BadFile(f"The class folder {root / name} has no images{f'. {remark}' * bool(remark)}")
            rows += [(path, name) for path in contents.images]
    return rows


def left_out(root: Path) -> str:
    """A line on files skipped because of their extensions; "" if there are none."""
    return files.describe_skipped(sum((scan(root / name).skipped for name in _classes(root)), Counter()))


def images(folder: Path) -> list[str]:
    """The images below a folder, sorted, without hidden files and folders."""
    return scan(folder).images


def images_directly_in(folder: str) -> list[str]:
    """The images in a folder, sorted, without hidden files and those in subfolders; none if it does not exist."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    paths = (os.path.join(folder, name) for name in names if is_image(name) and not is_hidden(name))
    return [path for path in paths if os.path.isfile(path)]


class Contents(NamedTuple):
    """The contents of a folder, see scan."""

    images: list[str]
    linked: int  # number of images in linked folders
    hidden: int  # number of hidden images, which are left out
    skipped: Counter  # files skipped because of their extensions, see files.count_skipped


def scan(folder: Path) -> Contents:
    """Find the images below a folder. Linked folders count once, and never if they contain this folder."""
    images: list[str] = []
    linked, hidden = 0, 0
    skipped: Counter[str] = Counter()
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    starts = [folder]
    for start in starts:
        for parent, folders, names in os.walk(start):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            paths = [path for name in names if is_image(name) and (path := Path(parent, name)).is_file()]
            visible = [str(path) for path in paths if not is_hidden(path.name)]
            images += visible
            linked += len(visible) * os.path.islink(start)
            hidden += len(paths) - len(visible)
            skipped += files.count_skipped(names)
            for name in filter(is_hidden, folders):
                hidden += sum(is_image(file) for _, _, below in os.walk(Path(parent, name)) for file in below)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            starts += [path for name in folders if (path := Path(parent, name)).is_symlink()]  # after all others
    return Contents(sorted(images), linked, hidden, skipped)


def images_at(*locations: str) -> list[str]:
    """The image files at these paths, of files or folders; prints a line on other files in the folders.

    Raises FileNotFoundError for a path without images.
    """
    paths: list[str] = []
    skipped: Counter[str] = Counter()
    for location in locations:
        if not os.path.exists(location):
            raise FileNotFoundError(f"There is no {location}")
        if os.path.isdir(location):
            folder = scan(Path(location))
            if not folder.images:
                remark = files.describe_skipped(folder.skipped)
                raise FileNotFoundError(f"There are no images in {location}{f'. {remark}' * bool(remark)}")
            skipped += folder.skipped
        paths += folder.images if os.path.isdir(location) else [location]
    if skipped:
        print(files.describe_skipped(skipped), file=sys.stderr)
    return paths


def remarks(root: Path) -> list[str]:
    """Lines on the numbers of hidden images and of images in linked folders, if not 0."""
    hidden = scan(root).hidden
    linked = sum(scan(root / name).linked for name in _classes(root))
    return [
        *([f"Hidden, so left out: {quantity(hidden, 'image')}"] if hidden else []),
        *([f"In linked folders: {quantity(linked, 'image')}"] if linked else []),
    ]


def _classes(root):
    """The names of the class folders. Raises BadFile for folders that are no classes, or that are the same folder."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    words = {name: NO_CLASSES.intersection(re.split(r"[\W\d_]+", name.lower())) for name in names}
    suspects = [name for name in names if words[name]]
    # A single word may belong to classes: freight_train, steam_train.
    if 2 * len(suspects) > len(names) and (len(names) == 1 or len(set.union(*words.values())) > 1):
        likely = max(suspects, key=lambda name: bool(re.search("train|^im", name.lower())))
        raise BadFile(
            f"{root} has the folders {', '.join(names[:SHOWN])}, which are no classes: choose the right folder, e.g. "
            f"--data-root {root / likely}, or list the images and their splits in a table: --dataset csv"
        )
    targets: dict[Path, str] = {}  # real path -> class; some folders may be links
    for name in names:
        if (first := targets.setdefault(Path(os.path.realpath(root / name)), name)) != name:
            raise BadFile(f"{root / first} and {root / name} are the same folder: remove one of the links")
    for target, name in targets.items():
        if outer := next((targets[parent] for parent in target.parents if parent in targets), None):
            raise BadFile(f"{root / name} is a folder in {root / outer}: its images would belong to two classes")
    return names


def _read_classes(path, classes):
    path = require(Path(path), f"--test-classes must be {NONE}, or a file that lists the test classes, one per line.")
    spellings, tests = by_form(classes), set()
    for number, line in enumerate(read_lines(path), 1):
        if name := strip(line):
            matches = [name] if name in classes else spellings.get(form(name), [])
            if len(matches) != 1:
                raise BadFile(f"{path}, line {number}: there is no class folder '{name}'")
            tests.add(matches[0])
    if not 0 < len(tests) < len(classes):
        raise BadFile(f"{path} names {len(tests)} of {len(classes)} classes: expected at least one, but not all")
    return tests
