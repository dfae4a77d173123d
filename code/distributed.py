"""Many processes that do what one does: torch.distributed under torchrun. In a single process all of this does nothing.

The loss of a batch is not the mean of its parts' losses, since every embedding meets every other's proxy: embeddings
are gathered, every process computes the loss of the whole batch, and the gradients of the network, to which each
process contributes the part through its own images, are summed.
"""

import os
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stdout

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from proxy_anchor import hardware


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def group():
    """The group of all processes, or None in a single process."""
    return dist.group.WORLD if dist.is_initialized() else None


@contextmanager
def processes(gpu_id: int):
    """Join the processes that torchrun started, if it did; yields this process's device. Only the first one prints.

    Raises ValueError where srun started several that know nothing of each other.
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
        # File names may be of any bytes, see console.errors_in_one_line.
        with (
            open(os.devnull, "w", errors="backslashreplace") as nowhere,
            redirect_stdout(sys.stdout if rank() == 0 else nowhere),
        ):
            yield device
    finally:
        # gloo's threads need the GIL to let go of the last collective's tensors, and the group's destructor holds it
        # while it waits for them: a deadlock in torch 2.6 (pytorch#154976). Asleep, this thread lets them have it.
        time.sleep(0.1)
        dist.destroy_process_group()


def tasks_of_srun() -> int:
    """How many tasks of this command srun started: 1 without it, though sbatch and salloc may set SLURM_NTASKS."""
    step, tasks, number = (
        int(value) if (value := os.environ.get(f"SLURM_{name}", "")).isdecimal() else 0
        for name in ("STEP_NUM_TASKS", "NTASKS", "PROCID")
    )
    return step or (tasks if number else 1)


def launch_on_all_gpus(gpu_id: int, script: str, argv: list[str] | None) -> None:
    """With --gpu-id -1 and several GPUs: run the script in this process's place under torchrun, one process per GPU.

    Does not return then. argv: the arguments of the script's main, None for those of this process.
    """
    if gpu_id == -1 and torch.cuda.device_count() > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
        arguments = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, *torchrun, script, *arguments])


@contextmanager
def first_process_first():
    """What is downloaded or drawn in this context is made once, by the first process; the others then find it."""
    if dist.is_initialized() and rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def describe(batch_size: int) -> str:
    """A line on how a batch is divided, or nothing in a single process. Raises ValueError if it is too small."""
    if count() == 1:
        return ""
    if batch_size < count():
        raise ValueError(f"A batch of {batch_size} images cannot be divided among {count()} processes")
    shares = " or ".join(str(size) for size in sorted(set(sizes(batch_size))))
    return f"{count()} processes: each takes {shares} of the {batch_size} images of a batch.\n"


def with_common_statistics(network, device: torch.device, bn_freeze: bool):
    """The network; on CUDA, with the BatchNorm statistics of the whole batch, if they train. CPUs cannot do this."""
    if count() > 1 and not bn_freeze:
        if device.type == "cuda":
            network.model.synchronize_norms()
        else:
            print("On a CPU, BatchNorm statistics are those of each process's part of the batch.")
    return network


def sizes(total: int) -> list[int]:
    """How many of `total` items each process has: as equal as can be, the first ones a larger share."""
    return [len(part) for part in np.array_split(np.arange(total), count())]


def own(total: int) -> slice:
    """Which of `total` items are this process's."""
    first = sum(sizes(total)[: rank()])
    return slice(first, first + sizes(total)[rank()])


def gather(share: torch.Tensor, total: int) -> torch.Tensor:
    """The processes' shares (n, ...) of `total` rows, in their order, as (total, ...); the gradient flows back."""
    return Gather.apply(share, total) if count() > 1 else share


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, total):
        ctx.sizes = sizes(total)
        padded = share.new_zeros(max(ctx.sizes), *share.shape[1:])  # all_gather needs equal shapes
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, ctx.sizes)])

    @staticmethod
    def backward(ctx, gradient):
        # Every process computes the same loss of all rows: its own rows' gradient is already whole.
        return gradient.split(ctx.sizes)[rank()], None


class Replica:
    """Calls a network, whose gradients are summed over the processes while the backward pass goes on."""

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.parallel, self.trains = network, None

    def __call__(self, *inputs):
        if count() == 1 or not torch.is_grad_enabled():
            return self.network(*inputs)
        trains = [parameter.requires_grad for parameter in self.network.parameters()]
        if trains != self.trains:  # DistributedDataParallel only sees the parameters that train when it is made
            self.trains = trains
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames a setting
                # In a graph that it knows to be the same in each step, some layers may never run.
                self.parallel = DistributedDataParallel(
                    self.network, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
                )
            self.parallel.register_comm_hook(None, sum_of_bucket)
        return self.parallel(*inputs)


def sum_of_bucket(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The sum, not the mean: the loss is that of the whole batch."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def from_first(make):
    """The result of make() in the first process, for all of them."""
    box = [make() if rank() == 0 else None]
    if count() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def of_each(value) -> list:
    """The value of each process, in all of them, once all have come here."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def maximum(number: int) -> int:
    """The largest of the processes' numbers; on the CPU, so that no GPU is waited for."""
    if count() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast(module: torch.nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    if count() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)
