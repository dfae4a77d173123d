"""Small datasets, and checkpoints, in the exact layouts of the real ones."""

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat


def write_image(path, number):
    """A 40 x 32 JPEG: a colour of its own with some noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, 3) * 0.8 + random.integers(0, 50, (32, 40, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, format="JPEG")


def cub(root, classes=(1, 2, 3, 4, 101, 102, 103), images=6):
    for c in classes:
        for i in range(images):
            write_image(root / "CUB_200_2011" / "images" / f"{c:03d}.Bird_{c}" / f"Bird_{c}_{i:04d}.jpg", 100 * c + i)
    (root / "CUB_200_2011" / "images" / f"{classes[0]:03d}.Bird_{classes[0]}" / "._Bird.jpg").write_bytes(
        b"left by macOS"
    )
    return root


def _annotations(records, fields):
    # MATLAB stores this as a 1 x N struct array of object fields.
    array = np.empty((1, len(records)), dtype=[(field, object) for field in fields])
    for i, record in enumerate(records):
        array[0, i] = record
    return array


def cars(root, classes=(1, 2, 98, 99, 100, 196), images=4):
    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    records = []
    for c in classes:
        for _ in range(images):
            name = f"car_ims/{len(records) + 1:06d}.jpg"
            write_image(root / "cars196" / name, len(records))
            records.append((name, 1, 1, 30, 30, np.uint8(c), np.uint8(0)))
    names = np.array([[f"Car {c}" for c in classes]], dtype=object)
    savemat(root / "cars196" / "cars_annos.mat", {"annotations": _annotations(records, fields), "class_names": names})
    return root


def cars_devkit(root, classes=(1, 2, 98, 99, 100, 196), images=2):
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    (root / "cars196" / "devkit").mkdir(parents=True)
    for part, annotations in (("cars_train", "cars_train_annos.mat"), ("cars_test", "cars_test_annos_withlabels.mat")):
        records = []
        for c in classes:
            for _ in range(images):
                name = f"{len(records) + 1:05d}.jpg"
                write_image(root / "cars196" / part / name, len(records))
                records.append((1, 1, 30, 30, np.uint8(c), name))
        savemat(root / "cars196" / "devkit" / annotations, {"annotations": _annotations(records, fields)})
    return root


def sop(root, train=3, test=3, images=3):
    folder = root / "Stanford_Online_Products"
    image_id = 0
    for table, ids in (("Ebay_train.txt", range(1, train + 1)), ("Ebay_test.txt", range(11319, 11319 + test))):
        rows = ["image_id class_id super_class_id path"]
        for product in ids:
            for i in range(images):
                image_id += 1
                name = f"bicycle_final/{111085122870 + product}_{i}.JPG"
                write_image(folder / name, image_id)
                rows.append(f"{image_id} {product} 1 {name}")
        (folder / table).write_text("\n".join(rows) + "\n")
    return root


def inshop(root, table="Eval", images="Img", train=2, test=3):
    folder = root / "Inshop_Clothes"
    rows = []
    for item in range(1, train + test + 1):
        for i, status in enumerate(["train"] * 4 if item <= train else ["query", "gallery", "query", "gallery"]):
            name = f"img/WOMEN/Dresses/id_{item:08d}/{i + 1:02d}_1_front.jpg"
            write_image(folder / images / name, 10 * item + i)
            rows.append(f"{name:<70} id_{item:08d} {status}")
    path = folder / table / "list_eval_partition.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{len(rows)}\nimage_name item_id evaluation_status\n" + "\n".join(rows) + "\n")
    return root


def folder(root, classes=("ant", "bee", "cat", "dog", "eel"), images=6):
    """Your own images: one folder per class."""
    for c, name in enumerate(classes):
        for i in range(images):
            write_image(root / name / ("more" if i == 0 else ".") / f"{i}.jpg", 100 * c + i)
    for name in ("notes.txt", "notes.pdf", ".hidden.jpg"):
        (root / "ant" / name).write_text("not an image")
    return root


def save_checkpoint(path, network, record=None):
    """A checkpoint as train.py writes it, with this record of its network; without one as the published code does."""
    content = {"model_state_dict": network.state_dict()}
    torch.save(content | ({"network": record} if record else {}), path)
