"""The choice of the number of epochs on held-out classes, and the results of several seeds as tables and a picture."""

from pathlib import Path
from statistics import fmean, stdev

from proxy_anchor import figures, metrics

SHOWN = ("R@1", "MAP@R")


def choose(folds: list[list[dict]], by: str) -> tuple[int, dict[str, float]]:
    """(epochs, metrics): the number of epochs with the best mean of a metric over the folds; the first in case of ties.

    folds: the rows of metrics.csv of each fold. The metrics are means over the folds, named as on a test set.
    """
    names = [name for name in metrics.metrics_only(metrics.plain(folds[0][0])) if name != "elapsed"]
    means = [{name: fmean(metrics.plain(row)[name] for row in rows) for name in names} for rows in zip(*folds)]
    best = max(range(len(means)), key=lambda epoch: means[epoch][by])
    return best + 1, means[best]


def result_of(seed: int, epochs: int, validation: dict[str, float], rows: list[dict]) -> dict:
    """The result of a retrained run: its last epoch, and for comparison its best epoch on the test set."""
    best, last, names = metrics.best(rows), rows[-1], validation.keys()
    return {
        "seed": seed,
        "epochs": epochs,
        "validation": validation,
        "last_epoch": {name: last[name] for name in names},
        "best_epoch_on_test": {name: best[name] for name in names},
        "epochs_of_best": int(best["epoch"]) + 1,
        "gap": {name: best[name] - last[name] for name in names},
    }


def over_seeds(results: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{kind of result: {metric: its spread over the seeds}}, see spread."""
    kinds = [kind for kind, value in results[0].items() if isinstance(value, dict)]
    return {
        kind: {name: spread([result[kind][name] for result in results]) for name in results[0][kind]} for kind in kinds
    }


def spread(values: list[float]) -> dict[str, float]:
    """{"mean": mean, "deviation": sample standard deviation}; a single value has no deviation."""
    return {"mean": fmean(values)} | ({"deviation": stdev(values)} if len(values) > 1 else {})


def percent(value: float | dict[str, float]) -> str:
    """A share, or the spread of a share, in percent."""
    if not isinstance(value, dict):
        return f"{100 * value:.2f}"
    return f"{100 * value['mean']:.2f}" + (f" ± {100 * value['deviation']:.2f}" if "deviation" in value else "")


def table(content: dict, columns: dict[str, tuple[str, str]], entries: tuple[str, ...] = ()) -> str:
    """A Markdown table with a line per seed and a line for the spread over seeds.

    columns: {heading: (kind of result, metric)}. entries: further entries of the results to show unchanged.
    """
    results, spreads = content["seeds"], content["over_seeds"]
    lines = [["seed", *entries, *columns], ["---"] * (1 + len(entries) + len(columns))]
    for result in results:
        lines.append([str(result[name]) for name in ("seed", *entries)])
        lines[-1] += [percent(result[kind][name]) for kind, name in columns.values()]
    lines.append(["mean", *("" for _ in entries), *(percent(spreads[kind][name]) for kind, name in columns.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(content: dict) -> str:
    """The text of results.md, from the content of results.json."""
    settings = content["settings"]
    folds, by = settings["folds"], settings["by"]
    held_out = {"2": "the second half of the training classes", "val": "the classes of the split val"}.get(
        folds, f"each of {folds} parts of the training classes in turn (mean over the parts)"
    )
    result = {name: ("last_epoch", name) for name in SHOWN}
    claim = {"best epoch on test: R@1": ("best_epoch_on_test", "R@1"), "gap": ("gap", "R@1")}
    paragraphs = [
        f"# Without test-set selection: {settings['dataset']}, {settings['model']}",
        f"    {content['command']}",
        f"The number of epochs, at most {settings['epochs']}, was chosen by {by} on {held_out}. Then the network was "
        "trained on all training classes for the same number of epochs; the result is its test after the last epoch. "
        "In percent; mean ± standard deviation over the seeds.",
        table(content, result | claim, ("epochs",)),
        "**Best epoch on test** is not a result: it is the highest R@1 on the test set among the epochs of that run, "
        "which a choice on the test set would have reported. The gap is the difference, and a lower bound: a choice "
        "among more epochs can only be more optimistic.",
    ]
    if "folds_together" in content["over_seeds"]:
        kinds = {"one by one": "folds_one_by_one", "together": "folds_together"}
        columns = {f"{words}: {name}": (kind, name) for words, kind in kinds.items() for name in SHOWN}
        paragraphs += [
            f"The networks of the {folds} folds on the test set, each at the epoch with the best {by} on its fold: the "
            "mean of their individual results (one by one), and the result of their concatenated embeddings of unit "
            "length (together).",
            table(content, columns),
        ]
    paragraphs.append(f"Versions: {', '.join(f'{name} {version}' for name, version in content['versions'].items())}.")
    return "\n\n".join(paragraphs) + "\n"


def draw(content: dict, path: Path) -> None:
    """Draw the last epoch and the best epoch on the test set for each seed, and the means of both."""
    settings, results, spreads = content["settings"], content["seeds"], content["over_seeds"]
    kinds = {
        "last_epoch": ("without test-set selection", {"color": figures.STRONG[0], "markersize": 6}),
        "best_epoch_on_test": (
            "best epoch on test, not a result",
            {"color": figures.STRONG[1], "markersize": 10, "markeredgewidth": 1.6, "fillstyle": "none"},
        ),
    }
    values = {kind: [100 * result[kind]["R@1"] for result in results] for kind in kinds}
    with figures.picture(path, 7.6, 1.6 + 0.27 * len(results)) as figure:
        ax = figure.subplots()
        gap = percent(spreads["gap"]["R@1"])
        ax.set_title(f"{settings['dataset']}, {settings['model']}: R@1 on the test set, %; the gap is {gap}")
        mean, deviation = (100 * spreads["last_epoch"]["R@1"].get(name, 0) for name in ("mean", "deviation"))
        ax.axvspan(mean - deviation, mean + deviation, color=figures.STRONG[0], alpha=0.1, linewidth=0)
        ax.hlines(range(len(results)), *values.values(), color=figures.MUTED[0], linewidth=1.2)
        for kind, (words, look) in kinds.items():
            spread = spreads[kind]["R@1"]
            ax.axvline(100 * spread["mean"], color=look["color"], linewidth=1)
            ax.plot(values[kind], range(len(results)), "o", label=f"{words}: {percent(spread)}", zorder=3, **look)
        ax.set_yticks(range(len(results)), [f"seed {result['seed']}, {result['epochs']} epochs" for result in results])
        ax.set_ylim(len(results) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
