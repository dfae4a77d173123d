"""In-shop Clothes Retrieval (DeepFashion, Liu et al., 2016): 7,982 items; the test set has queries and a gallery."""

import os
from pathlib import Path

from .files import BadFile, image_size, read_table, require, whole_number

FOLDER = "Inshop_Clothes"
SIZES = {"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)}  # classes, images
KS = (1, 10, 20, 30, 40, 50)
UPRIGHT = False  # the published numbers depend on the images as stored
SOURCE = (
    "Download img.zip and list_eval_partition.txt of DeepFashion's In-shop Clothes Retrieval Benchmark "
    "(mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html) and run: python -m dataset prepare Inshop img.zip "
    "list_eval_partition.txt"
)
LIKELY_CAUSE = "an incomplete copy"


def samples(folder: Path, split: str) -> list[tuple[str, int]]:
    """(path, item id) of each image of the split, in the order of the list.

    The list may be in Eval/, in Anno/ or at the top, the images in Img/img/ or in img/.
    """
    candidates = [folder / parent / "list_eval_partition.txt" for parent in ("Eval", "Anno", ".")]
    table = require(next((path for path in candidates if path.exists()), candidates[0]), SOURCE)
    # Img/img first: on case-insensitive disks, img is Img.
    base = folder if (folder / "img").is_dir() and not (folder / "Img" / "img").is_dir() else folder / "Img"
    if not (base / "img").is_dir():
        highres = (
            " It has img_highres/, but the benchmark uses img.zip, not img_highres.zip."
            if (base / "img_highres").is_dir()
            else ""
        )
        raise FileNotFoundError(f"There is no {base / 'img'}.{highres} {SOURCE}")
    rows = []
    for line, (name, item, status) in read_table(table, ["image_name", "item_id", "evaluation_status"], skip=1):
        if status not in SIZES:
            raise BadFile(f"{table}, line {line}: the evaluation_status is '{status}', expected {', '.join(SIZES)}")
        if status == split:
            rows.append((os.path.join(base, name), whole_number(item.removeprefix("id_"), table, line, "item_id")))
    return rows


def check_images(paths: list[str]) -> None:
    """Raise BadFile if the images are those of img_highres.zip, judged by the size of the first."""
    width, height = image_size(paths[0], UPRIGHT)
    if max(width, height) > 512:
        raise BadFile(
            f"{paths[0]} is {width} x {height}: expected the 256-pixel images of img.zip; "
            "likely cause: img_highres.zip was extracted instead"
        )
