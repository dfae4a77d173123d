"""Cars-196 (Krause et al., 2013): 196 car models; the first 98 are for training, the others for testing."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from .files import BadFile, require

FOLDER = "cars196"
SIZES = {"train": (98, 8054), "eval": (98, 8131)}  # classes, images
KS = (1, 2, 4, 8, 16, 32)
UPRIGHT = False  # the published numbers depend on the images as stored
SOURCE = (
    "Needed are car_ims/ and cars_annos.mat, or in the devkit layout cars_train/, cars_test/, "
    "devkit/cars_train_annos.mat and devkit/cars_test_annos_withlabels.mat; docs/data.md lists copies."
)
LIKELY_CAUSE = "an incomplete copy, or a Kaggle copy, which lacks the labels of the test images"


def samples(folder: Path, split: str) -> list[tuple[str, int]]:
    """(path, class) of each image of the split: classes 1-98 train, unlike the devkit's own training set."""
    devkit = folder / "devkit"
    if devkit.is_dir() and not (folder / "cars_annos.mat").exists():
        with_labels = "cars_test_annos_withlabels.mat"
        test_annotations = folder / with_labels if (folder / with_labels).exists() else devkit / with_labels
        rows = read_annotations(devkit / "cars_train_annos.mat", "fname", folder / "cars_train")
        rows += read_annotations(test_annotations, "fname", folder / "cars_test")
    else:
        rows = read_annotations(folder / "cars_annos.mat", "relative_im_path", folder)
    return [(path, label) for path, label in rows if (label <= 98) == (split == "train")]


def read_annotations(path: Path, path_field: str, image_folder: Path) -> list[tuple[str, int]]:
    """(path, class) of each record of a MATLAB annotation file. Raises BadFile naming the file and the record."""
    require(path, SOURCE)
    rows = _read(path, path.stat().st_mtime_ns, path_field)
    return [(os.path.join(image_folder, name), label) for name, label in rows]


@lru_cache
def _read(path, mtime, path_field):
    reader = [sys.executable, str(Path(__file__).with_name("matlab.py")), str(path), path_field]
    process = subprocess.run(reader, capture_output=True, text=True)
    if process.returncode != 0:
        reason = process.stderr.strip() if process.returncode > 0 else "its reader crashes on it"
        raise BadFile(f"{path} is not an annotation file of Cars-196 (fields {path_field} and class): {reason}")
    return json.loads(process.stdout)
