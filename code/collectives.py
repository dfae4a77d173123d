"""What processes exchange that each hold a part of the rows of something. In a single process nothing is exchanged."""

import torch
import torch.distributed as dist


class Parts:
    """The processes of a torch.distributed group; None for this one alone."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.count = dist.get_world_size(group) if group else 1
        self.rank = dist.get_rank(group) if group else 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Of tensors of one shape; x is overwritten."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Of each element; x is overwritten."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def _reduced(self, x, operation):
        if self.group:
            dist.all_reduce(x, operation, self.group)
        return x

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """(n, w) of each process as (n, N w)."""
        return torch.cat(self._gathered(x), dim=1) if self.group else x

    def each(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The x of each process, of any number of rows."""
        if not self.group:
            return [x]
        lengths = [int(length) for length in self._gathered(torch.tensor(len(x), device=x.device))]
        filled = x.new_zeros(max(lengths), *x.shape[1:])
        filled[: len(x)] = x
        return [rows[:length] for rows, length in zip(self._gathered(filled), lengths)]

    def _gathered(self, x):
        found = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(found, x.contiguous(), self.group)
        return found

    def sent(self, x: torch.Tensor, owner: int) -> torch.Tensor:
        """The owner's x, for all processes; that of the others is overwritten."""
        if self.group:
            dist.broadcast(x, dist.get_global_rank(self.group, owner), self.group)
        return x
