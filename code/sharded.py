"""The Proxy-Anchor loss with its classes sharded over the processes, or with a random sample of them.

The sums inside the loss's logarithms run over the batch, so the terms of two classes are independent: a process that
has the whole batch needs no other process's proxies. Each process holds a contiguous range of classes, with their
proxies, gradients and moments. What the processes exchange does not grow with the number of classes.
"""

import math

import numpy as np
import torch
from torch import nn

from proxy_anchor import collectives, losses
from proxy_anchor.blocked import ProxyAnchorFunction
from proxy_anchor.vectors import norms

BLOCK = 1 << 14  # classes whose initial proxies are drawn at a time


class ShardedProxyAnchor(nn.Module):
    """losses.ProxyAnchor of which each process has the proxies (c, D) of its own `classes`.

    All processes pass the same batch, and get the same loss and the same gradient of the embeddings, those of all
    classes. They exchange one number and, in the backward pass, a gradient (B, D).
    """

    proxy_lr = losses.ProxyAnchor.proxy_lr
    clipped = losses.ProxyAnchor.clipped

    def __init__(self, num_classes: int, embedding_size: int, margin: float, alpha: float):
        super().__init__()
        self.num_classes = num_classes
        self.classes = range(num_classes)[collectives.shard(num_classes)]
        self.margin = margin
        self.alpha = alpha
        self.proxies = nn.Parameter(initial_proxies(num_classes, embedding_size, self.classes))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As losses.ProxyAnchor.forward."""
        labels = losses.checked_labels(labels, embeddings, self.num_classes, self.proxies.shape[1])
        with torch.autocast(embeddings.device.type, enabled=False):
            x, _ = losses.in_full_precision(embeddings, self.proxies)
            x = collectives.all_reduce_gradient(x / norms(x))
            return collectives.all_reduce(self.local_terms(x, labels))

    def local_terms(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The part of the loss that comes from this process's classes; x (B, D) of unit length."""
        weights = x.new_ones(len(self.proxies), 1)
        return self.terms(self.proxies, x, labels, self.rows_of(labels), weights, self.num_classes)

    def rows_of(self, labels: torch.Tensor) -> torch.Tensor:
        """The row of each class among the proxies of the step; -1 for those without one in this process."""
        return positions(labels, self.classes)

    def terms(self, proxies, x, labels, rows, weights, num_classes: int) -> torch.Tensor:
        """The terms of these proxies, see ProxyAnchorFunction."""
        if not len(proxies):  # more processes than classes
            return 0 * (x.sum() + proxies.sum())
        settings = self.margin, self.alpha, rows, weights, num_classes
        return ProxyAnchorFunction.apply(x, proxies.to(x.dtype), labels, *settings)


def positions(numbers: torch.Tensor, among: range, offset: int = 0) -> torch.Tensor:
    """The position of each number in the range, from the offset on; -1 for others."""
    return torch.where((numbers >= among.start) & (numbers < among.stop), numbers - among.start + offset, -1)


def initial_proxies(num_classes: int, embedding_size: int, classes: range) -> torch.Tensor:
    """The initial proxies of these classes, as losses.ProxyAnchor draws them, without ever holding all of them."""
    proxies = torch.empty(len(classes), embedding_size)
    std = math.sqrt(2) / math.sqrt(num_classes)  # as kaiming_normal_ computes it
    # torch draws 16 numbers at a time, so the last block must not be a small one.
    starts = range(0, max(num_classes - BLOCK, 0) + 1, BLOCK)
    for start in starts:
        size = num_classes - start if start == starts[-1] else BLOCK
        block = torch.empty(size, embedding_size).normal_(0, std)
        begin, end = max(start, classes.start), min(start + size, classes.stop)
        if begin < end:
            proxies[begin - classes.start : end - classes.start] = block[begin - start : end - start]
    return proxies


class SeededProxyAnchor(ShardedProxyAnchor):
    """A ShardedProxyAnchor that draws random numbers in each step.

    They depend on the seed and the number of the step alone, not on the number of processes.
    """

    def __init__(self, num_classes: int, embedding_size: int, margin: float, alpha: float, seed: int):
        super().__init__(num_classes, embedding_size, margin, alpha)
        self.seed, self.step = seed, 0  # a number of the host: the draw need not wait for a GPU

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = super().forward(embeddings, labels)
        self.step += 1
        return loss

    def bit_generator(self) -> np.random.Philox:
        return np.random.Philox(key=[self.seed % 2**64, self.step])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}step"] = self.step

    def _load_from_state_dict(self, state, prefix, *more):
        self.step = int(state.pop(f"{prefix}step"))
        super()._load_from_state_dict(state, prefix, *more)


class SampledProxyAnchor(SeededProxyAnchor):
    """An unbiased estimate of Proxy-Anchor and its gradient, from all classes of the batch and a sample of the others.

    The negative terms are a mean over the classes. Each class outside the batch is sampled with probability `share`,
    and then represents 1/share classes.

    `proxies` (m, D) are those of the step, copied from their rows. The optimizer sees no others: proxies that were not
    drawn are not decayed, and their moments do not change. rows: {name: (c, D)}, all local proxies and their moments.
    """

    def __init__(self, num_classes: int, embedding_size: int, margin: float, alpha: float, share: float, seed: int):
        super().__init__(num_classes, embedding_size, margin, alpha, seed)
        self.share = share
        self.rows = {"proxies": self.proxies.data}
        self.sample = torch.empty(0, dtype=torch.long)  # (m,), ascending: which rows the step's proxies are
        self.proxies = nn.Parameter(self.proxies.data[:0])

    def local_terms(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        local = labels - self.classes.start
        self.draw(local)
        weights = torch.where(torch.isin(self.sample, local), 1, 1 / self.share).to(x.dtype)[:, None]  # (m, 1)
        # Autograd remembers the shape of a parameter, which changes with the step.
        proxies = self.proxies.detach().requires_grad_()
        proxies.register_post_accumulate_grad_hook(self._take_gradient)
        return self.terms(proxies, x, labels, self.rows_of(labels), weights, self.num_classes)

    def rows_of(self, labels: torch.Tensor) -> torch.Tensor:
        local = labels - self.classes.start
        return torch.where(torch.isin(local, self.sample), torch.searchsorted(self.sample, local), -1)

    def draw(self, local: torch.Tensor) -> None:
        """Take the proxies of the step: a sample, and the local ones of the batch. It forces a host sync.

        local (B,): the rows of the batch's classes, outside of the range of rows for those of other processes.
        """
        self.rows = {name: rows.to(self.proxies) for name, rows in self.rows.items()}  # follow the module's device
        # Philox draws four numbers at a time, and can skip any multiple of four.
        fours, skipped = divmod(self.classes.start, 4)
        philox = self.bit_generator().advance(fours)
        numbers = np.random.Generator(philox).random(skipped + len(self.classes))[skipped:]
        drawn = torch.from_numpy(np.flatnonzero(numbers < self.share)).to(local.device)
        is_local = (local >= 0) & (local < len(self.classes))
        self.sample = torch.cat([drawn, local[is_local]]).unique()
        self.proxies.grad = None
        self.proxies.data = self.rows["proxies"][self.sample]

    def _take_gradient(self, proxies):
        self.proxies.grad = proxies.grad

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the steps of the optimizer, of any kind, read and write the rows."""
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)

    def before_step(self, optimizer, *_):
        """Give the optimizer the moments of the step's proxies."""
        moments = {name: rows[self.sample] for name, rows in self.rows.items() if name != "proxies"}
        optimizer.state[self.proxies].update(moments)

    def after_step(self, optimizer, *_):
        """Store the step's proxies and take their moments back."""
        state = optimizer.state[self.proxies]
        moments = {name: state.pop(name) for name in list(state) if state[name].ndim == 2}
        for name, values in ({"proxies": self.proxies.data} | moments).items():
            rows = self.rows.setdefault(name, torch.zeros_like(self.rows["proxies"]))
            rows[self.sample] = values

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: rows for name, rows in self.rows.items()}  # not the proxies of the step

    def _load_from_state_dict(self, state, prefix, *_):
        entries = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        rows = {name: value.to(self.proxies) for name, value in entries.items() if name != "step"}
        if wrong := [tuple(value.shape) for value in rows.values() if value.shape != self.rows["proxies"].shape]:
            raise ValueError(f"expected rows {tuple(self.rows['proxies'].shape)}, found {wrong[0]}")
        self.step, self.rows = int(entries["step"]), rows


def take_rows(content: dict) -> dict[str, torch.Tensor]:
    """Remove the rows of classes, the proxies and their moments, from the content of a run's checkpoint.

    Returns them by names such as "criterion proxies" and "optimizer exp_avg".
    """
    return {
        f"{name} {key}": entry.pop(key)
        for name, entry in _entries_with_rows(content).items()
        for key in list(entry)
        if isinstance(entry[key], torch.Tensor) and entry[key].ndim == 2
    }


def put_rows(content: dict, rows: dict[str, torch.Tensor]) -> None:
    """Put rows of classes into the content of a run's checkpoint, by the names of take_rows."""
    entries = _entries_with_rows(content)
    for full_name, values in rows.items():
        name, key = full_name.split(" ")
        entries[name][key] = values


def _entries_with_rows(content: dict) -> dict[str, dict]:
    """The state of the loss, and the optimizer's of the proxies, as copies in the content: the originals are in use."""
    proxies = content["optimizer"]["param_groups"][-1]["params"][0]  # the last group has the proxies alone
    state = content["optimizer"]["state"]
    content["criterion"], state[proxies] = dict(content["criterion"]), dict(state.get(proxies, {}))
    return {"criterion": content["criterion"], "optimizer": state[proxies]}
