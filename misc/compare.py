"""Compare runs: R@1 over the epochs as a chart, and a table with the time.

python misc/compare.py logs/logs_cub/* --save comparison.svg --save comparison.png

Runs of one experiment are pooled to mean and standard deviation. They may differ in the seed and in what does not
change the experiment: the device, the number of processes, the versions, paths, the number of epochs. A setting that
some runs do not record, because an older version wrote them, does not separate runs, unless the other runs of the
experiment differ in it: then a run without it has a group of its own, named so. A folder counts once.

Groups of at least two seeds are compared with the best of them: the difference of their best R@1, and whether it is
more than the choice of the test classes explains.
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
from proxy_anchor import cli, distillation, figures, losses, metrics
from proxy_anchor.runs import logbook, run_folders, significance

NOT_COMPARED = ("seed", "by", *run_folders.NOT_CONFIG, *run_folders.MAY_CHANGE)
BASELINES = {*losses.LOSSES, *distillation.LOSSES} - {"Proxy_Anchor", "Relaxed_Contra"}  # in muted colours
# What losses and settings are called; other settings have their own names.
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
# What nearly always follows from other settings: shown only where nothing else tells runs apart.
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
    """Runs of one experiment, under a name that tells it from the others."""

    name: str
    runs: list[Run]


def read(folders: list[str]) -> list[Run]:
    """The runs in these folders, each once. Raises FileNotFoundError or ValueError if there is none."""
    found = {}
    for folder in map(Path, folders):
        config = run_folders.read_config(folder)
        if not isinstance(config.get("loss"), str):
            raise ValueError(f'{folder / run_folders.CONFIG} names no "loss"; expected what train.py writes')
        config["loss"] = losses.label(config["loss"])
        if config.get("lr_schedule", "step") != "step":  # recorded, but without effect
            config = {name: value for name, value in config.items() if not name.startswith("lr_decay_")}
        rows, backbone = run_folders.read_metrics(folder)
        plain = [metrics.plain(row) for row in rows]
        found.setdefault(folder.resolve(), Run(folder, config, plain, backbone and metrics.plain(backbone)))
    return list(found.values())


def pool(members: list[Run]) -> list[Group]:
    """The groups of the runs of one experiment each, the best first."""
    settings = [
        frozenset(
            (name, json.dumps(value, sort_keys=True)) for name, value in run.config.items() if name not in NOT_COMPARED
        )
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
    """Whether no name has two values in these pairs (name, value)."""
    return len(dict(one | other)) == len(one | other)


def names(settings: list[dict[str, str]]) -> list[str]:
    """A name for each: its loss, and its values of the settings that differ."""
    apart = {name for own in settings for name in own if len({other.get(name, own[name]) for other in settings}) > 1}
    for shown in (apart - {"loss", *FOLLOWS}, apart - {"loss"}):
        named = [", ".join([readable_loss(own), *described(own, sorted(shown))]) for own in settings]
        if len(set(named)) == len(named):
            break
    return named


def readable_loss(settings: dict[str, str]) -> str:
    loss = json.loads(settings["loss"])
    return LOSSES.get(loss, loss)


def described(settings: dict[str, str], shown: list[str]) -> list[str]:
    """The settings of these names, in words; None and "" are not set."""
    recorded = [(name, json.loads(settings[name])) for name in shown if name in settings]
    said = [SETTINGS.get(name, name + " {}").format(value) for name, value in recorded if value not in (None, "")]
    return said + [f"{name} not recorded" for name in shown if name not in settings]


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


def differences(groups: list[Group]) -> list[str]:
    """Whether groups of at least two seeds differ from the best of them, or why that is not said."""
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
        lines.append(f"Fewer than two seeds, so whether they differ is not said: {'; '.join(few)}")
    return lines


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there is one."""
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
    """The text, with +- of the same width instead of ± where a terminal of this encoding cannot show it.

    What else it cannot show is escaped by the stream, see cli.errors_in_one_line.
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("± ", "+-")
    return text


def draw(groups: list[Group], path: Path) -> None:
    """R@1 over the epochs that all runs of a group have: its mean, and a band of one standard deviation around it."""
    with figures.picture(path, 8.2, 4.6) as figure:
        ax = figure.subplots()
        ends = []
        colors = figures.colors_of([group.runs[0].config["loss"] not in BASELINES for group in groups])
        for (name, members), color in reversed(list(zip(groups, colors))):  # the best on top
            recalls = [{int(row["epoch"]): 100 * row["R@1"] for row in run.rows} for run in members]
            x = sorted(set.intersection(*map(set, recalls)))
            if not x:
                raise ValueError(f"The runs of {name} have no epoch in common; compare them one by one")
            values = [[run[epoch] for run in recalls] for epoch in x]
            mean = [statistics.mean(v) for v in values]
            deviation = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            marker = "o" if len(x) <= figures.MARKED else None
            ax.plot(x, mean, color=color, marker=marker, markersize=4, zorder=3, clip_on=False)
            low, high = zip(*[(m - d, m + d) for m, d in zip(mean, deviation)])
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            ends.append((mean[-1], f"{name}  {spread(values[-1], 1)}", color))
        single = all(len(group.runs) == 1 for group in groups)
        datasets = {run.config.get("dataset") for group in groups for run in group.runs} - {None}
        where = f" on {datasets.pop()}" if len(datasets) == 1 else ""
        ax.set_title(f"R@1{where}, %" + ("" if single else f": mean ± standard deviation over {count_of_runs(groups)}"))
        ax.set(xlabel="epoch, from 0", xlim=(None, ax.dataLim.x1))
        ax.xaxis.get_major_locator().set_params(integer=True)
        figures.label_ends(ax, ends)


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
    args = parser.parse_args(argv)
    with cli.errors_in_one_line("compare.py"):
        groups = pool(read(args.runs))
        lines = [table(groups), *remarks(groups), *differences(groups)]
        print(in_encoding("\n".join(lines), sys.stdout.encoding or "utf-8"))
        for path in args.save or ["comparison.png"]:
            draw(groups, Path(path))
            print(f"The chart is {path}")


if __name__ == "__main__":
    main()
