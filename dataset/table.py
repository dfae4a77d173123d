"""Your own images, listed in a CSV file with the columns path, label and split (train, eval, query, gallery or val).

Paths are relative to the file's folder, or absolute. The images of val train too, unless --fold val holds them out. A
column group may name the burst, session or camera of an image: a query is not to find images of its own group. An image
whose group is empty is a group of its own. White space around a cell does not count.
"""

import csv
import os
from collections import Counter
from pathlib import Path

from dataset.files import BadFile, require
from dataset.names import describe_alike, form, stripped

KS = (1, 2, 4, 8, 16, 32)
COLUMNS = ["path", "label", "split"]
GROUP = "group"  # a further column
TRAINING = ("train", "val")
SPLITS = ("train", "eval", "query", "gallery", "val")


def splits(root: Path) -> list[str]:
    """The splits in the file. Raises BadFile unless it tests with either eval, or query and gallery."""
    present = {"train" if split in TRAINING else split for _, _, split, _ in _read(root)}
    if present - {"train"} not in ({"eval"}, {"query", "gallery"}):
        raise BadFile(
            f"{root} has the splits {', '.join(sorted(present))}: to test, it needs eval, or query and gallery"
        )
    return [split for split in SPLITS if split in present]


def samples(root: Path, split: str) -> list[tuple[str, str]]:
    """(path, label) of each image of the split, in the order of the file."""
    return [(path, label) for path, label, of, _ in _read(root) if of in _parts(split)]


def validation_classes(root: Path) -> list[str]:
    """The labels of val. Raises BadFile if there are none, or if train has one of them."""
    labels = {split: {label for _, label, of, _ in _read(root) if of == split} for split in TRAINING}
    if not labels["val"]:
        raise BadFile(f"{root} has no split 'val', which --fold val holds out")
    if shared := sorted(labels["val"] & labels["train"]):
        raise BadFile(
            f"{root}: {len(shared):,} labels are in both train and val, the first is '{shared[0]}'; validation is on "
            "classes that are not trained on"
        )
    return sorted(labels["val"])


def groups(root: Path, split: str) -> dict[str, str] | None:
    """{path: group} of the images of the split, "" where a cell is empty; None without a column of groups."""
    found = {path: group for path, _, of, group in _read(root) if of in _parts(split)}
    return None if None in found.values() else found


def _parts(split):
    """What the column says of the images of a split."""
    return TRAINING if split == "train" else (split,)


def remarks(root: Path) -> list[str]:
    """A line on the groups of the test images, and on how many images are left out of their galleries."""
    first, *others = [name for name in splits(root) if name != "train"]
    queries = groups(root, first)
    gallery = groups(root, others[0]) if others else queries
    if queries is None or gallery is None:
        return []
    sizes = Counter(filter(None, gallery.values()))
    left_out = sum(sizes[group] - (path in gallery) for path, group in queries.items() if group)
    named = set(filter(None, [*queries.values(), *gallery.values()]))
    alone = len([path for path, group in (queries | gallery).items() if not group])
    return [
        f"{len(named):,} groups of test images, and {alone:,} images alone: images of a query's own group are left "
        f"out of its gallery, {left_out:,} in all",
        *describe_alike("Groups", named),
    ]


def _read(path):
    """(path, label, split, group) of each row, group None where the file has none.

    Raises BadFile with the line of a row that does not fit.

    An image listed twice among the test images would find itself, so this is an error, as it is among the training
    images. An image may both train and test: the gallery may be the catalogue that the network was trained on.
    """
    if require(path, "--data-root must be the CSV file.").is_dir():
        raise BadFile(f"{path} is a folder: with --dataset csv, --data-root must be the CSV file")
    rows, lines_of, lines_of_form = [], {}, {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)  # also before a quote
            reader.fieldnames = [stripped(name) for name in reader.fieldnames or []]
            columns = sorted(reader.fieldnames)
            if columns not in (sorted(COLUMNS), sorted([*COLUMNS, GROUP])):
                raise BadFile(
                    f"{path}, line 1: expected the columns {','.join(COLUMNS)}, found {reader.fieldnames}; "
                    f"{GROUP} may be a further one"
                )
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                row = {name: stripped(cell) if isinstance(cell, str) else cell for name, cell in cells.items()}
                if None in row or not all(row[name] for name in COLUMNS) or row.get(GROUP, "") is None:
                    raise BadFile(f"{where}: expected a path, a label and a split, found {list(row.values())}")
                if any(row[name].startswith('"') and not cells[name].startswith('"') for name in row):
                    raise BadFile(f"{where}: a quote must follow its comma at once, found {list(cells.values())}")
                if row["split"] not in SPLITS:
                    raise BadFile(f"{where}: the split is '{row['split']}', expected one of {', '.join(SPLITS)}")
                image = os.path.normpath(path.parent / row["path"])
                use = "train" if row["split"] in TRAINING else "test"
                for lines, spelling in ((lines_of, image), (lines_of_form, form(image))):
                    first, of_first = lines.setdefault((spelling, use), (reader.line_num, image))
                    if first != reader.line_num and not _are_two(image, of_first):
                        raise BadFile(f"{where}: {row['path']} is in line {first} already; list an image once to {use}")
                rows.append((image, row["label"], row["split"], row.get(GROUP)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadFile(f"{path} is not a CSV file: {error}") from error
    return rows


def _are_two(path, other):
    """Whether two spellings of a path are two files."""
    return path != other and os.path.exists(path) and os.path.exists(other) and not os.path.samefile(path, other)
