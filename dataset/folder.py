"""Your own images in one folder per class: the first half of the sorted classes trains, the others test.

--test-classes FILE chooses the test classes instead: the names of their folders, one per line.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dataset import files
from dataset.files import BadFile, is_hidden, is_image, read_lines, require
from dataset.names import by_form, form, stripped

KS = (1, 2, 4, 8, 16, 32)
SHOWN = 5  # folders in an error
# Words in the names of folders that are splits, or parts of a dataset.
NO_CLASSES = set(
    "train training trainset val valid validate validation valset test testing testset dev eval query "
    "gallery image images img imgs mask masks label labels annotation annotations".split()
)


def splits(root: Path) -> list[str]:
    return ["train", "eval"]


def samples(root: Path, split: str, test_classes: Path | None = None) -> list[tuple[str, str]]:
    """(path, class) of each image of the split; images are files at any depth with an image's ending.

    Raises BadFile for a class without images, for fewer than two classes, and for test classes that do not exist or
    leave none to train.
    """
    require(root, "--data-root must be a folder with one folder per class.")
    classes = _classes(root)
    if len(classes) < 2:
        raise BadFile(f"{root} has too few folders ({len(classes)}): expected one per class, and at least two classes")
    tests = set(classes[len(classes) // 2 :]) if test_classes is None else _read_classes(test_classes, classes)
    found = []
    for name in classes:
        if (name in tests) == (split == "eval"):
            in_class = find(root / name)
            if not in_class.images:
                remark = files.left_out(in_class.others)
                raise BadFile(f"The class folder {root / name} has no images{f'. {remark}' * bool(remark)}")
            found += [(path, name) for path in in_class.images]
    return found


def left_out(root: Path) -> str:
    """A line on the files that are left out because of their endings; "" if there are none."""
    return files.left_out(sum((find(root / name).others for name in _classes(root)), Counter()))


def images(folder: Path) -> list[str]:
    """The images in a folder and the folders in it, sorted; hidden files and folders are left out."""
    return find(folder).images


class Found(NamedTuple):
    images: list[str]
    linked: int  # of the images, those in linked folders
    hidden: int  # images that are left out
    others: Counter  # of the files that are left out because of their endings, see files.others


def find(folder: Path) -> Found:
    """The images in a folder and the folders in it; a linked one counts once, and not if it contains this folder."""
    images: list[str] = []
    linked, hidden = 0, 0
    others: Counter[str] = Counter()
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    places = [folder]
    for place in places:
        for parent, folders, names in os.walk(place):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            here = [path for name in names if is_image(name) and (path := Path(parent, name)).is_file()]
            shown = [str(path) for path in here if not is_hidden(path.name)]
            images += shown
            linked += len(shown) * os.path.islink(place)
            hidden += len(here) - len(shown)
            others += files.others(names)
            for name in filter(is_hidden, folders):
                hidden += sum(is_image(file) for _, _, below in os.walk(Path(parent, name)) for file in below)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            places += [path for name in folders if (path := Path(parent, name)).is_symlink()]  # after all others
    return Found(sorted(images), linked, hidden, others)


def remarks(root: Path) -> list[str]:
    """Lines on the images that are left out and those in linked folders, if any."""
    hidden = find(root).hidden
    linked = sum(find(root / name).linked for name in _classes(root))
    return [
        *([f"{hidden:,} images are left out: they or their folders are hidden"] if hidden else []),
        *([f"{linked:,} images are in linked folders"] if linked else []),
    ]


def _classes(root):
    """The names of the class folders. Raises BadFile where they are no classes, or two of them are one folder."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    words = {name: NO_CLASSES.intersection(re.split(r"[\W\d_]+", name.lower())) for name in names}
    wrong = [name for name in names if words[name]]
    # One word alone may be of classes: freight_train, steam_train.
    if 2 * len(wrong) > len(names) and (len(names) == 1 or len(set.union(*words.values())) > 1):
        likely = max(wrong, key=lambda name: bool(re.search("train|^im", name.lower())))
        raise BadFile(
            f"{root} has the folders {', '.join(names[:SHOWN])}, which are no classes: choose one that has them, as by "
            f"--data-root {root / likely}, or list the images in a table that names their splits: --dataset csv"
        )
    places: dict[Path, str] = {}  # of the classes: some may be links
    for name in names:
        if (first := places.setdefault(Path(os.path.realpath(root / name)), name)) != name:
            raise BadFile(f"{root / first} and {root / name} are one folder, under two names: remove a link")
    for place, name in places.items():
        if outer := next((places[above] for above in place.parents if above in places), None):
            raise BadFile(f"{root / name} is a folder in {root / outer}: its images would be of two classes")
    return names


def _read_classes(path, classes):
    require(path, "--test-classes names a file with the names of the test classes, one per line.")
    classes_of, tests = by_form(classes), set()
    for number, line in enumerate(read_lines(path), 1):
        if name := stripped(line):
            matches = [name] if name in classes else classes_of.get(form(name), [])
            if len(matches) != 1:
                raise BadFile(f"{path}, line {number}: there is no class folder '{name}'")
            tests.add(matches[0])
    if not 0 < len(tests) < len(classes):
        raise BadFile(f"{path} names {len(tests)} of {len(classes)} classes: expected some to test and some to train")
    return tests
