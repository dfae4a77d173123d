"""Kill a short run with SIGKILL at random moments, resume it each time, and compare it with an uninterrupted run.

python benchmarks/kills.py [--kills 200] [--epochs 60] [--seed 0]
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import kills, trees


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context = kills.processes()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trees.cub(root / "data")
        argv = [
            "--allow-partial",
            "--dataset",
            "cub",
            "--data-root",
            str(root / "data"),
            "--model",
            "resnet18",
            "--pretrained",
            "none",
            "--embedding-size",
            "8",
            "--image-size",
            "32",
            "--batch-size",
            "4",
            "--workers",
            "0",
            "--epochs",
            str(args.epochs),
        ]
        seconds = kills.finish(context, [*argv, "--LOG_DIR", str(root / "one")])
        print(f"Never stopped: {args.epochs} epochs in {seconds:.1f} s")
        again = [*argv, "--LOG_DIR", str(root / "two")]
        died = kills.killed_and_resumed(context, again, args.kills, 1.3 * seconds / args.epochs, args.seed)
        kills.assert_identical(kills.outcome(root / "two"), kills.outcome(root / "one"))
        print(f"Killed {died} times: metrics, last.pth, best checkpoint and texts are identical to the last bit")


if __name__ == "__main__":
    main()
