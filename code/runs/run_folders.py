"""The folders of runs: new ones, those to resume, and a lock that lets one process at a time write to each."""

import argparse
import json
import re
from pathlib import Path

from proxy_anchor import checkpoint, cli, metrics
from proxy_anchor.files import Locked, lock_folder, numbered, printable
from proxy_anchor.runs import resuming

CONFIG, CLASSES, LAST, ERROR = "config.json", "classes.csv", "last.pth", "error.txt"
# Entries of config.json that describe the machine or the code, not the experiment.
NOT_CONFIG = ("device", "processes", "recipe", "versions", "commit", "wandb_id")
# Arguments that do not change the experiment: a run may be resumed with other values.
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
)
# Defaults for settings that older runs did not record.
LEGACY_DEFAULTS = {
    "crop": 0.875,
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
    "orientation": "stored",
}
LEGACY_TRANSFER_DEFAULTS = {"head": "orthogonal", "lr_schedule": "cosine"}


class Finished(Exception):
    """The run to resume has no epochs left."""


def new(path: Path):
    """Create and lock the folder or, if it is not empty, the first of path_2, path_3, ... that is: (folder, lock)."""
    for folder in numbered(path):
        folder.mkdir(parents=True, exist_ok=True)
        if any(
            not file.name.startswith(".") for file in folder.iterdir()
        ):  # hidden: the lock, and leftovers of a killed start
            continue
        try:
            held = lock_folder(folder)
        except Locked:
            continue
        if not (folder / CONFIG).exists():  # another may have come first
            return folder, held
        held.close()


def run_dir(log_dir: Path, dataset: str, name: str) -> Path:
    """The folder of a run of this name."""
    return log_dir / f"logs_{dataset}" / name


def to_resume(name: str, config: dict) -> Path | None:
    """The folder of the run to continue, as the configuration's "resume" says; None for a new run.

    "auto" means the latest of the folders name, name_2, ... with a run of this configuration, unfinished runs first.
    Raises Finished if the run has no epochs left, and ValueError if it is another experiment, or if "auto" finds only a
    run of an earlier version, which did not turn photos upright.
    """
    resume, path = config["resume"], run_dir(Path(config["LOG_DIR"]), config["dataset"], name)
    if resume is None:
        return None
    if resume == "auto":
        folders = of_experiment(path, config)
        if not folders and (former := of_experiment(path, config | {"orientation": LEGACY_DEFAULTS["orientation"]})):
            raise ValueError(
                f"{former[-1]} was trained on photos as stored, without EXIF rotation: continue it with --resume "
                f"{former[-1]}, or choose another --remark to train on upright photos"
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
    """The folders among path, path_2, path_3, ... that exist, in this order."""
    pattern = re.compile(re.escape(path.name) + r"(?:_(\d+))?")
    numbers = {other: int(match[1] or 1) for other in path.parent.glob("*") if (match := pattern.fullmatch(other.name))}
    return [folder for folder in sorted(numbers, key=numbers.__getitem__) if folder.is_dir()]


def of_experiment(path: Path, config: dict) -> list[Path]:
    """The folders among path, path_2, path_3, ... that hold a run of this configuration, in this order."""
    return [
        folder
        for folder in existing(path)
        if (folder / CONFIG).exists() and not differences(read_config(folder), config)
    ]


def is_finished(folder: Path, epochs: int) -> bool:
    """Whether a run has done these epochs and saved its best network, which it does last.

    Raises FileNotFoundError if it has results but no last.pth, or has lost its best network, and ValueError if that was
    replaced.
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
    config = LEGACY_DEFAULTS | read_config(folder)
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
    """The folder of a run, given itself or a file in it."""
    return Path(path).parent if Path(path).is_file() else Path(path)


def read_config(folder: Path) -> dict:
    """The content of config.json. Raises FileNotFoundError or ValueError if there is none."""
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


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, recipe_of) -> argparse.Namespace:
    """Parse the command line of a training; defaults come from the dataset's recipe, or from the run to resume.

    recipe_of(name of a dataset) -> {argument: default}, of which the parser may lack some. args.recipe lists the
    defaults of the recipe that are in use.
    """
    args = parser.parse_args(argv)
    if args.resume in (None, "auto"):
        recipe = {name: value for name, value in recipe_of(args.dataset).items() if name in args}
        parser.set_defaults(**recipe)
        args = parser.parse_args(argv)
        used = [f"--{name.replace('_', '-')} {value}" for name, value in recipe.items() if getattr(args, name) == value]
        args.recipe = " ".join(used)
        return args
    try:
        path = folder(args.resume)
        config = read_config(path)
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {error}")
    cli.set_recorded(parser, config, path / CONFIG)
    args = parser.parse_args(argv)  # arguments that are not given stay as they were
    args.resume, args.recipe = str(path), printable(str(config.get("recipe", "")))
    return args


def upright(resume: str | None) -> bool | None:
    """Whether the run to resume turns its images upright; None unless --resume names a run."""
    if resume in (None, "auto"):
        return None
    return (LEGACY_DEFAULTS | read_config(Path(resume)))["orientation"] == "upright"


def differences(old: dict, new: dict) -> list[str]:
    """What makes two configurations different experiments: 'name: old, now new' for each."""
    old = LEGACY_DEFAULTS | (LEGACY_TRANSFER_DEFAULTS if "teacher" in old else {}) | old
    new = json.loads(json.dumps(new))  # as it would be read back
    for config in (old, new):
        if "loss" in config:  # the path of a file may change: its content is compared
            config["loss"] = str(config["loss"]).rpartition(":")[2]
    compared = [name for name in new if name in old and name not in (*MAY_CHANGE, *NOT_CONFIG)]
    if "pretrained_sha256" in compared:  # a file is known by its content, wherever it is
        compared.remove("pretrained")
    words = {
        "data": "other images or classes than the run had",
        "files": "images of other sizes or times than the run had; where they were copied, copy the times too",
        "pretrained_sha256": "other pretrained weights than the run began with",
        "loss_sha256": "the file of the loss has changed since the run began",
        "teacher": "a different teacher, or one recorded by file path in an older version",
    }  # instead of digests
    return [f"{n}: {words.get(n) or f'{old[n]}, now {new[n]}'}" for n in compared if old[n] != new[n]]
