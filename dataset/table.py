"""Your own images, listed in a CSV file with the columns path, label and split (train, eval, query, gallery or val).

Paths are relative to the file's folder, or absolute. The images of val train too, unless --fold val holds them out.
"""

import csv
import os
from pathlib import Path

from dataset.files import BadFile, require

KS = (1, 2, 4, 8, 16, 32)
COLUMNS = ["path", "label", "split"]
TRAINING = ("train", "val")
SPLITS = ("train", "eval", "query", "gallery", "val")


def splits(root: Path) -> list[str]:
    """The splits in the file. Raises BadFile unless it tests with either eval, or query and gallery."""
    present = {"train" if split in TRAINING else split for _, _, split in _read(root)}
    if present - {"train"} not in ({"eval"}, {"query", "gallery"}):
        raise BadFile(
            f"{root} has the splits {', '.join(sorted(present))}: to test, it needs eval, or query and gallery"
        )
    return [split for split in SPLITS if split in present]


def samples(root: Path, split: str) -> list[tuple[str, str]]:
    """(path, label) of each image of the split, in the order of the file."""
    wanted = TRAINING if split == "train" else (split,)
    return [(path, label) for path, label, of in _read(root) if of in wanted]


def validation_classes(root: Path) -> list[str]:
    """The labels of val. Raises BadFile if there are none, or if train has one of them."""
    labels = {split: {label for _, label, of in _read(root) if of == split} for split in TRAINING}
    if not labels["val"]:
        raise BadFile(f"{root} has no split 'val', which --fold val holds out")
    if shared := sorted(labels["val"] & labels["train"]):
        raise BadFile(
            f"{root}: {len(shared):,} labels are in both train and val, the first is '{shared[0]}'; validation is on "
            "classes that are not trained on"
        )
    return sorted(labels["val"])


def _read(path):
    """(path, label, split) of each row. Raises BadFile with the line of a row that does not fit.

    An image listed twice among the test images would find itself, so this is an error, as it is among the training
    images. An image may both train and test: the gallery may be the catalogue that the network was trained on.
    """
    if require(path, "--data-root must be the CSV file.").is_dir():
        raise BadFile(f"{path} is a folder: with --dataset csv, --data-root must be the CSV file")
    rows, lines = [], {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if sorted(reader.fieldnames or []) != sorted(COLUMNS):
                raise BadFile(f"{path}, line 1: expected the columns {','.join(COLUMNS)}, found {reader.fieldnames}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or not all(row.values()):
                    raise BadFile(f"{where}: expected a path, a label and a split, found {list(row.values())}")
                if row["split"] not in SPLITS:
                    raise BadFile(f"{where}: the split is '{row['split']}', expected one of {', '.join(SPLITS)}")
                image = os.path.normpath(path.parent / row["path"])
                use = "train" if row["split"] in TRAINING else "test"
                if (first := lines.setdefault((image, use), reader.line_num)) != reader.line_num:
                    raise BadFile(f"{where}: {row['path']} is in line {first} already; list an image once to {use}")
                rows.append((image, row["label"], row["split"]))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadFile(f"{path} is not a CSV file: {error}") from error
    return rows
