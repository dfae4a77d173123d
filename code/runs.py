"""The folders of runs: a new one for a new run, the one of an interrupted run to go on with, one process at a time."""

import fcntl
import json
import os
import socket
from pathlib import Path

from proxy_anchor import checkpoint

CONFIG, LAST, LOCK = "config.json", "last.pth", ".lock"
RECORDS = ("device", "processes", "sizes", "versions", "wandb_id")  # in the configuration beside the arguments
# Arguments that do not change the experiment, so that a run may go on with others.
FREE = ("epochs", "workers", "gpu_id", "data_root", "LOG_DIR", "cache", "compile", "wandb", "resume", "debug")


class Locked(RuntimeError):
    """A run that another process is writing."""


def lock(folder: Path):
    """Hold the folder until the returned file is closed, or this process ends however it ends; raises Locked."""
    file = open(folder / LOCK, "a+")  # noqa: SIM115 (it stays open: closing it gives the lock up)
    os.register_at_fork(after_in_child=file.close)  # workers may outlive a killed process, and would hold it too
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise Locked(
            f"{folder} is being written by {holder}; end that first, or give this run another --remark"
        ) from None
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
    """Create the folder or, where it holds a run, the first of path_2, path_3, ... that holds none: (folder, lock)."""
    for folder in numbered(path):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG).exists():
            continue
        try:
            held = lock(folder)
        except Locked:
            continue
        if not (folder / CONFIG).exists():  # another may have come first
            return folder, held
        held.close()


def unfinished(path: Path, config: dict) -> Path | None:
    """The latest of path, path_2, ... that holds a run of this configuration with epochs to go, if there is one."""
    found = None
    for folder in numbered(path):
        if not folder.exists():
            return found
        if (folder / CONFIG).exists() and not differences(read_config(folder), config):
            last = folder / LAST
            if not last.exists() or checkpoint.epochs_done(last) < config["epochs"]:
                found = folder


def folder(path: str) -> Path:
    """The folder of a run, which may be named by a file in it."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def read_config(folder: Path) -> dict:
    """The configuration of a run. Raises FileNotFoundError or ValueError where there is none."""
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


def arguments(path: str) -> dict:
    """What a run that is to go on was told on its command line. Raises as read_config does."""
    config = read_config(Path(path))
    return {name: value for name, value in config.items() if name not in (*RECORDS, "resume", "debug")}


def differences(old: dict, new: dict) -> list[str]:
    """What makes two configurations different experiments: 'name: old, now new' for each."""
    new = json.loads(json.dumps(new))  # as it would be read back
    compared = [name for name in new if name in old and name not in (*FREE, "device", "processes", "versions")]
    return [f"{name}: {old[name]}, now {new[name]}" for name in compared if old[name] != new[name]]
