"""The folders of runs: a new one for a new run, the old one to resume a run; one process at a time writes to it."""

import json
import os
import re
import socket
from pathlib import Path

from proxy_anchor import checkpoint, metrics
from proxy_anchor.files import hold
from proxy_anchor.runs import resuming

CONFIG, CLASSES, LAST, LOCK = "config.json", "classes.csv", "last.pth", ".lock"
# Entries of the configuration that are not part of the experiment.
SURROUNDINGS = ("device", "processes", "recipe", "versions", "commit", "wandb_id")
# Arguments that do not change the experiment, so that a run may be resumed with others.
MAY_CHANGE = (
    "epochs",
    "workers",
    "gpu_id",
    "data_root",
    "source_ckpt",
    "LOG_DIR",
    "cache",
    "compile",
    "wandb",
    "resume",
    "debug",
    "skip_baseline",
)
# What was so in runs that do not tell it.
FORMER = {
    "crop": checkpoint.FORMER_CROP,
    "fold": None,
    "by": "R@1",
    "freeze": "",
    "embedding_lr": 1.0,
    "eps": None,
    "head": "linear",
    "lr_schedule": "step",
    "sample_proxies": 1.0,
    "loss_args": "",
    "loss_sha256": None,
    "orientation": checkpoint.FORMER_ORIENTATION,
}
FORMER_TRANSFER = {"head": "orthogonal", "lr_schedule": "cosine"}


class Locked(RuntimeError):
    """A run that another process is writing."""


class Finished(Exception):
    """A run to resume that has no epochs left."""


def lock(folder: Path, instead: str = "give this run another --remark"):
    """Hold the folder until the returned file is closed, or this process ends however it ends; raises Locked.

    instead: what else to do where another process holds it.
    """
    try:
        file = hold(folder / LOCK, wait=False)
    except BlockingIOError:
        holder = (folder / LOCK).read_text().strip() or "another process"
        raise Locked(f"{folder} is being written by {holder}; end that first, or {instead}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def numbered(path: Path):
    """path, path_2, path_3, ..."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}_{number}")
        number += 1


def new(path: Path):
    """Create the folder or, where it holds anything, the first of path_2, path_3, ... that is empty: (folder, lock)."""
    for folder in numbered(path):
        folder.mkdir(parents=True, exist_ok=True)
        if any(not file.name.startswith(".") for file in folder.iterdir()):  # the lock, what a killed start has left
            continue
        try:
            held = lock(folder)
        except Locked:
            continue
        if not (folder / CONFIG).exists():  # another may have come first
            return folder, held
        held.close()


def place(log_dir: Path, dataset: str, name: str) -> Path:
    """The folder of a run of this name."""
    return log_dir / f"logs_{dataset}" / name


def to_resume(name: str, config: dict) -> Path | None:
    """The folder of the run that the configuration's --resume means, if any.

    For "auto" it is the latest of the folders of this name, name_2, ... that holds a run of this configuration,
    unfinished ones first. Raises Finished where it has no epochs left, and ValueError where the run of --resume is
    another experiment, or the only run that "auto" might mean is one of before photos were turned upright.
    """
    resume, path = config["resume"], place(Path(config["LOG_DIR"]), config["dataset"], name)
    if resume is None:
        return None
    if resume == "auto":
        folders = of_experiment(path, config)
        if not folders and (former := of_experiment(path, config | {"orientation": FORMER["orientation"]})):
            raise ValueError(
                f"{former[-1]} has its photos as stored, not turned by their EXIF: --resume {former[-1]} continues it "
                "so; choose another --remark to train with upright photos"
            )
    elif different := differences(read_config(Path(resume)), config):
        raise ValueError(f"{resume} is another experiment ({'; '.join(different)}); start a new one")
    else:
        folders = [Path(resume)]
    for folder in reversed(folders):
        if not is_finished(folder, config["epochs"]):
            return folder
    if folders:
        raise Finished(
            f"{folders[-1]} has finished (epochs: {config['epochs']}): nothing to do. "
            "To continue it, raise --epochs; to train again, leave out --resume"
        )
    return None


def existing(path: Path) -> list[Path]:
    """Those of path, path_2, path_3, ... that exist, in this order."""
    pattern = re.compile(re.escape(path.name) + r"(?:_(\d+))?")
    found = [(int(match[1] or 1), other) for other in path.parent.glob("*") if (match := pattern.fullmatch(other.name))]
    return [folder for _, folder in sorted(found) if folder.is_dir()]


def of_experiment(path: Path, config: dict) -> list[Path]:
    """Those of path, path_2, path_3, ... that hold a run of this configuration, in this order."""
    return [
        folder
        for folder in existing(path)
        if (folder / CONFIG).exists() and not differences(read_config(folder), config)
    ]


def is_finished(folder: Path, epochs: int) -> bool:
    """Whether a run has done these epochs and saved its best network, before which it may have been killed.

    Raises FileNotFoundError if it has results, but no last.pth or no longer its best network, and ValueError if that
    is another one.
    """
    if not (folder / LAST).exists():
        if saved := sorted(folder.glob("*_best.pth")):  # which is written after it
            raise FileNotFoundError(
                f"{folder} has {saved[0].name}, but no {LAST} to continue from; to train again, leave out --resume"
            )
        return False
    progress = resuming.progress(folder / LAST)
    if progress["epoch"] < epochs:
        return False
    config = FORMER | read_config(folder)
    epoch = metrics.best(progress["rows"], config["by"])["epoch"]
    best = folder / f"{config['dataset']}_{config['model']}_best.pth"
    results = best.with_name(f"{best.stem}_results.txt")
    if not results.exists() or not results.read_text().startswith(f"Best Epoch: {epoch}\n"):
        return False
    identity = checkpoint.Checkpoint(best).identity
    if progress.get("best", identity) != identity:
        raise ValueError(f"{best} is not the network that this run has written; to train again, leave out --resume")
    return True


def folder(path: str) -> Path:
    """The folder of a run, which may be named by a file in it; a path to nothing stays what it is."""
    return Path(path).parent if Path(path).is_file() else Path(path)


def read_config(folder: Path) -> dict:
    """The configuration of a run. Raises FileNotFoundError or ValueError if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"There is no run to resume in {folder}: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a run")
    return config


def upright(resume: str | None) -> bool | None:
    """Whether the run of --resume has its images upright, as it then continues; None where it does not say a run."""
    if resume in (None, "auto"):
        return None
    return (FORMER | read_config(Path(resume)))["orientation"] == "upright"


def differences(old: dict, new: dict) -> list[str]:
    """What makes two configurations different experiments: 'name: old, now new' for each."""
    old = FORMER | (FORMER_TRANSFER if "teacher" in old else {}) | old
    new = json.loads(json.dumps(new))  # as it would be read back
    for config in (old, new):
        if "loss" in config:  # the path of a file may change: its content is compared
            config["loss"] = str(config["loss"]).rpartition(":")[2]
    compared = [name for name in new if name in old and name not in (*MAY_CHANGE, *SURROUNDINGS)]
    if "pretrained_sha256" in compared:  # a file is known by its content, wherever it is
        compared.remove("pretrained")
    words = {
        "data": "other images or classes than the run had",
        "files": "images of other sizes or times than the run had; where they were copied, copy the times too",
        "pretrained_sha256": "other pretrained weights than the run began with",
        "loss_sha256": "the file of the loss has changed since the run began",
        "teacher": "another one, or known by its file to an earlier version",
    }  # instead of digests
    return [f"{n}: {words.get(n) or f'{old[n]}, now {new[n]}'}" for n in compared if old[n] != new[n]]
