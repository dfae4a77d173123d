"""Compare runs: R@1 over the epochs as a chart, and a table with the time.

python misc/compare.py logs/logs_cub/* --save comparison.svg --save comparison.png

Runs of the same experiment are pooled to mean and standard deviation. They may differ in the seed and in whatever does
not change the experiment: device, number of processes, versions, paths, number of epochs. A setting that a run of an
older version does not record does not separate it from others, unless these differ in the setting: then the run without
it forms its own group, with a note in its name. A folder counts once.

Groups of at least two seeds are compared with the best one: the difference in their best R@1, and whether the choice of
the test classes could explain it.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from itertools import combinations, cycle
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import significance

from proxy_anchor import cli, distillation, figures, loss_registry, metrics
from proxy_anchor.runs import logbook, run_folders
from proxy_anchor.upgrades.flags import OFF

NOT_COMPARED = ("seed", "by", *run_folders.NOT_CONFIG, *run_folders.MAY_CHANGE)
BASELINES = {*loss_registry.LOSSES, *distillation.LOSSES} - {"Proxy_Anchor", "Relaxed_Contra"}  # in muted colours
# Displayed names of losses and settings; other settings keep their names.
LOSSES = {
    "Proxy_Anchor": "Proxy-Anchor",
    "Proxy_NCA": "Proxy-NCA",
    "MS": "Multi-Similarity",
    "NPair": "N-pair",
    "Relaxed_Contra": "Relaxed contrastive",
}
SETTINGS = {
    "IPC": "{} per class",
    "batch_size": "batch {}",
    "embedding_size": "{}-d",
    "image_size": "{} px",
    "lr": "learning rate {}",
    "mrg": "margin {}",
    "dataset": "{}",
    "model": "{}",
    "remark": "{}",
    "fold": "fold {} held out",
    "loss_args": "{}",
    "loss_sha256": "file {:.8}",
}
# Settings that usually follow from others: shown only if nothing else distinguishes the runs.
FOLLOWS = ("sizes", "data", "l2_norm", "distance", "schedule", "lr_schedule", "head", "loss_sha256")


class Run(NamedTuple):
    folder: Path
    config: dict
    rows: list[dict]  # of metrics.csv
    backbone: dict | None = None  # the metrics of the backbone alone

    @property
    def best(self) -> float:
        return max(row["R@1"] for row in self.rows)


class Group(NamedTuple):
    """Runs of the same experiment, with a name that distinguishes it from the others."""

    name: str
    runs: list[Run]


def read(folders: list[str]) -> list[Run]:
    """The runs in these folders, without duplicates. Raises FileNotFoundError or ValueError for other folders."""
    runs = {}
    for folder in map(Path, folders):
        config = run_folders.read_config(folder)
        if not isinstance(config.get("loss"), str):
            raise ValueError(f'{folder / run_folders.CONFIG} names no "loss"; expected what train.py writes')
        config["loss"] = loss_registry.label(config["loss"])
        if config.get("lr_schedule", "step") != "step":  # recorded, but without effect
            config = {name: value for name, value in config.items() if not name.startswith("lr_decay_")}
        rows, backbone = run_folders.read_metrics(folder)
        plain = [metrics.plain(row) for row in rows]
        runs.setdefault(folder.resolve(), Run(folder, config, plain, backbone and metrics.plain(backbone)))
    return list(runs.values())


def pool(members: list[Run]) -> list[Group]:
    """Group the runs by experiment, the best group first."""
    settings = [
        frozenset(
            (name, json.dumps(value, sort_keys=True)) for name, value in run.config.items() if name not in NOT_COMPARED
        )
        for run in members
    ]
    mates = {one: [other for other in settings if agree(one, other)] for one in settings}
    unclear = {one for one in mates if any(not agree(a, b) for a, b in combinations(set(mates[one]), 2))}
    groups = {}  # by all known settings
    for run, recorded in zip(members, settings):
        clear = [] if recorded in unclear else [other for other in mates[recorded] if other not in unclear]
        known = recorded.union(*clear)
        groups.setdefault(known, []).append(run)
    pooled = [Group(name, members) for name, members in zip(names(list(map(dict, groups))), groups.values())]
    return sorted(pooled, key=lambda group: -statistics.mean(run.best for run in group.runs))


def agree(one: frozenset, other: frozenset) -> bool:
    """Whether two sets of (name, value) have no contradictory values."""
    return len(dict(one | other)) == len(one | other)


def names(settings: list[dict[str, str]]) -> list[str]:
    """A name for each group of settings: the loss and the values that differ between groups."""
    differing = {
        name for one in settings for name in one if len({other.get(name, one[name]) for other in settings}) > 1
    }
    for shown in (differing - {"loss", *FOLLOWS}, differing - {"loss"}):
        labels = [", ".join([readable_loss(one), *describe(one, sorted(shown))]) for one in settings]
        if len(set(labels)) == len(labels):
            break
    return labels


def readable_loss(settings: dict[str, str]) -> str:
    loss = json.loads(settings["loss"])
    return LOSSES.get(loss, loss)


def describe(settings: dict[str, str], shown: list[str]) -> list[str]:
    """The settings of these names, in words; those with the value None or "" and upgrades that are off are left out."""
    recorded = [(name, json.loads(settings[name])) for name in shown if name in settings]
    off = [name for name, value in recorded if value in (None, "") or (name in OFF and not value)]
    words = [SETTINGS.get(name, name + " {}").format(value) for name, value in recorded if name not in off]
    return words + [f"{name} not recorded" for name in shown if name not in settings]


def remarks(groups: list[Group]) -> list[str]:
    """Notes on duplicate seeds and different numbers of epochs within groups."""
    lines = []
    for name, members in groups:
        for seed, count in Counter(run.config.get("seed") for run in members).items():
            if seed is not None and count > 1:
                folders = ", ".join(str(run.folder) for run in members if run.config.get("seed") == seed)
                lines.append(f"{name}: {count} runs have seed {seed} ({folders}); they are not independent")
        lengths = sorted({len(run.rows) for run in members})
        if len(lengths) > 1:
            lines.append(
                f"{name}: the runs have {' or '.join(map(str, lengths))} epochs; the chart shows the common ones"
            )
    return lines


def differences(groups: list[Group]) -> list[str]:
    """Comparisons of groups of at least two seeds with the best one, or reasons why there is no comparison."""
    if len(groups) == 1:
        return []
    best, *others = [g for g in groups if len({run.config.get("seed") for run in g.runs}) > 1] or [None]
    lines = []
    for other in others:
        try:
            mean, low, high = (
                100 * value
                for value in significance.difference(*([run[:3] for run in group.runs] for group in (best, other)))
            )
            verdict = "no difference is shown" if low <= 0 <= high else "they differ"
            text = f"{mean:+.2f} points, 95% interval [{low:.2f}, {high:.2f}]: {verdict}"
        except ValueError as error:
            text = f"not compared: {error}"
        lines.append(f"{best.name} - {other.name}: {text}")
    if few := [group.name for group in groups if group is not best and group not in others]:
        lines.append(f"Not compared (one seed each): {'; '.join(few)}; run at least two seeds")
    return lines


def spread(values: list[float], digits: int = 2) -> str:
    """The mean and, of several values, the standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def summary(members: list[Run]) -> list[str]:
    """The cells of one line of the table."""
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
    alone = [[100 * run.backbone["R@1"] for run in members if run.backbone] for _, members in groups]
    if any(alone):
        columns = [logbook.BACKBONE, *(spread(values) if values else "-" for values in alone)]
        lines = [[name, n, cell, *rest] for (name, n, *rest), cell in zip(lines, columns)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    first, *rest = widths
    return "\n".join(
        f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, rest)) for name, *cells in lines
    )


def in_encoding(text: str, encoding: str) -> str:
    """Replace ± by +- of the same width if the encoding of the terminal lacks it.

    The stream escapes other characters, see cli.errors_in_one_line.
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("± ", "+-")
    return text


def colors_of(primary: list[bool]) -> list[str]:
    """A strong colour for each of those that are primary, a muted one for the others."""
    strong, muted = cycle(figures.STRONG), cycle(figures.MUTED)
    return [next(strong if first else muted) for first in primary]


def draw(groups: list[Group], path: Path, time: bool = False, title: str | None = None) -> None:
    """Draw the mean R@1 of each group over its common epochs, with a band of one standard deviation.

    time: also over the time until the end of each epoch, in the fastest of the group's runs. title: of the chart,
    instead of one that names the dataset.
    """
    with figures.picture(path, 11 if time else 8.2, 4.6) as figure:
        *by_time, ax = figure.subplots(1, 1 + time, sharey=True, squeeze=False)[0]
        curves = [curve(*group) for group in groups]
        unit, unit_name = figures.time_axis(max(seconds[-1] for _, _, seconds in curves))
        ends = []
        colors = colors_of([group.runs[0].config["loss"] not in BASELINES for group in groups])
        for (name, _), color, (epochs, recalls, seconds) in reversed(list(zip(groups, colors, curves))):
            mean = [statistics.mean(values) for values in recalls]
            deviation = [statistics.stdev(values) if len(values) > 1 else 0 for values in recalls]
            low, high = zip(*[(m - d, m + d) for m, d in zip(mean, deviation)])
            for axes, x in [(ax, epochs), *((axes, [second / unit for second in seconds]) for axes in by_time)]:
                marker = "o" if len(x) <= figures.MARKED else None
                axes.plot(x, mean, color=color, marker=marker, markersize=4, zorder=3, clip_on=False)
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            ends.append((mean[-1], f"{name}  {spread(recalls[-1], 1)}", color))
        first = (*by_time, ax)[0]
        alone = {round(100 * run.backbone["R@1"], 2) for _, members in groups for run in members if run.backbone}
        if len(alone) == 1:
            figures.draw_level(first, *alone, "backbone alone")
            if by_time:
                figures.draw_level(ax, *alone)
        single = all(len(group.runs) == 1 for group in groups)
        datasets = {run.config.get("dataset") for group in groups for run in group.runs} - {None}
        where = f" on {datasets.pop()}" if len(datasets) == 1 else ""
        title = title or f"R@1{where}, %"
        first.set_title(title + ("" if single else f": mean ± standard deviation over {count_of_runs(groups)}"))
        for axes in by_time:
            axes.set(xlabel=f"{unit_name} of training and evaluation", xlim=(0, axes.dataLim.x1))
        ax.set(xlabel="epoch, from 0", xlim=(None, ax.dataLim.x1))
        ax.xaxis.get_major_locator().set_params(integer=True)
        figures.label_ends(ax, ends)


def curve(name: str, members: list[Run]) -> tuple[list[int], list[list[float]], list[float]]:
    """(epochs, the R@1 of each run in percent, seconds) at the epochs that the runs have in common.

    The seconds are those of the fastest run: other work on the machine makes runs slower, nothing makes them faster.
    Raises ValueError if there are none.
    """
    rows = [{int(row["epoch"]): row for row in run.rows} for run in members]
    epochs = sorted(set.intersection(*map(set, rows)))
    if not epochs:
        raise ValueError(f"The runs of {name} have no epoch in common; compare them individually")
    recalls = [[100 * run[epoch]["R@1"] for run in rows] for epoch in epochs]
    return epochs, recalls, [min(run[epoch]["elapsed"] for run in rows) for epoch in epochs]


def count_of_runs(groups: list[Group]) -> str:
    low, high = (f([len(group.runs) for group in groups]) for f in (min, max))
    return f"{low} run" + ("" if low == 1 else "s") if low == high else f"{low} to {high} runs"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--save",
        action="append",
        metavar="FILE",
        help="the chart as .png, .svg or .pdf; may be given several times (default: comparison.png)",
    )
    parser.add_argument("--time", action="store_true", help="draw R@1 over the wall time too, for runs on one machine")
    parser.add_argument("--title", metavar="TEXT", help="title of the chart (default: it names the dataset)")
    args = parser.parse_args(argv)
    with cli.errors_in_one_line("compare.py"):
        groups = pool(read(args.runs))
        lines = [table(groups), *remarks(groups), *differences(groups)]
        print(in_encoding("\n".join(lines), sys.stdout.encoding or "utf-8"))
        for path in args.save or ["comparison.png"]:
            draw(groups, Path(path), args.time, args.title)
            print(f"The chart is {path}")


if __name__ == "__main__":
    main()
