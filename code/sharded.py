"""The Proxy-Anchor loss with its classes divided over the processes, and with a sample of them instead of all.

For each class the logarithms of the loss run over the batch, so that classes do not meet: a process that has the whole
batch needs no other process's proxies. Each owns a contiguous range of classes; their proxies, gradients and moments
exist nowhere else, and what the processes exchange does not grow with the number of classes.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from proxy_anchor import collectives, losses

BLOCK = 1 << 14  # classes whose first proxies are drawn at a time


def create(
    name: str, num_classes: int, embedding_size: int, margin: float, alpha: float, share: float = 1, seed: int = 0
) -> nn.Module:
    """The loss of losses.create; Proxy-Anchor with its classes divided where there are several processes.

    share: of the classes that are not in the batch, how many a step of Proxy-Anchor takes; seed: of this choice.
    The others are computed whole by each process: for Proxy-NCA's softmax, too, the library holds all proxies.
    """
    if name == "Proxy_Anchor" and share < 1:
        return SampledProxyAnchor(num_classes, embedding_size, margin, alpha, share, seed)
    if name == "Proxy_Anchor" and collectives.world_size() > 1:
        return DividedProxyAnchor(num_classes, embedding_size, margin, alpha)
    return losses.create(name, num_classes, embedding_size, margin, alpha)


class DividedProxyAnchor(losses.ProxyAnchor):
    """ProxyAnchor, of whose proxies each process has a part: (c, D), those of its `classes`.

    All processes pass the same batch, and get the same loss and the same gradient of the embeddings: those of all
    classes. It takes the sum of a number, and in the backward pass that of a gradient (B, D).
    """

    def initial_proxies(self, embedding_size: int) -> torch.Tensor:
        """Those of ProxyAnchor, which do not depend on the number of processes, without ever holding all of them."""
        self.classes = range(self.num_classes)[collectives.shard(self.num_classes)]
        own = torch.empty(len(self.classes), embedding_size)
        std = math.sqrt(2) / math.sqrt(self.num_classes)  # as kaiming_normal_ has it
        # torch draws 16 numbers at a time, so the last block is not a small one.
        starts = range(0, max(self.num_classes - BLOCK, 0) + 1, BLOCK)
        for start in starts:
            size = self.num_classes - start if start == starts[-1] else BLOCK
            drawn = torch.empty(size, embedding_size).normal_(0, std)
            begin, end = max(start, self.classes.start), min(start + size, self.classes.stop)
            if begin < end:
                own[begin - self.classes.start : end - self.classes.start] = drawn[begin - start : end - start]
        return own

    def of_unit_vectors(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return Sum.apply(self.of_own_classes(SumOfGradients.apply(x), labels))

    def of_own_classes(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not len(self.proxies):  # more processes than classes
            return 0 * (x.sum() + self.proxies.sum())
        weights = x.new_ones(len(self.proxies), 1)
        return self.of_proxies(self.proxies, x, labels, labels - self.classes.start, weights)


class SampledProxyAnchor(DividedProxyAnchor):
    """An unbiased estimate of ProxyAnchor and of its gradient: all classes of the batch and a sample of the others.

    The negative terms are a mean over the classes: each of the others is in the sample with probability `share`, and
    stands for 1/share of them. Which ones are in it follows from the seed and the number of the step alone, the same
    for any number of processes.

    `proxies` (m, D) are those of the step, a copy of their rows; the optimizer sees no others: proxies that were not
    drawn are not decayed, and their moments rest. rows: {name: (c, D)}, all proxies of the process and their moments.
    """

    def __init__(self, num_classes: int, embedding_size: int, margin: float, alpha: float, share: float, seed: int):
        super().__init__(num_classes, embedding_size, margin, alpha)
        self.share, self.seed, self.step = share, seed, 0
        self.rows = {"proxies": self.proxies.data}
        self.places = torch.empty(0, dtype=torch.long)  # (m,), ascending: of the step's proxies among the rows
        self.proxies = nn.Parameter(self.proxies.data[:0])

    def of_own_classes(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        places = labels - self.classes.start
        self.draw(places)
        if not len(self.places):
            return super().of_own_classes(x, labels)
        rows = torch.where(torch.isin(places, self.places), torch.searchsorted(self.places, places), -1)
        weights = torch.where(torch.isin(self.places, places), 1, 1 / self.share).to(x.dtype)[:, None]  # (m, 1)
        # Autograd remembers the shape of a parameter, which changes with the step.
        proxies = self.proxies.detach().requires_grad_()
        proxies.register_post_accumulate_grad_hook(self._take_gradient)
        return self.of_proxies(proxies, x, labels, rows, weights)

    def draw(self, places: torch.Tensor) -> None:
        """Take the proxies of the next step: a sample, and those of the batch, at these places where they are here.

        A GPU is waited for.
        """
        self.rows = {name: rows.to(self.proxies) for name, rows in self.rows.items()}  # wherever the module was moved
        # Philox gives its numbers by fours, and leaps to any of them.
        fours, skipped = divmod(self.classes.start, 4)
        philox = np.random.Philox(key=[self.seed % 2**64, self.step]).advance(fours)
        numbers = np.random.Generator(philox).random(skipped + len(self.classes))[skipped:]
        sample = torch.from_numpy(np.flatnonzero(numbers < self.share)).to(places.device)
        here = (places >= 0) & (places < len(self.classes))
        self.places = torch.cat([sample, places[here]]).unique()
        self.proxies.grad = None
        self.proxies.data = self.rows["proxies"][self.places]
        self.step += 1

    def _take_gradient(self, proxies):
        self.proxies.grad = proxies.grad

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer's steps, of any kind, read and write the rows."""
        optimizer.register_step_pre_hook(self._lend)
        optimizer.register_step_post_hook(self._keep)

    def _lend(self, optimizer, *_):
        moments = {name: rows[self.places] for name, rows in self.rows.items() if name != "proxies"}
        optimizer.state[self.proxies].update(moments)

    def _keep(self, optimizer, *_):
        state = optimizer.state[self.proxies]
        moments = {name: state.pop(name) for name in list(state) if state[name].ndim == 2}
        for name, values in ({"proxies": self.proxies.data} | moments).items():
            rows = self.rows.setdefault(name, torch.zeros_like(self.rows["proxies"]))
            rows[self.places] = values

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination |= {prefix + name: value for name, value in ({"step": self.step} | self.rows).items()}

    def _load_from_state_dict(self, state, prefix, *_):
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        rows = {name: value.to(self.proxies) for name, value in own.items() if name != "step"}
        if wrong := [tuple(value.shape) for value in rows.values() if value.shape != self.rows["proxies"].shape]:
            raise ValueError(f"expected rows {tuple(self.rows['proxies'].shape)}, found {wrong[0]}")
        self.step, self.rows = int(own["step"]), rows


class Sum(torch.autograd.Function):
    """The sum of a number over the processes, which share its gradient."""

    @staticmethod
    def forward(ctx, part):
        total = part.clone()
        if collectives.world_size() > 1:
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class SumOfGradients(torch.autograd.Function):
    """The same in each process; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        if collectives.world_size() > 1:
            dist.all_reduce(gradient)
        return gradient
