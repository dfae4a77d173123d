"""protocol.py: the test set untouched until the last step, the arithmetic, and a run that is stopped and killed."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import poison
import pytest
import torch
import trees
from helpers import without_reader
from pages import REPOSITORY

import dataset
import evaluate
import net
import protocol
import train
from proxy_anchor import checkpoint, files
from proxy_anchor.runs import child, run_folders, selection
from proxy_anchor.runs.stopping import Interrupted

EPOCHS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with a small CUB: 6 training and 4 test classes of 5 images each."""
    return trees.cub(tmp_path_factory.mktemp("cub"), classes=(1, 2, 3, 4, 5, 6, 101, 102, 103, 104), images=5)


def flags(root, logs, **changed):
    settings = {
        "dataset": "cub",
        "data-root": root,
        "model": "tiny",
        "embedding-size": 8,
        "batch-size": 4,
        "warm": 0,
        "bn-freeze": 0,
        "image-size": 32,
        "workers": 0,
        "pretrained": "none",
        "epochs": EPOCHS,
        "lr-decay-step": 1,
        "lr": 3e-3,
        "LOG_DIR": logs,
    } | changed
    return ["--allow-partial", *(f"--{key}={value}" for key, value in settings.items())]


class InThisProcess:
    """Instead of child.run: trains in this process, the test set poisoned while there is a fold."""

    def __init__(self, root):
        splits = dataset.open_splits("cub", root, 32, allow_partial=True)
        self.test_files = {*splits["eval"].paths, *map(os.path.dirname, splits["eval"].paths)}
        self.trained = []

    def __call__(self, command):
        python, script, *argv = command
        assert (python, script) == (sys.executable, train.__file__)
        self.trained.append(argv)
        with pytest.MonkeyPatch.context() as patch:
            on_fold = "--fold" in argv
            with poison.poisoned(self.test_files if on_fold else [], patch):
                train.main(argv)
        return 0


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """(folder of logs, results.json, the flags of each training) of two seeds with the second half held out."""
    return run_here(root, tmp_path_factory.mktemp("two"), "--seeds", "1", "2")


@pytest.fixture(scope="module")
def of_three_folds(root, tmp_path_factory):
    return run_here(root, tmp_path_factory.mktemp("three"), "--seeds", "1", "--folds", "3", "--by", "R@1")


def run_here(root, logs, *own, **changed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(child, "run", training := InThisProcess(root))
        protocol.main([*own, "--", *flags(root, logs, **changed)])
    (folder,) = (logs / "protocol_cub").iterdir()
    return logs, json.loads((folder / "results.json").read_text()), training.trained


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_everything_is_chosen_before_the_test_set_is_looked_at(finished, of_three_folds):
    """The poison in InThisProcess has seen to the rest."""
    for (_, _, trained), folds in ((finished, ["2/2"] * 2), (of_three_folds, ["1/3", "2/3", "3/3"])):
        assert [argv[argv.index("--fold") + 1] if "--fold" in argv else None for argv in trained] == (
            folds + [None] * (len(trained) - len(folds))
        )


def test_epoch_is_chosen_on_the_fold_and_the_retraining_has_as_many(root, finished, tmp_path):
    """And the schedule, and to the last bit the course, of a run of full length."""
    logs, content, _ = finished
    for seed, result in zip((1, 2), content["seeds"], strict=True):
        fold, retrained = (logs / place for place in result["runs"])
        rows = rows_of(fold)
        assert run_folders.read_config(fold)["fold"] == "2/2" and len(rows) == EPOCHS
        best = max(range(EPOCHS), key=lambda epoch: rows[epoch]["val/MAP@R"])  # the first of equals
        assert result["epochs"] == best + 1 and result["validation"]["MAP@R"] == rows[best]["val/MAP@R"]
        config = run_folders.read_config(retrained)
        assert (config["seed"], config["epochs"], config["fold"]) == (seed, best + 1, None)
        assert config["sizes"] == {"train": [30, 6], "eval": [20, 4]}
        assert [row["lr"] for row in rows_of(retrained)] == [3e-3, 1.5e-3, 7.5e-4][: best + 1]
    train.main([*flags(root, tmp_path), "--seed", str(seed)])
    (whole,) = (tmp_path / "logs_cub").iterdir()
    for row, expected in zip(rows_of(retrained), rows_of(whole)[: best + 1], strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_results(finished):
    """From the files of the runs, by hand."""
    logs, content, _ = finished
    last, claims, gaps = [], [], []
    for result in content["seeds"]:
        rows = rows_of(logs / result["runs"][-1])
        last.append(rows[-1]["R@1"])
        claims.append(max(row["R@1"] for row in rows))
        gaps.append(claims[-1] - last[-1])
        assert result["last_epoch"]["R@1"] == last[-1] and result["last_epoch"]["MAP@R"] == rows[-1]["MAP@R"]
        assert (result["best_epoch_on_test"]["R@1"], result["gap"]["R@1"]) == (claims[-1], gaps[-1])
        assert rows[result["epochs_of_best"] - 1]["R@1"] == claims[-1]
    for kind, (a, b) in {"last_epoch": last, "best_epoch_on_test": claims, "gap": gaps}.items():
        spread = content["over_seeds"][kind]["R@1"]
        assert spread["mean"] == pytest.approx((a + b) / 2) and spread["deviation"] == pytest.approx(
            math.sqrt((a - (a + b) / 2) ** 2 + (b - (a + b) / 2) ** 2)  # over n - 1 = 1
        )
    (folder,) = (logs / "protocol_cub").iterdir()
    text = (folder / "results.md").read_text()
    mean, deviation = (100 * content["over_seeds"]["last_epoch"]["R@1"][name] for name in ("mean", "deviation"))
    assert f"| mean |  | {mean:.2f} ± {deviation:.2f} |" in text and "is not a result" in text
    assert (folder / "results.png").stat().st_size > 5000


ROWS = [[0.2, 0.5, 0.4, 0.5], [0.3, 0.1, 0.4, 0.1]]


def test_choice_by_the_mean_over_folds():
    folds = [
        [
            {"epoch": e, "loss": 1.0, "lr": 1.0, "seconds": 1.0, "val/R@1": v / 2, "val/MAP@R": v}
            for e, v in enumerate(fold)
        ]
        for fold in ROWS
    ]
    assert selection.choose(folds, "MAP@R") == (3, {"R@1": pytest.approx(0.2), "MAP@R": pytest.approx(0.4)})
    assert selection.choose(folds[:1], "MAP@R") == (2, {"R@1": 0.25, "MAP@R": 0.5})  # the first of equals
    assert selection.choose(folds[1:], "R@1")[0] == 3


def test_spread_by_hand():
    values = [0.1, 0.4, 0.7]  # deviations -0.3, 0, 0.3: a sum of squares of 0.18 over n - 1 = 2
    assert selection.spread(values) == {"mean": pytest.approx(0.4), "deviation": pytest.approx(0.3)}
    assert selection.spread([0.25]) == {"mean": 0.25}
    assert selection.percent({"mean": 0.25}) == "25.00"
    assert selection.percent({"mean": 0.4, "deviation": 0.3}) == "40.00 ± 30.00"


def embeddings_of(path, images):
    network = net.create("tiny", 8)
    checkpoint.load(path, network)
    network.eval()
    with torch.inference_mode():
        return network(network.normalize(torch.stack([image for image, _ in images]))).double()


def recall_at_1(vectors, labels):
    """Brute force: cosine, each image among all others."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    return (labels[similarity.argmax(dim=1)] == labels).double().mean().item()


def test_folds_one_by_one_and_together(root, of_three_folds, capsys):
    """Equal to the networks' embeddings, of unit length, put side by side by hand."""
    logs, content, _ = of_three_folds
    (result,) = content["seeds"]
    paths = [logs / place / "cub_tiny_best.pth" for place in result["runs"][:3]]
    (images,) = dataset.eval_sets("cub", root, 32, allow_partial=True)
    labels = torch.from_numpy(images.labels)
    each = [embeddings_of(path, images) for path in paths]
    each = [vectors / vectors.norm(dim=1, keepdim=True) for vectors in each]
    expected = [recall_at_1(vectors, labels) for vectors in each]
    assert result["folds_one_by_one"]["R@1"] == pytest.approx(sum(expected) / 3)
    assert result["folds_together"]["R@1"] == pytest.approx(recall_at_1(torch.cat(each, dim=1), labels))
    common = ["--dataset", "cub", "--data-root", str(root), "--allow-partial", "--workers", "0", "--resume"]
    rows = evaluate.main([*common, *map(str, paths)])
    assert [rows[f"checkpoint {number}"]["R@1"] for number in (1, 2, 3)] == pytest.approx(expected)
    assert rows["mean"] == result["folds_one_by_one"] and rows["together"] == result["folds_together"]
    one = evaluate.main([*common, str(paths[0])])
    assert one == rows["checkpoint 1"]
    assert "one by one: R@1" in (next((logs / "protocol_cub").iterdir()) / "results.md").read_text()
    assert result["epochs"] == selection.choose([rows_of(logs / place) for place in result["runs"][:3]], "R@1")[0]


def test_checkpoints_of_two_kinds_are_refused(root, of_three_folds, tmp_path, capsys):
    logs, content, _ = of_three_folds
    path = logs / content["seeds"][0]["runs"][0] / "cub_tiny_best.pth"
    other = checkpoint.Checkpoint(path).spec.to_record() | {"image_size": 64}
    trees.save_checkpoint(tmp_path / "b.pth", net.create("tiny", 8), other)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--dataset", "cub", "--resume", str(path), str(tmp_path / "b.pth")])
    assert end.value.code == 2 and "image_size 64 instead of 32" in capsys.readouterr().err


@pytest.mark.slow
def test_stopped_killed_and_started_again(root, tmp_path):
    """A signal reaches the training, which saves and ends; killed, it takes the training along; the end is the same."""
    argv = ["--seeds", "1", "--", *flags(root, tmp_path, model="resnet18")]
    command = [sys.executable, str(REPOSITORY / "protocol.py"), *argv]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

    def start_until(words):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        assert any(words in line for line in process.stdout)
        return process

    process = start_until("epoch  0")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "train.py: stopped by SIGTERM" in errors
    assert errors.splitlines()[-1] == "protocol.py: stopped by SIGTERM; the same command continues from here"

    process = start_until("Resuming")
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "logs_cub").iterdir()
    for _ in range(100):  # the kernel ends the training, and with it the lock
        try:
            files.lock_folder(folder, "wait").close()
            break
        except files.Locked:
            time.sleep(0.05)
    else:
        pytest.fail("the training outlives protocol.py")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "run", InThisProcess(root))
        protocol.main(argv)
    (path,) = tmp_path.glob("protocol_cub/*/results.json")
    ours = json.loads(path.read_text())
    _, expected, _ = run_here(root, tmp_path / "at once", "--seeds", "1", model="resnet18")
    assert ours["seeds"] == expected["seeds"] and ours["settings"] == expected["settings"]
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "run", again := InThisProcess(root))
        protocol.main(argv)
    assert len(again.trained) == 2 and path.read_bytes() == before  # all has finished


def test_child_passes_on_how_it_ends():
    assert child.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert child.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]) == 137
    handler = signal.getsignal(signal.SIGUSR1)
    stop = "import os, signal; os.kill(os.getppid(), signal.SIGUSR1); signal.pause()"
    with pytest.raises(Interrupted, match="SIGUSR1"):
        child.run([sys.executable, "-c", stop])
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_failed_training_ends_the_protocol(root, tmp_path, monkeypatch, capfd):
    with pytest.raises(SystemExit) as end:
        protocol.main(
            ["--", *flags(root, tmp_path / "logs", model="resnet18"), "--data-root", str(tmp_path / "nowhere")]
        )
    errors = capfd.readouterr().err.splitlines()
    assert end.value.code == 1 and len(errors) == 1 and errors[0].startswith("train.py: error: There is no ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--", "--seed", "2"], "--seed cannot come after the --: pass --seeds before it"),
        (["--", "--fold=1/2"], "cannot come after the --: pass --folds"),
        (["--", "--resume", "auto"], "--resume cannot come after the --: it is always auto"),
        (["--", "--by", "R@1"], "cannot come after the --: pass it before"),
        (["--", "--epochs", "0"], "argument --epochs: expected at least 1"),
        (["--", "--test-classes", "none"], "--test-classes none leaves no class to test on"),
        (["--", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--dataset", "cub"], "unrecognized arguments: --dataset cub"),
        (["--seeds", "1", "1"], "argument --seeds: expected different numbers"),
        (
            ["--seeds", "1", str(2**63)],
            "argument --seeds: 9223372036854775808 is too large",
        ),  # not after the first training
        (["--", f"--remark={'x' * 170}"], "argument --remark: the name of a run's folder would have"),
        (["--seeds", "-1"], "argument --seeds"),
        (["--folds", "1"], "argument --folds: expected 2, 4 or another number"),
        (["--folds", "2/2"], "argument --folds"),
        (["--out", ""], "argument --out: expected a path"),
    ],
)
def test_usage_errors(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        protocol.parse(argv)
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_several_tasks_of_srun_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(SystemExit) as end:
        protocol.parse([])
    assert end.value.code == 2 and "srun started 4 tasks" in capsys.readouterr().err


def test_folds_of_a_table_and_of_others():
    for folds, expected in {"val": ["val"], "2": ["2/2"], "4": ["1/4", "2/4", "3/4", "4/4"]}.items():
        args = protocol.parse(["--folds", folds, "--", "--dataset", "cub"])
        trainings = list(protocol.trainings_on_folds(args, seed=1))
        assert [training.argv[training.argv.index("--fold") + 1] for training in trainings] == expected
        assert protocol.count_of(folds) == len(expected)


def test_results_of_other_settings_are_kept(root, finished):
    logs, _, _ = finished
    argv = ["--seeds", "5", "--", *flags(root, logs)]
    (folder,) = (logs / "protocol_cub").iterdir()
    assert protocol.open_folder(protocol.parse(argv)) == folder
    other = protocol.open_folder(protocol.parse(["--by", "R@1", *argv]))
    assert other.name == f"{folder.name}_2"
    other.rmdir()


# What it is given


@pytest.mark.slow
def test_protocol_goes_on_when_nobody_reads_its_output(root, tmp_path):
    argv = flags(root, tmp_path, model="resnet18", epochs=1)
    command = [sys.executable, "-u", protocol.__file__, "--seeds", "1", "--", *argv]
    assert without_reader(command, 1, stderr=subprocess.STDOUT) == (0, "")
    assert list(tmp_path.glob("protocol_cub/*/results.json"))


def test_remark_that_begins_with_a_hyphen(root, tmp_path):
    _, content, _ = run_here(root, tmp_path, "--seeds", "1", remark="-x")
    assert "-x_retrained" in content["seeds"][0]["runs"][-1]


def test_more_folds_than_classes(root, tmp_path, capsys, monkeypatch):
    """However many: the first training says so."""
    monkeypatch.setattr(child, "run", InThisProcess(root))
    with pytest.raises(SystemExit, match="1"):
        protocol.main(["--folds", "200000000", "--", *flags(root, tmp_path)])
    assert "--fold 1/200000000: 6 training classes cannot be divided into 200,000,000 parts" in capsys.readouterr().err


def test_folder_of_any_bytes(root, tmp_path):
    logs = tmp_path / os.fsdecode(b"bad\xff dir")
    shutil.copytree(root, logs / "data")
    _, content, _ = run_here(logs / "data", logs, "--seeds", "1")
    assert "\udcff" in content["command"]
    (folder,) = (logs / "protocol_cub").iterdir()
    assert {"results.md", "results.json", "results.png"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("link", [False, True])
def test_results_go_into_a_folder(root, tmp_path, capsys, link):
    out = tmp_path / "out"
    out.symlink_to("nothing") if link else out.write_text("mine")
    with pytest.raises(SystemExit, match="1"):
        protocol.main(["--seeds", "1", "--out", str(out), "--", *flags(root, tmp_path / "logs")])
    assert f"{out} is a file: --out must be a folder" in capsys.readouterr().err


def test_results_of_somebody_else_are_kept(root, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.md").write_text("mine")
    with pytest.raises(SystemExit, match="1"):
        protocol.main(["--out", str(out), "--", *flags(root, tmp_path)])
    assert f"{out} is neither empty nor a folder of protocol.py's results" in capsys.readouterr().err
    assert os.listdir(out) == ["results.md"] and (out / "results.md").read_text() == "mine"


def test_best_network_of_a_fold_is_known_by_its_content(root, tmp_path, capsys):
    """Replaced by another one of its kind, then gone."""
    logs, content, _ = run_here(root, tmp_path, "--seeds", "1", "--folds", "3")
    best = logs / content["seeds"][0]["runs"][0] / "cub_tiny_best.pth"
    other = logs / content["seeds"][0]["runs"][1] / "cub_tiny_best.pth"
    best.write_bytes(other.read_bytes())
    for words in (f"{best} is not the network that this run has written", f"There is no checkpoint {best}"):
        with pytest.raises(SystemExit, match="1"):
            run_here(root, tmp_path, "--seeds", "1", "--folds", "3")
        assert words in capsys.readouterr().err
        best.unlink(missing_ok=True)


def test_pretrained_file_is_known_by_its_content(root, tmp_path):
    weights, results = tmp_path / "w.pth", []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        torch.save(net.create("tiny", None).model.state_dict(), weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(child, "run", training := InThisProcess(root))
            protocol.main(["--seeds", "1", "--", *flags(root, tmp_path, pretrained=weights)])
        folders = sorted((tmp_path / "protocol_cub").iterdir())
        results.append([json.loads((folder / "results.json").read_text()) for folder in folders])
        assert len(training.trained) == 2
    assert [len(found) for found in results] == [1, 2, 2]
    again, first = results[2][0]["seeds"], results[0][0]["seeds"]
    assert again == first and results[1][1]["seeds"][0]["runs"] != first[0]["runs"]


def test_run_on_photos_of_ones_own_is_found(tmp_path):
    """They are seen upright, which only the data says."""
    trees.folder(tmp_path / "photos")
    argv = flags(tmp_path / "photos", tmp_path / "logs", dataset="folder", epochs=1)
    train.main(argv)
    (run,) = (tmp_path / "logs" / "logs_folder").iterdir()
    assert protocol.Training("a run", argv, 1).folder() == run and len(protocol.Training("a run", argv, 1).rows()) == 1
