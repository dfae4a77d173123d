"""One's own images, a folder a class: the first half of the sorted classes trains, the others test.

--test-classes FILE chooses the others instead: the names of their folders, one a line.
"""

from pathlib import Path

from PIL import Image

from dataset.files import BadFile, read_lines, require

KS = (1, 2, 4, 8, 16, 32)


def splits(root: Path) -> list[str]:
    return ["train", "eval"]


def samples(root: Path, split: str, test_classes: Path | None = None) -> list[tuple[str, str]]:
    """(path, class) of each image of the split; images are the files, at any depth, whose names end as images' do.

    Raises BadFile for a class without images, fewer than two classes, or test classes that leave none or do not exist.
    """
    require(root, "--data-root is to be a folder with a folder a class.")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise BadFile(f"{root} has too few folders ({len(classes)}): expected one a class, and at least two classes")
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
    """The images in a folder and the folders in it, sorted; hidden files are none."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(
        str(path) for path in folder.rglob("*")
        if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file()
    )  # fmt: skip


def _read_classes(path, classes):
    require(path, "--test-classes names a file with the names of the test classes, one a line.")
    tests = {name: number for number, line in enumerate(read_lines(path), 1) if (name := line.strip())}
    for name, number in tests.items():
        if name not in classes:
            raise BadFile(f"{path}, line {number}: there is no class folder '{name}'")
    if not 0 < len(tests) < len(classes):
        raise BadFile(f"{path} names {len(tests)} of {len(classes)} classes: expected some to test and some to train")
    return tests
