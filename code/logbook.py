"""The record of a run: its folder, metrics.csv, config.json, the best result, and wandb."""

import argparse
import csv
import json
import netrc
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlparse

from proxy_anchor.files import replacing

from proxy_anchor import checkpoint, distributed

LOG_DIR = Path(__file__).resolve().parent.parent / "logs"
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "matplotlib", "pytorch-metric-learning")


def options() -> argparse.ArgumentParser:
    """Command-line flags of the record."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("record")
    group.add_argument("--LOG_DIR", default=str(LOG_DIR), metavar="DIR", help="where run folders go")
    group.add_argument("--remark", default="", help="ends the name of the run folder")
    group.add_argument(
        "--wandb",
        choices=("online", "offline", "disabled"),
        help="Weights & Biases; without this flag, online if it has credentials",
    )
    return parser


def run_name(model, loss, embedding_size, alpha, margin, optimizer, lr, batch_size, seed, remark) -> str:
    """The published folder name of a run; a seed other than 1 is added."""
    method = f"{model}_{loss}_embedding{embedding_size}_alpha{alpha:g}_mrg{margin:g}"
    return f"{method}_{optimizer}_lr{lr}_batch{batch_size}{remark}" + ("" if seed == 1 else f"_seed{seed}")


def new_folder(path: Path) -> Path:
    """Create the folder or, where there is one already, the first free of path_2, path_3, ..."""
    number = 1
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def has_wandb_credentials() -> bool:
    """Whether wandb would find an API key, in the environment or in the netrc file, without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_wandb(mode: str | None, log_dir: Path, project: str, name: str, config: dict):
    """A wandb run, or None if the mode is disabled. Mode None: WANDB_MODE, else online with credentials, else disabled.

    Raises ValueError for online without credentials, for which wandb would ask, and RuntimeError if wandb fails.
    """
    if mode is None:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_credentials() else None)
        if mode is None:
            print("wandb has no credentials here (wandb login): logging to the run folder alone.")
    if mode in (None, "disabled"):
        return None
    if mode == "online" and not has_wandb_credentials():
        raise ValueError("wandb has no credentials to go online with: run `wandb login`, or choose --wandb offline")
    import wandb  # slow to import, and not everyone has it

    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(project=project, notes=name, dir=str(log_dir), mode=mode, config=config)
    except wandb.errors.Error as error:
        raise RuntimeError(f"wandb does not start: {error}. --wandb offline or disabled goes on without it") from error


def versions() -> dict[str, str]:
    """Of Python and of the libraries here on which results depend."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def open_logbook(*args, **keywords):
    """The Logbook of these arguments in the first process, which alone writes; in others one that does nothing."""
    return Logbook(*args, **keywords) if distributed.rank() == 0 else NoLogbook()


class Logbook:
    """Writes what a run does into a folder of its own, {log_dir}/logs_{dataset}/{name}, to wandb and to the terminal.

    The files are whole at any moment: metrics.csv (a row an epoch), config.json, {dataset}_{model}_best_results.txt.
    wandb_mode: see start_wandb.
    """

    def __init__(self, log_dir: Path, dataset: str, model: str, name: str, config: dict, wandb_mode: str | None):
        self.prefix = f"{dataset}_{model}"
        self.rows = []
        self.wandb = start_wandb(wandb_mode, log_dir, f"{dataset}_ProxyAnchor", name, config)
        wanted = log_dir / f"logs_{dataset}" / name
        self.folder = new_folder(wanted)
        print(f"Logging to {self.folder}" + ("" if self.folder == wanted else f": {wanted.name} holds an earlier run."))
        self._write("config.json", json.dumps(config | {"versions": versions()}, indent=2) + "\n")

    def log_epoch(self, epoch: int, loss: float, lr: float, seconds: float, metrics: dict[str, float]) -> None:
        """Add a row to metrics.csv and print it; metrics are in 0..1."""
        shown = "  ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items())
        print(f"epoch {epoch:>2}  loss {loss:.4f}  lr {lr:g}  {seconds:.0f} s  {shown}", flush=True)
        self.rows.append({"epoch": epoch, "loss": loss, "lr": lr, "seconds": round(seconds, 2)} | metrics)
        with replacing(self.folder / "metrics.csv") as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        if self.wandb:
            self.wandb.log({"loss": loss} | metrics, step=epoch)

    def save_best(self, epoch: int, network, metrics: dict[str, float]) -> None:
        """The network of the best epoch so far as a checkpoint, and its Recall@K in the published text file."""
        checkpoint.save(self.folder / f"{self.prefix}_best.pth", network)
        recalls = {name.removeprefix("R@"): value for name, value in metrics.items() if name.startswith("R@")}
        lines = [f"Best Epoch: {epoch}", *(f"Best Recall@{k}: {100 * recall:.4f}" for k, recall in recalls.items())]
        self._write(f"{self.prefix}_best_results.txt", "\n".join(lines) + "\n")

    def close(self) -> None:
        print(f"The best network is in {self.folder}")
        if self.wandb:
            self.wandb.finish()

    def _write(self, name, text):
        with replacing(self.folder / name) as path:
            path.write_text(text)


class NoLogbook:
    """In place of the logbook where another process writes it."""

    def log_epoch(self, *args):
        pass

    save_best = log_epoch

    def close(self):
        pass


def table(rows: dict[str, dict[str, float]]) -> str:
    """A table of metrics in percent: a line for each name of rows, a column for each metric that any line has."""
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {name:>6}" for name in columns)]
    for name, metrics in rows.items():
        cells = (f"{100 * metrics[c]:.2f}" if c in metrics else "-" for c in columns)
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>{max(6, len(c))}}" for c, cell in zip(columns, cells)))
    return "\n".join(lines)
