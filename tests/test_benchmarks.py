"""The benchmarks run, on sizes that measure nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "command, words",
    [
        ("loss_time.py --batch 8 --classes 20 --size 8 --rounds 1", "ours"),
        ("recall_time.py --images 2100 --size 8 --rounds 1", "ours"),
        ("processes.py --images 50 --batch-size 8 --image-size 32 --rounds 1", "two training steps"),
        ("throughput.py --loaders --images 4 --seconds 0.05", "published style"),
        ("throughput.py --models resnet18 --batch-size 4 --steps 1 --images 12 --workers 1", "(c) from"),
    ],
)
def test_benchmark_runs(command, words):
    script, *flags = command.split()
    done = subprocess.run([sys.executable, BENCHMARKS / script, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
