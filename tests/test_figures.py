"""curves.png of a run, misc/compare.py on several, images in rows, and misc/idea.py."""

import io
import json
import os
import sys
from itertools import combinations

import compare
import idea
import pytest
import torch
from helpers import write_run
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from proxy_anchor import figures, losses
from proxy_anchor.runs import run_folders


def colours(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24)), image.size


def test_rows_have_the_time_since_the_start(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.2, 0.3])
    rows, _ = run_folders.read_metrics(tmp_path / "a")
    assert [row["elapsed"] for row in rows] == [10, 20, 30] and rows[2]["R@2"] == pytest.approx(0.31)


@pytest.mark.parametrize("recalls", [[0.1, 0.5, 0.4], [0.5 + 0.001 * epoch for epoch in range(60)]])
def test_curves_are_drawn(tmp_path, recalls):
    write_run(tmp_path / "a", recalls)
    figures.draw_run(*run_folders.read_metrics(tmp_path / "a"), tmp_path / "curves.png", "glyphs, resnet18")
    count, size = colours(tmp_path / "curves.png")
    assert count > 50 and size == (988, 858)


def test_one_epoch_is_no_curve(tmp_path):
    write_run(tmp_path / "a", [0.5])
    figures.draw_run(*run_folders.read_metrics(tmp_path / "a"), tmp_path / "curves.png", "glyphs, resnet18")
    assert not (tmp_path / "curves.png").exists()


def test_curves_say_the_best_epoch_the_k_and_the_time(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **more: seen.append(figure) or path.touch())
    write_run(tmp_path / "a", [0.1, 0.5, 0.4], seconds=50)
    figures.draw_run(*run_folders.read_metrics(tmp_path / "a"), tmp_path / "curves.png", "glyphs, resnet18")
    loss_axes, recall_axes, _ = seen[0].axes
    assert seen[0].get_suptitle() == "glyphs, resnet18"
    assert recall_axes.get_title("left") == "Recall@K, %: the best R@1 is 50.00, in epoch 1"
    assert [text.get_text() for text in recall_axes.texts] == ["R@1  40.0", "R@2  41.0"]
    ticks = loss_axes.child_axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks][::5] == ["0", "2.5 minutes"]
    assert ticks[-1].get_position()[0] == pytest.approx(2.5)  # 150 seconds: the end of epoch 2


def test_labels_are_pushed_apart_as_little_as_need_be():
    assert figures.pushed_apart([50, 10], 5, 0, 100) == [50, 10]
    assert figures.pushed_apart([50, 50, 10], 4, 0, 100) == [48, 52, 10]
    assert figures.pushed_apart([99, 98, 97], 4, 0, 100) == [100, 96, 92]
    assert figures.pushed_apart([1, 1, 1], 90, 0, 100) == [0, 50, 100]  # too little room


def overlapping(figure):
    """Whether texts beside the axes overlap."""
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    return any(a.y0 < b.y1 and b.y0 < a.y1 for a, b in combinations(boxes, 2))


def test_chart_labels_each_line_at_its_end(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **more: seen.append(figure) or path.touch())
    losses = ("Proxy_Anchor", "MS", "Contrastive", "NPair")
    folders = [
        write_run(tmp_path / f"{loss}{seed}", [0.3, 0.8 + 0.02 * seed - 0.001 * i], loss=loss, seed=seed)
        for i, loss in enumerate(losses)
        for seed in (1, 2)
    ]
    compare.main([*folders, "--save", str(tmp_path / "chart.svg"), "--save", str(tmp_path / "chart.png")])
    assert (tmp_path / "chart.svg").exists() and (tmp_path / "chart.png").exists()
    for figure in seen:
        assert not overlapping(figure)
        assert [text.get_text() for text in figure.axes[0].texts][::-1] == [
            "Proxy-Anchor  83.0 ± 1.4",
            "Multi-Similarity  82.9 ± 1.4",
            "Contrastive  82.8 ± 1.4",
            "N-pair  82.7 ± 1.4",
        ]
        assert figure.axes[0].texts[-1].get_color() in figures.STRONG


def test_svg_is_the_same_each_time(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [0.3, 0.5])
    compare.main([folder, "--save", str(tmp_path / "1.svg"), "--save", str(tmp_path / "2.svg")])
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_runs_are_drawn_by_epoch(tmp_path, monkeypatch):
    """Not by row: one run may have a row that the other lacks."""
    rows = [[{"epoch": epoch, "R@1": 0.1 * (epoch + 1), "elapsed": 1.0} for epoch in r] for r in ((0, 1, 2), (1, 2))]
    group = compare.Group("a", [compare.Run(tmp_path, {"loss": "MS"}, r) for r in rows])
    seen = []
    monkeypatch.setattr(figures, "label_ends", lambda ax, ends: seen.append((ax.lines[0].get_xydata().ravel(), ends)))
    compare.draw([group], tmp_path / "chart.png")
    ((line, ((y, text, _),)),) = seen
    assert list(line) == pytest.approx([1, 20, 2, 30]) and y == pytest.approx(30) and text == "a  30.0 ± 0.0"


def test_runs_are_drawn_over_time_too(tmp_path, monkeypatch):
    """Beside the epochs: the time of the fastest run, and the backbone alone as a line in both charts."""
    rows = [
        [{"epoch": epoch, "R@1": 0.1 * (epoch + 1), "elapsed": slow * (epoch + 1)} for epoch in (0, 1)]
        for slow in (900.0, 120.0, 130.0)
    ]
    runs = [compare.Run(tmp_path, {"loss": "MS", "dataset": "cars"}, r, {"R@1": 0.05}) for r in rows]
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **more: seen.append(figure) or path.touch())
    compare.draw([compare.Group("a", runs)], tmp_path / "chart.png", time=True, title="half")
    by_time, by_epoch = seen[0].axes
    assert by_time.lines[0].get_xydata().ravel().tolist() == pytest.approx([2, 10, 4, 20])  # minutes
    assert by_epoch.lines[0].get_xydata().ravel().tolist() == pytest.approx([0, 10, 1, 20])
    assert by_time.get_title(loc="left") == "half: mean ± standard deviation over 3 runs"
    assert by_time.get_xlabel() == "minutes of training and evaluation"
    assert [ax.lines[-1].get_ydata()[0] for ax in (by_time, by_epoch)] == pytest.approx([5, 5])
    assert [text.get_text() for text in by_time.texts] == ["backbone alone 5.0"]


def test_images_are_drawn_and_missing_ones_named(tmp_path, monkeypatch):
    def read_image(path):
        if "missing" in path:
            raise ValueError(f"The image {path} is missing")
        return torch.full((3, 900, 600), 99, dtype=torch.uint8)

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **more: seen.append(figure) or path.touch())
    monkeypatch.setattr(figures, "ROWS", 3)
    row = [("a.jpg", "query"), ("b.jpg", "crow\n0.931"), ("of/missing.jpg", "0.8")]
    figures.draw_images([row, [("c.jpg", "query")]] + 2 * [15 * [("d.jpg", "")]], read_image, tmp_path / "a.png")
    (ax,) = seen[0].axes
    texts = [text.get_text() for text in ax.texts]
    assert texts[:5] == ["query", "crow\n0.931", "missing.jpg", "0.8", "query"]
    assert len(ax.patches) == 3 + 1 + figures.COLUMNS and len(ax.images) == len(ax.patches) - 1
    assert ax.images[0].get_array().shape == (224, 149, 3)  # no larger than it is drawn


def test_names_of_any_characters_are_drawn_as_they_are(tmp_path, capsys, monkeypatch):
    """No formulas between dollars, and no font has bytes that are not UTF-8."""

    def read_image(path):
        raise ValueError(f"The image {path} is missing")

    seen = []
    monkeypatch.setattr(
        Text, "draw", lambda text, *args, draw=Text.draw: seen.append(text.get_text()) or draw(text, *args)
    )
    names = ["$x_$", os.fsdecode(b"\xff.jpg"), r"$\frac$"]
    figures.draw_images([[(name, f"query\n{name}")] for name in names], read_image, tmp_path / "a.png")
    assert {"$x_$", "query\n$x_$", "\\udcff.jpg", "query\n\\udcff.jpg"} <= set(seen)
    run = write_run(tmp_path / "a", [0.1], remark="$x_$" + os.fsdecode(b"\xff"))
    other = write_run(tmp_path / "b", [0.1], remark="")
    compare.main([run, other, "--save", str(tmp_path / "chart.png")])
    assert "Proxy-Anchor, $x_$" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "epoch,loss\n0,1\n", "epoch,loss,lr,seconds,R@1\n0,a,1,1,1\n", "epoch,lr\n0\n"])
def test_other_files_are_an_error(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv is not the metrics\.csv of a run"):
        run_folders.read_metrics(tmp_path)


@pytest.mark.parametrize("row", ["nan,1,1,1,1", "0,1,1,inf,1", "0,1,1,1,nan", "0,1,1,1,1e308"])
def test_numbers_that_no_picture_can_show_are_an_error(tmp_path, row):
    (tmp_path / "metrics.csv").write_text(f"epoch,loss,lr,seconds,R@1\n{row}\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 2: expected finite numbers and R@1 from 0 to 1"):
        run_folders.read_metrics(tmp_path)


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
        "Proxy-Anchor, learning rate 0.0001 2 61.00 ± 1.41 61.00 ± 1.41 2.5 ± 0.7 25 ± 7",
        "Proxy-Anchor, learning rate 0.001 1 40.00 40.00 1.0 10",
        "Multi-Similarity, 4 per class, learning rate 0.0001 1 30.00 10.00 1.0 7",
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
    b = write_run(tmp_path / "b", [0.6], seed=2, optimizer="new", data={"train": "12"})
    groups, _ = compared(capsys, tmp_path, a, b)
    assert groups == {"Proxy-Anchor": 2}
    c = write_run(tmp_path / "c", [0.4], seed=3, optimizer="old")
    groups, _ = compared(capsys, tmp_path, a, b, c)
    assert groups == {
        "Proxy-Anchor, optimizer new": 1,
        "Proxy-Anchor, optimizer not recorded": 1,
        "Proxy-Anchor, optimizer old": 1,
    }
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
    a = write_run(tmp_path / "a", [0.5], device="cpu", processes=1, sizes={"train": 1, "eval": 2})
    b = write_run(tmp_path / "b", [0.6], device="cuda:0", processes=2, seed=2, sizes={"eval": 2, "train": 1})
    assert compared(capsys, tmp_path, a, b)[0] == {"Proxy-Anchor": 2}


def test_a_folder_counts_once(tmp_path, capsys, monkeypatch):
    a = write_run(tmp_path / "a", [0.5])
    (tmp_path / "link").symlink_to(a)
    monkeypatch.chdir(tmp_path)
    assert compared(capsys, tmp_path, a, a + "/", "a", "../" + tmp_path.name + "/a", "link")[0] == {"Proxy-Anchor": 1}


def test_what_pooled_numbers_hide_is_said(tmp_path, capsys):
    a = write_run(tmp_path / "a", [0.5, 0.6])
    b = write_run(tmp_path / "b", [0.6])
    c = write_run(tmp_path / "c", [0.6], loss="MS")
    _, lines = compared(capsys, tmp_path, a, b, c)
    assert lines[:-1] == [
        f"Proxy-Anchor: 2 runs have seed 1 ({a}, {b}); they are not independent",
        "Proxy-Anchor: the runs have 1 or 2 epochs; the chart shows the common ones",
        "Not compared (one seed each): Proxy-Anchor; Multi-Similarity; run at least two seeds",
    ]


def test_table_prints_where_there_is_no_plus_minus(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / "a", [0.6]), write_run(tmp_path / "b", [0.62], seed=2)]
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "ascii", write_through=True))
    compare.main([*folders, "--save", str(tmp_path / "ä.png")])
    head, line, _ = output.getvalue().decode("ascii").splitlines()
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


def test_arrows_of_the_idea_are_the_gradient_of_the_loss():
    criterion = losses.ProxyAnchor(4, 2)
    proxies = torch.nn.functional.normalize(criterion.proxies.detach())
    x = torch.nn.functional.normalize(torch.randn(12, 2)).requires_grad_()
    labels = torch.arange(12) % 4
    expected = torch.autograd.grad(criterion(x, labels), x)[0]
    by_product = idea.slopes(x.detach(), proxies, labels) @ proxies
    along_circle = by_product - (by_product * x).sum(dim=1, keepdim=True) * x
    torch.testing.assert_close(along_circle, expected, atol=1e-4, rtol=1e-4)


def test_idea_is_drawn(tmp_path):
    threads = torch.get_num_threads()
    images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 4
    moments = idea.train(images, labels, [0, 1])
    torch.set_num_threads(threads)
    idea.draw(images, labels, moments, tmp_path / "idea.png")
    assert colours(tmp_path / "idea.png")[0] > 500
