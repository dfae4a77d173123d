"""Choose the number of epochs on held-out training classes, train on all of them for that many, and test once."""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import dataset
import evaluate
import net
import train
from proxy_anchor import cli, figures, hardware
from proxy_anchor.files import numbered, replacing
from proxy_anchor.runs import child, logbook, run_folders, selection
from proxy_anchor.runs.stopping import Interrupted
from proxy_anchor.upgrades.flags import OFF

EXAMPLES = """examples:
  as ProxyNCA++: the second half of the training classes chooses the epoch; flags after -- are those of train.py:
    python protocol.py --seeds 1 2 3 -- --dataset cub --model bn_inception --batch-size 180
  as A Metric Learning Reality Check: four folds; the four networks are also tested, one by one and together:
    python protocol.py --seeds 1 2 3 --folds 4 -- --dataset cub --model bn_inception --batch-size 180
"""
RESULTS = "results.json"
LONGEST_NAME = 255 - len("_999")  # in bytes, of a folder; those of repeated runs have a number behind it
DECIDED = {  # flags of train.py, and what to do instead
    "--seed": "pass --seeds before it",
    "--fold": "pass --folds before it",
    "--by": "pass it before",
    "--resume": "it is always auto",
}
# The arguments of train.py that evaluate.py needs too, because checkpoints do not record them.
EVALUATION = (
    "dataset",
    "data_root",
    "test_classes",
    "allow_partial",
    "skip_bad_images",
    "batch_size",
    "workers",
    "amp",
)


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        usage="protocol.py [--flag value ...] -- [flags of train.py]",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=cli.HelpFormatter,
    )
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--seeds",
        default=[1, 2, 3],
        type=cli.integer(0),
        nargs="+",
        metavar="S",
        help="seeds to train with, one result each (default: 1 2 3)",
    )
    group.add_argument(
        "--folds",
        default="2",
        type=folds,
        metavar="N",
        help="2: hold out the second half of the training classes; a larger N: each of N parts in turn; val: the split "
        "val of your CSV file",
    )
    group.add_argument(
        "--by",
        default="MAP@R",
        **cli.one_of("R@1", "MAP@R"),
        help="metric that chooses the epoch, on the held-out classes",
    )
    group.add_argument(
        "--out",
        type=cli.path,
        metavar="DIR",
        help="folder for the results (default: protocol_DATASET in the folder of the runs)",
    )
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.flags, args.command = argv[end + 1 :], shlex.join(["python", "protocol.py", *argv])
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("argument --seeds: expected different numbers")
    for flag in args.flags:
        if (name := flag.partition("=")[0]) in DECIDED:
            parser.error(f"{name} cannot come after the --: {DECIDED[name]}")
    args.training = train.parse(args.flags)
    if args.training.lr_schedule == "cosine":
        parser.error("--lr-schedule cosine depends on --epochs, which this script chooses")
    if args.training.test_classes == dataset.folder.NONE:
        parser.error("--test-classes none leaves no class to test on, and this script is for the test")
    if args.training.epochs < 1:
        parser.error("argument --epochs: expected at least 1, found 0")
    # Else the longest name, that of the last training, would be the first to fail.
    longest = train.run_name(train.parse(on_all(args, max(args.seeds), args.training.epochs).argv))
    if (length := len(os.fsencode(longest))) > LONGEST_NAME:
        parser.error(
            f"argument --remark: the name of a run's folder would have {length} bytes; it can have {LONGEST_NAME}"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("start protocol.py without torchrun, and give --gpu-id -1 after -- for all GPUs")
    if (tasks := hardware.srun_tasks()) > 1:
        parser.error(
            f"srun started {tasks} tasks that would each do the same work: start one, and give --gpu-id -1 after -- "
            "for all GPUs of its machine"
        )
    return args


def folds(text: str) -> str:
    """The type of --folds. Raises ArgumentTypeError."""
    if not re.fullmatch(r"val|[2-9]|[1-9][0-9]{1,8}", text):
        raise argparse.ArgumentTypeError(f"expected 2, 4 or another number of parts, or val, found '{text}'")
    return text


class Training(NamedTuple):
    """A run of train.py: in words, its flags, and its epochs."""

    what: str
    argv: list[str]
    epochs: int

    @property
    def length(self) -> str:
        return "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"

    def folder(self) -> Path:
        """The folder of the run. Raises FileNotFoundError if it has not run."""
        args = train.parse(self.argv)
        path = run_folders.run_dir(Path(args.LOG_DIR), args.dataset, train.run_name(args))
        config = vars(args) | args.spec.to_record() | net.identity(args.pretrained)
        del config["spec"], config["orientation"]  # the latter depends on the data, which is not opened here
        if folders := run_folders.runs_of(path, config):
            return folders[-1]
        raise FileNotFoundError(f"There is no run {path}")

    def rows(self) -> list[dict[str, float]]:
        """The rows of its metrics.csv, one per epoch. Raises ValueError if their number is not that of the epochs."""
        rows, _ = run_folders.read_metrics(self.folder())
        if len(rows) != self.epochs:
            raise ValueError(
                f"{self.folder()} has {len(rows)} epochs, expected {self.epochs}: choose another --remark or --epochs"
            )
        return rows


def on_fold(args: argparse.Namespace, seed: int, fold: str) -> Training:
    flags = [*args.flags, "--seed", str(seed), "--fold", fold, "--by", args.by, "--resume", "auto"]
    return Training(f"seed {seed}, without fold {fold}", flags, args.training.epochs)


def on_all(args: argparse.Namespace, seed: int, epochs: int) -> Training:
    """On all training classes. The remark keeps it apart from runs of another length."""
    remark = f"{args.training.remark}_retrained{epochs}"
    flags = [*args.flags, "--seed", str(seed), "--epochs", str(epochs), f"--remark={remark}", "--resume", "auto"]
    return Training(f"seed {seed}, on all training classes", flags, epochs)


class Series:
    """Trainings one after another, with a line before each: which of how many, and the time left."""

    def __init__(self, total: int, epochs: int):
        self.total, self.epochs = total, epochs
        self.done: list[dict] = []  # rows
        self.number = 0

    def run(self, training: Training) -> list[dict[str, float]]:
        """Run a training and return its rows; if it fails, exit with its status."""
        self.number += 1
        left = ""
        if self.done:
            epochs = training.epochs + (self.total - self.number) * self.epochs
            seconds = epochs * fmean(row["seconds"] for row in self.done)
            unit, name = figures.time_axis(seconds)
            left = f"; at most about {seconds / unit:.0f} {name} left"
        print(f"Training {self.number} of {self.total}: {training.what}, {training.length}{left}", flush=True)
        if status := child.run([sys.executable, train.__file__, *training.argv]):
            sys.exit(status)  # the training has printed why
        rows = training.rows()
        self.done += rows
        return rows


def evaluate_folds(args: argparse.Namespace, trainings: list[Training]) -> dict[str, dict[str, float]]:
    """The test results of the folds' best networks: the mean of one by one, and together."""
    given = vars(args.training)
    flags = [f"--gpu-id={max(0, given['gpu_id'])}"]  # one process is enough
    for name in EVALUATION:
        flag, value = f"--{name.replace('_', '-')}", given[name]
        if value is not None and value is not False:
            flags.append(flag if value is True else f"{flag}={value}")
    name = f"{given['dataset']}_{given['model']}_best.pth"
    rows = evaluate.main([*flags, "--resume", *(str(training.folder() / name) for training in trainings)])
    return {"folds_one_by_one": rows["mean"], "folds_together": rows["together"]}


def settings(args: argparse.Namespace) -> dict:
    """The settings that the results depend on, besides the seeds."""
    decided = (*run_folders.NOT_CONFIG, *run_folders.MAY_CHANGE, "spec", "seed", "fold", "by")
    given = {name: value for name, value in vars(args.training).items() if name not in decided}
    given |= net.identity(args.training.pretrained)
    return given | {"epochs": args.training.epochs, "folds": args.folds, "by": args.by}


def open_folder(args: argparse.Namespace) -> Path:
    """The folder of the results: the first of path, path_2, ... that has none of other settings."""
    given = args.training
    name = train.run_name(argparse.Namespace(**vars(given) | {"seed": 1}))  # which is not in the name
    path = Path(args.out or Path(given.LOG_DIR) / f"protocol_{given.dataset}" / f"{name}_folds{args.folds}")
    folder = next(folder for folder in numbered(path) if settings_in(folder) in (None, settings(args)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def settings_in(folder: Path) -> dict | None:
    """The settings of the results in a folder; None if it has none. Raises ValueError for files of another kind."""
    path = folder / RESULTS
    if os.path.lexists(folder) and not folder.is_dir():  # a file, or a link to nothing
        raise ValueError(f"{folder} is a file: --out must be a folder, existing or new")
    if folder.is_dir() and not path.exists() and not all(file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(f"{folder} is neither empty nor a folder of protocol.py's results: choose another --out")
    try:
        # What older results do not record.
        names = ("loss_args", "loss_sha256", "frozen", "proxy_lr", *OFF)
        older = {name: run_folders.LEGACY_DEFAULTS[name] for name in names}
        return older | json.loads(path.read_text())["settings"] if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not one of protocol.py: {error}; choose another --out") from error


def count_of(folds: str) -> int:
    """The number of trainings with a fold held out: of two halves one, as ProxyNCA++."""
    return 1 if folds in ("2", "val") else int(folds)


def trainings_on_folds(args: argparse.Namespace, seed: int) -> Iterator[Training]:
    """One at a time: train.py may find that the classes cannot be divided into this many folds."""
    for part in range(1, count_of(args.folds) + 1):
        fold = {"2": "2/2", "val": "val"}.get(args.folds, f"{part}/{args.folds}")
        yield on_fold(args, seed, fold)


def protocol(args: argparse.Namespace) -> None:
    folder, given = open_folder(args), args.training
    series = Series(len(args.seeds) * (count_of(args.folds) + 1), given.epochs)

    # Everything is chosen before the test set is first looked at.
    chosen = {
        seed: selection.choose([series.run(training) for training in trainings_on_folds(args, seed)], args.by)
        for seed in args.seeds
    }

    results = []
    for seed, (epochs, validation) in chosen.items():
        retrained = on_all(args, seed, epochs)
        result = selection.result_of(seed, epochs, validation, series.run(retrained))
        on_folds = list(trainings_on_folds(args, seed))
        if len(on_folds) > 1:
            result |= evaluate_folds(args, on_folds)
        places = [os.path.relpath(training.folder(), given.LOG_DIR) for training in (*on_folds, retrained)]
        results.append(result | {"runs": places})

    content = {
        "command": args.command,
        "settings": settings(args),
        "versions": logbook.versions(),
        "seeds": results,
        "over_seeds": selection.over_seeds(results),
        "seconds": round(sum(row["seconds"] for row in series.done), 2),
    }
    text = selection.report(content)
    for name, written in {RESULTS: json.dumps(content, indent=2) + "\n", "results.md": text}.items():
        with replacing(folder / name) as path:
            path.write_text(written, encoding="utf-8", errors="backslashreplace")  # file names may be of any bytes
    selection.draw(content, folder / "results.png")
    print(f"{text}\nThe results are in {folder}")


def main(argv=None):
    args = parse(argv)
    with cli.errors_in_one_line("protocol.py"), cli.output_may_close():
        try:
            protocol(args)
        except Interrupted as interruption:
            print(f"protocol.py: {interruption}; the same command continues from here", file=sys.stderr)
            sys.exit(128 + interruption.signum)


if __name__ == "__main__":
    main()
