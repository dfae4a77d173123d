"""Your own images: --dataset folder and --dataset csv."""

import shutil

import pytest
import trees
from helpers import read_metrics, write_csv

import dataset
import evaluate
import export
import net
import protocol
import search
import train
import transfer
from dataset.__main__ import main as dataset_main
from dataset.files import BadFile


def labelled(images):
    """{file name: class} of a dataset."""
    return [(path.split("/")[-1], images.classes[label]) for path, label in zip(images.paths, images.labels)]


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
    with pytest.raises(SystemExit):  # because the linked image is in two classes
        dataset_main(["check", "folder", "--data-root", str(root), "--workers", "0"])
    out = capsys.readouterr().out
    assert "\nHidden, so left out: 3 images\n" in out  # with .hidden.jpg
    assert "\nIn linked folders: 4 images\n" in out


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
    with pytest.raises(FileNotFoundError, match=r"csv eval: 1 of 2; the first is 1.jpg"):
        dataset.load("csv", "a.csv", "eval")


def test_csv_may_train_and_test_on_an_image(tmp_path):
    trees.folder(tmp_path, classes=("ant", "bee"))
    uses = [("1", "query"), ("1", "train"), ("2", "gallery"), ("2", "train")]
    path = write_csv(tmp_path / "a.csv", [(f"{c}/{i}.jpg", c, s) for c in ("ant", "bee") for i, s in uses])
    assert [len(dataset.load("csv", path, split)) for split in ("train", "query", "gallery")] == [4, 2, 2]


def test_csv_with_a_gallery_and_a_byte_order_mark(tmp_path):
    trees.folder(tmp_path, classes=("ant", "bee"))
    path = write_csv(
        tmp_path / "a.csv",
        [
            (f"{c}/{i}.jpg", c, s)
            for c in ("ant", "bee")
            for i, s in enumerate(("gallery", "query", "gallery", "train"), 1)
        ][1:],
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert dataset.eval_splits("csv", path) == ["query", "gallery"]
    assert dataset.load("csv", path, "query").labels.tolist() == [0, 1]
    assert dataset.load("csv", path, "gallery").labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda root: [shutil.rmtree(root / name) for name in ("bee", "cat", "dog", "eel")], r"too few folders \(1\)"),
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
        ("", "line 1: expected path,label,split"),
        ("path,label\na.jpg,a\n", r"line 1: expected path,label,split\[,group\], found"),
        ("path,label,split\na.jpg,a,train\nb.jpg,b\n", "line 3: expected a path, a label and a split"),
        ("path,label,split\na.jpg,,train\n", "line 2: expected a path, a label and a split"),
        ("path,label,split\na.jpg,a,train,b\n", "line 2: expected a path"),
        ("path,label,split\na.jpg,a,test\n", "line 2: the split is 'test', expected one of train, eval"),
        ("path,label,split\na.jpg,a,query\n", "has the splits query: expected eval, or query and gallery"),
        ("path,label,split\na.jpg,a,train\n", "has the splits train: expected"),
        ('path,label,split\n"a.jpg,a,train\n', "is not a CSV file"),
        (
            "path,label,split\na/b.jpg,a,eval\nb.jpg,b,eval\na/c/../b.jpg,a,eval\n",
            r"line 4: a/c/\.\./b.jpg is already in line 2; list it once to test",
        ),
        ("path,label,split\na.jpg,a,train\na.jpg,b,train\n", "line 3: a.jpg is already in line 2"),
        ("path,label,split\na.jpg,a,query\na.jpg,a,gallery\n", "line 3: a.jpg is already in line 2"),
        ("path,label,split\na.jpg,a,eval\n", "Missing images of csv eval: 1 of 1; the first is .*a.jpg"),
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
    network = ["--model", "tiny", "--pretrained", "none", "--embedding-size", "8", "--image-size", "32"]
    train.main([*flags, *network, "--epochs", "1", "--LOG_DIR", str(tmp_path / "logs")])
    assert "train: 1" in capsys.readouterr().out
    (run,) = (tmp_path / "logs" / f"logs_{name}").iterdir()
    metrics = evaluate.main([*flags, "--resume", str(run / f"{name}_tiny_best.pth")])
    assert metrics["R@1"] == float(read_metrics(run)[0]["R@1"])
    assert "published" not in capsys.readouterr().out


def test_no_test_classes_train_on_all(tmp_path, capsys):
    """The metrics are of the training images, under a name of their own; the last epoch is kept, whatever they are."""
    trees.folder(tmp_path / "photos")
    own = ["--dataset", "folder", "--data-root", str(tmp_path / "photos"), "--test-classes", "none"]
    network = ["--model", "resnet18", "--pretrained", "none", "--image-size", "32", "--embedding-size", "8"]
    run = ["--batch-size", "10", "--epochs", "2", "--lr", "1e-12", "--warm", "0", "--workers", "0"]
    train.main([*own, *network, *run, "--wandb", "disabled", "--LOG_DIR", str(tmp_path / "logs")])
    out = capsys.readouterr().out
    assert "train: 30 images of 5 classes, eval: 30 images of 5 classes" in out
    assert "No class is held out: train/R@1 shows how well the training images are learned." in out
    assert "best epoch (1)" in out and "Next:" not in out
    (folder,) = (tmp_path / "logs" / "logs_folder").iterdir()
    assert [row for row in read_metrics(folder)[-1] if row.endswith("R@1")] == ["train/R@1"]


def test_one_test_class_is_remarked(tmp_path, capsys):
    root = trees.folder(tmp_path / "images", classes=("ant", "bee"))
    words = "All test images belong to the same class, so R@1 is 100% for any network.\n"
    network = ["--model", "tiny", "--pretrained", "none", "--embedding-size", "8", "--image-size", "32"]
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
        "train.py: error: folder eval: all 6 images are left out, so there is nothing to evaluate\n"
    )


def test_check(tmp_path, table, capsys):
    dataset_main(["check", "csv", "--data-root", str(table), "--workers", "0"])
    out = capsys.readouterr().out
    assert "train: 10 images of 2 classes\n" in out and "No problems found." in out and "same class" not in out
    (tmp_path / "images" / "dog" / "3.jpg").write_bytes(b"")
    with pytest.raises(SystemExit):
        dataset_main(["check", "csv", "--data-root", str(table), "--workers", "0"])
    assert "dog/3.jpg cannot be read" in capsys.readouterr().out


# Spellings


def test_blanks_before_quotes_do_not_count(tmp_path):
    """They are no part of the cell, nor are the quotes; what csv cannot tell is refused."""
    trees.folder(tmp_path, classes=("ant", "bee"))
    path = tmp_path / "a.csv"
    path.write_text('path, label, split\n"ant/1.jpg", "ant", train\nbee/1.jpg,  "bee", "eval"\nbee/2.jpg, bee, eval\n')
    assert dataset.load("csv", path, "eval").classes == ["bee"]
    assert dataset.load("csv", path, "train").classes == ["ant"]
    for blank in ("\t", "\u00a0"):
        path.write_text(f'path,label,split\nant/1.jpg,ant,train\nbee/1.jpg,{blank}"bee",eval\n')
        with pytest.raises(BadFile, match="line 3: a quote must directly follow its comma"):
            dataset.load("csv", path, "eval")


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u3000", "\u2009", "\u200b", "\ufeff", "\u202a", " \u00a0\t"])
def test_white_space_around_cells_does_not_count(tmp_path, blank):
    trees.folder(tmp_path, classes=("ant", "bee"))
    rows = [
        (f"{c}/{i}.jpg", c, split, f"{c} {i // 2}")
        for c in ("ant", "bee")
        for i, split in enumerate(("train", "eval", "eval", "eval"), 1)
    ]
    columns = ("path", "label", "split", "group")
    spaced = [[f"{blank * (i % 2)}{cell}{blank * (i % 3)}" for cell in row] for i, row in enumerate(rows)]
    spaced_columns = [f"{blank}{name}{blank}" for name in columns]
    clean, other = write_csv(tmp_path / "a.csv", rows, columns), write_csv(tmp_path / "b.csv", spaced, spaced_columns)
    for split in ("train", "eval"):
        expected, images = dataset.load("csv", clean, split), dataset.load("csv", other, split)
        assert (images.paths, images.classes) == (expected.paths, expected.classes)
        assert images.labels.tolist() == expected.labels.tolist()
        assert images.groups.tolist() == expected.groups.tolist()
    for column in range(3):  # nothing is left
        row = [blank if i == column else cell for i, cell in enumerate(rows[0])]
        with pytest.raises(BadFile, match="line 10: expected a path, a label and a split"):
            dataset.load("csv", write_csv(tmp_path / "c.csv", [*spaced, row], columns), "eval")
    alone = [[*row[:3], blank] for row in rows]  # an empty group
    assert len(set(dataset.load("csv", write_csv(tmp_path / "d.csv", alone, columns), "eval").groups)) == 6


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("on_disk, written", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED), (" oak ", "oak")])
def test_one_folder_has_two_spellings(tmp_path, on_disk, written, monkeypatch):
    root = trees.folder(tmp_path / "images", classes=("ant", "bee", on_disk))
    for i in (1, 2):
        (root / on_disk / f"{i}.jpg").rename(root / on_disk / f"{on_disk.strip()}{i}.jpg")
    rows = [(f"images/{written}/{written}{i}.jpg", "a", "eval", f"g{i}") for i in (1, 2)]
    rows += [("images/bee/1.jpg", "b", "eval", "")]
    table = write_csv(tmp_path / "a.csv", rows, ("path", "label", "split", "group"))
    images = dataset.load("csv", table, "eval")
    assert [path.split("/")[-1] for path in images.paths] == [
        f"{on_disk.strip()}1.jpg",
        f"{on_disk.strip()}2.jpg",
        "1.jpg",
    ]
    assert images.groups.tolist() == [0, 1, 2] and images[0][0].shape == (3, 32, 40)
    monkeypatch.chdir(tmp_path)
    assert dataset.load("csv", "a.csv", "eval").paths[0] == f"images/{on_disk}/{on_disk.strip()}1.jpg"

    (tmp_path / "tests.txt").write_text(f"{written}\u00a0\n", encoding="utf-8")
    images = dataset.load("folder", root, "eval", test_classes=tmp_path / "tests.txt")
    assert images.classes == [on_disk]


def test_both_spellings_are_one_image(tmp_path):
    trees.folder(tmp_path, classes=("ant", COMPOSED))
    table = write_csv(tmp_path / "a.csv", [(f"{name}/1.jpg", "a", "eval") for name in (COMPOSED, DECOMPOSED)])
    with pytest.raises(BadFile, match=r"line 3: .*1.jpg is already in line 2"):
        dataset.load("csv", table, "eval")


def test_each_of_two_folders_is_itself(tmp_path):
    """Where the disk has both spellings, none stands for the other."""
    root = trees.folder(tmp_path / "images", classes=("ant", COMPOSED, DECOMPOSED))
    if len(list(root.iterdir())) < 3:
        pytest.skip("this disk has one spelling for both")
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / "tests.txt").write_text(name, encoding="utf-8")
        images = dataset.load("folder", root, "eval", test_classes=tmp_path / "tests.txt")
        assert images.classes == [name]
    table = write_csv(tmp_path / "a.csv", [(f"images/{COMPOSED} /1.jpg", "a", "eval")])
    with pytest.raises(FileNotFoundError, match="csv eval: 1 of 1;"):
        dataset.load("csv", table, "eval")


@pytest.mark.parametrize(
    "path, words",
    [
        ("ant\\1.jpg", "; the path has backslashes: separate folders by /"),
        ("ant/1\u200b.jpg", r"; the path has spaces or invisible characters in unusual places: '.*1\\u200b.jpg'"),
        ("ant /1x.jpg", "; the path has spaces or invisible characters in unusual places: '.*ant /1x.jpg'"),
        ("ant/1\u00a0.jpg", r"unusual places: '.*1\\xa0.jpg'"),
        ("ant/9.jpg", r"the first is .*ant/9.jpg$"),
        ("\u65e5\u672c/9 9.jpg", r"the first is .*9 9.jpg$"),
    ],
)
def test_what_is_odd_about_a_missing_path_is_said(tmp_path, path, words):
    trees.folder(tmp_path, classes=("ant",))
    with pytest.raises(FileNotFoundError, match=words):
        dataset.load("csv", write_csv(tmp_path / "a.csv", [(path, "a", "eval")]), "eval")


def test_check_names_what_looks_alike(tmp_path, capsys):
    classes = ("Oak", "oak", "oak tree", "oak  tree", COMPOSED, DECOMPOSED, "\uff21", "A", "bee")
    root = trees.folder(tmp_path / "images", classes=["ant", *classes])
    table = write_csv(
        tmp_path / "a.csv", [(f"images/{c}/1.jpg", c, "eval", c) for c in classes], ("path", "label", "split", "group")
    )
    for name, place, kinds in (("folder", root, ["Classes"]), ("csv", table, ["Groups", "Classes"])):
        dataset_main(["check", name, "--data-root", str(place), "--workers", "0"])
        lines = [line for line in capsys.readouterr().out.splitlines() if "differ only in case" in line]
        assert [line.split()[0] for line in lines] == kinds
        for line in lines:
            assert line.count("(") == 4 and "bee" not in line
            for same in (
                "('Oak', 'oak')",
                r"('cafe\u0301', 'caf\xe9')",
                "('oak  tree', 'oak tree')",
                r"('A', '\uff21')",
            ):
                assert same in line


@pytest.mark.parametrize("name", ["folder", "csv"])
def test_data_root_is_required(tmp_path, name, capsys, monkeypatch):
    trees.save_checkpoint(
        tmp_path / "a.pth",
        net.create("tiny", 8),
        {"model": "tiny", "embedding_size": 8, "image_size": 32, "l2_norm": 1},
    )
    resume = ["--resume", str(tmp_path / "a.pth")]
    data = ["--dataset", name]
    for main, argv in (
        (train.main, data),
        (evaluate.main, [*data, *resume]),
        (export.main, [*data, *resume, "--out", str(tmp_path / "a.onnx")]),
        (search.main, ["index", *data, *resume, "--split", "eval", "--out", str(tmp_path / "index")]),
        (transfer.main, [*data, "--source-ckpt", str(tmp_path / "a.pth")]),
        (protocol.main, ["--", *data]),
        (dataset_main, ["check", name]),
    ):
        with pytest.raises(SystemExit) as refused:
            main(argv)
        error = capsys.readouterr().err
        assert refused.value.code == 2 and "error: argument --data-root: for your own images it is required" in error
