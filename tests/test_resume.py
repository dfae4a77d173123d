import csv
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from contextlib import suppress

import kills
import pytest
import torch
import trees
from helpers import run_folder, stop_at
from pages import REPOSITORY

import net
import train
from proxy_anchor import checkpoint, files
from proxy_anchor.runs import randomness, resuming, run_folders, stopping
from proxy_anchor.runs.logbook import Logbook
from proxy_anchor.runs.run import Run
from proxy_anchor.spec import NetworkSpec


def arguments(root, logs, **changed):
    settings = {
        "dataset": "cub",
        "data-root": root,
        "model": "tiny",
        "embedding-size": 8,
        "batch-size": 4,
        "image-size": 32,
        "workers": 0,
        "pretrained": "none",
        "epochs": 3,
        "lr-decay-step": 1,
        "LOG_DIR": logs,
    } | changed
    return ["--allow-partial", *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]


@pytest.fixture(scope="module")
def uninterrupted(cub_root, tmp_path_factory):
    logs = tmp_path_factory.mktemp("uninterrupted")
    train.main(arguments(cub_root, logs))
    return logs


@pytest.mark.parametrize(("error", "code"), [(None, 0), (stopping.Interrupted(signal.SIGTERM), 1), (ValueError(), 1)])
def test_wandb_is_told_how_a_run_ends(tmp_path, error, code):
    codes = []
    config = {"model": "m", "embedding_size": 1, "image_size": 32, "l2_norm": 1, "crop": 1.0}
    log = Logbook("name", config | {"LOG_DIR": str(tmp_path), "dataset": "cub", "wandb": "disabled"})
    log.wandb = types.SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
    with suppress(stopping.Interrupted, ValueError), Run(log, torch.nn.Linear(1, 1)) as run:
        for _ in run.epochs(1):
            if error:
                raise error
    assert codes == [code] and (run.log.folder / run_folders.LAST).exists() == isinstance(error, stopping.Interrupted)


# An epoch is 6 batches of training and 3 of evaluation.
@pytest.mark.parametrize("moment", [1, 6, 8, 14, 22])
def test_run_stopped_by_a_signal_goes_on_to_the_same_end(cub_root, tmp_path, monkeypatch, uninterrupted, moment):
    signum = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[moment % 3]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_at(patch, moment, signum)
        train.main(arguments(cub_root, tmp_path))
    assert stopped.value.code == 128 + signum
    progress = checkpoint.read(run_folder(tmp_path) / "last.pth")["progress"]
    epoch, batch = divmod(moment - 1, 9)
    assert (progress["epoch"], len(progress["losses"])) == (epoch, min(batch + 1, 6))
    train.main(arguments(cub_root, tmp_path, resume="auto"))
    kills.assert_identical(kills.outcome(tmp_path), kills.outcome(uninterrupted))


@pytest.mark.parametrize("loss, flags", [("Triplet", {"IPC": 2}), ("Proxy_NCA", {"optimizer": "sgd"})])
def test_every_part_goes_on(cub_root, tmp_path, monkeypatch, loss, flags):
    """Other losses (with random miners), samplers and optimizers."""
    train.main(arguments(cub_root, tmp_path / "one", loss=loss, **flags))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 14)
        train.main(arguments(cub_root, tmp_path / "two", loss=loss, **flags))
    train.main(arguments(cub_root, tmp_path / "two", loss=loss, resume="auto", **flags))
    kills.assert_identical(kills.outcome(tmp_path / "two"), kills.outcome(tmp_path / "one"))


@pytest.mark.slow
def test_kills(cub_root, tmp_path, uninterrupted):
    """20 times SIGKILL at random moments."""
    context = kills.processes("helpers")
    seconds = kills.finish(context, arguments(cub_root, tmp_path / "one", epochs=10))
    died = kills.killed_and_resumed(context, arguments(cub_root, tmp_path / "two", epochs=10), 20, seconds / 7, seed=0)
    assert died >= 15  # the others found the run at its end
    kills.assert_identical(kills.outcome(tmp_path / "two"), kills.outcome(tmp_path / "one"))


def test_resume_by_path_takes_the_arguments_of_the_run(cub_root, tmp_path, uninterrupted):
    train.main(arguments(cub_root, tmp_path, epochs=2))
    last = run_folder(tmp_path) / "last.pth"
    train.main(["--resume", str(last), "--epochs", "3"])
    kills.assert_identical(kills.outcome(tmp_path), kills.outcome(uninterrupted))
    args = train.parse(["--resume", str(last.parent)])
    assert (args.model, args.batch_size, args.epochs, args.workers) == ("tiny", 4, 3, 0)


@pytest.mark.parametrize("epochs", [1, 2])
def test_resume_of_another_experiment_is_refused(cub_root, tmp_path, capsys, epochs):
    """Also where it has finished."""
    train.main(arguments(cub_root, tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    with pytest.raises(SystemExit) as refused:
        train.main(["--resume", str(folder), "--epochs", str(epochs), "--lr", "0.5", "--warm", "0"])
    error = capsys.readouterr().err
    assert refused.value.code == 1
    assert "lr: 0.0001, now 0.5" in error and "warm: 1, now 0" in error and "epochs" not in error
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before


def test_resume_with_other_classes_is_refused(tmp_path, capsys):
    """As many of them: training and test classes swapped, then folders renamed."""
    root = trees.folder(tmp_path / "images", classes=("ant", "bee", "cat", "dog"))
    lists = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for path, names in zip(lists, ("ant\nbee\n", "cat\ndog\n")):
        path.write_text(names)
    flags = {"dataset": "folder", "epochs": 1, "test-classes": lists[0]}
    train.main(arguments(root, tmp_path / "logs", **flags)[1:])
    (folder,) = (tmp_path / "logs" / "logs_folder").iterdir()
    lists[0].write_text(lists[1].read_text())
    with pytest.raises(SystemExit) as refused:
        train.main(["--resume", str(folder), "--epochs", "2"])
    assert refused.value.code == 1 and "data: other images or classes than the run had" in capsys.readouterr().err
    lists[0].write_text("ant\nbee\n")
    (root / "dog").rename(root / "cow")
    with pytest.raises(SystemExit):
        train.main(["--resume", str(folder), "--epochs", "2"])
    assert "data: other images" in capsys.readouterr().err
    (root / "cow").rename(root / "dog")
    root.rename(tmp_path / "moved")
    train.main(["--resume", str(folder), "--epochs", "2", "--data-root", str(tmp_path / "moved")])


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("lr", 0.5, "its optimizer has other settings: initial_lr of group 0 0.0001, now 0.5"),
        ("weight_decay", 0.1, "its optimizer has other settings: weight_decay of group 0 0.0001, now 0.1"),
        ("lr_decay_step", 7, "its scheduler has other settings: step_size 1, now 7"),
    ],
)
def test_edited_configuration_is_refused(cub_root, tmp_path, capsys, name, value, words):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    config = run_folder(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(SystemExit) as refused:
        train.main(["--resume", str(config.parent), "--epochs", "2"])
    assert refused.value.code == 1 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value", [("lr", None), ("epochs", "many"), ("compile", 1), ("model", 5), ("warm", True)]
)
def test_configuration_with_other_types_is_refused(tmp_path, capsys, name, value):
    config = tmp_path / "config.json"
    recorded = {key: default for key, default in vars(train.parse([])).items() if key != "spec"}
    config.write_text(json.dumps(recorded | {name: value}))
    with pytest.raises(SystemExit) as refused:
        train.main(["--resume", str(tmp_path)])
    assert refused.value.code == 2
    assert f"config.json has {name} {value!r}, which is not accepted" in capsys.readouterr().err


def test_plain_checkpoint_in_the_place_of_the_last(cub_root, tmp_path, capsys):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    (folder / "cub_tiny_best.pth").replace(folder / "last.pth")
    with pytest.raises(SystemExit) as refused:
        train.main(arguments(cub_root, tmp_path, epochs=2, resume="auto"))
    assert refused.value.code == 1 and "last.pth is not a checkpoint to resume from" in capsys.readouterr().err


def test_best_network_is_that_of_its_results_after_a_kill_in_between(cub_root, tmp_path, monkeypatch, uninterrupted):
    """Killed when last.pth was written and the best network not yet: it is made up for when the run is resumed."""
    killed = []

    def save_best(log, row, network):
        killed.append(row["epoch"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Logbook, "save_best", save_best)
        train.main(arguments(cub_root, tmp_path))
    assert killed == [0] and not list(run_folder(tmp_path).glob("*best*"))
    train.main(arguments(cub_root, tmp_path, epochs=1, resume="auto"))  # also where no epoch is left
    assert len(list(run_folder(tmp_path).glob("*best*"))) == 2
    train.main(arguments(cub_root, tmp_path, epochs=3, resume="auto"))
    kills.assert_identical(kills.outcome(tmp_path), kills.outcome(uninterrupted))


@pytest.mark.parametrize("moment", [6, 15])
def test_no_warning_on_resuming_at_the_end_of_an_epoch(cub_root, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, moment)
        train.main(arguments(cub_root, tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        train.main(arguments(cub_root, tmp_path, resume="auto"))


def test_resume_of_another_data_set_is_refused(cub_root, tmp_path, capsys):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    trees.cub(tmp_path / "data", images=7)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run_folder(tmp_path)), "--epochs", "2", "--data-root", str(tmp_path / "data")])
    assert "sizes" in capsys.readouterr().err


def test_auto_finds_the_run(cub_root, tmp_path, capsys):
    """The latest unfinished one of the same experiment, whatever became of the folders before it."""
    train.main(arguments(cub_root, tmp_path, epochs=1, resume="auto"))  # there is none: it starts
    train.main(arguments(cub_root, tmp_path, epochs=1, resume="auto", warm=0))  # another experiment of the same name
    train.main(arguments(cub_root, tmp_path, epochs=1))
    name = "tiny_Proxy_Anchor_embedding8_alpha32_mrg0.1_adamw_lr0.0001_batch4"
    folders = run_folders.existing(tmp_path / "logs_cub" / name)
    assert [folder.name[-2:] for folder in folders] == ["h4", "_2", "_3"]
    shutil.rmtree(folders[0])
    capsys.readouterr()
    train.main(arguments(cub_root, tmp_path, epochs=2, resume="auto"))
    assert f"Resuming {folders[2]} at epoch 1, step 0" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["auto", "path"])
def test_finished_run_is_left_as_it_is(cub_root, tmp_path, capsys, how):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train.main(arguments(cub_root, tmp_path, epochs=1, resume="auto" if how == "auto" else folder))  # exit status 0
    assert f"{folder} has finished (epochs: 1): nothing to do" in capsys.readouterr().out
    assert run_folder(tmp_path) == folder and {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("how", ["auto", "path"])
def test_run_without_its_last_checkpoint_is_left_as_it_is(cub_root, tmp_path, capsys, how):
    """Somebody may have made room once it was finished."""
    train.main(arguments(cub_root, tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    (folder / "last.pth").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as refused:
        train.main(arguments(cub_root, tmp_path, epochs=1, resume="auto" if how == "auto" else folder))
    assert refused.value.code == 1 and "no last.pth to continue from" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("path", ["nowhere", "nowhere/last.pth"])
def test_no_run_to_resume(tmp_path, capsys, path):
    with pytest.raises(SystemExit) as refused:
        train.main(["--resume", str(tmp_path / path)])
    assert refused.value.code == 2
    assert f"There is no run to resume in {tmp_path / path}" in capsys.readouterr().err.replace("\n", " ")


def test_mistyped_name_in_the_folder_of_a_run_resumes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    test_no_run_to_resume(tmp_path, capsys, "last")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"nonsense"])
def test_damaged_last_checkpoint_is_an_error(cub_root, tmp_path, capsys, damage):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    last = run_folder(tmp_path) / "last.pth"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(SystemExit) as refused:
        train.main(["--resume", str(last), "--epochs", "2"])
    assert refused.value.code == 1 and str(last) in capsys.readouterr().err


def test_second_resume_at_the_same_time_is_refused(cub_root, tmp_path, capsys):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    held = files.lock_folder(folder, "wait")
    with pytest.raises(SystemExit) as refused:
        train.main(["--resume", str(folder), "--epochs", "2"])
    assert refused.value.code == 1
    assert f"being written by process {os.getpid()} on {socket.gethostname()}" in capsys.readouterr().err
    held.close()
    train.main(["--resume", str(folder), "--epochs", "2"])


def test_child_does_not_hold_the_lock(tmp_path):
    """A worker that outlives its killed parent must not keep others from the run."""
    held = files.lock_folder(tmp_path, "wait")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"here")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reading, 4)
        held.close()
        files.lock_folder(tmp_path, "wait").close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_new_run_takes_no_folder_of_another(tmp_path):
    first, lock = run_folders.new(tmp_path / "run")
    second, _ = run_folders.new(tmp_path / "run")  # the first has no config.json yet, but is held
    assert [first.name, second.name] == ["run", "run_2"]
    lock.close()
    third, _ = run_folders.new(tmp_path / "run")  # given up before it began
    assert third.name == "run"


def test_random_states_are_restored():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1), np.random.randn()

    draw()
    state = randomness.state()
    first = draw()
    draw()
    randomness.restore(state)
    assert draw() == first


def test_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), stopping.Stop():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


@pytest.mark.slow
@pytest.mark.parametrize("whole_job", [False, True])
def test_signal_to_a_running_command(cub_root, tmp_path, whole_job):
    """SIGTERM as a scheduler sends it, to the process or to all of the job: the workers do not take the step away."""
    flags = arguments(cub_root, tmp_path, model="resnet18", epochs=1000, workers=2)
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "train.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("epoch  1"):
            break
    (os.killpg if whole_job else os.kill)(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "train.py: stopped by SIGTERM; everything is saved" in error and "Traceback" not in error
    with open(run_folder(tmp_path) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    progress = checkpoint.read(run_folder(tmp_path) / "last.pth")["progress"]
    assert [int(row["epoch"]) for row in rows] == list(range(progress["epoch"]))


def test_write_that_fails_leaves_the_old_file(tmp_path):
    """The file size limit of the process makes real writes fail half-way."""
    path = tmp_path / "run.pth"
    network, spec = torch.nn.Linear(100, 100), NetworkSpec("linear", 100, 32)
    checkpoint.save(path, network, spec)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"run\.pth cannot be written .*MB free"):
            checkpoint.save(path, network, spec)
        with pytest.raises(OSError, match=r"text cannot be written"), files.replacing(tmp_path / "text") as temporary:
            temporary.write_text("x" * 30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["run.pth"]


def test_file_whose_folder_is_gone_is_named(tmp_path):
    words = r"gone/text cannot be written .* there is no folder .*gone$"
    with pytest.raises(OSError, match=words), files.replacing(tmp_path / "gone" / "text") as temporary:
        temporary.write_text("x")


def test_disk_that_fills_up_in_a_run(cub_root, tmp_path, capsys):
    """The run ends with an error that names the file, and goes on when there is room."""
    train.main(arguments(cub_root, tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SystemExit) as failed:
            train.main(["--resume", str(folder), "--epochs", "3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert failed.value.code == 1 and ".pth cannot be written" in error and "MB free" in error
    assert resuming.progress(folder / "last.pth")["epoch"] == 1
    train.main(["--resume", str(folder), "--epochs", "3"])
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["0", "1", "2"]
    assert json.loads((folder / "config.json").read_text())["epochs"] == 3


# What is known by its content


def backbone_weights(path, seed):
    torch.manual_seed(seed)
    torch.save(net.create("tiny", None).model.state_dict(), path)
    return path


def test_pretrained_file_is_known_by_its_content(cub_root, tmp_path, capsys):
    weights = backbone_weights(tmp_path / "w.pth", 0)
    settings = {"pretrained": weights, "epochs": 1, "resume": "auto"}
    train.main(arguments(cub_root, tmp_path, **settings))
    weights.rename(tmp_path / "elsewhere.pth")
    capsys.readouterr()
    train.main(arguments(cub_root, tmp_path, **settings | {"pretrained": tmp_path / "elsewhere.pth"}))
    assert "nothing to do" in capsys.readouterr().out
    backbone_weights(weights, 1)
    train.main(arguments(cub_root, tmp_path, **settings))
    assert "Logging to" in capsys.readouterr().out and len(list((tmp_path / "logs_cub").iterdir())) == 2
    first, _ = sorted((tmp_path / "logs_cub").iterdir())
    with pytest.raises(SystemExit, match="1"):
        train.main(["--resume", str(first), "--epochs", "2"])
    assert "pretrained_sha256: other pretrained weights than the run began with" in capsys.readouterr().err


def test_pretrained_file_that_is_replaced_while_it_is_read(cub_root, tmp_path, capsys, monkeypatch):
    """The run would have noted another than it began with."""
    weights, create = tmp_path / "w.pth", net.create
    torch.save(create("tiny", 8).state_dict(), weights)

    def replaced_before(name, size, pretrained=None, *more, **others):
        if pretrained:
            torch.save(create("tiny", 8).state_dict(), weights)
        return create(name, size, pretrained, *more, **others)

    monkeypatch.setattr(net, "create", replaced_before)
    with pytest.raises(SystemExit, match="1"):
        train.main(arguments(cub_root, tmp_path / "logs", pretrained=weights))
    assert f"{weights} was replaced while it was read: start again" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("moment", [2, 14])
def test_run_goes_on_without_the_file_that_it_began_with(cub_root, tmp_path, monkeypatch, moment):
    weights = backbone_weights(tmp_path / "w.pth", 0)
    logs = tmp_path / "one", tmp_path / "two"
    for folder in logs:
        with monkeypatch.context() as patch, suppress(SystemExit):
            if folder == logs[1]:
                stop_at(patch, moment + 3)  # evaluation of the backbone alone comes first
            train.main(arguments(cub_root, folder, pretrained=weights))
    weights.unlink()
    train.main(["--resume", str(run_folder(logs[1]))])
    kills.assert_identical(kills.outcome(logs[1]), kills.outcome(logs[0]))
    assert "pretrained_sha256" in run_folders.read_config(run_folder(logs[1]))


@pytest.mark.parametrize("exchange", ["contents", "names"])
def test_resume_with_other_images_under_the_same_names_is_refused(tmp_path, capsys, exchange):
    trees.cub(tmp_path)
    train.main(arguments(tmp_path, tmp_path / "logs", epochs=1))
    images = sorted((tmp_path / "CUB_200_2011" / "images" / "002.Bird_2").iterdir())
    if exchange == "names":
        aside = images[0].with_suffix(".aside")
        for old, new in ((images[0], aside), (images[1], images[0]), (aside, images[1])):
            old.rename(new)
    else:
        for number, path in enumerate(images):
            trees.write_image(path, 5000 + number)
    with pytest.raises(SystemExit, match="1"):
        train.main(["--resume", str(run_folder(tmp_path / "logs")), "--epochs", "2"])
    assert "files: images of other sizes or times than the run had" in capsys.readouterr().err


def test_images_that_were_moved_with_their_times_are_the_same(tmp_path):
    trees.cub(tmp_path / "here")
    train.main(arguments(tmp_path / "here", tmp_path / "logs", epochs=1))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    folder = run_folder(tmp_path / "logs")
    train.main(["--resume", str(folder), "--epochs", "2", "--data-root", str(tmp_path / "there")])


def test_best_network_that_is_another_or_gone_is_named(cub_root, tmp_path, capsys):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    best = run_folder(tmp_path) / "cub_tiny_best.pth"
    content = checkpoint.read(best)
    torch.save(content | {"threshold": {}}, best)  # the same weights
    train.main(arguments(cub_root, tmp_path, epochs=1, resume="auto"))
    content["model_state_dict"]["model.embedding.bias"] += 1
    torch.save(content, best)
    for words in (f"{best} is not the network that this run has written", f"There is no checkpoint {best}"):
        with pytest.raises(SystemExit, match="1"):
            train.main(arguments(cub_root, tmp_path, epochs=1, resume="auto"))
        assert words in capsys.readouterr().err
        best.unlink(missing_ok=True)


def test_what_the_user_keeps_in_the_folder_of_a_run_stays(cub_root, tmp_path):
    train.main(arguments(cub_root, tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    own = ["last-backup.pth", "last-epoch1.pth", "mynotes.tmp", "copy_best_results.txt"]
    for name in own:
        (folder / name).write_text("mine")
    train.main(arguments(cub_root, tmp_path, epochs=2, resume="auto"))
    assert [(folder / name).read_text() for name in own] == ["mine"] * 4


def test_new_run_takes_no_folder_that_holds_something_else(cub_root, tmp_path):
    wanted = tmp_path / "logs_cub" / "tiny_Proxy_Anchor_embedding8_alpha32_mrg0.1_adamw_lr0.0001_batch4"
    wanted.mkdir(parents=True)
    (wanted / "metrics.csv").write_text("mine")
    train.main(arguments(cub_root, tmp_path, epochs=1))
    assert (wanted / "metrics.csv").read_text() == "mine" and wanted.with_name(f"{wanted.name}_2").exists()


def test_start_that_was_killed_before_its_configuration_leaves_the_folder_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.0123456789abcdef.tmp").write_text("{")
    folder, lock = run_folders.new(tmp_path / "run")
    lock.close()
    assert folder == tmp_path / "run"


def test_run_in_a_folder_of_any_bytes(cub_root, tmp_path, uninterrupted):
    logs = tmp_path / os.fsdecode(b"bad\xff dir")
    train.main(arguments(cub_root, logs, epochs=2))
    train.main(arguments(cub_root, logs, resume="auto"))
    kills.assert_identical(kills.outcome(logs), kills.outcome(uninterrupted))
