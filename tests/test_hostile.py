"""Damaged files: each ends in an error that the scripts show as one line, or in the right result."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
import trees
from helpers import mutations, result_or_error
from PIL import Image

import dataset
import evaluate
import export
import net
import search
import transfer
from dataset.__main__ import main as dataset_main
from dataset.files import read_image
from net import pretrained
from proxy_anchor import checkpoint, cli
from proxy_anchor.files import csv_cell, printable
from proxy_anchor.runs import resuming
from proxy_anchor.spec import NetworkSpec

SPEC = NetworkSpec("tiny", 4, 32)


class Tiny(torch.nn.Module):
    unused = ()

    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((7, 30), value))
        self.register_buffer("count", torch.tensor(5))


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.pth"
    trees.save_checkpoint(path, Tiny(1.5), {"model": "tiny", "embedding_size": 4, "image_size": 32, "l2_norm": 1})
    errors = 0
    for data in mutations(path.read_bytes(), 210, seed=0):
        path.write_bytes(data)
        network = Tiny(0.0)
        result_or_error(lambda: checkpoint.Checkpoint(path).spec)
        if isinstance(result_or_error(lambda network=network: checkpoint.load(path, network)), Exception):
            errors += 1
            assert not network.weight.any()  # nothing was loaded
        else:
            assert (network.weight == 1.5).all() and network.count == 5
    assert errors > 100


def test_damaged_legacy_checkpoints(tmp_path):
    """The legacy format has no checksums: cut short or with pieces missing, it is an error."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"model_state_dict": Tiny(1.5).state_dict()}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        network = Tiny(0.0)
        assert isinstance(result_or_error(lambda network=network: checkpoint.load(path, network)), Exception)
        assert not network.weight.any()


def test_damaged_run_checkpoints(tmp_path):
    """last.pth: what does not load whole is an error."""
    path = tmp_path / "last.pth"
    network = Tiny(1.5)
    optimizer = torch.optim.AdamW(network.parameters())
    resuming.save(path, network, SPEC, {"optimizer": optimizer}, {"epoch": 3, "losses": [], "seconds": 0.0, "rows": []})
    for data in mutations(path.read_bytes(), 70, seed=1):
        path.write_bytes(data)
        other = Tiny(0.0)
        parts = {"optimizer": torch.optim.AdamW(other.parameters())}
        progress = result_or_error(lambda other=other, parts=parts: resuming.load(path, other, parts))
        if isinstance(progress, Exception):
            assert not other.weight.any()
        else:
            assert progress["epoch"] == 3 and (other.weight == 1.5).all()


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"progress": change}
            for change in (
                {"rows": None},
                {"rows": [{}]},
                {"rows": [1]},
                {"losses": None},
                {"losses": ["x"]},
                {"seconds": "x"},
                {"epoch": -1},
            )
        ),
        {"optimizer": {}},
        {"optimizer": None},
        {"idle": 5},
        {"idle": {"scale": 1.0}},
    ],
)
def test_edited_run_checkpoints(tmp_path, change):
    path, network = tmp_path / "last.pth", Tiny(1.5)
    parts = {"optimizer": torch.optim.AdamW(network.parameters()), "idle": torch.amp.GradScaler("cpu", enabled=False)}
    resuming.save(path, network, SPEC, parts, {"epoch": 3, "losses": [], "seconds": 0.0, "rows": []})
    assert resuming.load(path, network, parts)["epoch"] == 3
    content = checkpoint.read(path)
    progress = content["progress"] | change.get("progress", {})
    torch.save(content | change | {"progress": progress}, path)
    with pytest.raises(ValueError, match=str(path)):
        resuming.load(path, network, parts)


def test_damaged_weights_files(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(Tiny(1.5).state_dict(), path)
    for data in mutations(path.read_bytes(), 70, seed=2):
        path.write_bytes(data)
        network = Tiny(0.0)
        if isinstance(result_or_error(lambda network=network: pretrained.load_weights(network, path)), Exception):
            assert not network.weight.any()
        else:
            assert (network.weight == 1.5).all()


@pytest.mark.parametrize(
    "name, make, table",
    [
        ("SOP", trees.sop, "Stanford_Online_Products/Ebay_train.txt"),
        ("Inshop", trees.inshop, "Inshop_Clothes/Eval/list_eval_partition.txt"),
        ("cars", trees.cars, "cars196/cars_annos.mat"),
        ("cars", trees.cars_devkit, "cars196/devkit/cars_train_annos.mat"),
    ],
)
def test_damaged_annotations(tmp_path, name, make, table):
    """Every split of what is read has an image and a label in range for each entry."""
    root = make(tmp_path)
    path = root / table
    for data in mutations(path.read_bytes(), 14 if name == "cars" else 70, seed=3):
        path.write_bytes(data)
        for split in dataset.BENCHMARKS[name].SIZES:
            images = result_or_error(lambda split=split: dataset.load(name, root, split, allow_partial=True))
            if not isinstance(images, Exception):
                assert len(images.paths) == len(images.labels) > 0
                assert images.labels.min() >= 0 and images.labels.max() < images.num_classes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_images(tmp_path, kind):
    path = tmp_path / "image"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)
    for data in mutations(path.read_bytes(), 35, seed=4):
        path.write_bytes(data)
        image = result_or_error(lambda: read_image(str(path)))
        if isinstance(image, Exception):
            assert str(path) in str(image)
        else:
            assert image.dtype == torch.uint8 and image.shape[0] == 3


def test_path_of_several_lines_is_told_whole(tmp_path):
    """An error of a worker comes as a traceback, of which the message is shown."""
    path = str(tmp_path / "a\nTraceback: b.jpg")
    images = dataset.ImageDataset([path], np.zeros(1, dtype=int), [""])
    for workers in (0, 1):
        error = result_or_error(lambda workers=workers: list(dataset.eval_loader(images, 1, workers)))
        assert cli.one_line(error) == f"The image {tmp_path}/a Traceback: b.jpg is missing"


def test_error_of_the_operating_system_names_the_file_first(tmp_path):
    error = result_or_error((tmp_path / "none.txt").read_text)
    assert cli.one_line(error) == f"{tmp_path}/none.txt: No such file or directory"


def test_network_stays_as_it_was(tmp_path):
    """A checkpoint of another size loads nothing, not even the tensors that would fit."""
    network = net.create("tiny", 8)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trees.save_checkpoint(tmp_path / "other.pth", net.create("tiny", 16), {})
    assert isinstance(result_or_error(lambda: checkpoint.load(tmp_path / "other.pth", network)), ValueError)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


FORGED = "x\x1b[2J\x9b31m\r\u202e\u2028\n  1  1.0000  forged"  # a name of a file may hold all of these


def is_plain(text):
    """Whether text has no control characters but the line breaks of the program, and none of its lines is forged."""
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", text) and not re.search(
        "^ *1  1.0000", text, re.M
    )


@pytest.mark.parametrize("name", ["folder", "csv"])
def test_names_forge_no_lines_of_a_check(tmp_path, capsys, name):
    """In the lists of duplicates, of damaged images, of classes and of images left out."""
    root, table = tmp_path / "images", [["path", "label", "split"]]
    for number, label in enumerate(("ant", FORGED, FORGED.upper(), "zoo")):
        for i in range(3):
            trees.write_image(root / label / f"{FORGED}{i}.jpg", max(2, 10 * number + i))
            table.append([f"images/{label}/{FORGED}{i}.jpg", f"{label}.", "train" if i else "eval"])
    shutil.copy(root / "ant" / f"{FORGED}0.jpg", root / FORGED / f"{FORGED}1.jpg")
    (root / "zoo" / f"{FORGED}2.jpg").write_bytes(b"damaged")
    (tmp_path / f".{FORGED}.jpg").write_bytes(b"hidden")
    with open(tmp_path / "images.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    place = root if name == "folder" else tmp_path / "images.csv"
    with pytest.raises(SystemExit):
        dataset_main(["check", name, "--data-root", str(place), "--workers", "0"])
    out, error = capsys.readouterr()
    assert "Identical files have different labels" in out and "cannot be read" in out and "differ only in case" in out
    assert is_plain(out) and is_plain(error) and r"x\x1b[2J\x9b31m\r\u202e\u2028\n  1  1.0000  forged" in out


def test_lines_of_a_check_are_short(tmp_path, capsys):
    csv.field_size_limit(2_000_000)
    rows = [["path", "label", "split", "group"]]
    for i in range(4):
        trees.write_image(tmp_path / f"{i}.jpg", i // 2)
        rows.append([f"{i}.jpg", "aA"[i % 2] * 200_000, "eval", "bB"[i // 2] * 200_000])
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(SystemExit):
        dataset_main(["check", "csv", "--data-root", str(tmp_path / "a.csv"), "--workers", "0"])
    out = capsys.readouterr().out
    assert "Classes that differ" in out and "Groups that differ" in out and "different labels" in out
    assert max(map(len, out.splitlines())) < 900


@pytest.mark.parametrize(
    "rows, words",
    [
        ([FORGED], "expected a path, a label and a split"),
        ([FORGED, "a", FORGED], "the split is"),
        ([FORGED, "a", "eval"], "Missing images of csv"),
        (["a" * 1_000_000, "a" * 100_000, "a" * 100_000], "the split is"),
    ],
)
def test_errors_are_one_short_line(tmp_path, capsys, rows, words):
    csv.field_size_limit(2_000_000)
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], rows])
    with pytest.raises(SystemExit):
        dataset_main(["check", "csv", "--data-root", str(tmp_path / "a.csv"), "--workers", "0"])
    error = capsys.readouterr().err
    assert words in error and is_plain(error) and error.count("\n") == 1 and len(error) < 900


@pytest.mark.parametrize("model", [f"tiny{FORGED}", "tiny" + "\x1b" * 1_000_000])
def test_a_record_forges_no_errors(tmp_path, capsys, model):
    """Those of usage, too, in which a file gave the argument."""
    record = {"model": "tiny", "embedding_size": 8, "image_size": 32, "l2_norm": 1}
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), record)
    trees.save_checkpoint(tmp_path / "b.pth", net.create("tiny", 8), record | {"model": model})
    for script, argv in (
        (evaluate, ["--resume", str(tmp_path / "b.pth")]),
        (evaluate, ["--resume", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]),
        (evaluate, ["--resume", str(tmp_path / "b.pth"), "--model", "resnet50"]),
        (export, ["--resume", str(tmp_path / "b.pth"), "--out", str(tmp_path / "b.onnx")]),
        (transfer, ["--source-ckpt", str(tmp_path / "b.pth")]),
        (search, ["index", "--resume", str(tmp_path / "b.pth"), "--images", ".", "--out", str(tmp_path / "index")]),
    ):
        with pytest.raises(SystemExit):
            script.main(argv)
        out, error = capsys.readouterr()
        (line,) = [line for line in error.splitlines() if "error: " in line]
        assert is_plain(out + error) and len(line) < 900


def test_cells_are_no_formulas(tmp_path):
    for text in ("=1+1", "+a", "-a", "@SUM(A1)", "=cmd|' /C calc'!A0", "-1+1", "- 1"):
        assert csv_cell(text) == f"'{text}"
    for text in ("-1", "+1.5", "1", "0.25", "a=b", "", "'=1", "caf\u00e9"):
        assert csv_cell(text) == text
    assert csv_cell("\t=1") == r"\t=1" and csv_cell("\r=1\n") == r"\r=1\n"


def test_printable_keeps_what_people_write():
    for text in ("caf\u00e9", "\u65e5\u672c\u8a9e \u3000", "\U0001f468\u200d\U0001f469", "a b", "C:\\a", "\u05d0"):
        assert printable(text) == text
    assert printable("a" * 100, 21) == "aaaaaaaa ... aaaaaaaa"
