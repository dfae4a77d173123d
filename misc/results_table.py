"""A table of what the recipes of misc/reproduce.sh have reached, in Markdown.

python misc/results_table.py --logs logs/reproduce --seeds 1 2 3 -- "--dataset cub --batch-size 180" "--dataset glyphs"

A row for each recipe, given as flags of train.py: the published R@1; ours of the best epoch on the test set, as it is
published; ours by protocol.py, which does not look at it; the seeds, mean and standard deviation over them; the commit
and the versions; the command and the folders below --logs. Only finished runs count.
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
    found = {}
    for folder in sorted((logs / f"logs_{args.dataset}").glob("*")):
        if not (folder / run_folders.CONFIG).exists() or not (folder / "metrics.csv").exists():
            continue
        config = run_folders.read_config(folder)
        seed = config.get("seed")
        if seed in seeds and not run_folders.differences(config, settings_of(args) | {"seed": seed}):
            rows, _ = run_folders.read_metrics(folder)
            if len(rows) == args.epochs:
                found[seed] = Finished(folder, config, max(row["R@1"] for row in rows))
    return [found[seed] for seed in sorted(found)]


def of_protocol(logs: Path, args: argparse.Namespace) -> tuple[str, Path] | None:
    """The result of protocol.py for a recipe, and its folder."""
    for path in sorted(logs.glob(f"protocol_{args.dataset}/*/results.json")):
        content = json.loads(path.read_text())
        settings = content["settings"]
        wanted = settings_of(args) | {"by": settings["by"]}  # what chose the epoch
        if not run_folders.differences(settings, wanted) and settings["epochs"] == args.epochs:
            recalls = [100 * result["honest"]["R@1"] for result in content["seeds"]]
            return f"{spread(recalls)} ({len(recalls)} seed{'s' * (len(recalls) > 1)})", path.parent
    return None


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def row(logs: Path, recipe: str, seeds: list[int]) -> list[str]:
    args = train.parse(shlex.split(recipe))
    found, protocol = finished(logs, args, seeds), of_protocol(logs, args)
    reference = metrics.PUBLISHED.get((args.dataset, args.model), {}).get(1)
    folders = [run.folder for run in found] + ([protocol[1]] if protocol else [])
    return [
        f"{args.dataset}, {args.model}",
        f"{reference:.1f}" if reference else "",
        spread([100 * run.best for run in found]) if found else NONE,
        protocol[0] if protocol else NONE,
        ", ".join(str(run.config["seed"]) for run in found),
        ", ".join(sorted({shortened(run.config.get("commit")) for run in found})),
        "; ".join(sorted({versions(run.config.get("versions", {})) for run in found})),
        f"`python train.py {recipe}`",
        ", ".join(f"`{os.path.relpath(folder, logs)}`" for folder in folders),
    ]


def shortened(commit: str | None) -> str:
    """The first ten digits of a commit, and whether files differed from it."""
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
