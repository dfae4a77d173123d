"""Compare runs: R@1 against training time and against epochs on one chart, and a table.

python misc/compare.py logs/logs_cub/* --save comparison.png

Runs of one experiment are pooled to mean and standard deviation. They may differ in the seed and in what does not
change the experiment: the device, the number of processes, the versions, paths, the number of epochs. A setting that
some runs do not record, because an older version wrote them, sets no runs apart, unless those of the same experiment
that do record it differ: then a run without it is none of theirs, and is named so. A folder counts once.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from proxy_anchor import console, curves, runs

NOT_COMPARED = ("seed", "device", "processes", "versions", "wandb_id", *runs.FREE)


class Run(NamedTuple):
    folder: Path
    config: dict
    rows: list[dict]  # of metrics.csv

    @property
    def best(self) -> float:
        return max(row["R@1"] for row in self.rows)


class Group(NamedTuple):
    """Runs of one experiment, under a name that tells it from the others."""

    name: str
    runs: list[Run]


def read(folders: list[str]) -> list[Run]:
    """The runs in these folders, each once. Raises FileNotFoundError or ValueError where there is none."""
    found = {}
    for folder in map(Path, folders):
        config = runs.read_config(folder)
        if not isinstance(config.get("loss"), str):
            raise ValueError(f'{folder / runs.CONFIG} names no "loss"; expected what train.py writes')
        found.setdefault(folder.resolve(), Run(folder, config, curves.read(folder / "metrics.csv")))
    return list(found.values())


def pool(members: list[Run]) -> list[Group]:
    """The groups of the runs of one experiment each, the best first."""
    settings = [
        frozenset((name, json.dumps(value)) for name, value in run.config.items() if name not in NOT_COMPARED)
        for run in members
    ]
    mates = {one: [other for other in settings if agree(one, other)] for one in settings}
    unclear = {one for one in mates if any(not agree(a, b) for a, b in combinations(set(mates[one]), 2))}
    groups = {}  # by all that is known of their settings
    for run, own in zip(members, settings):
        known = own if own in unclear else own.union(*(other for other in mates[own] if other not in unclear))
        groups.setdefault(known, []).append(run)
    pooled = [Group(name, members) for name, members in zip(names(list(map(dict, groups))), groups.values())]
    return sorted(pooled, key=lambda group: -statistics.mean(run.best for run in group.runs))


def agree(one: frozenset, other: frozenset) -> bool:
    """Whether no name has two values in these (name, value)."""
    return len(dict(one | other)) == len(one | other)


def names(settings: list[dict[str, str]]) -> list[str]:
    """Of each of these, the loss and the values of what sets them apart."""
    apart = {name for own in settings for name in own if len({other.get(name, own[name]) for other in settings}) > 1}
    # The sizes of the splits follow from other settings, but not always.
    for shown in (apart - {"loss", *runs.RECORDS}, apart - {"loss"}):
        named = [", ".join([json.loads(own["loss"]), *described(own, sorted(shown))]) for own in settings]
        if len(set(named)) == len(named):
            break
    return named


def described(settings: dict[str, str], shown: list[str]) -> list[str]:
    """'name value' of what is set."""
    values = {name: json.loads(settings.get(name, '"not recorded"')) for name in shown}
    return [f"{name} {value}" for name, value in values.items() if value not in (None, "")]


def remarks(groups: list[Group]) -> list[str]:
    """What the numbers of these groups do not show by themselves."""
    found = []
    for name, members in groups:
        for seed, count in Counter(run.config.get("seed") for run in members).items():
            if seed is not None and count > 1:
                folders = ", ".join(str(run.folder) for run in members if run.config.get("seed") == seed)
                found.append(f"{name}: {count} runs have seed {seed} ({folders}); they are not independent")
        lengths = sorted({len(run.rows) for run in members})
        if len(lengths) > 1:
            found.append(
                f"{name}: the runs have {' or '.join(map(str, lengths))} epochs; the chart shows those that all have"
            )
    return found


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def summary(members: list[Run]) -> list[str]:
    """The cells of a line of the table."""
    reached = [next(row for row in run.rows if row["R@1"] >= 0.95 * run.best) for run in members]
    return [
        str(len(members)),
        spread([100 * run.best for run in members]),
        spread([100 * run.rows[-1]["R@1"] for run in members]),
        spread([row["epoch"] + 1 for row in reached], 1),
        spread([row["elapsed"] for row in reached], 0),
    ]


def table(groups: list[Group]) -> str:
    lines = [["", "n", "best R@1", "last R@1", "epochs to 95% of best", "seconds to it"]]
    lines += [[name, *summary(members)] for name, members in groups]
    widths = [max(map(len, column)) for column in zip(*lines)]
    first, *rest = widths
    return "\n".join(
        f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, rest)) for name, *cells in lines
    )


def in_encoding(text: str, encoding: str) -> str:
    """The text as a terminal of this encoding can show it, of the same width where it has a ±."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("± ", "+-").encode(encoding, "backslashreplace").decode(encoding)
    return text


def draw(groups: list[Group], path: Path) -> None:
    """R@1 over time and over epochs: the mean of each group, and one standard deviation around it."""
    from matplotlib.figure import Figure

    unit, unit_name = curves.time_axis(max(run.rows[-1]["elapsed"] for _, members in groups for run in members))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for (name, members), marker in zip(groups, "osD^vP*X<>" * len(groups)):
        epochs = list(zip(*(run.rows for run in members)))  # those that all have; of each, a row a run
        recalls = [[100 * row["R@1"] for row in rows] for rows in epochs]
        mean = [statistics.mean(values) for values in recalls]
        deviation = [statistics.stdev(values) if len(values) > 1 else 0 for values in recalls]
        time = [statistics.mean(row["elapsed"] for row in rows) / unit for rows in epochs]
        for ax, x in zip(axes, (time, [rows[0]["epoch"] + 1 for rows in epochs])):
            (line,) = ax.plot(x, mean, marker=marker, markersize=5, label=f"{name} (n = {len(members)})")
            low, high = zip(*[(m - d, m + d) for m, d in zip(mean, deviation)])
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes[0].set(xlabel=f"training time, {unit_name}", ylabel="R@1, %", xlim=(0, None))
    axes[1].set(xlabel="epochs")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[console.options()],
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--save", default="comparison.png", metavar="FILE", help="the chart, a picture (comparison.png)"
    )
    args = parser.parse_args(argv)
    with console.errors_in_one_line("compare.py", args.debug):
        groups = pool(read(args.runs))
        print(in_encoding("\n".join([table(groups), *remarks(groups)]), sys.stdout.encoding or "utf-8"))
        draw(groups, Path(args.save))
        print(in_encoding(f"The chart is {args.save}", sys.stdout.encoding or "utf-8"))


if __name__ == "__main__":
    main()
