"""What several test modules use: a small network, runs of train.py, its errors, several processes."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import kills
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pages import REPOSITORY
from torch import nn

import net
import search
import train
from net.backbone import Backbone
from proxy_anchor import cli
from proxy_anchor.embedding import Embedder
from proxy_anchor.spec import Calibration

# torch 2.9 cannot; between it and 2.14, nothing was tried
exports_onnx = pytest.mark.skipif(torch.__version__ < (2, 10), reason="this torch cannot export the pooling to ONNX")
fakes_cuda = pytest.mark.skipif(torch.__version__ < (2, 10), reason="this torch needs a driver for fake CUDA tensors")

# A network


class Tiny(Backbone, nn.Module):
    """A backbone of 20,000 parameters with layers named as ResNet's, for tests in which the network is not the point.

    `--model tiny` in the process of the tests; a script in a process of its own does not know it.
    """

    num_features = 48

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.layer(16, 32)
        self.layer2 = self.layer(32, 48)
        self.fc = nn.Linear(48, 10)  # never runs

    @staticmethod
    def layer(inputs: int, outputs: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def features(self, images):
        return self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(images)))))


net.BACKBONES["tiny"] = Tiny
# What a checkpoint records of it.
RECORD = {"model": "tiny", "embedding_size": 8, "image_size": 32, "l2_norm": 1}


def threshold(value, **changed) -> Calibration:
    """A calibrated threshold with this value for all sizes."""
    measured = Calibration(
        "cosine", 0.05, (20, 10), (value, value), (0.02, 0.0, 0.1), (0.5, 0.4, 0.6), (0.0, 10.0), (2, 2), "folder", {}
    )
    return replace(measured, **changed)


def save_backbone(name, path):
    """Write the backbone weights of a random network."""
    torch.manual_seed(7)
    state = net.create(name, 8).model.state_dict()
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith("embedding.")}, path)
    return path


# Runs of train.py


RUN = "tiny_Proxy_Anchor_embedding8_alpha32_mrg0.1_adamw_lr0.0001_batch8"  # the folder of run_train


def arguments(root, **changed):
    """For train.py and evaluate.py: a small network on small images of the small CUB, with the flags changed."""
    settings = {
        "dataset": "cub",
        "data-root": root,
        "model": "tiny",
        "embedding-size": 8,
        "batch-size": 8,
        "image-size": 32,
        "workers": 0,
    } | changed
    return ["--allow-partial", *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]


def run_train(root, logs, **changed):
    train.main(arguments(root, **{"pretrained": "none", "epochs": 2, "LOG_DIR": logs} | changed))


def run_folder(logs):
    """The only run's."""
    (folder,) = (logs / "logs_cub").iterdir()
    return folder


def read_metrics(folder):
    """The rows of a run's metrics.csv, as texts."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_figures(logs):
    """The rows of the only run's metrics.csv, as numbers, without the seconds."""
    with open(next(logs.glob("**/metrics.csv")), newline="") as file:
        return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def stop_at(monkeypatch, moment, signum=signal.SIGTERM):
    """Send the signal while batch number `moment` is worked on, batches of training and of evaluation counted alike."""
    seen = []

    def batches(embedder, loader, batches=Embedder.batches):
        for batch in batches(embedder, loader):
            seen.append(batch)
            if len(seen) == moment:
                os.kill(os.getpid(), signum)
            yield batch

    monkeypatch.setattr(Embedder, "batches", batches)


def write_run(folder, recalls, seconds=10.0, **config):
    """The folder of a run with these R@1."""
    folder.mkdir()
    settings = {"loss": "Proxy_Anchor", "IPC": None, "lr": 1e-4, "seed": 1, "epochs": 3, "workers": 4}
    (folder / "config.json").write_text(json.dumps(settings | config))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "loss", "lr", "seconds", "R@1", "R@2"])
        writer.writerows([epoch, 5 - epoch, 1e-4, seconds, r, r + 0.01] for epoch, r in enumerate(recalls))
    return str(folder)


# Data


def write_csv(path, rows, columns=("path", "label", "split")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


class Squares:
    """Stands for a dataset: image i is a square of one grey."""

    def __init__(self, labels, classes, side=32):
        self.labels, self.classes, self.side = labels, classes, side
        self.paths = [f"{i}.jpg" for i in range(len(labels))]

    def __getitem__(self, index):
        return torch.full((3, self.side, self.side), index % 256, dtype=torch.uint8), int(self.labels[index])


def examples(kind, distance, random):
    """200 embeddings of a kind, in float32 or float64; of unit length for the cosine."""
    x = random.normal(size=(200, 16))
    if kind == "ties" and distance == "cosine":
        # Products are exactly representable, so that ties are ties in any precision; many are duplicates.
        return np.hstack([random.choice([-0.5, 0.5], size=(200, 4)), np.zeros((200, 12))]).astype(np.float32)
    if kind == "ties":  # points of a grid, far from 0: many pairs are equally distant
        return (1000 + random.integers(0, 4, size=(200, 3))).astype(np.float32)
    if distance == "euclidean":
        x *= 10 ** random.uniform(-4, 4, size=(200, 1))
        return {"random": x.astype(np.float32), "float64": x, "far": (1e4 + 1e-2 * x).astype(np.float32)}[kind]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# The index of search.py


def make_index(weights, images, out, *more, name="a.pth"):
    search.main(
        ["index", "--resume", str(weights / name), "--images", str(images), "--out", str(out), "--workers", "0", *more]
    )


def query_index(out, capsys, *more):
    """The answers, from the JSON that search.py prints."""
    capsys.readouterr()
    search.main(["query", "--index", str(out), "--json", *map(str, more)])
    return json.loads(capsys.readouterr().out)


def described(out):
    """images.json, with the images {path: stamp} of the file beside it."""
    content = json.loads((out / "images.json").read_text())
    lines = (out / f"images-{content['number']}.jsonl").read_text().splitlines()
    return content | {"images": dict(map(json.loads, lines))}


# Errors


def fails(run, capsys, words, code=1):
    """run() ends with this exit status and one line on stderr that contains the words (2: after the usage)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run()
    message = capsys.readouterr().err
    assert error.value.code == code, message
    assert words in message and (code == 2 or message.count("\n") == 1), message


def mutations(data: bytes, count: int, seed: int):
    """Damaged copies: a flipped bit, a changed byte, cut short, a piece removed, doubled, zeroed or of random bytes."""
    chance = random.Random(seed)
    for number in range(count):
        place = chance.randrange(len(data))
        end = min(len(data), place + chance.choice((1, 8, 200)))
        yield (
            data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :],
            data[:place] + chance.randbytes(1) + data[place + 1 :],
            data[:place],
            data[:place] + data[end:],
            data[:end] + data[place:end] + data[end:],
            data[:place] + bytes(end - place) + data[end:],
            data[:place] + chance.randbytes(end - place) + data[end:],
        )[number % 7]


def result_or_error(function):
    """What the function returns, or the error, which must be one that the scripts show as one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    except Exception as error:
        assert str(error) and cli.is_deliberate(error)
        return error


# Processes


def in_processes(count, function, *arguments):
    """function(*arguments) in each of `count` processes; the result of the first."""
    if count == 1:
        return function(*arguments)
    # Threads of this process would not be there in a fork of it, so the processes are forks of another.
    with kills.processes("helpers").Manager() as manager:
        results = manager.dict()
        port = 20000 + os.getpid() % 20000
        mp.start_processes(_process, (count, port, function, arguments, results), count, start_method="forkserver")
        assert all(results[rank][0] == results[0][0] for rank in results)
        return results[0][1]


def _process(rank, count, port, function, arguments, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    result = function(*arguments)
    fingerprint = sum(float(tensor.double().sum()) for tensor in result.values())
    results[rank] = fingerprint, {name: tensor.numpy() for name, tensor in result.items()}
    dist.destroy_process_group()


def assert_close(ours, expected, tolerance):
    """Of two dicts, an array or tensor each."""
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, expected[name].numpy(), rtol=tolerance, atol=tolerance, err_msg=name)


def torchrun(processes, script, *arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [str(argument) for argument in arguments]
    return subprocess.run(
        [*command, str(REPOSITORY / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def without_reader(command, lines, **streams):
    """A command whose output is read up to this many lines, then no more; what it leaves in stderr, if it is read."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **streams) as process:
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        return process.wait(timeout=100), process.stderr.read() if process.stderr else ""
