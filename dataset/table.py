"""User images listed in a CSV file with the columns path, label and split (train, eval, query, gallery or val).

Paths are relative to the file's folder, or absolute. The split val is part of the training set, unless --fold val holds
it out. An optional column group names the burst, session or camera of an image: a query is not compared with images of
its group. Images with an empty group are ungrouped. White space around cells is ignored.
"""

import csv
import os
from collections import Counter
from pathlib import Path

from proxy_anchor.files import quantity

from .files import BadFile, require
from .names import describe_similar, form, strip

KS = (1, 2, 4, 8, 16, 32)
COLUMNS = ["path", "label", "split"]
GROUP = "group"  # optional column
TRAINING = ("train", "val")
SPLITS = ("train", "eval", "query", "gallery", "val")


def splits(root: Path) -> list[str]:
    """The splits in the file. Raises BadFile unless its test splits are either eval, or query and gallery."""
    present = {"train" if split in TRAINING else split for _, _, split, _ in _read(root)}
    if present - {"train"} not in ({"eval"}, {"query", "gallery"}):
        raise BadFile(f"{root} has the splits {', '.join(sorted(present))}: expected eval, or query and gallery")
    return [split for split in SPLITS if split in present]


def samples(root: Path, split: str) -> list[tuple[str, str]]:
    """(path, label) of each image of the split, in the order of the file."""
    return [(path, label) for path, label, name, _ in _read(root) if name in _members(split)]


def validation_classes(root: Path) -> list[str]:
    """The labels of val. Raises BadFile if there are none, or if train shares one."""
    labels = {split: {label for _, label, name, _ in _read(root) if name == split} for split in TRAINING}
    if not labels["val"]:
        raise BadFile(f"{root} has no split 'val', which --fold val holds out")
    if shared := sorted(labels["val"] & labels["train"]):
        raise BadFile(f"{root}: train and val share labels, the first is '{shared[0]}'; expected different labels")
    return sorted(labels["val"])


def groups(root: Path, split: str) -> dict[str, str] | None:
    """{path: group} of the images of the split, "" for an empty cell; None without the column group."""
    group_of = {path: group for path, _, name, group in _read(root) if name in _members(split)}
    return None if None in group_of.values() else group_of


def _members(split):
    """The values of the column split for the images of a split."""
    return TRAINING if split == "train" else (split,)


def remarks(root: Path) -> list[str]:
    """A line on the groups of the test images and the gallery images that they exclude, and on similar names."""
    first, *others = [name for name in splits(root) if name != "train"]
    queries = groups(root, first)
    gallery = groups(root, others[0]) if others else queries
    if queries is None or gallery is None:
        return []
    sizes = Counter(filter(None, gallery.values()))
    left_out = sum(sizes[group] - (path in gallery) for path, group in queries.items() if group)
    group_names = set(filter(None, [*queries.values(), *gallery.values()]))
    ungrouped = len([path for path, group in (queries | gallery).items() if not group])
    return [
        f"Test images: {quantity(len(group_names), 'group')}, {ungrouped:,} ungrouped; left out of "
        f"the galleries because of the query's group: {left_out:,}",
        *describe_similar("Groups", group_names),
    ]


def _read(path):
    """(path, label, split, group) of each row; group is None without the column. Raises BadFile with the line.

    An image must not be listed twice for testing, because it would match itself, nor twice for training. It may be
    listed for both: the gallery may be the catalogue that the network was trained on.
    """
    if require(path, "--data-root must be the CSV file.").is_dir():
        raise BadFile(f"{path} is a folder: with --dataset csv, --data-root must be the CSV file")
    rows, lines_by_path, lines_by_form = [], {}, {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)  # skips blanks before a quote too
            reader.fieldnames = [strip(name) for name in reader.fieldnames or []]
            columns = sorted(reader.fieldnames)
            if columns not in (sorted(COLUMNS), sorted([*COLUMNS, GROUP])):
                raise BadFile(f"{path}, line 1: expected {','.join(COLUMNS)}[,{GROUP}], found {reader.fieldnames}")
            for cells in reader:
                location = f"{path}, line {reader.line_num}"
                row = {name: strip(cell) if isinstance(cell, str) else cell for name, cell in cells.items()}
                if None in row or not all(row[name] for name in COLUMNS) or row.get(GROUP, "") is None:
                    raise BadFile(f"{location}: expected a path, a label and a split, found {list(row.values())}")
                if any(row[name].startswith('"') and not cells[name].startswith('"') for name in row):
                    raise BadFile(f"{location}: a quote must directly follow its comma, found {list(cells.values())}")
                if row["split"] not in SPLITS:
                    raise BadFile(f"{location}: the split is '{row['split']}', expected one of {', '.join(SPLITS)}")
                image = os.path.normpath(path.parent / row["path"])
                use = "train" if row["split"] in TRAINING else "test"
                for lines, spelling in ((lines_by_path, image), (lines_by_form, form(image))):
                    line, other = lines.setdefault((spelling, use), (reader.line_num, image))
                    if line != reader.line_num and not _are_different_files(image, other):
                        raise BadFile(f"{location}: {row['path']} is already in line {line}; list it once to {use}")
                rows.append((image, row["label"], row["split"], row.get(GROUP)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadFile(f"{path} is not a CSV file: {error}") from error
    return rows


def _are_different_files(path, other):
    """Whether two spellings of a path are different files."""
    return path != other and os.path.exists(path) and os.path.exists(other) and not os.path.samefile(path, other)
