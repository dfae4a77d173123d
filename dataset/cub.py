"""CUB-200-2011 (Wah et al., 2011): 200 species of birds; the first 100 are for training, the others for testing."""

import os
from pathlib import Path

from .files import BadFile, is_hidden, require

FOLDER = "CUB_200_2011"
SIZES = {"train": (100, 5864), "eval": (100, 5924)}  # classes, images
KS = (1, 2, 4, 8, 16, 32)
UPRIGHT = False  # the published numbers depend on the images as stored
SOURCE = (
    "Download CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and run: "
    "python -m dataset prepare cub CUB_200_2011.tgz"
)
LIKELY_CAUSE = "an incomplete copy, or CUB-200 of 2010 (3,043 test images) instead of CUB-200-2011"


def samples(folder: Path, split: str) -> list[tuple[str, str]]:
    """(path, class) of each image of the split; classes 001-100, by the number before the folder's dot, train."""
    rows = []
    for class_folder in sorted(require(folder / "images", SOURCE).iterdir()):
        if is_hidden(class_folder.name) or not class_folder.is_dir():
            continue
        number = class_folder.name.split(".")[0]
        if not number.isdecimal():
            raise BadFile(
                f"{class_folder} is not a class folder of CUB: expected a name like 001.Black_footed_Albatross"
            )
        if (int(number) <= 100) == (split == "train"):
            rows += [
                (os.path.join(class_folder, name), class_folder.name)
                for name in sorted(os.listdir(class_folder))
                if not is_hidden(name)  # some copies contain '._' files of macOS
            ]
    return rows
