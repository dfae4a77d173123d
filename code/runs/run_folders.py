"""The folders of runs: new ones, those to resume, the lock of each, and the files in them."""

import argparse
import csv
import json
import math
import re
from itertools import accumulate
from pathlib import Path

from proxy_anchor import cli, metrics
from proxy_anchor.files import Locked, lock_folder, numbered, printable
from proxy_anchor.spec import CROP
from proxy_anchor.upgrades.flags import OFF

CONFIG, METRICS, CLASSES = "config.json", "metrics.csv", "classes.csv"
BACKBONE = "backbone.json"  # what the backbone alone achieves
LAST, ERROR = "last.pth", "error.txt"
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
    "crop": CROP,
    "fold": None,
    "by": "R@1",
    "freeze": "",
    "frozen": False,
    "embedding_lr": 1.0,
    "eps": None,
    "head": "linear",
    "lr_schedule": "step",
    "sample_proxies": 1.0,
    "proxy_lr": 100.0,
    "loss_args": "",
    "loss_sha256": None,
    "orientation": "stored",
} | OFF
LEGACY_TRANSFER_DEFAULTS = {"head": "orthogonal", "lr_schedule": "cosine"}
ADVICE = "give this run another --remark"  # where another process writes the run


class Finished(Exception):
    """The run to resume has no epochs left."""


def new(path: Path):
    """Create and lock the folder or, if it is not empty, the first of path_2, path_3, ... that is: (folder, lock)."""
    for folder in numbered(path):
        folder.mkdir(parents=True, exist_ok=True)
        # Hidden files are the lock, and leftovers of a killed start.
        if any(not file.name.startswith(".") for file in folder.iterdir()):
            continue
        try:
            held = lock_folder(folder, ADVICE)
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
        folders = runs_of(path, config)
        if not folders and (former := runs_of(path, config | {"orientation": LEGACY_DEFAULTS["orientation"]})):
            raise ValueError(
                f"{former[-1]} was trained on photos as stored, not turned upright by their EXIF: "
                f"--resume {former[-1]} continues it that way; choose another --remark to train with upright photos"
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


def runs_of(path: Path, config: dict) -> list[Path]:
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
    from proxy_anchor.checkpoint import Checkpoint
    from proxy_anchor.runs import resuming

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
    identity = Checkpoint(best).identity
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


def read_metrics(folder: Path) -> tuple[list[dict[str, float]], dict[str, float] | None]:
    """The rows of metrics.csv, one per epoch, and the metrics of the backbone alone, None without any.

    The rows get "elapsed": seconds since the start. Raises FileNotFoundError or ValueError.
    """
    path = folder / METRICS
    try:
        with open(path, newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        first_line, backbone = 2, read_backbone(folder)
        if rows and rows[0].get("epoch") == -1:  # where earlier versions put the backbone alone
            first_line, backbone = 3, rows.pop(0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the metrics.csv of a run: {error}") from error
    if not rows or not {*metrics.NOT_METRICS, "R@1"} <= set(metrics.plain(rows[0])):
        raise ValueError(f"{path} is not the metrics.csv of a run: it has no rows, or other columns")
    for line, row in enumerate(rows, start=first_line):
        usable = row.keys() == rows[0].keys() and all(map(math.isfinite, row.values()))
        if not usable or not 0 <= metrics.plain(row)["R@1"] <= 1:
            raise ValueError(f"{path}, line {line}: expected finite numbers and R@1 from 0 to 1, found {row}")
    for row, elapsed in zip(rows, accumulate(row["seconds"] for row in rows)):
        row["elapsed"] = elapsed
    return rows, backbone


def read_backbone(folder: Path) -> dict[str, float] | None:
    """The metrics of the backbone alone, None without any. Raises ValueError."""
    path = folder / BACKBONE
    if not path.exists():
        return None
    try:
        backbone = {name: float(value) for name, value in json.loads(path.read_text()).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not 0 <= metrics.plain(backbone).get("R@1", -1) <= 1:
        raise ValueError(f"{path} is damaged: expected R@1 from 0 to 1, found {backbone}")
    return backbone


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, recipe_of) -> argparse.Namespace:
    """Parse the command line of a training; defaults come from the dataset's recipe, or from the run to resume.

    recipe_of(arguments) -> {argument: default}, of which the parser may lack some. args.recipe lists the defaults of
    the recipe that are in use.
    """
    args = parser.parse_args(argv)
    if args.resume in (None, "auto"):
        recipe = {name: value for name, value in recipe_of(args).items() if name in args}
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
