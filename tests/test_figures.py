"""curves.png of a run, and misc/compare.py on several."""

import csv
import json
import os
import subprocess
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


def compared(capsys, tmp_path, *folders):
    """{name: n} of the table of these runs, and the lines after it."""
    compare.main([*map(str, folders), "--save", str(tmp_path / "chart.png")])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {cell[0]: int(cell[1]) for cell in cells if len(cell) > 2}, [cell[0] for cell in cells if len(cell) == 1]


def test_settings_that_a_run_does_not_record_set_it_apart_only_where_the_others_differ(tmp_path, capsys):
    a = write_run(tmp_path / "a", [0.5], seed=1)
    b = write_run(tmp_path / "b", [0.6], seed=2, recipe="new", data={"train": "12"})
    groups, _ = compared(capsys, tmp_path, a, b)
    assert groups == {"Proxy_Anchor": 2}
    c = write_run(tmp_path / "c", [0.4], seed=3, recipe="old")
    groups, _ = compared(capsys, tmp_path, a, b, c)
    assert groups == {
        "Proxy_Anchor, recipe new": 1, "Proxy_Anchor, recipe not recorded": 1, "Proxy_Anchor, recipe old": 1
    }  # fmt: skip
    groups, _ = compared(capsys, tmp_path, c, b, a, write_run(tmp_path / "d", [0.1], loss="MS", recipe="older"))
    assert sum(groups.values()) == len(groups) == 4


def test_no_two_groups_share_a_name(tmp_path, capsys):
    """Nothing set, and not recorded; sizes, which alone tell folders of images apart."""
    folders = [
        write_run(tmp_path / "a", [0.5], IPC=None),
        write_run(tmp_path / "b", [0.4], IPC=4),
        write_run(tmp_path / "c", [0.3], sizes={"train": [6, 2]}, IPC=4),
        write_run(tmp_path / "d", [0.2], sizes={"train": [9, 3]}, IPC=4),
    ]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    write_run(tmp_path / "e", [0.1])
    (tmp_path / "e" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "IPC"}))
    groups, _ = compared(capsys, tmp_path, *folders, tmp_path / "e")
    assert len(groups) == 5 and sum(groups.values()) == 5


def test_neither_device_nor_processes_set_runs_apart(tmp_path, capsys):
    a = write_run(tmp_path / "a", [0.5], device="cpu", processes=1)
    b = write_run(tmp_path / "b", [0.6], device="cuda:0", processes=2, seed=2)
    assert compared(capsys, tmp_path, a, b)[0] == {"Proxy_Anchor": 2}


def test_a_folder_counts_once(tmp_path, capsys, monkeypatch):
    a = write_run(tmp_path / "a", [0.5])
    (tmp_path / "link").symlink_to(a)
    monkeypatch.chdir(tmp_path)
    assert compared(capsys, tmp_path, a, a + "/", "a", "../" + tmp_path.name + "/a", "link")[0] == {"Proxy_Anchor": 1}


def test_what_pooled_numbers_hide_is_said(tmp_path, capsys):
    a = write_run(tmp_path / "a", [0.5, 0.6])
    b = write_run(tmp_path / "b", [0.6])
    c = write_run(tmp_path / "c", [0.6], loss="MS")
    _, lines = compared(capsys, tmp_path, a, b, c)
    assert lines[:-1] == [
        f"Proxy_Anchor: 2 runs have seed 1 ({a}, {b}); they are not independent",
        "Proxy_Anchor: the runs have 1 or 2 epochs; the chart shows those that all have",
    ]


def test_table_prints_where_there_is_no_plus_minus(tmp_path):
    folders = [write_run(tmp_path / "a", [0.6]), write_run(tmp_path / "b", [0.62], seed=2, lr=1e-4)]
    done = subprocess.run(
        [sys.executable, compare.__file__, *folders, "--save", tmp_path / "chart.png"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, line, _ = done.stdout.splitlines()
    assert "61.00 +-1.41" in line and len(head) == len(line)


def test_a_run_without_a_loss_is_named(tmp_path, capsys):
    write_run(tmp_path / "a", [0.5])
    (tmp_path / "a" / "config.json").write_text('{"seed": 1}')
    with pytest.raises(SystemExit) as error:
        compare.main([str(tmp_path / "a")])
    message = capsys.readouterr().err
    assert error.value.code == 1 and message.count("\n") == 1
    assert f'{tmp_path / "a" / "config.json"} names no "loss"' in message


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main([str(tmp_path)])
    assert error.value.code == 1 and "has no config.json" in capsys.readouterr().err
