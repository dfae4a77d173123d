"""Collectives of torch.distributed. In a single process they return their input.

Where `total` rows are sharded over the processes, each has a contiguous range of them: see shard.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard_sizes(total: int) -> list[int]:
    """How many of `total` rows each process has; where they cannot be equal, the first processes have one more."""
    size, remainder = divmod(total, world_size())
    return [size + (number < remainder) for number in range(world_size())]


def shard(total: int) -> slice:
    """The rows of this process among `total`."""
    sizes = shard_sizes(total)
    start = sum(sizes[: rank()])
    return slice(start, start + sizes[rank()])


def gather_shards(x: torch.Tensor, total: int) -> torch.Tensor:
    """The shards (n, ...) of all processes as (total, ...), with a gradient: see GatherShards."""
    return GatherShards.apply(x, total) if world_size() > 1 else x


class GatherShards(torch.autograd.Function):
    """Concatenates the shards. Every process computes the same loss of all rows, so a shard's gradient is complete."""

    @staticmethod
    def forward(ctx, x, total):
        ctx.sizes = shard_sizes(total)
        return torch.cat(_all_gather_rows(x, ctx.sizes, None))

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.sizes)[rank()], None


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum over the processes; each has the gradient of the sum."""
    return AllReduce.apply(x) if world_size() > 1 else x


class AllReduce(torch.autograd.Function):
    """The sum forward, the identity backward."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def all_reduce_gradient(x: torch.Tensor) -> torch.Tensor:
    """x, the same in all processes; its gradient is the sum of theirs."""
    return AllReduceGradient.apply(x) if world_size() > 1 else x


class AllReduceGradient(torch.autograd.Function):
    """The identity forward, the sum backward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def all_reduce_max(number: int) -> int:
    """The largest number of all processes. It is reduced on the CPU, so no GPU has to be waited for."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_gather_object(value) -> list:
    """The values of all processes, by rank. No process goes on before all have called this."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """The result of make() in the process of rank 0, for all processes; the others do not call it."""
    result = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def broadcast_module(module: torch.nn.Module) -> None:
    """Overwrite the parameters and buffers of all processes with those of rank 0."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


@contextmanager
def rank_zero_first():
    """The process of rank 0 runs this context before the others, which then find what it downloaded or drew."""
    if dist.is_initialized() and rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


class Processes:
    """The processes of a torch.distributed group, or this one alone for None."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.size = dist.get_world_size(group) if group else 1
        self.rank = dist.get_rank(group) if group else 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the processes; overwrites x."""
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The maximum of each element over the processes; overwrites x."""
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def _all_reduce(self, x, operation):
        if self.group:
            dist.all_reduce(x, operation, self.group)
        return x

    def concat_columns(self, x: torch.Tensor) -> torch.Tensor:
        """The columns (n, w) of each of N processes as (n, N w)."""
        return torch.cat(_all_gather(x, self.size, self.group), dim=1) if self.group else x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The x of each process; their numbers of rows may differ."""
        if not self.group:
            return [x]
        sizes = _all_gather(torch.tensor(len(x), device=x.device), self.size, self.group)
        return _all_gather_rows(x, list(map(int, sizes)), self.group)

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """The x of the process of this rank; overwrites that of the others."""
        if self.group:
            dist.broadcast(x, dist.get_global_rank(self.group, source), self.group)
        return x


ALONE = Processes()


def world() -> Processes:
    """All processes."""
    return Processes(dist.group.WORLD) if dist.is_initialized() else ALONE


def _all_gather(x: torch.Tensor, size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    tensors = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(tensors, x.contiguous(), group)
    return tensors


def _all_gather_rows(x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The rows of each process, where their numbers `sizes` may differ: padded, for all_gather needs equal shapes."""
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    return [rows[:size] for rows, size in zip(_all_gather(padded, len(sizes), group), sizes)]
