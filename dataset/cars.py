"""Cars-196 (Krause et al., 2013): 196 car models; the first 98 train, the others test."""

import os
from pathlib import Path

import numpy as np

from dataset.files import BadFile, require

FOLDER = "cars196"
SIZES = {"train": (98, 8054), "eval": (98, 8131)}  # classes, images
KS = (1, 2, 4, 8, 16, 32)
SOURCE = (
    "Needed are car_ims/ and cars_annos.mat, or in the devkit layout cars_train/, cars_test/, "
    "devkit/cars_train_annos.mat and devkit/cars_test_annos_withlabels.mat; see the README for copies."
)
LIKELY_CAUSE = "an incomplete copy, or one of Kaggle's, which lack the labels of the test images"


def samples(folder: Path, split: str) -> list[tuple[str, int]]:
    """(path, class) of each image of the split. Classes 1-98 train, whatever the devkit calls training images."""
    devkit = folder / "devkit"
    if devkit.is_dir() and not (folder / "cars_annos.mat").exists():
        with_labels = "cars_test_annos_withlabels.mat"
        test_annotations = folder / with_labels if (folder / with_labels).exists() else devkit / with_labels
        found = read_annotations(devkit / "cars_train_annos.mat", "fname", folder / "cars_train")
        found += read_annotations(test_annotations, "fname", folder / "cars_test")
    else:
        found = read_annotations(folder / "cars_annos.mat", "relative_im_path", folder)
    return [(path, label) for path, label in found if (label <= 98) == (split == "train")]


def read_annotations(path: Path, path_field: str, image_folder: Path) -> list[tuple[str, int]]:
    """(path, class) of each record of a MATLAB annotation file. Raises BadFile with the file and the record."""
    from scipy.io import loadmat  # slow to import, and no other data set needs it

    require(path, SOURCE)
    try:
        annotations = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=["annotations"])["annotations"])
        names, labels = annotations[path_field], annotations["class"]
    except Exception as error:  # scipy raises nearly anything on damaged files
        raise BadFile(
            f"{path} is not an annotation file of Cars-196 (fields {path_field} and class): {error}"
        ) from error
    found = []
    for number, (name, label) in enumerate(zip(names, labels), start=1):
        if not isinstance(name, str) or not np.issubdtype(np.asarray(label).dtype, np.integer) or np.size(label) != 1:
            raise BadFile(f"{path}, record {number}: expected a path and a class, found {name!r} and {label!r}"[:300])
        found.append((os.path.join(image_folder, name), int(label)))
    return found
