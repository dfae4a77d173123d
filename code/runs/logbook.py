"""The record of a run: its folder, metrics.csv, config.json and checkpoints, its line per epoch in the terminal."""

from __future__ import annotations

import argparse
import csv
import json
import netrc
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from proxy_anchor import cli, figures, metrics
from proxy_anchor.files import lock_folder, printable, replacing
from proxy_anchor.runs import run_folders
from proxy_anchor.runs.stopping import Interrupted
from proxy_anchor.spec import NetworkSpec

if TYPE_CHECKING:
    from proxy_anchor.evaluation import Result

BACKBONE = "backbone alone"  # as people read it
SHOWN = 3  # metrics after each epoch: what fits into 80 characters
LOG_DIR = Path(__file__).resolve().parents[2] / "logs"
LONGEST_REASON = 200  # characters of an error of wandb
WANDB_VARIABLES = {  # the user's variables override these settings; wandb reads its other variables itself
    "project": "WANDB_PROJECT",
    "notes": "WANDB_NOTES",
    "dir": "WANDB_DIR",
    "id": "WANDB_RUN_ID",
    "resume": "WANDB_RESUME",
}
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "matplotlib", "pytorch-metric-learning")


def options() -> argparse.ArgumentParser:
    """Command-line flags of the record."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("run folder and logging")
    group.add_argument(
        "--LOG_DIR",
        default=str(LOG_DIR),
        type=cli.path,
        metavar="DIR",
        help="folder for the run folders (default: logs/ in this repository)",
    )
    group.add_argument(
        "--resume",
        type=cli.path,
        metavar="auto|PATH",
        help="continue an interrupted run: its folder, or auto for the unfinished run of this command, if any",
    )
    group.add_argument(
        "--remark", default="", type=cli.name_part, help="text at the end of the run folder's name, to tell runs apart"
    )
    group.add_argument(
        "--wandb",
        **cli.one_of("online", "offline", "disabled"),
        help="mode of Weights & Biases; without this flag, online if there are credentials",
    )
    return parser


def run_name(*, model, loss, embedding_size, settings, optimizer, lr, batch_size, seed, remark, fold=None) -> str:
    """The published folder name of a run, with the fold and a seed other than 1; settings: those of the loss."""
    settings = f"{settings}_" if settings else ""
    name = f"{model}_{loss}_embedding{embedding_size}_{settings}{optimizer}_lr{lr}_batch{batch_size}{remark}"
    return name + (f"_fold{fold.replace('/', 'of')}" if fold else "") + ("" if seed == 1 else f"_seed{seed}")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """The git commit of this code, with -dirty if files differ from it; None if it is unknown."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # the folder may be inside another project's repository
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with suppress(FileNotFoundError):  # without git
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None
    return None


def open_logbook(name: str, config: dict, resume: Path | None) -> Logbook:
    """The Logbook of a run in the first process, and a NullLogbook in the others.

    name: of a new run's folder. resume: the folder of a run to continue, see run_folders.to_resume. Raises as Logbook
    does.
    """
    from proxy_anchor import collectives

    log = Logbook(name, config, resume) if collectives.rank() == 0 else NullLogbook(config)
    log.folder, log.resumes = collectives.from_rank_zero(lambda: (log.folder, log.resumes))
    return log


class Logbook:
    """Writes what a run does into a folder of its own, {LOG_DIR}/logs_{dataset}/{name}, to wandb and to the terminal.

    The files are whole at any moment: metrics.csv (a row per epoch), backbone.json, classes.csv, config.json,
    {dataset}_{model}_best_results.txt, checkpoints. curves.png is drawn when the run ends or stops. folder: of the run;
    resumes: whether it continues from the last.pth that is there. As a context, it ends with the run.
    config: what config.json records. resume: None for a new run, or the folder of one, see run_folders.to_resume.
    Raises files.Locked if another process writes the run.
    """

    def __init__(self, name: str, config: dict, resume: Path | None = None):
        log_dir, dataset, model = Path(config["LOG_DIR"]), config["dataset"], config["model"]
        self.prefix, self.title = f"{dataset}_{model}", f"{dataset}, {model}"
        self.spec = NetworkSpec.from_record(config)
        wanted = run_folders.run_dir(log_dir, dataset, name)
        old = {}
        if resume is not None:
            self.folder, self.lock = resume, lock_folder(resume, run_folders.ADVICE)
            old = run_folders.read_config(resume)
            if (then := old.get("versions")) != (now := versions()):
                print(f"The run was written with {then}, and continues with {now}: rounding may differ.")
        # Before anything is written, because it may fail.
        self.wandb = start_wandb(config["wandb"], log_dir, f"{dataset}_ProxyAnchor", name, config, old.get("wandb_id"))
        if resume is None:
            self.folder, self.lock = run_folders.new(wanted)
            other = "" if self.folder == wanted else f": {wanted.name} holds an earlier run."
            print(printable(f"Logging to {self.folder}{other}"))
        (self.folder / run_folders.ERROR).unlink(missing_ok=True)  # of the run that is continued
        self.resumes = (self.folder / run_folders.LAST).exists()
        began_with = {name: old[name] for name in old if name == "pretrained_sha256"}  # the file may be gone by now
        config = (
            began_with
            | config
            | {
                "versions": versions(),
                "commit": commit(),
                "wandb_id": self.wandb.id if self.wandb else old.get("wandb_id"),
            }
        )
        self._write(run_folders.CONFIG, json.dumps(config, indent=2) + "\n")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        ends_or_stops = error[0] is None or issubclass(error[0], Interrupted)
        try:
            if ends_or_stops and (self.folder / run_folders.METRICS).exists():
                figures.draw_run(*run_folders.read_metrics(self.folder), self.folder / "curves.png", self.title)
        finally:  # whatever happens to the picture
            if self.wandb:
                self.wandb.finish(exit_code=int(error[0] is not None))
            self.lock.close()

    def resume(self, progress: dict) -> None:
        """Print where the run continues, and cut metrics.csv to that point."""
        print(f"Resuming {printable(str(self.folder))} at epoch {progress['epoch']}, step {len(progress['losses'])}")
        if backbone := progress.pop("backbone", None):  # an earlier version kept it there
            self.write_backbone(backbone)
        if progress["rows"]:  # the file may have one more, of an epoch that was not saved
            self._write_rows(run_folders.METRICS, progress["rows"])

    def log_backbone(self, row: dict) -> None:
        """Write the metrics of the backbone alone to backbone.json and print them, shortened; they are in 0..1."""
        self.write_backbone(row)
        print(f"{BACKBONE}  {shortened(row)}", flush=True)
        if self.wandb:
            self.wandb.summary.update({f"{BACKBONE}/{name}": value for name, value in row.items()})

    def write_backbone(self, row: dict) -> None:
        self._write(run_folders.BACKBONE, json.dumps(row, indent=2) + "\n")

    def log_epoch(self, rows: list[dict]) -> None:
        """Write the rows of all epochs to metrics.csv and print the last, shortened; metrics are in 0..1."""
        row = rows[-1]
        print(
            f"epoch {row['epoch']:>2}  loss {row['loss']:.5g}  lr {row['lr']:g}  {row['seconds']:.0f} s  "
            f"{shortened(metrics.metrics_only(row))}",
            flush=True,
        )
        self._write_rows(run_folders.METRICS, rows)
        if self.wandb:
            self.wandb.log({"loss": row["loss"]} | metrics.metrics_only(row), step=row["epoch"])

    def save_classes(self, epoch: int, classes: list[dict]) -> None:
        """Write the hits of each class in the best epoch so far, see evaluation.Result.by_class."""
        self._write_rows(run_folders.CLASSES, [{"epoch": epoch} | row for row in classes])

    def save_best(self, row: dict, network) -> None:
        """Write the network of the best epoch so far as a checkpoint, and its Recall@K as the published text file."""
        from proxy_anchor import checkpoint

        checkpoint.save(self.folder / f"{self.prefix}_best.pth", network, self.spec)
        prefix, row = metrics.prefix(row), metrics.plain(row)
        recalls = {name.removeprefix("R@"): value for name, value in row.items() if name.startswith("R@")}
        lines = [
            f"Best Epoch: {row['epoch']}",
            *(f"Best {prefix}Recall@{k}: {100 * r:.4f}" for k, r in recalls.items()),
        ]
        self._write(f"{self.prefix}_best_results.txt", "\n".join(lines) + "\n")

    def save_last(self, network, parts: dict, progress: dict) -> None:
        """Write last.pth, which a run resumes from; each process writes its shard of the proxies."""
        from proxy_anchor.runs import resuming

        resuming.save(self.folder / run_folders.LAST, network, self.spec, parts, progress)

    def _write_rows(self, name, rows):
        with replacing(self.folder / name) as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[-1])
            writer.writeheader()
            writer.writerows(rows)

    def _write(self, name, text):
        with replacing(self.folder / name) as path:
            path.write_text(text)


class NullLogbook(Logbook):
    """The Logbook of all processes but the first: it writes only the process's shard of last.pth."""

    def __init__(self, config: dict):
        self.spec = NetworkSpec.from_record(config)

    def __exit__(self, *error):
        pass

    def resume(self, progress):
        pass

    def log_backbone(self, row):
        pass

    def log_epoch(self, rows):
        pass

    def save_classes(self, epoch, classes):
        pass

    def save_best(self, row, network):
        pass


def shortened(row: dict[str, float]) -> str:
    """The first of the metrics, in percent."""
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in list(row.items())[:SHOWN])


def untrained(result: Result) -> str:
    """The results of a network before training, as lines."""
    return metrics.table({"untrained": result.metrics}) + "\n" + result.remark()


def has_credentials() -> bool:
    """Whether wandb would find an API key or a token, in the environment or the netrc file, without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # ValueError: no URL, or not UTF-8
        return False


def start_wandb(
    mode: str | None, log_dir: Path, project: str, name: str, config: dict, run_id: str | None = None
) -> Any:
    """A wandb run, which continues that of run_id if given, or None if the mode is disabled.

    Mode None: WANDB_MODE, else online with credentials, else disabled. The user's WANDB_VARIABLES come first.
    Raises ValueError for online without credentials, for which wandb would ask, and RuntimeError if wandb fails.
    """
    if mode is None:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_credentials() else "disabled")
    if mode == "disabled":
        return None
    if mode == "online" and not has_credentials():
        raise ValueError("wandb has no credentials to go online with: run `wandb login`, or choose --wandb offline")
    import wandb  # slow to import, and not everyone has it

    log_dir.mkdir(parents=True, exist_ok=True)
    resume = "allow" if run_id and mode == "online" else None
    settings: dict[str, Any] = {"project": project, "notes": name, "dir": str(log_dir), "id": run_id, "resume": resume}
    settings = {name: value for name, value in settings.items() if not os.environ.get(WANDB_VARIABLES[name])}
    settings["mode"] = mode
    try:
        return wandb.init(config=config, **settings)
    except (wandb.errors.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise RuntimeError(f"wandb does not start: {reason}. Choose --wandb offline or disabled") from error
