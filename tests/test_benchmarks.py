"""The benchmarks run, on sizes that measure nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, words",
    [
        ("loss_time.py --batch 8 --classes 20 --size 8 --rounds 1", "ours"),
        ("loss_memory.py --batch 8 --size 8 --classes 50 --most 100", "peak memory"),
        ("recall_time.py --images 2100 --size 8 --rounds 1", "ours"),
        ("frozen.py --images 40 --classes 8 --features 16 --embedding-size 8 --batch-size 10", "| training "),
        ("processes.py --images 50 --batch-size 8 --image-size 32 --rounds 1", "two training steps"),
        ("backbones.py --models resnet18 --batch-size 2 --image-size 32 --rounds 1", "| resnet18 | 11.2 | 512 |"),
        (
            "allocator.py --models resnet18 --batch-sizes 2 4 --image-size 32 --largest 2",
            "| resnet18 | 4 | evaluation |",
        ),
        ("index_size.py --vectors 3000 --size 16 --queries 20 --index-factory IVF4,SQ8", "--nprobe 4"),
        ("page_time.py misc --model resnet18 --images 20 --rounds 1", "median answer"),
        ("throughput.py --loaders --images 4 --seconds 0.05", "published style"),
        ("throughput.py --models resnet18 --batch-size 4 --steps 1 --images 12 --workers 1", "(c) from"),
    ],
)
def test_benchmark_runs(command, words):
    script, *flags = command.split()
    command = [sys.executable, BENCHMARKS / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.slow
def test_stores_are_compared():
    pytest.importorskip("lancedb")
    command = [sys.executable, BENCHMARKS / "stores.py", "--vectors", "20000", "--size", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| change a tenth, delete a hundredth |") == 2
    recalls = [float(recall) for recall in re.findall(r"recall@10 (\S+)", done.stdout)]
    assert len(recalls) == 6 and min(recalls) > 0.8


@pytest.mark.slow
def test_libraries_that_are_missing_are_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('faiss', 'pytorch_metric_learning', 'wandb'):\n    sys.modules[name] = None\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, BENCHMARKS / "recall_time.py", "--images", "2100", "--size", "8", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\| (faiss|pytorch-metric-learning).*\| +not installed", done.stdout) == [
        "faiss",
        "pytorch-metric-learning",
    ]
    assert "ours / this" in done.stdout
    train = [sys.executable, BENCHMARKS.parent / "train.py", "--help"]
    assert subprocess.run(train, capture_output=True, timeout=300, env=environment).returncode == 0


def gpu_script(tmp_path, python, *arguments):
    """Run benchmarks/gpu.sh with a shell script instead of Python."""
    (tmp_path / "python").write_text(f"#!/bin/bash\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    command = ["bash", BENCHMARKS / "gpu.sh", *arguments]
    environment = os.environ | {"PYTHON": str(tmp_path / "python")}
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=environment)


def test_gpu_script_makes_one_table(tmp_path):
    python = """
        case "$*" in
            *"import faiss"*) exit 1 ;;
            *pytest*) echo "FAILED tests/test_cuda.py::test_loss[7]"; echo "1 failed, 9 passed in 3 s"; exit 1 ;;
            *loss_memory*) echo "| first row  |  1 ms |  |"; exit 3 ;;
            *.py*) echo "sizes"; echo "| ours       |  2 ms | 1.00 |" ;;
        esac"""
    done = gpu_script(tmp_path, python, "results.md")
    assert done.returncode == 1 and "2 of the commands failed" in done.stderr
    table = (tmp_path / "results.md").read_text()
    assert done.stdout == table
    for line in (
        "|---|---|---|---|",
        "| `import faiss` | not installed |  |  |",
        "| `tests/test_cuda.py` | 1 failed, 9 passed in 3 s | exit status 1 |  |",
        "| `tests/test_cuda.py::test_loss[7]` | FAILED |  |  |",
        "| `loss_time.py` | ours | 2 ms | 1.00 |",
        "| `loss_memory.py` | first row | 1 ms | |",
        "| `loss_memory.py` | failed | exit status 3 |  |",
    ):
        assert line in table.splitlines()


def test_gpu_script_without_a_gpu(tmp_path):
    done = gpu_script(tmp_path, "exit 1", "results.md")
    assert done.returncode == 1 and "no CUDA device here" in done.stderr
    assert not (tmp_path / "results.md").exists()
    assert gpu_script(tmp_path, "exit 0").returncode == 2
