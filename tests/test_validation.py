"""train.py --fold: which classes are held out, that the test set stays untouched, and what a run leaves behind."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import poison
import pytest
import torch
import trees

import dataset
import train
from dataset import transforms, validation
from dataset.images import ImageDataset
from proxy_anchor import metrics
from proxy_anchor.runs import resuming, run_folders

# Classes of the training split, and the first of each part: the ranges of the two reference protocols.
HALVES = {"cub": (100, [0, 50]), "cars": (98, [0, 49]), "SOP": (11318, [0, 5659]), "Inshop": (3997, [0, 1998])}
QUARTERS = {
    "cub": (100, [0, 25, 50, 75]),
    "cars": (98, [0, 24, 49, 73]),
    "SOP": (11318, [0, 2829, 5659, 8488]),
    "Inshop": (3997, [0, 999, 1998, 2997]),
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("parts", [HALVES, QUARTERS], ids=["halves", "quarters"])
def test_class_ranges(name, parts):
    classes, starts = parts[name]
    assert dataset.BENCHMARKS[name].SIZES["train"][0] == classes
    labels = np.arange(classes)[::-1].repeat(2)  # the order of the images does not matter
    images = ImageDataset([f"{i}.jpg" for i in range(len(labels))], labels, list(range(1000, 1000 + classes)))
    for part, (start, end) in enumerate(zip(starts, [*starts[1:], classes]), start=1):
        split = validation.hold_out(images, f"{part}/{len(starts)}", "evaluation")
        held_out = list(range(1000 + start, 1000 + end))
        assert split["val"].classes == held_out
        assert split["train"].classes == [label for label in images.classes if label not in set(held_out)]
        for half in split.values():
            assert len(half) == 2 * half.num_classes and sorted(set(half.labels)) == list(range(half.num_classes))
            whole = [int(path.removesuffix(".jpg")) for path in half.paths]
            assert [half.classes[label] for label in half.labels] == [1000 + labels[i] for i in whole]
            assert half.numbers.tolist() == whole


def test_parts_have_every_class_once():
    for classes in range(2, 30):
        for parts in range(2, classes + 1):
            found = [number for k in range(1, parts + 1) for number in validation.fold_classes(classes, f"{k}/{parts}")]
            assert found == list(range(classes))
    with pytest.raises(ValueError, match="3 training classes cannot be divided into 4 parts"):
        validation.fold_classes(3, "1/4")


@pytest.mark.parametrize("fold", ["0/2", "3/2", "1/1", "2", "a/b", "1/2/3", "-1/2", "", "²/4", "1/2\n"])
def test_wrong_fold_is_a_usage_error(fold, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse([f"--fold={fold}"])
    assert end.value.code == 2 and "expected K/N, the K-th of N >= 2 parts" in capsys.readouterr().err


def test_fold_val_needs_a_split_of_that_name(cub_root):
    with pytest.raises(ValueError, match="--fold val is for --dataset csv: cub has no split"):
        dataset.open_splits("cub", cub_root, 32, "val", allow_partial=True)


def table(root, rows):
    """A CSV file of (label, split), an image for each; returns its path."""
    for number, (label, _) in enumerate(rows):
        trees.write_image(root / f"{label}/{number}.jpg", number)
    lines = [f"{label}/{number}.jpg,{label},{split}" for number, (label, split) in enumerate(rows)]
    (root / "table.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    return root / "table.csv"


def own_table(root):
    """Two classes each to train, to validate and to test."""
    splits = {"a": "train", "b": "train", "c": "val", "d": "val", "e": "eval", "f": "eval"}
    return table(root, [(label, split) for label, split in splits.items() for _ in range(4)])


TREES = {
    "cub": trees.cub,
    "cars": lambda root: trees.cars(root, classes=(1, 2, 3, 4, 99, 100)),
    "SOP": lambda root: trees.sop(root, train=4),
    "Inshop": lambda root: trees.inshop(root, train=4),
    "folder": lambda root: trees.folder(root, classes=("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")),
    "csv": own_table,
}


def test_images_look_as_in_the_whole_split(cub_root):
    """The held-out ones as when they test, the others as when all train: the same crops from the same numbers."""
    parts = dataset.open_splits("cub", cub_root, 32, "1/2", allow_partial=True)
    whole = dataset.train_set("cub", cub_root, 32, allow_partial=True)
    seen = dataset.load("cub", cub_root, "train", transforms.Evaluation(32), allow_partial=True)
    assert [dataset.size(images) for images in parts.values()] == [(12, 2), (12, 2)]
    place = {path: number for number, path in enumerate(whole.paths)}
    for index, path in enumerate(parts["val"].paths):
        assert torch.equal(parts["val"][index][0], seen[place[path]][0])
    for index, path in enumerate(parts["train"].paths):
        assert torch.equal(parts["train"][1, 3, index][0], whole[1, 3, place[path]][0])


def test_val_of_a_table(tmp_path):
    path = own_table(tmp_path)
    parts = dataset.open_splits("csv", path, 32, "val")
    assert [images.classes for images in parts.values()] == [["a", "b"], ["c", "d"]]
    assert dataset.open_splits("csv", path, 32)["train"].classes == ["a", "b", "c", "d"]  # without the flag it trains
    assert list(dataset.open_splits("csv", path, 32)) == ["train", "eval"]
    with pytest.raises(ValueError, match="train and val share labels, the first is 'a'"):
        dataset.open_splits("csv", table(tmp_path / "both", [("a", "train"), ("a", "val"), ("e", "eval")]), 32, "val")
    with pytest.raises(ValueError, match="has no split 'val'"):
        dataset.open_splits("csv", table(tmp_path / "none", [("a", "train"), ("e", "eval")]), 32, "val")
    with pytest.raises(ValueError, match="csv train has no images for training"):
        dataset.open_splits("csv", table(tmp_path / "all", [("a", "val"), ("e", "eval")]), 32, "val")


def arguments(name, place, logs, **changed):
    settings = {
        "dataset": name,
        "data-root": place,
        "model": "tiny",
        "embedding-size": 8,
        "batch-size": 4,
        "warm": 0,
        "image-size": 32,
        "workers": 0,
        "pretrained": "none",
        "epochs": 1,
        "lr-decay-step": 1,
        "LOG_DIR": logs,
    } | changed
    return ["--allow-partial", *(f"--{key}={value}" for key, value in settings.items())]


def files_to_test(name, place):
    """The test images, and the folders without training images."""
    splits = dataset.open_splits(name, place, 32, allow_partial=True)
    training, *tests = [set(images.paths) for images in splits.values()]
    images = set.union(*tests) - training
    return images | {
        folder for path in images if not any(t.startswith(f"{(folder := os.path.dirname(path))}/") for t in training)
    }


@pytest.mark.parametrize("name", TREES)
def test_test_set_stays_untouched(name, tmp_path, monkeypatch):
    """With a search for damaged images, a cache and balanced batches; a run without a fold finds the poison."""
    place = TREES[name](tmp_path / "data")
    place = place if place.suffix == ".csv" else tmp_path / "data"
    fold = "val" if name == "csv" else "2/2"
    argv = [*arguments(name, place, tmp_path / "logs", fold=fold, IPC=2, cache=tmp_path / "cache"), "--skip-bad-images"]
    poisons = files_to_test(name, place)
    assert len(poisons) > 3
    with poison.poisoned(poisons, monkeypatch):
        train.main(argv)
        with pytest.raises(poison.Touched):
            splits = dataset.open_splits(name, place, 32, allow_partial=True)
            assert splits["train"][0, 0, 0]  # the training images may be read
            list(splits.values())[1][0]
    (folder,) = (tmp_path / "logs" / f"logs_{name}").iterdir()
    config = run_folders.read_config(folder)
    assert config["fold"] == fold and config["sizes"].keys() == config["data"].keys() == {"train", "val"}
    assert folder.name.endswith("_foldval" if name == "csv" else "_fold2of2")


@pytest.fixture(scope="module")
def on_fold(cub_root, tmp_path_factory):
    """The folder of a run on the second half, whose best epoch is by MAP@R."""
    logs = tmp_path_factory.mktemp("fold")
    train.main([*arguments("cub", cub_root, logs, fold="2/2", epochs=3, by="MAP@R", lr=1e-2), "--bn-freeze", "0"])
    (folder,) = (logs / "logs_cub").iterdir()
    return folder


def test_run_on_a_fold(on_fold, capsys):
    """All that it leaves behind names the fold's metrics, and the best epoch is by the metric that was chosen."""
    with open(on_fold / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["val/R@1", "val/R@2", "val/R@4", "val/R@8", "val/R@16", "val/R@32", "val/MAP@R", "val/R-precision"]
    assert list(rows[0]) == ["epoch", "loss", "lr", "seconds", *names]
    best = max(range(3), key=lambda epoch: float(rows[epoch]["val/MAP@R"]))
    lines = (on_fold / "cub_tiny_best_results.txt").read_text().splitlines()
    assert lines[:2] == [f"Best Epoch: {best}", f"Best val/Recall@1: {100 * float(rows[best]['val/R@1']):.4f}"]
    assert run_folders.is_finished(on_fold, 3)
    assert resuming.progress(on_fold / "last.pth")["rows"][1]["val/R@1"] == float(rows[1]["val/R@1"])
    assert metrics.plain(run_folders.read_metrics(on_fold)[0][2])["R@1"] == float(rows[2]["val/R@1"])
    assert (on_fold / "curves.png").exists()


def test_best_is_by_the_metric_named():
    rows = [{"epoch": e, "val/R@1": r, "val/MAP@R": m} for e, r, m in [(0, 0.5, 0.1), (1, 0.4, 0.3), (2, 0.5, 0.3)]]
    assert [metrics.best(rows)["epoch"], metrics.best(rows, "MAP@R")["epoch"]] == [0, 1]
    assert metrics.best([metrics.plain(row) for row in rows], "MAP@R")["epoch"] == 1


def test_resume(on_fold, cub_root, capsys):
    """A fold's run is found again and continued, and refused as the run of another fold, or of all classes."""
    logs = on_fold.parent.parent
    same = [*arguments("cub", cub_root, logs, fold="2/2", epochs=3, by="MAP@R", lr=1e-2), "--bn-freeze=0"]
    train.main([*same, "--resume", "auto"])
    assert "has finished" in capsys.readouterr().out
    for change in (["--fold", "1/2"], ["--by", "R@1"]):
        with pytest.raises(SystemExit) as end:
            train.main([*same, *change, "--resume", str(on_fold)])
        words = f"{change[0][2:]}: {'2/2' if change[0] == '--fold' else 'MAP@R'}, now {change[1]}"
        assert end.value.code == 1 and words in capsys.readouterr().err
    plain = [argument for argument in same if not argument.startswith("--fold")]
    with pytest.raises(SystemExit):
        config = json.loads((on_fold / "config.json").read_text())
        (on_fold / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "fold"}))  # as of old
        try:
            train.main([*plain, "--resume", str(on_fold)])
        finally:
            (on_fold / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert "other images or classes" in capsys.readouterr().err


def test_names_of_folders():
    names = [train.run_name(train.parse(["--remark", "x", *more])) for more in ([], ["--fold", "1/4", "--seed", "2"])]
    assert names[1] == f"{names[0]}_fold1of4_seed2" and Path(names[1]).name == names[1]


def test_untrained_network_is_measured_on_the_fold(cub_root, tmp_path, capsys):
    train.main(arguments("cub", cub_root, tmp_path, fold="1/2", epochs=0))
    lines = capsys.readouterr().out.splitlines()
    assert "train: 12 images of 2 classes, val: 12 images of 2 classes" in lines
    assert any(line.startswith("val/       ") and " R@1 " in line for line in lines) and not any(tmp_path.iterdir())
