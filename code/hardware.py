"""The device and the processes that a script runs on."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Collection
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from proxy_anchor import cli

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, as in malloc.h


def options(without: Collection[str] = (), several: bool = True) -> argparse.ArgumentParser:
    """Command-line flags of the device, without these flags; several: whether the script can use several GPUs."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("device")
    add = cli.adder(group, without)
    add(
        "--gpu-id",
        default=0,
        type=cli.integer(-1),
        metavar="N",
        help=f"CUDA device{', or -1 for all' * several}; without CUDA, Apple's GPU or the CPU",
    )
    add(
        "--amp",
        default="none",
        **cli.one_of("none", "bf16", "fp16"),
        help="mixed precision: bf16 for recent GPUs, fp16 for older ones; none: float32",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the network (torch.compile): takes a minute, then steps are faster; for long runs",
    )
    return parser


def select(gpu_id: int) -> torch.device:
    """CUDA device `gpu_id`, the first one for -1; without CUDA Apple's GPU or the CPU.

    Raises ValueError for an id that does not exist. In this process TF32 is turned off and, for the CPU, freed memory
    is kept.
    """
    import torch

    turn_off_tf32()
    if torch.cuda.is_available():
        gpu_id, count = 0 if gpu_id == -1 else gpu_id, torch.cuda.device_count()
        if not 0 <= gpu_id < count:
            raise ValueError(f"There is no CUDA device {gpu_id}: --gpu-id can be 0 to {count - 1} here")
        torch.cuda.set_device(gpu_id)  # else code that names no device would use the first one too
        return torch.device("cuda", gpu_id)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    keep_freed_memory()
    return torch.device("cpu")


def turn_off_tf32() -> None:
    """Compute in float32, as the published results were; convolutions on CUDA would use TF32 by default."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def keep_freed_memory() -> None:
    """Let the process keep memory that is freed, for the tensors of the next step.

    On Linux, glibc returns every large tensor to the kernel at once, and the next one costs a page fault per 4 KB: in
    large batches on a CPU, up to half of the time. Other C libraries have no such setting and stay as they are.
    """
    _call_malloc("mallopt", M_TRIM_THRESHOLD, -1)
    _call_malloc("mallopt", M_MMAP_MAX, 0)


def return_freed_memory() -> None:
    """Return to the kernel what keep_freed_memory has kept."""
    _call_malloc("malloc_trim", 0)


def _call_malloc(name: str, *arguments: int) -> None:
    if sys.platform == "linux" and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*arguments)


def describe(device: torch.device) -> str:
    """One line on the device in use."""
    import torch

    if device.type == "cuda":
        return f"Running on CUDA device {device.index}, {torch.cuda.get_device_name(device)}."
    name = "Apple's GPU (MPS)" if device.type == "mps" else f"the CPU (threads: {torch.get_num_threads()})"
    return f"No CUDA device here: running on {name}."


@contextmanager
def processes(gpu_id: int):
    """Join the processes that torchrun started, if any, and yield this process's device. Only rank 0 prints.

    Raises ValueError if srun started several tasks that do not all know of each other: without torchrun, or in several
    groups of torchruns, such as those that --gpu-id -1 starts.
    """
    if (tasks := srun_tasks()) > int(os.environ.get("GROUP_WORLD_SIZE", 1)):  # the number of torchruns that joined
        raise ValueError(
            f"srun started {tasks} tasks that would each do the same work: start one task per machine, and let "
            "torchrun start a process per GPU and join the machines: srun --ntasks-per-node=1 torchrun "
            "--nnodes=MACHINES --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=FIRST_MACHINE:29500 SCRIPT ..."
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield select(gpu_id)
        return
    import torch
    import torch.distributed as dist

    from proxy_anchor import collectives

    device = select(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        # File names may contain any bytes, see cli.errors_in_one_line.
        with (
            open(os.devnull, "w", errors="backslashreplace") as devnull,
            redirect_stdout(sys.stdout if collectives.rank() == 0 else devnull),
        ):
            yield device
    finally:
        # gloo's threads need the GIL to release the last collective's tensors, and the group's destructor holds the GIL
        # while it waits for them: a deadlock in torch 2.6 (pytorch#154976). Sleeping lets them have the GIL first.
        time.sleep(0.1)
        dist.destroy_process_group()


def srun_tasks() -> int:
    """The number of srun's tasks for this command; 1 without srun, even if sbatch or salloc set SLURM_NTASKS."""
    step, tasks, number = (
        int(value) if (value := os.environ.get(f"SLURM_{name}", "")).isdecimal() else 0
        for name in ("STEP_NUM_TASKS", "NTASKS", "PROCID")
    )
    return step or (tasks if number else 1)


def launch_on_all_gpus(gpu_id: int, script: str, argv: list[str] | None) -> None:
    """With --gpu-id -1 and several GPUs, replace this process by torchrun, which runs the script once per GPU.

    argv: the arguments of the script's main; None for those of this process.
    """
    if gpu_id != -1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    import torch

    if torch.cuda.device_count() > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
        arguments = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, *torchrun, script, *arguments])


def describe_batch(batch_size: int) -> str:
    """One line on how a batch is divided; "" in a single process. Raises ValueError for fewer images than processes."""
    from proxy_anchor import collectives

    if collectives.world_size() == 1:
        return ""
    if batch_size < collectives.world_size():
        raise ValueError(f"A batch of {batch_size} images cannot be divided among {collectives.world_size()} processes")
    sizes = " or ".join(str(size) for size in sorted(set(collectives.shard_sizes(batch_size))))
    return f"{collectives.world_size()} processes: each takes {sizes} of the {batch_size} images of a batch.\n"
