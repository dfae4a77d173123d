import csv
import json
import linecache
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trees
from helpers import RUN, arguments, read_metrics, run_folder, run_train, without_reader
from pages import PAGES, REPOSITORY, commands
from PIL import Image

import dataset
import evaluate
import net
import train
from proxy_anchor import checkpoint, cli, evaluation
from proxy_anchor.embedding import Embedder
from proxy_anchor.retrieval import best_positive_rank
from proxy_anchor.runs import logbook, run_folders


@pytest.fixture(scope="module")
def trained(cub_root, tmp_path_factory):
    """Log folder of a finished run."""
    logs = tmp_path_factory.mktemp("logs")
    run_train(cub_root, logs)
    return logs / "logs_cub" / RUN


def test_folder_of_a_run_stands_for_its_best_checkpoint(cub_root, trained, tmp_path, capsys):
    best = trained / "cub_tiny_best.pth"
    flags = ["--allow-partial", "--data-root", str(cub_root), "--workers", "0", "--resume"]
    assert evaluate.main([*flags, str(trained)]) == evaluate.main([*flags, str(best)])
    assert checkpoint.in_run(str(trained)) == str(best) and checkpoint.in_run("none.pth") == "none.pth"
    with pytest.raises(SystemExit, match="1"):
        evaluate.main([*flags, str(tmp_path)])
    assert f"{tmp_path} has no *_best.pth, expected one" in capsys.readouterr().err
    for name in ("a_best.pth", "b_best.pth"):
        (tmp_path / name).write_bytes(best.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has 2 \*_best.pth, expected one"):
        checkpoint.in_run(str(tmp_path))


def test_training_ends_with_the_next_command(cub_root, tmp_path, capsys):
    run_train(cub_root, tmp_path / "two words", epochs=1)
    line = capsys.readouterr().out.splitlines()[-1]
    start, *argv = shlex.split(line.removeprefix("Next: python "))
    args = evaluate.parse(argv)
    assert start == "evaluate.py" and (args.data_root, args.report) == (str(cub_root), "report") and args.allow_partial
    assert Path(args.resume[0]).parent.parent.parent == tmp_path / "two words"


# Training


def test_classes_are_those_of_the_best_network(cub_root, trained):
    network = net.create("tiny", 8)
    checkpoint.load(trained / "cub_tiny_best.pth", network)
    (images,) = dataset.eval_sets("cub", cub_root, 32, allow_partial=True)
    found = Embedder(network, torch.device("cpu")).embed(dataset.eval_loader(images, 16, 0))
    y, ranks = found.labels, best_positive_rank(found.vectors, found.labels)
    best = max(read_metrics(trained), key=lambda row: float(row["R@1"]))
    with open(trained / "classes.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {
                "epoch": best["epoch"],
                "class": str(label),
                "queries": "6",
                "hits": str(int((ranks[y == label] == 0).sum())),
            }
            for label in range(3)
        ]


def test_run_folder_is_the_published_one(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        ".lock",
        "classes.csv",
        "config.json",
        "cub_tiny_best.pth",
        "cub_tiny_best_results.txt",
        "curves.png",
        "last.pth",
        "metrics.csv",
    ]
    rows = read_metrics(trained)
    assert list(rows[0]) == [
        "epoch",
        "loss",
        "lr",
        "seconds",
        "R@1",
        "R@2",
        "R@4",
        "R@8",
        "R@16",
        "R@32",
        "MAP@R",
        "R-precision",
    ]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    best = max(rows, key=lambda row: (float(row["R@1"]), -int(row["epoch"])))
    lines = (trained / "cub_tiny_best_results.txt").read_text().splitlines()
    assert lines[0] == f"Best Epoch: {best['epoch']}"
    assert lines[1] == f"Best Recall@1: {100 * float(best['R@1']):.4f}"
    config = json.loads((trained / "config.json").read_text())
    assert config["seed"] == 1 and config["sizes"] == {"train": [24, 4], "eval": [18, 3]}
    assert (
        config["versions"]["torch"] == torch.__version__.split("+")[0]
        or config["versions"]["torch"] == torch.__version__
    )


def test_evaluation_gives_the_recalls_of_training(trained, cub_root, capsys):
    metrics = evaluate.main(arguments(cub_root, resume=trained / "cub_tiny_best.pth"))
    best = max(read_metrics(trained), key=lambda row: (float(row["R@1"]), -int(row["epoch"])))
    assert metrics == {k: float(v) for k, v in best.items() if k in metrics}
    assert len(metrics) == 8
    assert "all 22 tensors match" in capsys.readouterr().out


def without_seconds(folder):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(folder)]


def test_cache_changes_nothing(trained, cub_root, tmp_path, capsys):
    """Neither training nor evaluation; the second run finds it built."""
    for _ in range(2):
        run_train(cub_root, tmp_path, cache=tmp_path / "cache")
    assert capsys.readouterr().out.count("Decoding ") == 2  # of the training and the test images
    assert without_seconds(tmp_path / "logs_cub" / RUN) == without_seconds(trained)
    assert without_seconds(tmp_path / "logs_cub" / f"{RUN}_2") == without_seconds(trained)


def test_cache_without_the_bad_images(tmp_path, capsys):
    root = trees.cub(tmp_path)
    damaged = root / "CUB_200_2011" / "images" / "101.Bird_101" / "Bird_101_0000.jpg"
    damaged.write_bytes(b"")
    flags = {"epochs": 1, "cache": tmp_path / "cache"}
    with pytest.raises(SystemExit):
        run_train(root, tmp_path, **flags)
    assert "Bird_101_0000.jpg cannot be read" in capsys.readouterr().err
    for folder in (tmp_path / "first", tmp_path / "second"):  # the cache is built, then read
        train.main([*arguments(root, pretrained="none", LOG_DIR=folder, **flags), "--skip-bad-images"])
        assert "Left out: 1 unreadable image\n" in capsys.readouterr().out
    assert without_seconds(tmp_path / "first" / "logs_cub" / RUN) == without_seconds(
        tmp_path / "second" / "logs_cub" / RUN
    )


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(cub_root, tmp_path, amp):
    flags = {"lr": 1e-5}  # fp16 skips the first steps
    run_train(cub_root, tmp_path / "amp", amp=amp, **flags)
    run_train(cub_root, tmp_path / "plain", **flags)
    of_amp, of_plain = (read_metrics(run_folder(tmp_path / name)) for name in ("amp", "plain"))
    for row, plain in zip(of_amp, of_plain, strict=True):
        assert float(row["loss"]) == pytest.approx(float(plain["loss"]), rel=0.05)


@pytest.mark.parametrize("name", ["cub_tiny_best.pth", "last.pth"])
def test_checkpoint_says_how_it_is_used(trained, cub_root, capsys, name):
    flags = ["--allow-partial", "--data-root", str(cub_root), "--workers", "0", "--resume", str(trained / name)]
    metrics = evaluate.main(flags)
    assert metrics == evaluate.main(arguments(cub_root, resume=trained / name))
    for contradiction in (["--model", "resnet50"], ["--embedding-size", "512"], ["--l2-norm", "0"]):
        with pytest.raises(SystemExit) as error:
            evaluate.main(flags + contradiction)
        assert error.value.code == 2
        assert re.search(rf"{contradiction[0]}: the checkpoint was trained with \w+, not", capsys.readouterr().err)


def test_crop_that_a_checkpoint_or_a_run_does_not_tell_is_the_former(tmp_path):
    """Releases that did not record it cropped glyphs as all others; today's network sees them whole."""
    network = net.create("tiny", 8)
    former = {"model": "tiny", "embedding_size": 8, "image_size": 32, "l2_norm": 1}
    trees.save_checkpoint(tmp_path / "former.pth", network, former)
    assert evaluate.parse(["--dataset", "glyphs", "--resume", str(tmp_path / "former.pth")]).spec.crop == 0.875
    assert run_folders.differences(former, former | {"crop": 0.875}) == []
    assert run_folders.differences(former, former | {"crop": dataset.crop_of("glyphs")}) == ["crop: 0.875, now 1.0"]
    torch.save({"model_state_dict": network.state_dict(), "network": None}, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="damaged: its record of the network has no entries: 'None'"):
        checkpoint.Checkpoint(tmp_path / "damaged.pth")


def test_second_run_is_the_same_and_overwrites_nothing(trained, cub_root, capsys):
    first = (trained / "cub_tiny_best.pth").read_bytes()
    run_train(cub_root, trained.parent.parent)
    second = trained.with_name(RUN + "_2")
    assert f"Logging to {second}" in capsys.readouterr().out
    assert (trained / "cub_tiny_best.pth").read_bytes() == first
    assert without_seconds(second) == without_seconds(trained)


def test_seed_and_remark_are_in_the_name(cub_root, tmp_path):
    run_train(cub_root, tmp_path, epochs=1, seed=2, remark="_trial", alpha=16.5)
    assert [p.name for p in (tmp_path / "logs_cub").iterdir()] == [RUN.replace("alpha32", "alpha16.5") + "_trial_seed2"]


def test_both_ends_are_shown(cub_root, tmp_path, capsys):
    run_train(cub_root, tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"best epoch \(\d\) .*\nlast epoch \(1\) ", out) and "No CUDA device here: running on" in out
    assert "train: 24 images of 4 classes, eval: 18 images of 3 classes" in out and "wandb" not in out


def test_no_epochs_evaluate_the_untrained_network(cub_root, tmp_path, capsys):
    run_train(cub_root, tmp_path, epochs=0)
    assert "untrained" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", ["Proxy_NCA", "MS", "Contrastive", "Triplet", "NPair"])
def test_every_loss_trains(cub_root, tmp_path, loss):
    run_train(cub_root, tmp_path, loss=loss, epochs=1, IPC=2)
    assert len(read_metrics(next((tmp_path / "logs_cub").iterdir()))) == 1


@pytest.mark.parametrize("model", ["bn_inception", "googlenet", "resnet34", "resnet50", "resnet101"])
def test_every_network_trains_and_evaluates(cub_root, tmp_path, model):
    run_train(cub_root, tmp_path, model=model, epochs=1, **{"bn-freeze": 0})
    path = next(tmp_path.glob("**/*_best.pth"))
    evaluate.main(arguments(cub_root, model=model, resume=path))


@pytest.mark.parametrize(
    "name, make, ks", [("cars", trees.cars, "R@32"), ("SOP", trees.sop, "R@1000"), ("Inshop", trees.inshop, "R@50")]
)
def test_every_benchmark_trains_and_evaluates(tmp_path, name, make, ks, capsys):
    make(tmp_path / "data")
    run_train(tmp_path / "data", tmp_path / "logs", dataset=name, epochs=1)
    metrics = evaluate.main(arguments(tmp_path / "data", dataset=name, resume=next(tmp_path.glob("**/*_best.pth"))))
    row = read_metrics(next(tmp_path.glob("logs/*/*")))[0]
    assert metrics == {k: float(v) for k, v in row.items() if k in metrics}
    assert ks in capsys.readouterr().out


def test_from_another_directory_paths_are_the_users(cub_root, tmp_path):
    command = [
        sys.executable,
        REPOSITORY / "train.py",
        *arguments(cub_root, model="resnet18", pretrained="none", epochs=1, LOG_DIR="mine", workers=2),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path / "mine")
    assert (folder / "cub_resnet18_best.pth").exists() and not done.stderr
    command = [
        sys.executable,
        REPOSITORY / "evaluate.py",
        *arguments(cub_root, model="resnet18", resume=folder.relative_to(tmp_path) / "cub_resnet18_best.pth"),
    ]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_default_paths_are_the_repositorys():
    args = train.parse([])
    assert (args.data_root, args.LOG_DIR) == (str(REPOSITORY / "data"), str(REPOSITORY / "logs"))


def test_defaults_are_the_published():
    published = {
        "dataset": "cub",
        "embedding_size": 512,
        "batch_size": 150,
        "epochs": 60,
        "gpu_id": 0,
        "model": "bn_inception",
        "loss": "Proxy_Anchor",
        "optimizer": "adamw",
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "workers": dataset.WORKERS,
        "lr_decay_step": 10,
        "lr_decay_gamma": 0.5,
        "alpha": 32,
        "mrg": 0.1,
        "IPC": None,
        "warm": 1,
        "bn_freeze": 1,
        "l2_norm": 1,
        "remark": "",
        "image_size": 224,
        "seed": 1,
        "pretrained": "imagenet",
    }
    assert published.items() <= vars(train.parse([])).items()


# wandb


def test_wandb_offline(cub_root, tmp_path):
    run_train(cub_root, tmp_path, epochs=1, wandb="offline")
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_wandb_credentials_are_found_without_wandb(monkeypatch, tmp_path):
    from proxy_anchor.runs.logbook import has_credentials

    assert not has_credentials()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "http://[bad")
    assert not has_credentials()
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "netrc").write_bytes(b"machine api.wandb.ai login caf\xe9 password key\n")
    assert not has_credentials()
    monkeypatch.delenv("NETRC")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "key")
            assert has_credentials()


class Told(Exception):
    """What wandb.init was called with."""


@pytest.mark.parametrize(
    "variable, setting",
    [
        ("WANDB_PROJECT", "project"),
        ("WANDB_NOTES", "notes"),
        ("WANDB_DIR", "dir"),
        ("WANDB_RUN_ID", "id"),
        ("WANDB_RESUME", "resume"),
    ],
)
def test_variables_of_wandb_come_first(variable, setting, monkeypatch, tmp_path):
    import wandb

    def init(**settings):
        raise Told(settings)

    monkeypatch.setattr(wandb, "init", init)
    ours = {"project", "notes", "dir", "id", "resume"}
    for expected in (ours, ours - {setting}):
        with pytest.raises(Told) as told:
            logbook.start_wandb("offline", tmp_path, "project", "name", {}, run_id="id")
        assert told.value.args[0].keys() == expected | {"mode", "config"}
        monkeypatch.setenv(variable, "mine")


@pytest.mark.parametrize("flag, variable, mode", [(None, "offline", "offline"), ("offline", "disabled", "offline")])
def test_mode_of_wandb_is_the_flag_or_the_variable(flag, variable, mode, monkeypatch, tmp_path):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **settings: settings)
    monkeypatch.setenv("WANDB_MODE", variable)
    assert logbook.start_wandb(flag, tmp_path, "project", "name", {})["mode"] == mode


def test_variables_reach_a_run_of_wandb(monkeypatch, tmp_path):
    """Of the real one, which reads more than this code knows."""
    import wandb

    wandb.teardown()  # what it has read for another test
    names = {"PROJECT": "project", "ENTITY": "entity", "NAME": "run_name", "NOTES": "run_notes", "RUN_ID": "run_id"}
    names |= {"RUN_GROUP": "run_group", "JOB_TYPE": "run_job_type"}
    for name in names:
        monkeypatch.setenv(f"WANDB_{name}", f"my-{name}")
    for name, value in {"MODE": "offline", "TAGS": "a,b", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = logbook.start_wandb(None, tmp_path / "logs", "project", "name", {})
    found = {name: getattr(run.settings, setting) for name, setting in names.items()}
    run.finish()
    assert found == {name: f"my-{name}" for name in names} and run.settings.run_tags == ("a", "b")
    wandb.teardown()
    assert list(tmp_path.glob("wandb/offline-run-*-my-RUN_ID")) and not list(tmp_path.glob("logs/*"))


def test_who_never_asked_for_wandb_reads_no_word_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert logbook.start_wandb(None, tmp_path, "project", "name", {}) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_wandb_that_does_not_start_is_one_short_line(error, monkeypatch, tmp_path):
    """As for an address that is none: what it raises then are pages."""
    import wandb

    def init(**settings):
        raise error("Invalid\nURL " * 1000)

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(
        RuntimeError, match="^wandb does not start: Invalid URL .{1,190}. Choose --wandb offline or dis"
    ):
        logbook.start_wandb("offline", tmp_path, "project", "name", {})


# Evaluation of published checkpoints


def test_published_figures_are_shown(cub_root, tmp_path, capsys):
    torch.save(
        {"model_state_dict": {f"module.{k}": v for k, v in net.create("bn_inception", 8).state_dict().items()}},
        tmp_path / "cub_bn_inception_best.pth",
        _use_new_zipfile_serialization=False,
    )
    evaluate.main(arguments(cub_root, model="bn_inception", resume=tmp_path / "cub_bn_inception_best.pth"))
    out = capsys.readouterr().out
    assert "all 487 tensors match" in out and re.search(r"published +69.10 +78.90 +86.10 +91.20", out)


def test_queries_without_a_positive_are_counted(tmp_path, capsys):
    trees.cub(tmp_path / "data")
    for i in range(5):
        (tmp_path / "data" / "CUB_200_2011" / "images" / "101.Bird_101" / f"Bird_101_{i:04d}.jpg").unlink()
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), {})
    evaluate.main(arguments(tmp_path / "data", resume=tmp_path / "a.pth"))
    assert "1 of 13 queries have no image of their class to find" in capsys.readouterr().out


# Bad input: one line on stderr, non-zero exit, nothing written


def fails(capsys, script, argv, message, status=1):
    with pytest.raises(SystemExit) as exit:
        script.main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == status, err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    if status == 1:
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model": "vgg"}, "--model: (there is no network 'vgg'|'vgg' is not one of )"),
        ({"loss": "None"}, "--loss: invalid choice"),
        ({"dataset": "cifar"}, "--dataset: invalid choice"),
        ({"optimizer": "lion"}, "--optimizer: invalid choice"),
        ({"embedding-size": 0}, "--embedding-size: 0 is not positive"),
        ({"lr": 1e39}, r"--lr: 1e\+39 is too large"),
        ({"mrg": 1e300}, r"--mrg: 1e\+300 is too large"),
        *(
            ({"loss": loss, **flags}, f"--loss: {loss} compares images of the same class")
            for loss in ("MS", "Contrastive", "Triplet", "NPair")
            for flags in ({}, {"IPC": 1})
        ),
        ({"image-size": 10**30}, "--image-size: 1000000000000000000000000000000 is too large"),
        ({"test-classes": ""}, "--test-classes: expected a path, found an empty one"),
        ({"LOG_DIR": ""}, "--LOG_DIR: expected a path, found an empty one"),
        ({"batch-size": -1}, "--batch-size: -1 is not positive"),
        ({"lr": 0}, "--lr: 0 is not positive"),
        ({"lr": "nan"}, "--lr: nan is not positive"),
        ({"epochs": -1}, "--epochs: -1 is negative"),
        ({"epochs": 0, "resume": "auto"}, "--epochs: 0 evaluates an untrained network"),
        ({"IPC": 9}, "--IPC: 9 images per class do not fit into a batch of 8"),
        ({"model": "bn_inception", "image-size": 300}, "--image-size: bn_inception cannot take images of 300"),
        ({"gpu-id": "x"}, "--gpu-id: 'x' is not a whole number"),
        ({"embedding": 8}, "unrecognized arguments: --embedding 8"),
    ],
)
def test_usage_errors(cub_root, tmp_path, capsys, changed, message):
    argv = arguments(cub_root, **{"pretrained": "none", "LOG_DIR": tmp_path / "logs"} | changed)
    fails(capsys, train, argv, message, status=2)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"data-root": "nowhere"}, r"There is no nowhere/CUB_200_2011/images\. Download CUB_200_2011.tgz"),
        ({"batch-size": 25}, "batch size 25 is larger than the training set of 24"),
        ({"batch-size": 24, "IPC": 2}, "needs 12 classes per batch, but the training set has 4"),
        ({"pretrained": "nowhere.pth"}, "There is no weights file nowhere.pth"),
        ({"LOG_DIR": "/dev/null/x"}, "/dev/null"),
    ],
)
def test_errors(cub_root, tmp_path, capsys, changed, message):
    argv = arguments(cub_root, **{"pretrained": "none", "LOG_DIR": tmp_path / "logs"} | changed)
    fails(capsys, train, argv, message)
    assert not (tmp_path / "logs").exists()


def test_partial_data_set_is_an_error_unless_allowed(cub_root, tmp_path, capsys):
    argv = [
        argument
        for argument in arguments(cub_root, pretrained="none", LOG_DIR=tmp_path / "logs")
        if argument != "--allow-partial"
    ]
    fails(capsys, train, argv, "cub train: found 24 images of 4 classes .*expected 5,864 of 100.*CUB-200 of 2010")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_one_line(tmp_path, capsys, workers):
    trees.cub(tmp_path / "data")
    bad = tmp_path / "data" / "CUB_200_2011" / "images" / "002.Bird_2" / "Bird_2_0003.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    argv = arguments(tmp_path / "data", pretrained="none", LOG_DIR=tmp_path / "logs", workers=workers)
    fails(capsys, train, argv, rf"error: The image {bad} cannot be read: .+")
    assert not list(tmp_path.glob("logs/**/*.pth"))


def test_unforeseen_error_keeps_its_traceback(cub_root, tmp_path, monkeypatch):
    """A ValueError of a library is no advice to the user; it is in the run's folder until the run continues."""

    def train_one_epoch(*args, **kwargs):
        int("not raised on purpose")

    argv = [*arguments(cub_root, pretrained="none", LOG_DIR=tmp_path, epochs=1), "--resume", "auto"]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="invalid literal"):
        patch.setattr(train.training, "train_one_epoch", train_one_epoch)
        train.main(argv)
    (path,) = tmp_path.glob("logs_cub/*/error.txt")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("ValueError: invalid literal for int()")
    train.main(argv)
    assert (path.parent / "last.pth").exists() and not path.exists()


def test_loss_that_is_not_finite(cub_root, tmp_path, capsys):
    argv = arguments(cub_root, pretrained="none", LOG_DIR=tmp_path / "logs", lr=1e30, epochs=3, warm=0)
    fails(capsys, train, argv, "error: The loss is (nan|inf) in epoch 0, step [12], at learning rate 1e.30")
    assert not list(tmp_path.glob("logs/**/*.pth"))


def test_checkpoint_errors(cub_root, tmp_path, capsys):
    fails(capsys, evaluate, arguments(cub_root, resume=tmp_path / "a.pth"), "There is no checkpoint")
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 16), {})
    message = r"another network: .*model.embedding.weight: expected \(8, 48\), found \(16, 48\)"
    fails(capsys, evaluate, arguments(cub_root, resume=tmp_path / "a.pth"), message)


def test_cuda_device_that_does_not_exist(cub_root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    fails(
        capsys,
        train,
        arguments(cub_root, **{"gpu-id": 2, "pretrained": "none"}),
        "There is no CUDA device 2: --gpu-id can be 0 to 1 here",
    )


def test_out_of_memory_suggests_a_smaller_batch(cub_root, tmp_path, monkeypatch, capsys):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")

    monkeypatch.setattr(train.training, "train_one_epoch", out_of_memory)
    fails(
        capsys,
        train,
        arguments(cub_root, pretrained="none", LOG_DIR=tmp_path),
        "out of memory; choose a smaller --batch-size",
    )


def run_limited(shell, *flags):
    """train.py in a shell that has limited what it may use."""
    command = shlex.join([sys.executable, str(REPOSITORY / "train.py"), *map(str, flags)])
    return subprocess.run(["bash", "-c", f"{shell}; {command}"], capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_memory_that_is_too_small(cub_root, tmp_path):
    large = {"image-size": 1024, "batch-size": 24, "warm": 0}
    flags = arguments(cub_root, model="resnet18", pretrained="none", LOG_DIR=tmp_path, **large)
    done = run_limited("ulimit -v 6000000", *flags)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "The memory is exhausted: choose a smaller --batch-size" in done.stderr


@pytest.mark.slow
def test_shared_memory_that_is_too_small(cub_root, tmp_path):
    """A real /dev/shm of 200 kB, in a mount namespace of its own."""
    namespace = ["unshare", "-m", "bash", "-c"]
    small = "mount -t tmpfs -o size=200k tmpfs /dev/shm"
    if subprocess.run([*namespace, small], capture_output=True).returncode != 0:
        pytest.skip("mounting needs to be root")
    large = {"image-size": 224, "workers": 2}
    flags = arguments(cub_root, model="resnet18", pretrained="none", LOG_DIR=tmp_path, **large)
    command = shlex.join([sys.executable, str(REPOSITORY / "train.py"), *map(str, flags)])
    done = subprocess.run([*namespace, f"{small}; {command}"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    # torch does not always say more than that a worker is gone.
    assert re.search(r"train.py: error: .*/dev/shm is too small for the workers: choose fewer --workers", done.stderr)


def test_closed_streams(cub_root, tmp_path):
    """As of a service: what would be printed is lost, and nothing else."""
    flags = [*arguments(cub_root, model="resnet18", epochs=1, LOG_DIR=tmp_path), "--pretrained", "none"]
    assert run_limited("exec >&- 2>&-", *flags).returncode == 0
    assert (run_folder(tmp_path) / "last.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["ro", "size=4k"])
def test_shared_memory_that_workers_cannot_have(cub_root, tmp_path, options):
    """One line, and not another one of the loader that was made by half."""
    namespace = ["unshare", "-m", "bash", "-c"]
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    if subprocess.run([*namespace, mount], capture_output=True).returncode != 0:
        pytest.skip("mounting needs to be root")
    flags = [*arguments(cub_root, model="resnet18", workers=2), "--pretrained", "none", "--LOG_DIR", tmp_path]
    command = shlex.join([sys.executable, str(REPOSITORY / "train.py"), *map(str, flags)])
    done = subprocess.run([*namespace, f"{mount}; {command}"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "/dev/shm is full or cannot be written: choose --workers 0" in done.stderr


@pytest.mark.slow
def test_compiler_that_fails_keeps_its_traceback(cub_root, tmp_path):
    compiler = tmp_path / "compiler"
    answer = "sys.exit(0 if '--version' in sys.argv else 'error: ' * 20_000)"
    compiler.write_text(f"#!{sys.executable}\nimport sys\nprint('g++ 12.0')\n{answer}\n")
    compiler.chmod(0o755)
    flags = [*arguments(cub_root, model="resnet18", LOG_DIR=tmp_path / "logs"), "--pretrained", "none", "--compile"]
    cache = f"export TORCHINDUCTOR_CACHE_DIR={tmp_path}/cache CXX={compiler}"
    done = run_limited(cache, *flags)
    assert done.returncode == 1 and "Traceback" in done.stderr and "CppCompileError" in done.stderr, done.stderr[:2000]


@pytest.mark.parametrize("errors", [subprocess.PIPE, subprocess.STDOUT])
def test_training_goes_on_when_nobody_reads_its_output(cub_root, tmp_path, errors):
    flags = [*arguments(cub_root, model="resnet18", epochs=2, LOG_DIR=tmp_path), "--pretrained", "none"]
    command = [sys.executable, "-u", REPOSITORY / "train.py", *flags]
    assert without_reader(command, 1, stderr=errors) == (0, "")
    assert len(read_metrics(run_folder(tmp_path))) == 2


def test_other_output_that_nobody_reads_ends_silently(cub_root, tmp_path):
    command = [sys.executable, "-u", REPOSITORY / "evaluate.py", "--backbone-only", "--pretrained", "none"]
    command += [
        flag for flag in arguments(cub_root, model="resnet18") if flag not in ("--embedding-size", "8", "--batch-size")
    ]
    assert without_reader(command, 1, stderr=subprocess.PIPE) == (128 + signal.SIGPIPE, "")


def test_broken_pipe_of_something_else_is_an_error(capfd):
    with pytest.raises(SystemExit) as error, cli.errors_in_one_line("a.py"):
        raise BrokenPipeError("the manager is gone")
    assert error.value.code == 1 and capfd.readouterr().err == "a.py: error: the manager is gone\n"


@pytest.mark.parametrize("file, deliberate", [("code/losses.py", True), ("train.py", True), ("my_losses.py", False)])
def test_errors_in_a_users_file_are_not_deliberate(file, deliberate, monkeypatch):
    path, source = str(cli.ROOT / file), "raise ValueError('too small')\n"
    monkeypatch.setitem(linecache.cache, path, (len(source), None, [source], path))
    with pytest.raises(ValueError) as error:
        exec(compile(source, path, "exec"))
    assert cli.is_deliberate(error.value) == deliberate


def test_batchnorm_on_a_single_image(cub_root, tmp_path):
    flags = {"model": "resnet18", "pretrained": "none", "LOG_DIR": tmp_path, "batch-size": 1, "bn-freeze": 0}
    argv = arguments(cub_root, **flags)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        train.main(argv)


def test_embeddings_that_are_not_finite(trained, cub_root, tmp_path, capsys):
    content = torch.load(trained / "cub_tiny_best.pth", weights_only=True)
    content["model_state_dict"]["model.embedding.bias"][0] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    with pytest.raises(SystemExit) as failed:
        evaluate.main(arguments(cub_root, resume=tmp_path / "nan.pth"))
    assert failed.value.code == 1 and "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{}, {"IPC": 4}])
def test_class_with_one_image(tmp_path, flags, capsys):
    """In training it is like any other (with --IPC, its image is drawn again); in a test, its query is a miss."""
    trees.cub(tmp_path / "data", classes=(1, 2, 3, 101, 102))
    for name in ("001.Bird_1", "102.Bird_102"):
        for path in sorted((tmp_path / "data" / "CUB_200_2011" / "images" / name).glob("B*"))[1:]:
            path.unlink()
    run_train(tmp_path / "data", tmp_path / "logs", epochs=1, **flags)
    output = capsys.readouterr().out
    assert "train: 13 images of 3 classes, eval: 7 images of 2 classes" in output
    assert "1 of 7 queries have no image of their class to find: they are misses." in output


def test_bad_images_are_skipped_on_demand(tmp_path, capsys):
    root = trees.cub(tmp_path / "data")
    bad = root / "CUB_200_2011" / "images" / "101.Bird_101" / "Bird_101_0002.jpg"
    bad.write_bytes(b"no image")
    train.main([*arguments(root, pretrained="none", epochs=1, LOG_DIR=tmp_path / "logs"), "--skip-bad-images"])
    output = capsys.readouterr().out
    assert f"Left out: 1 unreadable image\n  The image {bad} cannot be read" in output
    assert "train: 24 images of 4 classes, eval: 17 images of 3 classes" in output
    path = next(tmp_path.glob("logs/**/*_best.pth"))
    metrics = evaluate.main([*arguments(root, resume=path), "--skip-bad-images"])
    assert metrics["R@1"] == float(read_metrics(path.parent)[0]["R@1"])


# The commands of README.md and docs/


RECIPES = {  # batch size, learning rate, warm-up, BN-freeze, epochs between decays, decay
    ("cub", "bn_inception"): (180, 1e-4, 1, 1, 10, 0.5),
    ("cub", "resnet50"): (120, 1e-4, 5, 1, 5, 0.5),
    ("cars", "bn_inception"): (180, 1e-4, 1, 1, 20, 0.5),
    ("cars", "resnet50"): (120, 1e-4, 5, 1, 10, 0.5),
    ("SOP", "bn_inception"): (180, 6e-4, 1, 0, 20, 0.25),
    ("Inshop", "bn_inception"): (180, 6e-4, 1, 0, 20, 0.25),
}


def assert_published_recipes(commands):
    """Each command that trains on a benchmark is a published recipe, and all of these are there."""
    found = set()
    for argv in commands:
        args = train.parse(argv)
        if args.dataset in ("cub", "cars", "SOP", "Inshop"):
            assert (args.loss, args.embedding_size) == ("Proxy_Anchor", 512)
            assert RECIPES[args.dataset, args.model] == (
                args.batch_size,
                args.lr,
                args.warm,
                args.bn_freeze,
                args.lr_decay_step,
                args.lr_decay_gamma,
            )
            found.add((args.dataset, args.model))
    assert found == set(RECIPES)


def test_training_commands_of_the_pages_are_the_published_recipes():
    others = ("backbones.md", "recipes.md")  # of later networks
    lines = commands("python train.py", [page for page in PAGES if page.name not in others])
    assert_published_recipes([line for line in lines if "--frozen" not in line])  # which has a recipe of its own


def test_table_of_the_readme_is_the_published_recipes():
    rows = re.findall(r"^\| .* \| `(--dataset .*)` \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert_published_recipes(map(shlex.split, rows))


SMALL = {  # dataset: how to write a small one with enough training images for a batch, and its sizes
    "cub": (lambda root: trees.cub(root, (*range(1, 11), 101, 102), 18), {"train": (10, 180), "eval": (2, 36)}),
    "cars": (lambda root: trees.cars(root, images=60), {"train": (3, 180), "eval": (3, 180)}),
    "SOP": (lambda root: trees.sop(root, train=60), {"train": (60, 180), "eval": (3, 9)}),
    "Inshop": (lambda root: trees.inshop(root, train=45), {"train": (45, 180), "query": (3, 6), "gallery": (3, 6)}),
}


@pytest.mark.parametrize("number", range(6))
def test_published_training_command_runs(tmp_path, monkeypatch, number):
    """On small images under the default root, with weights from torch's cache."""
    command = [c for c in commands("python train.py") if "--gpu-id" in c][number]
    args = train.parse(command)
    write, sizes = SMALL[args.dataset]
    write(tmp_path / "data")
    monkeypatch.setattr(dataset.BENCHMARKS[args.dataset], "SIZES", sizes)
    weights = {
        k.removeprefix("model."): v for k, v in net.create(args.model, 4).state_dict().items() if "embedding" not in k
    }
    torch.save(weights, tmp_path / "weights.pth")
    monkeypatch.setattr("net.pretrained.imagenet_file", lambda name: tmp_path / "weights.pth")
    monkeypatch.setattr(dataset, "DATA_ROOT", tmp_path / "data")
    monkeypatch.setattr(train.logbook, "LOG_DIR", tmp_path / "logs")
    train.main([*command, "--epochs", "1", "--image-size", "32"])
    (checkpoint_file,) = (tmp_path / "logs").glob("logs_*/*/*_best.pth")
    assert checkpoint_file.parent.name == (
        f"{args.model}_Proxy_Anchor_embedding512_alpha32_mrg0.1_adamw_lr{args.lr}_batch{args.batch_size}"
    )


def test_code_is_no_package_of_its_own():
    """An __init__.py would let it hide the standard library's module `code`, which pdb imports."""
    assert not any((REPOSITORY / "code").glob("__init__.py"))


def test_image_of_one_pixel(tmp_path):
    trees.cub(tmp_path)
    Image.new("RGB", (1, 1)).save(tmp_path / "CUB_200_2011" / "images" / "001.Bird_1" / "Bird_1_0000.jpg")
    images = dataset.train_set("cub", tmp_path, 32, allow_partial=True)
    assert images[1, 0, 0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("loss, proxy_lr, clipped", [("Proxy_Anchor", 100, True), ("Proxy_NCA", 1, False)])
def test_recipe_is_what_the_flags_say(cub_root, tmp_path, monkeypatch, loss, proxy_lr, clipped):
    """train.py passes on what it is told: learning rates, decay, warm-up, BN-freeze, the epoch of the order."""
    seen = {"epochs": [], "trainable": []}
    create_optimizer, train_one_epoch = train.training.create_optimizer, train.training.train_one_epoch

    def spy_optimizer(*args, **keywords):
        seen["optimizer"] = create_optimizer(*args, **keywords)
        return seen["optimizer"]

    def spy_epoch(network, loss_of, batches, optimizer, scaler, epoch, clipped, *others):
        seen["clipped"] = [type(module).__name__ for module in clipped]
        seen["trainable"].append(network.model.conv1.weight.requires_grad)
        seen["bn"] = network.model.bn1.weight.requires_grad
        batches = list(batches)
        seen["epochs"].append(batches[0][0])
        return train_one_epoch(network, loss_of, batches, optimizer, scaler, epoch, clipped, *others)

    monkeypatch.setattr(train.training, "create_optimizer", spy_optimizer)
    monkeypatch.setattr(train.training, "train_one_epoch", spy_epoch)
    torch.backends.cudnn.allow_tf32 = True
    flags = {"lr": 1e-3, "weight-decay": 0.01, "warm": 2, "lr-decay-step": 1, "lr-decay-gamma": 0.1, "epochs": 3}
    run_train(cub_root, tmp_path, loss=loss, **flags)
    groups = seen["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([1e-3, 1e-3, 1e-3 * proxy_lr])
    assert {group["weight_decay"] for group in groups} == {0.01}
    rows = read_metrics(next(tmp_path.glob("logs_cub/*")))
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-4, 1e-5])
    assert seen["trainable"] == [False, False, True]
    assert seen["bn"]  # the end of the warm-up frees frozen BatchNorm too
    assert seen["clipped"] == ["EmbeddingNet", *["ProxyAnchor"] * clipped]
    assert not torch.equal(seen["epochs"][0], seen["epochs"][1])  # another order in another epoch
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_best_epoch_is_the_first_of_equals(cub_root, tmp_path, monkeypatch):
    result = evaluation.Result({"R@1": 0.5, "MAP@R": 0.1}, *torch.zeros(3, 10))
    monkeypatch.setattr(evaluation, "measure", lambda *args: result)
    run_train(cub_root, tmp_path, epochs=2)
    assert next(tmp_path.glob("**/*_best_results.txt")).read_text() == "Best Epoch: 0\nBest Recall@1: 50.0000\n"
