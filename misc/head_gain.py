"""Compare runs of train.py --frozen, after their last epoch, with the backbone alone: R@1 and MAP@R.

python misc/head_gain.py logs/logs_cars/*_frozen*

The runs may differ in the seed only. The intervals are a paired bootstrap over the test classes, see significance.py.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import significance

import dataset
import net
from net.embedding_net import Head, PooledBackbone
from proxy_anchor import cli, evaluation
from proxy_anchor.checkpoint import Checkpoint
from proxy_anchor.embedding import Embedder
from proxy_anchor.runs import run_folders
from proxy_anchor.runs.selection import percent, spread
from proxy_anchor.vectors import Embeddings

CPU = torch.device("cpu")


def configuration(folder: Path) -> dict:
    """What a run recorded. Raises ValueError for one that did not freeze, or held classes out."""
    config = run_folders.read_config(folder)
    if not config.get("frozen") or config.get("fold"):
        raise ValueError(f"{folder} is no run of train.py --frozen on all training classes")
    if config.get("average_weights"):
        raise ValueError(f"{folder} has results of averaged weights (--average-weights); this compares the last ones")
    return config


def compare(folders: list[Path], root: str | None, workers: int) -> None:
    """Print the metrics of the backbone and of the runs, and their difference. Raises OSError or ValueError."""
    config, *others = [configuration(folder) for folder in folders]
    labels = {name: config[name] for name in ("seed", "remark")}
    for folder, other in zip(folders[1:], others):
        if different := run_folders.differences(config, other | labels):
            raise ValueError(f"{folder} differs from {folders[0]} in more than the seed: {'; '.join(different)}")
    checkpoints = [Checkpoint(folder / run_folders.LAST) for folder in folders]
    networks = [checkpoint.open(checkpoint.spec, net.from_spec) for checkpoint in checkpoints]
    spec = checkpoints[0].spec
    image_sets = dataset.eval_sets(
        config["dataset"],
        root or config["data_root"],
        spec.image_size,
        spec.geometry,
        allow_partial=config["allow_partial"],
        test_classes=config["test_classes"],
        upright=spec.orientation == "upright",
    )
    loaders = [dataset.eval_loader(images, 180, workers) for images in image_sets]
    features = evaluation.embed(Embedder(PooledBackbone(networks[0].model), CPU), loaders)

    def measure(head) -> tuple[dict, dict]:
        """The metrics of a head, and their sums per class."""
        queries, gallery = [of and Embeddings(head(of.vectors), of.labels, of.groups) for of in features]
        result = evaluation.measure(queries, [1], gallery, spec.distance)
        values = {"R@1": (result.ranks == 0).double(), "MAP@R": result.average_precisions.double()}
        return result.metrics, {name: np.bincount(result.labels, value) for name, value in values.items()}

    backbone, sums_of_backbone = measure(lambda x: x)
    with torch.inference_mode():
        heads = [measure(Head(network).eval()) for network in networks]
    queries = np.bincount(features[0].labels)
    for name, of_backbone in sums_of_backbone.items():
        sums = np.stack([sums[name] for _, sums in heads])
        gain = significance.bootstrap(queries, sums, of_backbone[None])
        print(
            f"{name}: backbone alone {percent(backbone[name])}, {len(heads)} heads "
            f"{percent(spread([metrics[name] for metrics, _ in heads]))}, difference {100 * gain.mean:+.2f} points, "
            f"95% interval [{100 * gain.low:.2f}, {100 * gain.high:.2f}]"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--data-root", metavar="DIR", help="the dataset, if it has moved since the runs")
    parser.add_argument("--workers", type=int, default=dataset.WORKERS, help="processes that read images")
    args = parser.parse_args(argv)
    with cli.errors_in_one_line("head_gain.py"):
        compare(args.runs, args.data_root, args.workers)


if __name__ == "__main__":
    main()
