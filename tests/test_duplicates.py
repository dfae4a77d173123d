"""`python -m dataset check` finds duplicate images: identical files, and near duplicates."""

import shutil

import imagehash
import numpy as np
import pytest
import trees
from helpers import write_csv
from PIL import Image

import dataset
from dataset import duplicates
from dataset.__main__ import main as dataset_main


def smooth(seed, path):
    """A picture of large areas, as photos have."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture
def table(tmp_path):
    """40 pictures of 4 classes, two of which train, with planted duplicates."""
    rows = []
    for number in range(40):
        split, label = ("train" if number < 20 else "eval"), number // 10
        smooth(number, tmp_path / f"{number}.jpg")
        rows.append((f"{number}.jpg", label, split, ""))

    def add(name, label, split, group=""):
        rows.append((name, label, split, group))
        return tmp_path / name

    shutil.copy(tmp_path / "0.jpg", add("copy of 0.jpg", 0, "train"))
    shutil.copy(tmp_path / "1.jpg", add("copy of 1.jpg", 2, "eval"))
    with Image.open(tmp_path / "25.jpg") as image:
        image.resize((80, 60)).save(add("small 25.jpg", 3, "eval"), quality=50)
        rows[25] = ("25.jpg", 2, "eval", "")
    with Image.open(tmp_path / "30.jpg") as image:  # of one burst: known
        image.save(add("again 30.jpg", 3, "eval", "burst"), quality=80)
        rows[30] = ("30.jpg", 3, "eval", "burst")
    for name, grey in (("white.png", 255), ("black.png", 0), ("black again.png", 0)):
        Image.new("RGB", (50, 50), 3 * (grey,)).save(add(name, 3, "eval"))
    return write_csv(tmp_path / "images.csv", rows, ("path", "label", "split", "group"))


def check(table, capsys, problems=0):
    try:
        dataset_main(["check", "csv", "--data-root", str(table), "--workers", "0"])
        assert not problems
    except SystemExit:
        assert f"csv has {problems} problem" in (output := capsys.readouterr()).err
    else:
        output = capsys.readouterr()
    lines = output.out.replace(f"{table.parent}/", "").splitlines()
    return lines[next(i for i, line in enumerate(lines) if "both training and test" in line) :]


def test_duplicates_are_found_and_the_closest_listed(table, capsys):
    first, listed, flat, head, same, near, closest, *rows, end = check(table, capsys, problems=1)
    assert first == "Images in both training and test: 1" and listed == "  1.jpg = copy of 1.jpg"
    assert flat == "3 nearly uniform images: checked for identical files only"
    assert head.split() == ["pairs", "of", "images", "train", "test", "both", "classes", "differ"]
    assert same.split()[-4:] == ["1", "1", "1", "1"] and near.split()[-4:] == ["0", "1", "0", "1"]
    assert closest == "The closest pairs, each image once:"
    assert end == "  Identical files have different labels: 1.jpg has 0, copy of 1.jpg has 2"
    assert [" ".join(row.split()) for row in rows[:3]] == [
        "identical both 1.jpg = copy of 1.jpg (0 and 2)",
        "identical train 0.jpg = copy of 0.jpg (both 0)",
        "identical test black.png = black again.png (both 3)",
    ]
    with Image.open(table.parent / "25.jpg") as a, Image.open(table.parent / "small 25.jpg") as b:
        bits = imagehash.phash(a) - imagehash.phash(b)
    assert [" ".join(row.split()) for row in rows[3:]] == [f"{bits} bits test 25.jpg = small 25.jpg (2 and 3)"]


def test_without_the_library_it_is_said(table, capsys, monkeypatch):
    monkeypatch.setattr(duplicates, "find_spec", lambda name: None)
    lines = check(table, capsys, problems=1)
    assert lines[2] == "Near duplicates were not checked, only identical files: pip install imagehash"
    assert lines[4].split()[-4:] == ["1", "1", "1", "1"] and lines[5].split()[-4:] == ["0", "0", "0", "0"]
    assert lines[-1].startswith("  Identical files have different labels: ")


def test_no_duplicates_is_one_line(tmp_path, capsys):
    for number in range(4):
        smooth(number, tmp_path / f"{number}.jpg")
    table = write_csv(tmp_path / "a.csv", [(f"{i}.jpg", i % 2, "eval") for i in range(4)])
    assert check(table, capsys)[1:] == [
        "No duplicates: no identical files, nor hashes within 4 bits",
        "No problems found.",
    ]


@pytest.mark.parametrize("block", [1, 5000, 1 << 17])
def test_near_pairs_are_all_pairs(block, monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    random = np.random.default_rng(0)
    hashes = random.integers(0, 1 << 64, 150, dtype=np.uint64)
    for i in range(100, 150):  # near others, by up to 6 bits
        flipped = sum(1 << int(bit) for bit in random.choice(64, random.integers(0, 7), replace=False))
        hashes[i] = int(hashes[random.integers(0, 40)]) ^ flipped
    found = [pair for block in duplicates.near_pairs(hashes, 4) for pair in zip(*(part.tolist() for part in block))]
    numbers = hashes.tolist()
    pairs = [(i, j, bin(numbers[i] ^ numbers[j]).count("1")) for i in range(150) for j in range(i + 1, 150)]
    assert sorted(found) == [pair for pair in pairs if pair[2] <= 4] and len(found) > 30


def test_hash_is_that_of_the_library(table):
    for number in range(10):
        with Image.open(table.parent / f"{number}.jpg") as image:
            found, theirs = duplicates.perceptual_hash(np.asarray(image)), imagehash.phash(image)
        assert f"{found:016x}" == str(theirs)
    noise = np.random.default_rng(0).integers(100, 104, (90, 120, 3), dtype=np.uint8)
    assert duplicates.perceptual_hash(noise) is None


def test_many_equal_images_make_a_short_list():
    """Every pair is counted, and each image listed once."""
    count = 3000
    zeros = np.zeros(count, dtype=int)
    found = duplicates.find(zeros.astype(np.uint64), np.arange(count), zeros > 0, zeros, zeros - 1)
    assert found.near.tolist() == [count * (count - 1) // 2, 0, 0] and found.in_two_classes == (0, 0)
    assert found.closest and len({image for pair in found.closest for image in pair[:2]}) == 2 * len(found.closest)


@pytest.mark.parametrize(
    "labels, splits, groups, problems",
    [
        (("a", "b"), ("train", "train"), ("", ""), 1),
        (("a", "b"), ("eval", "eval"), ("", ""), 1),
        (("a", "b"), ("eval", "eval"), ("burst", "burst"), 1),  # a group explains the copy, not the labels
        (("a", "b"), ("train", "eval"), ("", ""), 1),
        (("a", "a"), ("train", "eval"), ("", ""), 0),
        (("a", "a"), ("eval", "eval"), ("", ""), 0),
    ],
)
def test_one_image_with_two_labels_is_wrong(tmp_path, capsys, labels, splits, groups, problems):
    for number in range(4):
        smooth(number, tmp_path / f"{number}.jpg")
    shutil.copy(tmp_path / "0.jpg", tmp_path / "1.jpg")
    rows = [("2.jpg", "a", "eval", ""), ("3.jpg", "b", "eval", "")]
    rows += [(f"{i}.jpg", labels[i], splits[i], groups[i]) for i in range(2)]
    lines = check(write_csv(tmp_path / "a.csv", rows, ("path", "label", "split", "group")), capsys, problems)
    wrong = "  Identical files have different labels: 0.jpg has a, 1.jpg has b"
    assert lines[-1] == (wrong if problems else "No problems found.")


def test_an_image_in_two_class_folders_is_wrong(tmp_path, capsys):
    for number in range(4):
        smooth(number, tmp_path / "ab"[number // 2] / f"{number}.jpg")
    shutil.copy(tmp_path / "a" / "0.jpg", tmp_path / "b" / "copy.jpg")
    with pytest.raises(SystemExit):
        dataset_main(["check", "folder", "--data-root", str(tmp_path), "--workers", "0"])
    out, error = capsys.readouterr()
    assert "No problems found" not in out and "folder has 1 problem, listed above" in error
    assert f"Identical files have different labels: {tmp_path}/a/0.jpg has a, {tmp_path}/b/copy.jpg has b" in out


def test_a_benchmark_may_have_images_with_two_labels(tmp_path, capsys, monkeypatch):
    """Half of Cars-196 has some."""
    monkeypatch.setattr(dataset.BENCHMARKS["cub"], "SIZES", {"train": (4, 24), "eval": (3, 18)})
    images = trees.cub(tmp_path) / "CUB_200_2011" / "images"
    shutil.copy(images / "101.Bird_101" / "Bird_101_0000.jpg", images / "102.Bird_102" / "Bird_102_0000.jpg")
    dataset_main(["check", "cub", "--data-root", str(tmp_path), "--workers", "0"])
    assert "This is the published cub." in capsys.readouterr().out
