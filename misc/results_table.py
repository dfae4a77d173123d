"""Print a Markdown table of the results of the recipes of misc/reproduce.sh.

python misc/results_table.py --logs logs/reproduce --seeds 1 2 3 -- "--dataset cub --batch-size 180" "--dataset glyphs"

Each recipe (flags of train.py) has a row with the published R@1; our R@1 of the best epoch on the test set, as in the
paper; our R@1 by protocol.py, without test-set selection (mean and standard deviation over seeds); seeds, commit and
versions; the command and the folders below --logs. Only finished runs count.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from proxy_anchor import cli, metrics
from proxy_anchor.files import quantity
from proxy_anchor.runs import run_folders

COLUMNS = [
    "R@1, %",
    "published",
    "ours, best epoch on test",
    "ours, without test-set selection",
    "seeds",
    "commit",
    "versions",
    "command",
    "logs",
]
VERSIONS = ("python", "torch", "torchvision")
NONE = "pending"


class Finished(NamedTuple):
    """A finished run."""

    folder: Path
    config: dict
    best: float


def settings_of(args: argparse.Namespace) -> dict:
    """The settings of a recipe, as config.json records them."""
    return {name: value for name, value in vars(args).items() if name != "spec"} | args.spec.to_record()


def finished(logs: Path, args: argparse.Namespace, seeds: list[int]) -> list[Finished]:
    """The finished runs of a recipe, the latest of each seed."""
    runs = {}
    for folder in sorted((logs / f"logs_{args.dataset}").glob("*")):
        if not (folder / run_folders.CONFIG).exists() or not (folder / "metrics.csv").exists():
            continue
        config = run_folders.read_config(folder)
        seed = config.get("seed")
        if seed in seeds and not run_folders.differences(config, settings_of(args) | {"seed": seed}):
            rows, _ = run_folders.read_metrics(folder)
            if len(rows) == args.epochs:
                runs[seed] = Finished(folder, config, max(row["R@1"] for row in rows))
    return [runs[seed] for seed in sorted(runs)]


def protocol_result(logs: Path, args: argparse.Namespace) -> tuple[str, Path] | None:
    """The result of protocol.py for a recipe, and its folder."""
    for path in sorted(logs.glob(f"protocol_{args.dataset}/*/results.json")):
        content = json.loads(path.read_text())
        settings = content["settings"]
        expected = settings_of(args) | {"by": settings["by"]}  # the metric that chose the epoch
        if not run_folders.differences(settings, expected) and settings["epochs"] == args.epochs:
            recalls = [100 * result["last_epoch"]["R@1"] for result in content["seeds"]]
            return f"{spread(recalls)} ({quantity(len(recalls), 'seed')})", path.parent
    return None


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def row(logs: Path, recipe: str, seeds: list[int]) -> list[str]:
    args = train.parse(shlex.split(recipe))
    runs, protocol = finished(logs, args, seeds), protocol_result(logs, args)
    reference = metrics.PUBLISHED.get((args.dataset, args.model), {}).get(1)
    folders = [run.folder for run in runs] + ([protocol[1]] if protocol else [])
    return [
        f"{args.dataset}, {args.model}",
        f"{reference:.1f}" if reference else "",
        spread([100 * run.best for run in runs]) if runs else NONE,
        protocol[0] if protocol else NONE,
        ", ".join(str(run.config["seed"]) for run in runs),
        ", ".join(sorted({shorten(run.config.get("commit")) for run in runs})),
        "; ".join(sorted({versions(run.config.get("versions", {})) for run in runs})),
        f"`python train.py {recipe}`",
        ", ".join(f"`{os.path.relpath(folder, logs)}`" for folder in folders),
    ]


def shorten(commit: str | None) -> str:
    """The first ten digits of a commit, with -dirty if files differed from it."""
    return "unknown" if commit is None else commit[:10] + "-dirty" * commit.endswith("-dirty")


def versions(recorded: dict[str, str]) -> str:
    return ", ".join(f"{name} {recorded[name]}" for name in VERSIONS if name in recorded)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logs", required=True, type=Path, metavar="DIR", help="--LOG_DIR of the runs")
    parser.add_argument("--seeds", default=[1], type=int, nargs="+", metavar="S", help="seeds of the runs that count")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="flags of train.py, in quotes")
    args = parser.parse_args(argv)
    with cli.errors_in_one_line("results_table.py"):
        lines = [COLUMNS, ["---"] * len(COLUMNS), *(row(args.logs, recipe, args.seeds) for recipe in args.recipes)]
        for line in lines:
            print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
