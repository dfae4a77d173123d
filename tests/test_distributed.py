"""Several gloo processes must do what one process does on the same batches."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, in_processes, read_figures, torchrun
from pages import REPOSITORY
from torch.utils.data import TensorDataset

import dataset
import evaluate
import net
import train as script
import transfer
from dataset.loading import BalancedBatches, RandomBatches
from proxy_anchor import checkpoint, collectives, evaluation, hardware, loss_registry, losses, training
from proxy_anchor.embedding import Embedder, Replica
from proxy_anchor.retrieval import best_positive_rank, map_at_r
from proxy_anchor.runs.run import Run
from proxy_anchor.runs.stopping import Interrupted, Stop
from proxy_anchor.thresholds import identification, verification

CLASSES, IMAGES, BATCH = 6, 48, 8  # 3 processes do not divide the batch


def train(optimizer, dtype, warm, bn_freeze, per_class, epochs=2, loss="Proxy_Anchor"):
    """A few steps of training on random images; every parameter, and the last step's gradients."""
    torch.manual_seed(0)
    pixels = torch.randn(IMAGES, 3, 32, 32, dtype=dtype)
    labels = np.arange(IMAGES) % CLASSES
    share = collectives.rank(), collectives.world_size()
    sampler = (
        BalancedBatches(labels, BATCH, per_class, 1, share) if per_class else RandomBatches(labels, BATCH, 1, share)
    )
    network = net.create("tiny", 8, bn_freeze=bn_freeze).to(dtype)
    criterion = loss_registry.create(loss, CLASSES, 8, 0.1, 32.0).to(dtype)
    optimizer = training.create_optimizer(optimizer, network, criterion, 1e-3, 1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    clipped = [network, criterion] if getattr(criterion, "clipped", False) else [network]
    replica = Replica(network)

    def loss_of(images, labels):
        embeddings, labels = (collectives.gather_shards(x, sampler.images_per_batch) for x in (replica(images), labels))
        return criterion(embeddings, labels)

    for epoch in range(epochs):
        training.set_trainable(network, epoch, warm)
        sampler.set_epoch(epoch)
        batches = [([key[-1] for key in keys]) for keys in sampler]
        batches = [(pixels[indices], torch.from_numpy(labels[indices])) for indices in batches[:3]]
        training.train_one_epoch(network, loss_of, batches, optimizer, scaler, epoch, clipped)
    named = dict(network.named_parameters())
    gradients = {f"gradient of {k}": p.grad for k, p in named.items() if p.grad is not None}
    if loss == "Proxy_Anchor":
        of_all = {"proxies": criterion.proxies.detach(), "gradient of proxies": criterion.proxies.grad}
        gradients |= {k: collectives.gather_shards(rows, CLASSES) for k, rows in of_all.items()}
    return {k: p.detach() for k, p in named.items()} | gradients


def trainings(*settings):
    """Several, in processes that are started once."""
    return {f"{each}: {k}": tensor for each in settings for k, tensor in train(*each).items()}


def test_sgd_in_float32():
    """Warm-up and its end, BN-freeze, both samplers: parameters and gradients after some steps."""
    settings = [("sgd", torch.float32, 1, True, per_class) for per_class in (None, 2)]
    assert_close(in_processes(2, trainings, *settings), trainings(*settings), 1e-5)


def test_float64():
    """AdamW divides by the gradient's size, which amplifies rounding: close agreement needs float64.

    The rivals see the whole batch too.
    """
    settings = [("adamw", torch.float64, 1, True, 2), ("sgd", torch.float64, 0, True, 4, 1, "MS")]
    assert_close(in_processes(3, trainings, *settings), trainings(*settings), 1e-9)


def averaged_gradient(parts):
    """The gradient that plain DDP would give: the mean of the gradients of each part's own loss."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 8, dtype=torch.double).requires_grad_(), torch.arange(BATCH) % CLASSES
    criterion = losses.ProxyAnchor(CLASSES, 8).double()
    loss = sum(criterion(a, b) for a, b in zip(x.chunk(parts), y.chunk(parts))) / parts
    loss.backward()
    return x.grad


def test_mean_of_the_parts_losses_would_be_another_loss():
    assert (averaged_gradient(2) - averaged_gradient(1)).abs().max() > 1e-3 * averaged_gradient(1).abs().max()


class Pixels(torch.nn.Module):
    """A network that embeds an image as its pixels."""

    def __init__(self, size):
        super().__init__()
        self.embedding_size = size
        self.normalize = torch.nn.Identity()

    def forward(self, images):
        return images.flatten(1)


def figures(total, gallery_total):
    torch.manual_seed(0)

    def part(count):
        x, y = torch.randn(count, 8, 1, 1), torch.arange(count) % 7
        return dataset.eval_loader(TensorDataset(x, y), 1, 0, (collectives.rank(), collectives.world_size()))

    loaders = [part(total)] + ([part(gallery_total)] if gallery_total else [])
    embedder = Embedder(Pixels(8), torch.device("cpu"))
    queries, gallery = evaluation.embed(embedder, loaders)
    result = evaluation.measure(queries, [1, 4], gallery)
    processes, sides = collectives.world(), [side for side in (queries, gallery) if side is not None]
    tensors = [tensor for side in sides for tensor in (side.vectors, side.labels)]
    together = [evaluate.all_gather(side, processes) for side in sides]
    found = identification.identify(queries, gallery, processes=processes)
    return {
        "own": torch.from_numpy(found.own).sort().values,
        "others": torch.from_numpy(found.others).sort(dim=0).values,
        "size": torch.tensor([found.classes, found.size]),
        "opis": torch.tensor(verification.verify(queries, gallery, replicates=2, processes=processes).opis),
        "ranks": best_positive_rank(*tensors, group=processes.group),
        "map": map_at_r(*tensors, group=processes.group),
        "metrics": torch.tensor(list(result.metrics.values())),
        "labels": result.labels,
        "average precisions": result.average_precisions,
    } | {f"{name} {i}": getattr(side, name) for i, side in enumerate(together) for name in ("vectors", "labels")}


def evaluations(*sizes):
    return {f"{each}: {name}": value for each in sizes for name, value in figures(*each).items()}


def test_evaluation_is_the_same():
    """No image lost or counted twice, also where 3 processes do not divide them, or one of them has none."""
    sizes = [(50, None), (23, 31), (2, 40)]
    alone = evaluations(*sizes)
    for name, array in in_processes(3, evaluations, *sizes).items():
        np.testing.assert_array_equal(array, alone[name].numpy(), err_msg=name)


def measures_backbone(folder):
    """Whether each process measures the backbone of a run whose backbone.json only the second process sees."""
    run = Run.__new__(Run)
    run.progress = {"epoch": 0, "losses": []}
    run.log = SimpleNamespace(folder=folder / str(collectives.rank()), log_backbone=lambda row: None)
    measured = torch.zeros(1)
    run.measure_backbone(lambda: measured.fill_(1) and SimpleNamespace(metrics={}))
    return {"measured": torch.cat(collectives.world().all_gather(measured))}


def test_processes_agree_whether_the_backbone_is_measured(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "1" / "backbone.json").write_text("{}")
    assert in_processes(2, measures_backbone, tmp_path)["measured"].tolist() == [1, 1]


def batches_until_a_signal(at, *numbers):
    """How many batches each process does, of its own number of them, when the first process gets a signal at one."""
    stop, rank, done = Stop(), collectives.rank(), 0
    for done, _ in enumerate(stop.watch(["batch"] * numbers[rank]), start=1):
        if rank == 0 and done == at:
            stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted) if at <= max(numbers) else nullcontext():
        stop.check()
    counts = [torch.zeros((), dtype=torch.long) for _ in numbers]
    dist.all_gather(counts, torch.tensor(done))
    return {"counts": torch.stack(counts)}


@pytest.mark.parametrize("at, counts", [(2, [2, 2, 0]), (5, [5, 4, 0]), (6, [6, 4, 0]), (9, [6, 4, 0])])
def test_signal_in_an_evaluation_is_obeyed_at_once(at, counts):
    """Though the processes have different numbers of batches, one of them none."""
    assert in_processes(3, batches_until_a_signal, at, 6, 4, 0)["counts"].tolist() == counts


def test_silent_processes_print_names_of_any_bytes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **keywords: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    with hardware.processes(0):
        print(os.fsdecode(b"\xff.jpg"))


@pytest.mark.slow
def test_torchrun(cub_root, tmp_path):
    """The scripts under torchrun: the same figures, one folder, one voice."""
    common = [
        "--allow-partial",
        "--data-root",
        cub_root,
        "--model",
        "resnet18",
        "--embedding-size",
        8,
        "--image-size",
        64,
        "--workers",
        0,
    ]
    flags = [*common, "--batch-size", 8, "--pretrained", "none", "--optimizer", "sgd", "--epochs", 2]
    done = torchrun(2, "train.py", *flags, "--LOG_DIR", tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  1") == 1 and "2 processes: each takes 4 of the 8 images of a batch." in done.stdout
    assert len(list(tmp_path.glob("two/logs_cub/*"))) == 1
    done = torchrun(2, "train.py", *flags, "--LOG_DIR", tmp_path / "two", "--resume", "auto", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("has finished (epochs: 2)") == 1
    script.main([str(argument) for argument in [*flags, "--LOG_DIR", tmp_path / "one"]])
    for ours, expected in zip(read_figures(tmp_path / "two"), read_figures(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(expected, abs=1e-4)

    best = next(tmp_path.glob("one/**/*_best.pth"))
    done = torchrun(3, "evaluate.py", *common, "--batch-size", 4, "--resume", best, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = evaluate.main([str(argument) for argument in [*common, "--batch-size", 4, "--resume", best]])
    row = next(line for line in done.stdout.splitlines() if line.startswith("this checkpoint"))
    assert [float(cell) for cell in row.split()[2:]] == pytest.approx([100 * v for v in metrics.values()], abs=0.005)


@pytest.mark.slow
def test_torchrun_restarts_and_other_numbers_of_processes(cub_root, tmp_path):
    """A process dies: torchrun starts all again, and they go on. Then one process goes on where two were."""
    flags = [
        "--allow-partial",
        "--data-root",
        cub_root,
        "--model",
        "resnet18",
        "--embedding-size",
        8,
        "--image-size",
        32,
        "--batch-size",
        4,
        "--workers",
        0,
        "--pretrained",
        "none",
        "--optimizer",
        "sgd",
        "--warm",
        0,
    ]
    flags = [str(flag) for flag in flags]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    resumed = [*flags, "--epochs", "6", "--LOG_DIR", str(tmp_path / "resumed"), "--resume", "auto"]
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }  # else restarts meet old addresses (pytorch#135712)
    agent = subprocess.Popen(
        [*command, str(REPOSITORY / "train.py"), *resumed], stdout=subprocess.PIPE, text=True, env=environment
    )
    output = []
    for line in agent.stdout:
        output.append(line)
        if line.startswith("epoch  1") and not any(line.startswith("Resuming") for line in output):
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait(timeout=60) == 0
    assert any(line.startswith("Resuming") for line in output)

    done = torchrun(2, "train.py", *flags, "--epochs", 6, "--LOG_DIR", tmp_path / "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_figures(tmp_path / "resumed") == read_figures(tmp_path / "one")

    import train as script

    (folder,) = (tmp_path / "one" / "logs_cub").iterdir()
    script.main(["--resume", str(folder), "--epochs", "7"])
    script.main([*flags, "--epochs", "7", "--LOG_DIR", str(tmp_path / "alone")])
    losses = [[row["loss"] for row in read_figures(tmp_path / name)] for name in ("one", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_torchrun_stopped_by_a_signal(cub_root, tmp_path):
    """The processes agree on the step after which they stop."""
    flags = [
        "--allow-partial",
        "--data-root",
        cub_root,
        "--model",
        "resnet18",
        "--embedding-size",
        8,
        "--image-size",
        32,
        "--batch-size",
        4,
        "--workers",
        0,
        "--pretrained",
        "none",
        "--epochs",
        1000,
        "--LOG_DIR",
        tmp_path,
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    agent = subprocess.Popen(
        [*command, str(REPOSITORY / "train.py"), *(str(flag) for flag in flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in agent.stdout:
        if line.startswith("epoch  1"):
            agent.terminate()
            break
    _, error = agent.communicate(timeout=120)
    assert "train.py: stopped by SIGTERM; everything is saved" in error
    (last,) = tmp_path.glob("logs_cub/*/last.pth")
    assert checkpoint.read(last)["progress"]["epoch"] >= 2


@pytest.mark.slow
def test_worker_that_dies_ends_the_run_with_its_error(tmp_path):
    import trees

    trees.cub(tmp_path / "data")
    bad = tmp_path / "data" / "CUB_200_2011" / "images" / "002.Bird_2" / "Bird_2_0003.jpg"
    bad.write_bytes(b"no image")
    flags = [
        "--allow-partial",
        "--data-root",
        tmp_path / "data",
        "--model",
        "resnet18",
        "--image-size",
        64,
        "--workers",
        0,
    ]
    done = torchrun(
        2, "train.py", *flags, "--batch-size", 24, "--pretrained", "none", "--LOG_DIR", tmp_path / "logs", cwd=tmp_path
    )
    assert done.returncode != 0 and f"train.py: error: The image {bad} cannot be read" in done.stderr


def test_batch_smaller_than_the_processes(monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 8)
    assert hardware.describe_batch(180) == "8 processes: each takes 22 or 23 of the 180 images of a batch.\n"
    with pytest.raises(ValueError, match="cannot be divided among 8 processes"):
        hardware.describe_batch(7)


def test_batch_of_several_per_class_smaller_than_the_processes(cub_root, tmp_path, monkeypatch, capsys):
    """3 images with 2 per class are a batch of 2."""
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    flags = ["--allow-partial", "--data-root", str(cub_root), "--batch-size", "3", "--IPC", "2", "--workers", "0"]
    with pytest.raises(SystemExit):
        script.main([*flags, "--image-size", "32", "--LOG_DIR", str(tmp_path)])
    assert "A batch of 2 images cannot be divided among 3 processes" in capsys.readouterr().err


@pytest.mark.usefixtures("no_checkpoint_needed")
def test_all_gpus_start_torchrun(monkeypatch):
    """With the arguments of main: those of another program, such as a notebook's, are not run again."""
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--its", "own"])
    hardware.launch_on_all_gpus(0, "train.py", None)
    assert not started
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    hardware.launch_on_all_gpus(-1, "train.py", None)
    assert started.pop() == [*torchrun, "train.py", "--its", "own"]
    monkeypatch.setattr(hardware, "processes", lambda gpu_id: sys.exit("the processes would start here"))
    for module, argv in (
        (script, []),
        (evaluate, ["--backbone-only", "--model", "resnet18"]),
        (transfer, ["--source-ckpt", "none.pth"]),
    ):
        argv = [*argv, "--gpu-id", "-1", "--dataset", "glyphs"]
        with pytest.raises(SystemExit):
            module.main(argv)
        assert started.pop() == [*torchrun, str(REPOSITORY / f"{module.__name__}.py"), *argv]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "already")
    hardware.launch_on_all_gpus(-1, "train.py", None)
    assert not started


@pytest.mark.parametrize(
    "environment, refused",
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, True),  # srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # salloc
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # sbatch, whose script is one process
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # salloc in a step; srun -n 1
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "", "SLURM_STEP_NUM_TASKS": "x"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "a", "GROUP_WORLD_SIZE": "1"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "a", "GROUP_WORLD_SIZE": "2"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "a", "GROUP_WORLD_SIZE": "4"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(environment, refused, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    one_process = {"LOCAL_RANK": 0, "RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in (one_process | environment).items():
        monkeypatch.setenv(name, str(value))
    words = "srun started 4 tasks .*: srun --ntasks-per-node=1 torchrun --nnodes=MACHINES"
    with pytest.raises(ValueError, match=words) if refused else nullcontext(), hardware.processes(0):
        pass


@pytest.mark.slow
def test_torchruns_that_know_nothing_of_each_other_are_refused(monkeypatch, tmp_path):
    """Two machines whose tasks forgot to join: torchrun says how many joined."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    done = torchrun(1, "train.py", "--dataset", "cub", "--data-root", tmp_path, cwd=tmp_path)
    assert done.returncode != 0 and "train.py: error: srun started 2 tasks" in done.stderr


def test_all_gpus_are_the_first_one_where_a_script_uses_one(monkeypatch):
    """As search.py does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert hardware.select(-1) == torch.device("cuda", 0)
