"""Training in several processes that torchrun starts, with the results of a single process.

The loss of a batch is not the mean of the losses of its shards, because every proxy meets every embedding. So the
embeddings are gathered, and every process computes the loss of the whole batch. Its gradient reaches the network only
through the process's own images; the sum over the processes is the gradient of the whole batch.
"""

import os
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from proxy_anchor import collectives, hardware


@contextmanager
def processes(gpu_id: int):
    """Join the processes that torchrun started, if any, and yield this process's device. Only rank 0 prints.

    Raises ValueError if srun started several tasks, which would not know of each other.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if (tasks := tasks_of_srun()) > 1:
            raise ValueError(
                f"srun started {tasks} tasks that would each do the same work: start one task per machine, and let "
                "torchrun start a process per GPU: srun --ntasks-per-node=1 torchrun --nproc-per-node=GPUS SCRIPT ..."
            )
        yield hardware.select(gpu_id)
        return
    device = hardware.select(int(os.environ["LOCAL_RANK"]))
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


def tasks_of_srun() -> int:
    """In how many tasks srun runs this command: 1 without srun, even if sbatch or salloc set SLURM_NTASKS."""
    step, tasks, number = (
        int(value) if (value := os.environ.get(f"SLURM_{name}", "")).isdecimal() else 0
        for name in ("STEP_NUM_TASKS", "NTASKS", "PROCID")
    )
    return step or (tasks if number else 1)


def launch_on_all_gpus(gpu_id: int, script: str, argv: list[str] | None) -> None:
    """With --gpu-id -1 and several GPUs, replace this process by torchrun, which runs the script once per GPU.

    argv: the arguments of the script's main; None for those of this process.
    """
    if gpu_id == -1 and torch.cuda.device_count() > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
        arguments = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, *torchrun, script, *arguments])


def describe(batch_size: int) -> str:
    """One line on how a batch is divided; "" in a single process. Raises ValueError for fewer images than processes."""
    if collectives.world_size() == 1:
        return ""
    if batch_size < collectives.world_size():
        raise ValueError(f"A batch of {batch_size} images cannot be divided among {collectives.world_size()} processes")
    sizes = " or ".join(str(size) for size in sorted(set(collectives.shard_sizes(batch_size))))
    return f"{collectives.world_size()} processes: each takes {sizes} of the {batch_size} images of a batch.\n"


def sync_batchnorm(network, device: torch.device, bn_freeze: bool) -> None:
    """Let BatchNorm layers that train use the statistics of the whole batch, which torch can only do on CUDA."""
    if collectives.world_size() > 1 and not bn_freeze:
        if device.type == "cuda":
            network.model.synchronize_norms()
        else:
            print("On a CPU, each process has BatchNorm statistics of its own images.")


class Replica:
    """Calls a network and sums its gradients over the processes, overlapped with the backward pass."""

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.parallel, self.trainable = network, None

    def __call__(self, *inputs):
        if collectives.world_size() == 1 or not torch.is_grad_enabled():
            return self.network(*inputs)
        trainable = [parameter.requires_grad for parameter in self.network.parameters()]
        if trainable != self.trainable:  # DistributedDataParallel fixes the parameters that train when it is made
            self.trainable = trainable
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames a setting
                # With a static graph, layers that never run are no error.
                self.parallel = DistributedDataParallel(
                    self.network, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
                )
            self.parallel.register_comm_hook(None, sum_of_bucket)
        return self.parallel(*inputs)


def sum_of_bucket(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum instead of average the gradients: each process has computed the loss of the whole batch."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])
