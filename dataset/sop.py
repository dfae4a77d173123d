"""Stanford Online Products (Oh Song et al., 2016): 22,634 products; 11,318 for training, the others for testing."""

import os
from pathlib import Path

from .files import read_table, require, whole_number

FOLDER = "Stanford_Online_Products"
SIZES = {"train": (11318, 59551), "eval": (11316, 60502)}  # classes, images
KS = (1, 10, 100, 1000)
UPRIGHT = False  # the published numbers depend on the images as stored
SOURCE = (
    "Download ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip and run: "
    "python -m dataset prepare SOP Stanford_Online_Products.zip"
)
LIKELY_CAUSE = "an incomplete copy"


def samples(folder: Path, split: str) -> list[tuple[str, int]]:
    """(path, product id) of each image of the split, in the order of its list."""
    table = require(folder / ("Ebay_train.txt" if split == "train" else "Ebay_test.txt"), SOURCE)
    rows = read_table(table, ["image_id", "class_id", "super_class_id", "path"])
    return [
        (os.path.join(folder, path), whole_number(product, table, line, "class_id"))
        for line, (_, product, _, path) in rows
    ]
