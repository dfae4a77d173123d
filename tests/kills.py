"""A short run that is killed with SIGKILL at random moments and resumed each time, beside one that is never stopped."""

import csv
import io
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock


def run(argv):
    """train.py in this process, a fork of one that has imported it already."""
    import torch

    import train

    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
        try:
            train.main(argv)
        except SystemExit:
            sys.__stderr__.write(output.getvalue())
            raise


def processes(*modules):
    """A context whose processes start as forks of one that has imported train.py and these modules, in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", __name__, *modules])
    first = context.Process(target=time.sleep, args=(0,))  # starts the server, which imports torch
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # older Pythons give it no path
        first.start()
    first.join()
    return context


def finish(context, argv) -> float:
    """Run to the end; returns its seconds."""
    process = context.Process(target=run, args=(argv,))
    start = time.perf_counter()
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit status {process.exitcode}"
    return time.perf_counter() - start


def killed_and_resumed(context, argv, kills: int, seconds: float, seed: int) -> int:
    """Kill the run `kills` times, each at a random moment of the next `seconds`, then let it end; how often it died."""
    moments = random.Random(seed)
    died = 0
    for _ in range(kills):
        process = context.Process(target=run, args=([*argv, "--resume", "auto"],))
        process.start()
        process.join(moments.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            died += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"exit status {process.exitcode}"
        if process.exitcode == 0:
            return died
    finish(context, [*argv, "--resume", "auto"])
    return died


def outcome(logs: Path) -> dict:
    """All that a run leaves behind, but for the seconds: rows, texts and every tensor."""
    import torch

    (folder,) = [path for path in logs.glob("logs_*/*") if path.is_dir()]
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    last = torch.load(folder / "last.pth", weights_only=True)
    for row in last["progress"]["rows"]:
        del row["seconds"]
    (best,) = folder.glob("*_best.pth")
    (text,) = folder.glob("*_best_results.txt")
    return {
        "rows": rows,
        "text": text.read_text(),
        "last": last,
        "best": torch.load(best, weights_only=True),
        "files": sorted(path.name for path in folder.iterdir()),
        "classes": (folder / "classes.csv").read_text(),
    }


def assert_identical(ours, expected, where="run"):
    """Equal to the last bit, tensors included."""
    import torch

    assert type(ours) is type(expected), where
    if isinstance(ours, dict):
        assert list(ours) == list(expected), where
        for key in ours:
            assert_identical(ours[key], expected[key], f"{where}, {key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(expected), where
        for number, pair in enumerate(zip(ours, expected)):
            assert_identical(*pair, f"{where}, {number}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, expected), where
    else:
        assert ours == expected, where
