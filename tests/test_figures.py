"""curves.png of a run, and misc/compare.py on several."""

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from proxy_anchor import curves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "misc"))
import compare


def write_run(folder, recalls, seconds=10.0, **config):
    """The folder of a run with these R@1."""
    folder.mkdir()
    settings = {"loss": "Proxy_Anchor", "IPC": None, "lr": 1e-4, "seed": 1, "epochs": 3, "workers": 4}
    (folder / "config.json").write_text(json.dumps(settings | config))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "loss", "lr", "seconds", "R@1", "R@2"])
        writer.writerows([epoch, 5 - epoch, 1e-4, seconds, r, r + 0.01] for epoch, r in enumerate(recalls))
    return str(folder)


def colours(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24)), image.size


def test_rows_have_the_time_since_the_start(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.2, 0.3])
    rows = curves.read(tmp_path / "a" / "metrics.csv")
    assert [row["elapsed"] for row in rows] == [10, 20, 30] and rows[2]["R@2"] == pytest.approx(0.31)


@pytest.mark.parametrize("recalls", [[0.5], [0.1, 0.5, 0.4]])
def test_curves_are_drawn(tmp_path, recalls):
    write_run(tmp_path / "a", recalls)
    curves.draw(tmp_path / "a" / "metrics.csv", tmp_path / "curves.png")
    count, size = colours(tmp_path / "curves.png")
    assert count > 50 and size == (990, 880)


@pytest.mark.parametrize("text", ["", "epoch,loss\n0,1\n", "epoch,loss,lr,seconds,R@1\n0,a,1,1,1\n", "epoch,lr\n0\n"])
def test_other_files_are_an_error(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv is not the metrics\.csv of a run"):
        curves.read(tmp_path / "metrics.csv")


def test_runs_of_several_seeds_are_pooled(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "a", [0.2, 0.58, 0.60]),  # 95% of the best, 0.57, in the second epoch
        write_run(tmp_path / "b", [0.2, 0.40, 0.62], seed=2, workers=0),
        write_run(tmp_path / "c", [0.3, 0.20, 0.10], loss="MS", IPC=4, seconds=7.0),
        write_run(tmp_path / "d", [0.4], lr=1e-3),
    ]
    compare.main([*folders, "--save", str(tmp_path / "chart.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[:4]] == [
        "n best R@1 last R@1 epochs to 95% of best seconds to it",
        "Proxy_Anchor, lr 0.0001 2 61.00 ± 1.41 61.00 ± 1.41 2.5 ± 0.7 25 ± 7",
        "Proxy_Anchor, lr 0.001 1 40.00 40.00 1.0 10",
        "MS, IPC 4, lr 0.0001 1 30.00 10.00 1.0 7",
    ]
    assert colours(tmp_path / "chart.png")[0] > 50


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main([str(tmp_path)])
    assert error.value.code == 1 and "has no config.json" in capsys.readouterr().err
