"""Your own images in one folder per class: the first half of the sorted classes trains, the others test.

--test-classes FILE chooses the test classes instead: the names of their folders, one per line.
"""

import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dataset.files import BadFile, read_lines, require
from dataset.names import by_form, form, stripped

KS = (1, 2, 4, 8, 16, 32)


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
            paths = images(root / name)
            if not paths:
                raise BadFile(f"The class folder {root / name} has no images")
            found += [(path, name) for path in paths]
    return found


def images(folder: Path) -> list[str]:
    """The images in a folder and the folders in it, sorted; hidden files and folders are left out."""
    return find(folder).images


class Found(NamedTuple):
    images: list[str]
    linked: int  # of the images, those in linked folders
    hidden: int  # images that are left out


def find(folder: Path) -> Found:
    """The images in a folder and the folders in it; a linked one counts once, and not if it contains this folder."""
    images, linked, hidden = [], 0, 0
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    places = [folder]
    for place in places:
        for parent, folders, files in os.walk(place):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            here = [path for name in files if _is_image(name) and (path := Path(parent, name)).is_file()]
            shown = [str(path) for path in here if not _is_hidden(path.name)]
            images += shown
            linked += len(shown) * os.path.islink(place)
            hidden += len(here) - len(shown)
            for name in filter(_is_hidden, folders):
                hidden += sum(_is_image(file) for _, _, below in os.walk(Path(parent, name)) for file in below)
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            places += [path for name in folders if (path := Path(parent, name)).is_symlink()]  # after all others
    return Found(sorted(images), linked, hidden)


def remarks(root: Path) -> list[str]:
    """Lines on the images that are left out and those in linked folders, if any."""
    hidden = find(root).hidden
    linked = sum(find(root / name).linked for name in _classes(root))
    return [
        *([f"{hidden:,} images are left out: they or their folders are hidden"] if hidden else []),
        *([f"{linked:,} images are in linked folders"] if linked else []),
    ]


def _is_image(name):
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind in Image.OPEN


def _is_hidden(name):
    return name.startswith(".")


def _classes(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))


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
