"""Compare runs: R@1 against training time and against epochs on one chart, and a table.

python misc/compare.py logs/logs_cub/* --save comparison.png

Runs that differ in nothing but the seed are pooled to mean and standard deviation.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from proxy_anchor import console, curves, runs

NOT_COMPARED = ("seed", "versions", "wandb_id", *runs.FREE)


def pool(folders: list[str]) -> dict[str, list[list[dict]]]:
    """{what sets it apart: rows of the metrics.csv of each run} of the runs that differ in the seed alone."""
    groups = {}
    for folder in map(Path, folders):
        config = runs.read_config(folder)
        key = json.dumps({name: value for name, value in config.items() if name not in NOT_COMPARED}, sort_keys=True)
        groups.setdefault(key, []).append(curves.read(folder / "metrics.csv"))
    configs = [json.loads(key) for key in groups]
    apart = {name for config in configs for name in config if any(c.get(name) != config[name] for c in configs)}
    named = {}
    for config, members in zip(configs, groups.values()):
        others = [f"{name} {config[name]}" for name in sorted(apart - {"loss"}) if config.get(name) is not None]
        named[", ".join([config["loss"], *others])] = members
    return named


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def summary(members: list[list[dict]]) -> list[str]:
    """The cells of a line of the table."""
    best = [max(row["R@1"] for row in rows) for rows in members]
    reached = [next(row for row in rows if row["R@1"] >= 0.95 * top) for rows, top in zip(members, best)]
    return [
        str(len(members)),
        spread([100 * top for top in best]),
        spread([100 * rows[-1]["R@1"] for rows in members]),
        spread([row["epoch"] + 1 for row in reached], 1),
        spread([row["elapsed"] for row in reached], 0),
    ]


def table(groups: dict[str, list[list[dict]]]) -> str:
    lines = [["", "n", "best R@1", "last R@1", "epochs to 95% of best", "seconds to it"]]
    lines += [[name, *summary(members)] for name, members in groups.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    first, *rest = widths
    return "\n".join(
        f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, rest)) for name, *cells in lines
    )


def draw(groups: dict[str, list[list[dict]]], path: Path) -> None:
    """R@1 over time and over epochs: the mean of each group, and one standard deviation around it."""
    from matplotlib.figure import Figure

    unit, unit_name = curves.time_axis(max(rows[-1]["elapsed"] for members in groups.values() for rows in members))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for (name, members), marker in zip(groups.items(), "osD^vP*X<>" * len(groups)):
        epochs = list(zip(*members))  # those that all have; of each, a row a run
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
        groups = pool(args.runs)
        ranked = sorted(groups, key=lambda name: -statistics.mean(max(r["R@1"] for r in rows) for rows in groups[name]))
        groups = {name: groups[name] for name in ranked}
        print(table(groups))
        draw(groups, Path(args.save))
        print(f"The chart is {args.save}")


if __name__ == "__main__":
    main()
