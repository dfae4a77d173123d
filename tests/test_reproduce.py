"""misc/reproduce.sh and its table, on small trees in the four formats."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import results_table
import trees
from pages import REPOSITORY, commands

import dataset
import train
from proxy_anchor.runs import logbook, run_folders

FORMATS = {"cub": trees.cub, "cars": trees.cars, "SOP": trees.sop, "Inshop": trees.inshop}


def printed(*flags, **environment):
    """The lines of misc/reproduce.sh commands."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    command = ["bash", REPOSITORY / "misc" / "reproduce.sh", "commands", *flags]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def trainings(lines):
    """The flags of train.py of each line that runs it."""
    return [argv[2:] for argv in map(shlex.split, lines) if len(argv) > 2 and Path(argv[1]).name == "train.py"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for make in FORMATS.values():
        make(root)
    return root


def test_recipes_are_the_published_ones(data):
    def experiment(argv):
        args = vars(train.parse(argv))
        return {
            name: value
            for name, value in args.items()
            if name not in (*run_folders.MAY_CHANGE, *run_folders.NOT_CONFIG)
        }

    page = commands("python train.py", [REPOSITORY / "docs" / "training.md"])
    documented = [experiment(argv) for argv in page if "--gpu-id" in argv and "--resume" not in argv]
    ours = [experiment(argv) for argv in trainings(printed(DATA=str(data), SEEDS="1"))]
    assert len(ours) == 7 and [one for one in ours if one["dataset"] != "glyphs"] == documented
    assert ours[-1] == experiment(["--dataset", "glyphs"])


def test_absent_datasets_are_named(tmp_path, data):
    shutil.copytree(data / "cars196", tmp_path / "cars196")
    head, first, second, *lines = printed(DATA=str(tmp_path), DATASETS="cub cars SOP", SEEDS="3 4")
    assert head == "Left out, see docs/data.md:"
    assert first == f"cub: there is no {tmp_path / 'CUB_200_2011'}. {dataset.BENCHMARKS['cub'].SOURCE}"
    assert second.startswith("SOP: there is no ")
    assert [argv[argv.index("--seed") + 1] for argv in trainings(lines)] == ["3", "4", "3", "4"]
    assert {argv[argv.index("--dataset") + 1] for argv in trainings(lines)} == {"cars"}


def test_small_trees_reach_the_table(data, tmp_path, capsys, monkeypatch):
    """Each format is trained for an epoch by the command that the script prints, with flags that make it small."""
    small = ["--allow-partial", "--epochs", "1", "--model", "tiny", "--pretrained", "none", "--image-size", "32"]
    small += ["--embedding-size", "8", "--batch-size", "4", "--workers", "0", "--wandb", "disabled"]
    environment = {"DATA": str(data), "LOGS": str(tmp_path), "SEEDS": "1 2", "DATASETS": " ".join(FORMATS)}
    once = {}
    for argv in trainings(printed(*small, **environment)):
        recipe = argv[: argv.index("--data-root")]
        once.setdefault(recipe[1], (recipe, []))[1].append(argv)  # a recipe of each format
    for recipe, (first, second, *_) in once.values():
        train.main(first)
        if recipe[1] == "cub":
            train.main(second)
            train.main(second)  # again: it resumes
    assert "has finished" in capsys.readouterr().out
    recipes = [shlex.join([*recipe, *small]) for recipe, _ in once.values()]
    results_table.main(["--logs", str(tmp_path), "--seeds", "1", "2", "--", *recipes, recipes[0] + " --lr 1e-3"])
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = [dict(zip(head, row)) for row in rows]
    assert [row["R@1, %"] for row in rows] == [f"{name}, tiny" for name in ("cub", "cars", "SOP", "Inshop", "cub")]
    assert [row["seeds"] for row in rows] == ["1, 2", "1", "1", "1", ""]
    folders = rows[0]["logs"].replace("`", "").split(", ")
    found = [run_folders.read_metrics(tmp_path / folder)[0][0]["R@1"] for folder in folders]
    mean, half = 50 * sum(found), 50 * abs(found[0] - found[1])
    assert rows[0]["ours, best epoch on test"] == f"{mean:.2f} ± {2**0.5 * half:.2f}"
    assert rows[4]["ours, best epoch on test"] == rows[1]["ours, without test-set selection"] == "pending"
    assert f"torch {logbook.versions()['torch']}" in rows[0]["versions"]
    assert rows[0]["command"] == f"`python train.py {recipes[0]}`"
    assert (logbook.commit() or "unknown")[:7] in rows[0]["commit"]


def test_results_of_the_protocol_and_the_published_ones_are_shown(tmp_path, capsys):
    recipe = "--dataset cub --batch-size 180"
    args = results_table.settings_of(train.parse(shlex.split(recipe)))
    settings = {k: v for k, v in args.items() if k not in (*run_folders.MAY_CHANGE, *run_folders.NOT_CONFIG, "seed")}
    for name, change in {"a": {"lr": 1.0}, "b": {}}.items():
        folder = tmp_path / "protocol_cub" / name
        folder.mkdir(parents=True)
        seeds = [{"seed": seed, "last_epoch": {"R@1": 0.6 + 0.02 * seed, "MAP@R": 0.2}} for seed in (1, 2)]
        content = {"settings": settings | {"epochs": 60, "folds": "2", "by": "MAP@R"} | change, "seeds": seeds}
        (folder / "results.json").write_text(json.dumps(content))
    results_table.main(["--logs", str(tmp_path), "--seeds", "1", "--", recipe, "--dataset cub --batch-size 90"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    row, other = (dict(zip(lines[0], line)) for line in lines[2:])
    assert row["published"] == "69.1" and row["ours, without test-set selection"] == "63.00 ± 1.41 (2 seeds)"
    assert row["logs"] == "`protocol_cub/b`" and other["ours, without test-set selection"] == "pending"
