"""The record of a run: its folder, metrics.csv, config.json, the best result, and wandb."""

import argparse
import csv
import json
import netrc
import os
import platform
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlparse

from proxy_anchor.files import replacing

LOG_DIR = Path(__file__).resolve().parent.parent / "logs"
LIBRARIES = ("torch", "torchvision", "numpy", "pillow")


def options() -> argparse.ArgumentParser:
    """Command-line flags of the record."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("record")
    group.add_argument("--LOG_DIR", default=str(LOG_DIR), metavar="DIR", help="where run folders go")
    group.add_argument("--remark", default="", help="ends the name of the run folder")
    group.add_argument(
        "--wandb",
        choices=("online", "offline", "disabled"),
        help="Weights & Biases (default: online if it has credentials)",
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


class Logbook:
    """Writes what a run does into a folder of its own, {log_dir}/logs_{dataset}/{name}, to wandb and to the terminal.

    The files are whole at any moment: metrics.csv (a row an epoch), config.json, {dataset}_{model}_best_results.txt.
    wandb_mode: online, offline, disabled, or None for online if wandb has credentials, else disabled.
    """

    def __init__(self, log_dir: Path, dataset: str, model: str, name: str, config: dict, wandb_mode: str | None):
        self.prefix = f"{dataset}_{model}"
        self.rows = []
        self.wandb = None
        if wandb_mode is None:
            wandb_mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_credentials() else "disabled")
            if wandb_mode == "disabled":
                print("wandb has no credentials here (wandb login): logging to the run folder alone.")
        if wandb_mode != "disabled":
            import wandb  # slow to import, and not everyone has it

            log_dir.mkdir(parents=True, exist_ok=True)
            self.wandb = wandb.init(
                project=f"{dataset}_ProxyAnchor", notes=name, dir=log_dir, mode=wandb_mode, config=config
            )
        wanted = log_dir / f"logs_{dataset}" / name
        self.folder = new_folder(wanted)
        print(f"Logging to {self.folder}" + ("" if self.folder == wanted else f": {wanted.name} holds an earlier run."))
        versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
        self._write("config.json", json.dumps(config | {"versions": versions}, indent=2) + "\n")

    def log_epoch(self, epoch: int, loss: float, lr: float, seconds: float, recalls: dict[int, float]) -> None:
        """Add a row to metrics.csv and print it; recalls are in 0..1."""
        shown = "  ".join(f"R@{k} {100 * recall:.2f}" for k, recall in recalls.items())
        print(f"epoch {epoch:>2}  loss {loss:.4f}  lr {lr:g}  {seconds:.0f} s  {shown}", flush=True)
        recalls = {f"R@{k}": recall for k, recall in recalls.items()}
        self.rows.append({"epoch": epoch, "loss": loss, "lr": lr, "seconds": round(seconds, 2)} | recalls)
        with replacing(self.folder / "metrics.csv") as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        if self.wandb:
            self.wandb.log({"loss": loss} | recalls, step=epoch)

    def write_best(self, epoch: int, recalls: dict[int, float]) -> None:
        """The published text file of the best epoch, in percent."""
        lines = [f"Best Epoch: {epoch}", *(f"Best Recall@{k}: {100 * recall:.4f}" for k, recall in recalls.items())]
        self._write(f"{self.prefix}_best_results.txt", "\n".join(lines) + "\n")

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()

    def _write(self, name, text):
        with replacing(self.folder / name) as path:
            path.write_text(text)


def recall_table(rows: dict[str, dict[int, float]]) -> str:
    """A table of Recall@K in percent: a line for each name, a column for each K that any line has."""
    ks = sorted({k for recalls in rows.values() for k in recalls})
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{f'R@{k}':>8}" for k in ks)]
    for name, recalls in rows.items():
        lines.append(
            f"{name:<{width}}" + "".join(f"{100 * recalls[k]:8.2f}" if k in recalls else f"{'-':>8}" for k in ks)
        )
    return "\n".join(lines)
