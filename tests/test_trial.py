"""misc/upgrades.py, the trial of docs/upgrades.md: on tiny settings, and its table of runs that were made up."""

import json

import numpy as np
import pytest
import significance
import torch
import upgrades
from scipy import stats

import net
import train
from proxy_anchor.embedding import Embedder
from proxy_anchor.runs import child, run_folders
from proxy_anchor.thresholds import verification


def test_interval_over_seeds_is_students():
    """By the library's own paired test, and the quantile of 9 degrees of freedom from a table."""
    random = np.random.default_rng(0)
    ours, theirs = random.normal(1, 1, 10), random.normal(0, 1, 10)
    found = significance.over_seeds(list(ours - theirs))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found == pytest.approx([(ours - theirs).mean(), expected.low, expected.high])
    assert found.high - found.mean == pytest.approx(2.262 * (ours - theirs).std(ddof=1) / 10**0.5, rel=1e-3)


def test_interval_over_seeds_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    found = [significance.over_seeds(list(0.3 + random.normal(size=3))) for _ in range(1000)]
    assert 0.93 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.97
    assert np.isnan(significance.over_seeds([1.0])[1:]).all()


def made_up(recall, opis=0.01):
    measured = {"R@1": recall, "MAP@R": recall / 2, "known right": recall / 4, "OPIS": opis}
    return {"epochs": 3, "last": measured, "best": measured | {"R@1": recall + 0.01}}


def test_table_of_runs_that_were_made_up():
    """Pairs of equal seeds alone; a verdict where the interval of R@1 excludes 0, or OPIS's; none with one seed."""
    base = [0.50, 0.60, 0.40, 0.55]
    gains = {"up": [0.02, 0.03, 0.02, 0.03], "down": [-0.02, -0.03, -0.02, -0.03], "even": [0.02, -0.03, 0.02, -0.01]}
    results = {upgrades.BASELINE: {seed: made_up(recall) for seed, recall in enumerate(base)}}
    for arm, differences in gains.items():
        results[arm] = {seed: made_up(base[seed] + d, 0.012) for seed, d in enumerate(differences)}
    results["up"][9] = made_up(0.0)  # of which there is no pair
    results["alone"] = {2: made_up(0.9)}
    results["threshold margin, chosen"] = {seed: made_up(recall, 0.008) for seed, recall in enumerate(base)}
    lines = upgrades.table(results, {"up": 1.25, upgrades.BASELINE: 1.0}).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][:4] == ["", "seeds", "R@1", "MAP@R"] and [len(row) for row in rows] == [9] * len(rows)
    assert rows[2] == ["Proxy-Anchor", "4", "51.25", "25.62", "12.81", "10.00", "52.25", "1.00", ""]
    low, high = stats.ttest_1samp([2, 3, 2, 3], 0).confidence_interval()
    assert rows[3][:3] == ["up", "4", f"**+2.50 [{low:+.2f}, {high:+.2f}]**"]
    assert rows[3][5] == "**+2.00 [+2.00, +2.00]**" and not rows[5][2].startswith("**")
    verdicts = ["gain", "loss", "no difference shown", "", "no difference shown; OPIS: gain"]
    assert [row[-1] for row in rows[3:]] == verdicts
    assert rows[6][:3] == ["alone", "1", "+50.00"] and rows[3][-2] == "1.25"


def test_runs_of_several_commits_or_versions_are_named():
    ours, theirs = ({"commit": commit, "versions": {"torch": "2.6"}} for commit in ("aaa", "bbb"))
    assert upgrades.remarks({"a": {1: ours, 2: ours}, "b": {1: ours}}) == ""
    assert upgrades.remarks({"a": {1: ours}, "b": {1: theirs}}) == (
        'Not all of these runs have the same commit: "aaa", "bbb"\n'
    )
    assert "same versions: " in upgrades.remarks({"a": {1: ours, 2: ours | {"versions": {"torch": "2.7"}}}})


@pytest.fixture
def tiny(cub_root, tmp_path, monkeypatch):
    """Two sets of one seed, the whole network and its head, whose runs of train.py are in this process; their flags."""
    torch.manual_seed(7)
    state = net.create("tiny", 8).model.state_dict()
    weights = tmp_path / "tiny.pth"
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith("embedding.")}, weights)
    flags = f"--dataset cub --allow-partial --pretrained {weights} --model tiny --embedding-size 8 --image-size 32 "
    flags += "--batch-size 6 --workers 0 --epochs 2"
    monkeypatch.setattr(upgrades, "SETS", {"whole": (f"{flags} --bn-freeze 0", 1), "head": (f"--frozen {flags}", 1)})
    ran = []
    monkeypatch.setattr(child, "run", lambda command: train.main(command[2:]) or ran.append(command) or 0)
    flags = ["--data-root", str(cub_root), "--runs", str(tmp_path / "runs")]
    return flags, ran, tmp_path / "runs"


@pytest.mark.parametrize("name", ["whole", "head"])
def test_trial_is_run_once_and_measured_after_the_last_epoch(tiny, name, capsys):
    """A result that is missing is measured again, without training; the averaged network is measured where it is."""
    flags, ran, runs = tiny
    upgrades.main(["run", name, *flags])
    assert len(ran) == 6 and "6 runs are done" in capsys.readouterr().out.splitlines()[0]
    results = {path.parent: json.loads(path.read_text()) for path in runs.glob(f"{name}/logs_cub/*/trial.json")}
    assert len(results) == 6
    for folder, result in results.items():
        rows, _ = run_folders.read_metrics(folder)
        assert result["epochs"] == 2 and result["last"]["MAP@R"] == rows[-1]["MAP@R"]
        assert result["best"]["R@1"] == max(row["R@1"] for row in rows)
    (averaged,) = runs.glob(f"{name}/logs_cub/*batch6{'_frozen' * (name == 'head')}_average-weights0.99")
    assert results[averaged]["last"]["OPIS"] == pytest.approx(opis_of(averaged, name == "head"))
    (averaged / "trial.json").unlink()
    upgrades.main(["run", name, *flags])
    assert len(ran) == 7 and json.loads((averaged / "trial.json").read_text()) == results[averaged]
    upgrades.main(["run", name, *flags])
    assert len(ran) == 7
    capsys.readouterr()
    upgrades.main(["table", "--runs", str(runs)])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}\n\n|") and shown.count("\n| ") == 8


def opis_of(folder, frozen):
    """Of the average in last.pth, put into a network by hand, and all test images."""
    args = train.parse(["--resume", str(folder)])
    network, content = net.from_spec(args.spec), torch.load(folder / "last.pth")
    network.load_state_dict(content["model_state_dict"])
    average = {name.removeprefix("module."): x for name, x in content["average"].items()}
    part = network.model if frozen else network
    part.load_state_dict({name: average.get(name, x) for name, x in part.state_dict().items()})
    assert torch.equal(
        network.model.embedding.weight, average["embedding.weight" if frozen else "model.embedding.weight"]
    )
    data = train.open_data(args)
    (loader,) = data.test_loaders
    return verification.verify(Embedder(network, torch.device("cpu")).embed(loader), replicates=1).opis


def test_run_whose_last_network_is_another_is_refused(tiny, capsys):
    flags, _, runs = tiny
    upgrades.main(["run", "whole", *flags])
    (folder,) = runs.glob("whole/logs_cub/*6")
    table = (folder / "metrics.csv").read_text().splitlines()
    names, last = table[0].split(","), table[-1].split(",")
    last[names.index("R@1")] = "0.123"
    (folder / "metrics.csv").write_text("\n".join([*table[:-1], ",".join(last)]) + "\n")
    (folder / "trial.json").unlink()
    with pytest.raises(SystemExit):
        upgrades.main(["run", "whole", *flags])
    assert "has R@1 0.123 in its last row, but its last network " in capsys.readouterr().err


def test_settings_are_chosen_on_held_out_classes(tiny, monkeypatch):
    """By the best mean of MAP@R in the last epoch; then each upgrade is run with its value."""
    monkeypatch.setattr(upgrades, "UPGRADES", {"Proxy Synthesis": ("--synthesis", (0.5, 1.0))})
    monkeypatch.setattr(upgrades, "CHOICE_SEEDS", (101, 102))
    flags, ran, runs = tiny
    upgrades.main(["choose", "head", *flags])
    chosen = json.loads((runs / "chosen_head.json").read_text())
    means = {}
    for value in ("0.5", "1"):
        folders = list(runs.glob(f"head/logs_cub/*synthesis{value}_fold2of2_seed10[12]"))
        rows = [run_folders.read_metrics(folder)[0] for folder in folders]
        assert len(rows) == 2
        means[value] = sum(one[-1]["val/MAP@R"] for one in rows) / 2
    best = max(means, key=lambda value: means[value])
    assert chosen["chosen"] == {"--synthesis": float(best)}
    assert chosen["MAP@R of fold 2/2"] == pytest.approx({f"--synthesis {value}": mean for value, mean in means.items()})
    # Four on the fold, then Proxy-Anchor, Proxy Synthesis and all, which are the same experiment here.
    assert len(ran) == 7 and len(list(runs.glob("head/logs_cub/*/trial.json"))) == 2


def test_time_is_measured_in_turn(tiny, capsys):
    flags, _, runs = tiny
    monkeypatched = upgrades.training.train_one_epoch
    upgrades.main(["time", "head", *flags, "--rounds", "2"])
    seconds = json.loads((runs / "time_head.json").read_text())["seconds"]
    assert [len(times) for times in seconds.values()] == [2] * 6 and min(min(times) for times in seconds.values()) > 0
    out = capsys.readouterr().out
    assert "Proxy-Anchor: 1.00 times the step of Proxy-Anchor" in out and out.count("Embedding 42 images") == 1
    assert upgrades.training.train_one_epoch is monkeypatched and not list(runs.glob("head/logs_*"))
    assert upgrades.ratios({"Proxy-Anchor": [1, 2, 4], "a": [2, 2, 2]})["a"] == 1


def test_sets_are_those_of_the_page():
    """Recipes that train.py accepts, of the quick start, of --frozen and of misc/cars_half.sh; ten seeds or three."""
    args = {name: train.parse(flags.split()) for name, (flags, _) in upgrades.SETS.items()}
    assert {name: seeds for name, (_, seeds) in upgrades.SETS.items()} == {"glyphs": 10, "head": 10, "cars": 3}
    assert (args["glyphs"].epochs, args["head"].epochs, args["cars"].epochs) == (6, 30, 6)
    script = (upgrades.Path(upgrades.__file__).parent / "cars_half.sh").read_text()
    assert "--image-size 96 --batch-size 120 --epochs 6 --lr-decay-step 4" in script
    flags = upgrades.arms()
    given = train.parse([*upgrades.SETS["head"][0].split(), *flags[upgrades.ALL]])
    plain = train.parse([*upgrades.SETS["head"][0].split(), "--synthesis", "--self-distill", "--threshold-margin"])
    assert (given.synthesis, given.self_distill, given.threshold_margin, given.average_weights) == (1, 1, 1, 0.99)
    assert (plain.synthesis, plain.self_distill, plain.threshold_margin) == (1, 1, 1)
