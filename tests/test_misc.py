"""The scripts in misc/ that no other page of tests runs: the shell scripts, without their hours, and thresholds.py."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import by_folder
import grouping
import neighbours_picture
import numpy as np
import pytest
import thresholds
import torch
import trees
from helpers import RECORD, arguments, fails

import dataset
import net
import protocol
import train
import transfer
from dataset import glyphs
from proxy_anchor.index import entries
from proxy_anchor.index.store import Index

MISC = Path(thresholds.__file__).parent
RESNET = RECORD | {"model": "resnet18"}

# Instead of Python: it writes its arguments down, and makes what the scripts look for afterwards.
PYTHON = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$WRITTEN"
echo >> "$WRITTEN"
while [ $# -gt 1 ]; do
    case "$1 $2" in
        "--LOG_DIR "*/teacher)
            mkdir -p "$2/logs_glyphs/run"
            cp "$TEACHER" "$2/logs_glyphs/run/glyphs_resnet18_best.pth" ;;
        "--out "*)
            mkdir -p "$2"
            touch "$2/results.png" ;;
    esac
    shift
done
"""


def test_every_script_runs_in_a_test():
    pages = [page.read_text() for page in Path(__file__).parent.glob("test_*.py")]
    scripts = [path for path in MISC.iterdir() if path.suffix in (".py", ".sh")]
    missing = [path.name for path in scripts if not any(path.stem in page for page in pages)]
    assert scripts and not missing


@pytest.mark.parametrize("script", [*MISC.glob("*.sh"), MISC.parent / "benchmarks" / "gpu.sh"], ids=lambda p: p.name)
def test_shell_scripts_are_valid(script):
    subprocess.run(["bash", "-n", script], check=True)


def letters(root, count, images):
    """A small dataset of glyphs: so many letters in each split."""
    for n in range(count):
        for split, first in (("train", 0x41), ("eval", 0x401)):
            for i in range(images):
                trees.write_image(root / "glyphs" / split / f"{first + n:04X}" / f"{i}.png", 10 * n + i)


@pytest.fixture
def commands_of(tmp_path):
    """commands_of(script, *arguments): the arguments of each command that a copy of the script gives to Python."""
    shutil.copytree(MISC, tmp_path / "misc", ignore=lambda _, names: [n for n in names if not n.endswith(".sh")])
    letters(tmp_path / "data", count=30, images=1)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    trees.save_checkpoint(tmp_path / "teacher.pth", net.create("resnet18", 128), RESNET | {"embedding_size": 128})
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "WRITTEN": str(tmp_path / "written"),
        "TEACHER": str(tmp_path / "teacher.pth"),
    }

    def run(script, *arguments):
        command = ["bash", tmp_path / "misc" / script, *arguments]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=60)
        lines = (tmp_path / "written").read_text().splitlines()
        return [(str(Path(path).relative_to(tmp_path)), argv) for path, *argv in map(shlex.split, lines)]

    return run


def test_comparison_of_losses(commands_of):
    *trainings, (drawn_by, argv) = commands_of("compare_losses.sh")
    assert len(trainings) == 18 and {name for name, _ in trainings} == {"train.py"}
    args = [train.parse(argv) for _, argv in trainings]
    assert len({(one.loss, one.seed) for one in args}) == 18 and {one.dataset for one in args} == {"glyphs"}
    assert drawn_by == "misc/compare.py" and [Path(path).name for path in argv[2::2]] == ["losses.svg"]


def test_comparison_of_transfers(commands_of):
    *trainings, (drawn_by, argv) = commands_of("compare_transfer.sh")
    assert [name for name, _ in trainings] == ["train.py", *["train.py", *["transfer.py"] * 3] * 3]
    args = [{"train.py": train, "transfer.py": transfer}[name].parse(argv) for name, argv in trainings]
    assert [one.embedding_size for one in args] == [128, *[16] * 12]
    assert drawn_by == "misc/compare.py" and [Path(path).name for path in argv[2::2]] == ["transfer.svg"]


def test_comparison_on_half_of_cars(commands_of):
    """Two at a time or one by one, with the flags of a GPU: six losses, all with the same settings, and resumable."""
    *trainings, (drawn_by, argv) = commands_of("cars_half.sh", "some data", "--image-size", "224", "--epochs", "40")
    assert len(trainings) == 18 and {name for name, _ in trainings} == {"train.py"}
    args = [train.parse(argv) for _, argv in trainings]
    assert len({(one.loss, one.seed) for one in args}) == 18 and {one.data_root for one in args} == {"some data"}
    assert {(one.image_size, one.epochs, one.resume) for one in args} == {(224, 40, "auto")}
    assert drawn_by == "misc/compare.py" and "--time" in argv and Path(argv[-1]).name == "cars_half.svg"


@pytest.mark.parametrize("script", ["cars_half.sh", "compare_losses.sh", "compare_transfer.sh"])
def test_comparison_that_only_draws(commands_of, script):
    assert [name for name, _ in commands_of(script, "draw")] == ["misc/compare.py"]


def test_gap_of_selection_on_the_test_set(commands_of, tmp_path):
    """On every 14th letter to train and every 7th to test; started again it continues."""
    for _ in range(2):
        commands = commands_of("selection_gap.sh")
    assert [name for name, _ in commands] == ["protocol.py"] * 2 and commands[0] == commands[1]
    args = protocol.parse(commands[0][1])
    letters = {
        split: len(list((tmp_path / "logs/selection_gap/data/glyphs" / split).iterdir())) for split in ("train", "eval")
    }
    assert letters == {"train": 3, "eval": 5} and len(args.seeds) == 10
    assert (tmp_path / "misc" / "selection_gap.png").exists()


def test_thresholds(tmp_path, monkeypatch, capsys):
    """All of misc/thresholds.py, on a few letters."""
    letters(tmp_path, count=24, images=4)
    monkeypatch.setitem(glyphs.SIZES, "eval", (24, 96))
    monkeypatch.setattr(thresholds, "SPLITS", 2)
    monkeypatch.setattr(thresholds, "SHARE", 0.8)
    path = tmp_path / "a.pth"
    trees.save_checkpoint(
        path, net.create("resnet18", 8, head="layernorm"), RESNET | {"head": "layernorm", "crop": 1.0}
    )
    data = ["--dataset", "glyphs", "--data-root", str(tmp_path), "--workers", "0"]
    capsys.readouterr()
    thresholds.main([*data, "--resume", str(path)])
    _, *lines = capsys.readouterr().out.splitlines()
    starts = [
        "R@1 of 48 images among 48 images",
        "R@1 of 48 images among 24 folders",
        "R@1 of 24 folders among 24 folders",
        "Threshold of 24 folders ",
        "Threshold of 24 folders ",
        "Threshold for 10.00% false accepts of pairs: ",
        "Threshold for 1.00% false accepts of pairs: ",
        "seed  0  threshold ",
        "seed  1  threshold ",
        "Requested: 80.0% of unknown queries. From one half to the other, over 2 splits: mean ",
        "probability ",
        "right ",
        "seed  0  threshold ",
        "seed  1  threshold ",
        "Requested: 80.0% of unknown queries. From a quarter to the rest, over 2 splits: mean ",
        "probability ",
        "right ",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    fails(lambda: thresholds.main([*data, "--resume", str(path), str(path)]), capsys, "Expected one network")
    test_set = dataset.load("glyphs", tmp_path, "eval")
    vectors = [[math.cos(label), math.sin(label)] for label in test_set.labels]
    write_index(tmp_path / "index", test_set.paths, vectors)
    thresholds.main([str(tmp_path / "index")])
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, starts[7:12], strict=True)] == starts[7:12]


def test_grouping(tmp_path, monkeypatch, capsys):
    """All of misc/grouping.py, on a few photographs; each half is sorted in four ways."""
    trees.folder(tmp_path / "photos", classes=[f"{c:02d}" for c in range(20)] + ["ant"])
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), RECORD)
    monkeypatch.setattr(grouping, "SPLITS", 2)
    grouping.main(arguments(tmp_path / "photos", dataset="folder", resume=tmp_path / "a.pth"))
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert re.fullmatch(r"seed  1: threshold 0\.\d{4}, 5 classes", lines[1])
    ways = ["number given", "threshold of the other half", "best threshold for this half", "threshold for queries, 5%"]
    form = r"([^:]*): things ([\d.]+) \(.* to .*\), alone .*, ARI (-?[\d.]+) \(.*\), AMI .*\)"
    rows = [re.fullmatch(form, line) for line in lines[2:]]
    assert [row[1] for row in rows] == ways and float(rows[0][2]) <= 5
    assert float(rows[2][3]) >= max(float(row[3]) for row in rows)
    test_set = dataset.load("folder", tmp_path / "photos", "eval")
    vectors = [[math.cos(label), math.sin(label)] for label in test_set.labels]
    write_index(tmp_path / "index", test_set.paths, vectors)
    grouping.main([str(tmp_path / "index")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(", 11 classes") and [line.split(":")[0] for line in lines[2:]] == ways  # with their "more"
    write_index(tmp_path / "alone", test_set.paths[::6], vectors[::6])
    fails(lambda: grouping.main([str(tmp_path / "alone")]), capsys, "half of the classes have no two images")


def write_index(folder, paths, vectors, by_folder=False):
    """An index of images or folders that exist, with these vectors (N, 2)."""
    record = {"model": "tiny", "embedding_size": 2, "image_size": 32, "l2_norm": 1}
    made = {"checkpoint": "a.pth", "weights": "0", "network": record, "by_folder": by_folder}
    folder.mkdir()
    index = Index.new(folder, made, "Flat")
    index.add({path: entries.stamp([path]) for path in paths}, torch.tensor(vectors))
    index.finish()


def test_picture_of_neighbours(tmp_path, monkeypatch):
    """One image of A lies among those of B."""
    monkeypatch.setattr(neighbours_picture, "NEIGHBOURS", 5)
    paths, vectors = [], []
    for letter, angle in (("A", 0.0), ("B", 0.5), ("C", 2.0)):
        for number in range(6):
            path = tmp_path / f"{ord(letter):04X}" / f"{number}.png"
            trees.write_image(path, number)
            paths.append(str(path))
            x = angle + (0.49 if number == 5 and letter == "A" else 0.01 * number)
            vectors.append([math.cos(x), math.sin(x)])
    write_index(tmp_path / "index", paths, vectors)
    neighbours_picture.main(str(tmp_path / "index"), str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").exists()


def test_images_and_folders_as_answers(tmp_path, capsys):
    """Against loops, for folders of several sizes; nothing is left of a folder with one image."""
    random = np.random.default_rng(0)
    sizes = [1, 2, 3, 5, 9]
    folders = [str(tmp_path / "photos" / str(n)) for n, size in enumerate(sizes) for _ in range(size)]
    paths = [f"{folder}/{number}.jpg" for number, folder in enumerate(folders)]
    for number, path in enumerate(paths):
        trees.write_image(Path(path), number)
    x = random.normal(size=(len(paths), 2)) + [[3 * math.cos(int(f[-1])), 3 * math.sin(int(f[-1]))] for f in folders]
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    write_index(tmp_path / "index", paths, x.tolist())

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    alone = means = 0
    for i, own in enumerate(folders):
        rest = [j for j in range(len(x)) if j != i]
        alone += folders[max(rest, key=lambda j: cosine(x[i], x[j]))] == own
        rows = {folder: [j for j in rest if folders[j] == folder] for folder in folders}
        means += (
            max((folder for folder in rows if rows[folder]), key=lambda f: cosine(x[i], x[rows[f]].mean(axis=0))) == own
        )
    by_folder.main(str(tmp_path / "index"))
    assert capsys.readouterr().out.splitlines() == [
        f"R@1 of 20 images among the other images: {5 * alone:.2f}",
        f"R@1 of 20 images among 5 folders, each without the query: {5 * means:.2f}",
    ]
    assert 0 < alone < 20 and 0 < means < 20 and alone != means


def test_index_of_folders_as_answers_is_refused(tmp_path, capsys):
    write_index(tmp_path / "index", [str(tmp_path)], [[1.0, 0.0]], by_folder=True)
    with pytest.raises(SystemExit):
        by_folder.main(str(tmp_path / "index"))
    assert capsys.readouterr().err.endswith(
        "is no index of single images by cosine similarity: make one without --by-folder\n"
    )


@pytest.mark.slow
def test_picture_of_a_report(tmp_path):
    pytest.importorskip("playwright.sync_api")
    if not shutil.which("chromium"):
        pytest.skip("there is no Chromium here")
    page, picture = tmp_path / "index.html", tmp_path / "report.png"
    rows = '<div class="row">a</div>' * 3
    page.write_text(f'{rows}<h2 id="similarities" style="margin-top:50px">b</h2><p>c</p><h3>d</h3>')
    subprocess.run([sys.executable, MISC / "report_picture.py", page, picture], check=True, timeout=120)
    assert picture.exists()
