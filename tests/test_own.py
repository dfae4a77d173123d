"""Your own images: --dataset folder and --dataset csv."""

import csv
import shutil

import pytest
import trees
from test_scripts import read_metrics

import dataset
import evaluate
import train
from dataset.__main__ import main as dataset_main
from dataset.files import BadFile


def labelled(images):
    """{file name: class} of a dataset."""
    return [(path.split("/")[-1], images.classes[label]) for path, label in zip(images.paths, images.labels)]


def write_csv(path, rows, columns=("path", "label", "split")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def table(tmp_path):
    """A CSV file of two training and two test classes."""
    trees.folder(tmp_path / "images", classes=("ant", "bee", "cat", "dog"))
    rows = [
        (f"images/{name}/{i}.jpg", f"the {name}, {name}", "train" if name in ("ant", "bee") else "eval")
        for name in ("ant", "bee", "cat", "dog")
        for i in range(1, 6)
    ]
    return write_csv(tmp_path / "images.csv", rows)


def test_folder_is_halved(tmp_path):
    trees.folder(tmp_path)
    train_set, eval_set = (dataset.load("folder", tmp_path, split) for split in ("train", "eval"))
    assert train_set.classes == ["ant", "bee"] and eval_set.classes == ["cat", "dog", "eel"]
    assert len(train_set) == 12 and len(eval_set) == 18 and eval_set.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert labelled(train_set)[:6] == [(f"{i}.jpg", "ant") for i in (1, 2, 3, 4, 5, 0)]  # the last in a folder below


def test_hidden_folders_are_left_out_and_links_followed_once(tmp_path, capsys):
    root, elsewhere = trees.folder(tmp_path / "images", classes=("ant", "bee", "cat")), tmp_path / "elsewhere"
    for name in ("more/0.jpg", "1.jpg", "2.jpg"):
        trees.write_image(elsewhere / name, 0)
    for hidden in (root / "ant" / ".ipynb_checkpoints", root / ".thumbnails"):
        trees.write_image(hidden / "deep" / "1.jpg", 0)
    for link, target in {
        root / "dog": elsewhere,  # a class
        root / "ant" / "linked": elsewhere / "more",  # one image of a class
        root / "ant" / "again": elsewhere / "more",
        root / "bee" / "itself": root / "bee",
        root / "bee" / "above": root,
        root / "cat" / "nowhere": tmp_path / "nowhere",
    }.items():
        link.symlink_to(target, target_is_directory=True)
    train_set, eval_set = (dataset.load("folder", root, split) for split in ("train", "eval"))
    assert train_set.classes == ["ant", "bee"] and eval_set.classes == ["cat", "dog"]
    assert len(train_set) == 6 + 1 + 6 and len(eval_set) == 6 + 3
    assert [path for path in train_set.paths if "again" in path] == [str(root / "ant" / "again" / "0.jpg")]
    dataset_main(["check", "folder", "--data-root", str(root), "--workers", "0"])
    out = capsys.readouterr().out
    assert "\n3 images are left out: they or their folders are hidden\n" in out  # with .hidden.jpg
    assert "\n4 images are in linked folders\n" in out


def test_test_classes_are_chosen(tmp_path):
    trees.folder(tmp_path / "images")
    (tmp_path / "tests.txt").write_text("ant\n\n eel\n", encoding="utf-8-sig")  # a byte order mark is no class
    choice = {"test_classes": tmp_path / "tests.txt"}
    assert dataset.load("folder", tmp_path / "images", "train", **choice).classes == ["bee", "cat", "dog"]
    assert dataset.load("folder", tmp_path / "images", "eval", **choice).classes == ["ant", "eel"]


def test_csv(table):
    eval_set = dataset.load("csv", table, "eval")
    assert labelled(eval_set)[4:6] == [("5.jpg", "the cat, cat"), ("1.jpg", "the dog, dog")]
    assert dataset.load("csv", table, "train").num_classes == 2 and dataset.eval_splits("csv", table) == ["eval"]


def test_csv_beside_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(trees.folder(tmp_path, classes=("ant", "bee")) / "ant")
    write_csv("a.csv", [("1.jpg", "ant", "eval"), ("../bee/1.jpg", "bee", "eval")])
    assert dataset.load("csv", "a.csv", "eval").paths == ["1.jpg", "../bee/1.jpg"]
    (tmp_path / "ant" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images .* the first is 1.jpg"):
        dataset.load("csv", "a.csv", "eval")


def test_csv_may_train_and_test_on_an_image(tmp_path):
    trees.folder(tmp_path, classes=("ant", "bee"))
    uses = [("1", "query"), ("1", "train"), ("2", "gallery"), ("2", "train")]
    path = write_csv(tmp_path / "a.csv", [(f"{c}/{i}.jpg", c, s) for c in ("ant", "bee") for i, s in uses])
    assert [len(dataset.load("csv", path, split)) for split in ("train", "query", "gallery")] == [4, 2, 2]


def test_csv_with_a_gallery_and_a_byte_order_mark(tmp_path):
    trees.folder(tmp_path, classes=("ant", "bee"))
    path = write_csv(tmp_path / "a.csv", [(f"{c}/{i}.jpg", c, s) for c in ("ant", "bee") for i, s in enumerate(
        ("gallery", "query", "gallery", "train"), 1)][1:])  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert dataset.eval_splits("csv", path) == ["query", "gallery"]
    assert dataset.load("csv", path, "query").labels.tolist() == [0, 1]
    assert dataset.load("csv", path, "gallery").labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "break_it, words",
    [
        (
            lambda root: [shutil.rmtree(root / name) for name in ("bee", "cat", "dog", "eel")],
            r"too few folders \(1\)",
        ),
        (lambda root: [path.unlink() for path in (root / "bee").rglob("*.jpg")], "bee has no images"),
        (shutil.rmtree, "There is no .*one folder per class"),
    ],
)
def test_wrong_folder_is_an_error(tmp_path, break_it, words):
    root = trees.folder(tmp_path / "images")
    break_it(root)
    with pytest.raises((BadFile, FileNotFoundError), match=words):
        dataset.load("folder", root, "train")


@pytest.mark.parametrize(
    "content, words",
    [
        ("bee\nfox\n", "line 2: there is no class folder 'fox'"),
        ("\n", "names 0 of 5 classes"),
        ("\xff", "is not a text file"),
        (None, "There is no"),
    ],
)
def test_wrong_test_classes_are_an_error(tmp_path, content, words):
    trees.folder(tmp_path / "images")
    path = tmp_path / "tests.txt"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises((BadFile, FileNotFoundError), match=words):
        dataset.load("folder", tmp_path / "images", "train", test_classes=path)


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "line 1: expected the columns path,label,split"),
        ("path,label\na.jpg,a\n", "line 1: expected the columns path,label,split, found"),
        ("path,label,split\na.jpg,a,train\nb.jpg,b\n", "line 3: expected a path, a label and a split"),
        ("path,label,split\na.jpg,,train\n", "line 2: expected a path, a label and a split"),
        ("path,label,split\na.jpg,a,train,b\n", "line 2: expected a path"),
        (
            "path,label,split\na.jpg,a,test\n",
            "line 2: the split is 'test', expected one of train, eval",
        ),
        ("path,label,split\na.jpg,a,query\n", "has the splits query: to test, it needs eval, or query and gallery"),
        ("path,label,split\na.jpg,a,train\n", "has the splits train: to test, it needs"),
        ('path,label,split\n"a.jpg,a,train\n', "is not a CSV file"),
        (
            "path,label,split\na/b.jpg,a,eval\nb.jpg,b,eval\na/c/../b.jpg,a,eval\n",
            r"line 4: a/c/\.\./b.jpg is in line 2 already; list an image once to test",
        ),
        ("path,label,split\na.jpg,a,train\na.jpg,b,train\n", "line 3: a.jpg is in line 2 already"),
        ("path,label,split\na.jpg,a,query\na.jpg,a,gallery\n", "line 3: a.jpg is in line 2 already"),
        ("path,label,split\na.jpg,a,eval\n", "1 of the 1 images of csv eval are missing; the first is .*a.jpg"),
        (b"path,label,split\n\xff\xfe,a,eval\n", "is not a CSV file"),
    ],
)
def test_wrong_csv_is_an_error(tmp_path, content, words):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((BadFile, FileNotFoundError), match=words):
        dataset.load("csv", path, "eval")


def test_csv_that_is_a_folder_and_classes_for_others_are_errors(tmp_path, table):
    with pytest.raises(BadFile, match="is a folder: with --dataset csv"):
        dataset.load("csv", tmp_path, "eval")
    with pytest.raises(ValueError, match="--test-classes is for --dataset folder"):
        dataset.load("csv", table, "eval", test_classes=table)
    with pytest.raises(ValueError, match="csv has no split 'query'; it has train, eval"):
        dataset.load("csv", table, "query")


@pytest.mark.parametrize("name", ["folder", "csv"])
def test_training_and_evaluation(tmp_path, table, name, capsys):
    root = tmp_path / "images" if name == "folder" else table
    flags = ["--dataset", name, "--data-root", str(root), "--batch-size", "8", "--workers", "0"]
    network = ["--model", "resnet18", "--pretrained", "none", "--embedding-size", "8", "--image-size", "32"]
    train.main([*flags, *network, "--epochs", "1", "--LOG_DIR", str(tmp_path / "logs")])
    assert "train: 1" in capsys.readouterr().out
    (run,) = (tmp_path / "logs" / f"logs_{name}").iterdir()
    metrics = evaluate.main([*flags, "--resume", str(run / f"{name}_resnet18_best.pth")])
    assert metrics["R@1"] == float(read_metrics(run)[0]["R@1"])
    assert "published" not in capsys.readouterr().out


def test_one_test_class_is_remarked(tmp_path, capsys):
    root = trees.folder(tmp_path / "images", classes=("ant", "bee"))
    words = "All test images are of one class: any network finds the right one, R@1 is 100% by definition.\n"
    network = ["--model", "resnet18", "--pretrained", "none", "--embedding-size", "8", "--image-size", "32"]
    flags = ["--dataset", "folder", "--data-root", str(root), "--batch-size", "6", "--workers", "0"]
    train.main([*flags, *network, "--epochs", "1", "--LOG_DIR", str(tmp_path / "logs")])
    assert words in capsys.readouterr().out
    (path,) = tmp_path.glob("logs/**/*_best.pth")
    assert evaluate.main([*flags, "--resume", str(path)])["R@1"] == 1
    assert words in capsys.readouterr().out
    dataset_main(["check", "folder", "--data-root", str(root), "--workers", "0"])
    assert words in capsys.readouterr().out
    for path in (root / "bee").rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit):
        train.main([*flags, *network, "--epochs", "1", "--LOG_DIR", str(tmp_path / "other"), "--skip-bad-images"])
    assert capsys.readouterr().err.endswith(
        "train.py: error: folder eval: all 6 images are left out, which leaves none to evaluate on\n"
    )


def test_check(tmp_path, table, capsys):
    dataset_main(["check", "csv", "--data-root", str(table), "--workers", "0"])
    out = capsys.readouterr().out
    assert "train: 10 images of 2 classes\n" in out and "Nothing is wrong." in out and "one class" not in out
    (tmp_path / "images" / "dog" / "3.jpg").write_bytes(b"")
    with pytest.raises(SystemExit):
        dataset_main(["check", "csv", "--data-root", str(table), "--workers", "0"])
    assert "dog/3.jpg cannot be read" in capsys.readouterr().out
