"""One training step, and what the recipes do around it: parameter groups, optimizers, schedules, warm-up."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from proxy_anchor import cli

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler

EmbeddingNet = Any  # of net.embedding_net; this package does not import net
CLIP_VALUE = 10  # of each gradient element, as published

OPTIMIZERS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # the class in torch.optim, and its settings; fused: one pass over all parameters, where torch has it
    "adamw": ("AdamW", {"fused": True}),
    "adam": ("Adam", {"fused": True}),
    "sgd": ("SGD", {"momentum": 0.9, "nesterov": True, "fused": True}),
    "rmsprop": ("RMSprop", {"alpha": 0.9, "momentum": 0.9}),
}
SCHEDULES = ("step", "cosine", "constant")
FROZEN = {  # the defaults of --frozen; the first five were chosen on held-out classes, see docs/training.md
    "epochs": 30,
    "lr": 1e-4,
    "lr_schedule": "constant",
    "head": "orthogonal",
    "batch_size": 180,
    "pretrained": "imagenet",
    "warm": 0,
    "bn_freeze": 1,
}
WITH_FROZEN = {  # {argument: (its only value with --frozen, the reason)}
    "warm": (0, "the backbone never trains, so there is no warm-up"),
    "bn_freeze": (1, "BatchNorm is part of the backbone, which never trains"),
    "freeze": ("", "the whole backbone is frozen"),
    "amp": ("none", "features are computed once, in float32"),
    "compile": (False, "the backbone runs only once"),
    "cache": (None, "each image is decoded only once"),
}


def options(without: Collection[str] = ()) -> argparse.ArgumentParser:
    """Command-line flags of the recipe, without these flags."""
    parser = argparse.ArgumentParser(add_help=False)
    add = cli.adder(parser.add_argument_group("training"), without)
    add(
        "--epochs",
        default=60,
        type=cli.integer(0),
        metavar="N",
        help="passes over the training images; 0 evaluates the untrained network",
    )
    add("--optimizer", default="adamw", **cli.one_of(*OPTIMIZERS), help="optimizer; the published results used adamw")
    add("--lr", default=1e-4, type=cli.positive, help="learning rate of the network; lower it if the loss diverges")
    add(
        "--weight-decay",
        default=1e-4,
        type=cli.not_negative,
        metavar="W",
        help="weight decay of all parameters that train; raise it against overfitting",
    )
    add(
        "--lr-decay-step",
        default=10,
        type=cli.integer(1),
        metavar="N",
        help="with --lr-schedule step: lower the learning rate every N epochs; scale it with --epochs",
    )
    add(
        "--lr-decay-gamma",
        default=0.5,
        type=cli.positive,
        metavar="G",
        help="with --lr-schedule step: factor by which the learning rate is lowered each time",
    )
    add(
        "--warm",
        default=1,
        type=cli.integer(0),
        metavar="N",
        help="epochs at the start in which the backbone is frozen; 0 when training from scratch",
    )
    add(
        "--seed",
        default=1,
        type=cli.integer(0),
        metavar="S",
        help="seed of the initial weights, the order of the images and their augmentation",
    )
    return parser


def later_options() -> argparse.ArgumentParser:
    """Command-line flags of training in recipes after the paper."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("further settings")
    group.add_argument(
        "--embedding-lr",
        default=1.0,
        type=cli.positive,
        metavar="X",
        help="the embedding layer's learning rate is X times --lr",
    )
    group.add_argument(
        "--eps",
        type=cli.positive,
        help="optimizer epsilon; transformer recipes use 1e-4 (default: the optimizer's own)",
    )
    group.add_argument(
        "--lr-schedule",
        default="step",
        **cli.one_of(*SCHEDULES),
        help="step: lower the learning rate as --lr-decay-step says, as published; cosine: lower it to 0 over "
        "--epochs; constant: keep it",
    )
    group.add_argument(
        "--frozen",
        action="store_true",
        help="train only the embedding layer and the proxies, on features of the pretrained backbone that are computed "
        "once and kept; a few seconds of training, with a recipe of its own",
    )
    group.add_argument(
        "--freeze",
        default="",
        metavar="NAME[,NAME ...]",
        help="layers of the backbone that never train, e.g. patch_embed of a transformer, or patch_embed,blocks.0",
    )
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for a setting that the optimizer does not have, or that contradicts --frozen."""
    if args.eps is not None and args.optimizer == "sgd":
        parser.error("argument --eps: sgd has no such setting; adamw, adam and rmsprop do")
    if args.frozen and args.pretrained == "none":
        parser.error("argument --frozen: the backbone never trains, so it needs pretrained weights, not none")
    for name, (value, reason) in WITH_FROZEN.items():
        if args.frozen and getattr(args, name) != value:
            parser.error(f"argument --{name.replace('_', '-')}: --frozen excludes it, because {reason}")


def create_optimizer(
    name: str,
    network: EmbeddingNet,
    criterion: nn.Module,
    lr: float,
    weight_decay: float,
    embedding_lr: float = 1,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """Optimizer of the backbone at lr, the embedding layer at embedding_lr times lr, and the loss's proxies.

    The proxies' learning rate is lr, or criterion.proxy_lr times lr where the loss has this attribute. All that trains
    is decayed. eps: None for the optimizer's own.
    """
    from torch import optim

    embedding = list(network.model.embedding.parameters())
    backbone = [p for key, p in network.named_parameters() if not key.startswith("model.embedding.")]
    groups = [{"params": backbone}, {"params": embedding, "lr": lr * embedding_lr}]
    if proxies := list(criterion.parameters()):
        groups.append({"params": proxies, "lr": lr * getattr(criterion, "proxy_lr", 1)})
    settings = {"weight_decay": weight_decay} | ({} if eps is None else {"eps": eps})
    class_name, fixed = OPTIMIZERS[name]
    optimizer = getattr(optim, class_name)(groups, lr=lr, **fixed, **settings)
    if attach_optimizer := getattr(criterion, "attach_optimizer", None):
        attach_optimizer(optimizer)
    return optimizer


def create_scheduler(
    name: str, optimizer: torch.optim.Optimizer, epochs: int, step: int = 10, gamma: float = 0.5
) -> LRScheduler:
    """The schedule of the learning rate, stepped after each epoch.

    "step", as published: times gamma every `step` epochs. "cosine": lr (1 + cos(pi e / epochs)) / 2. "constant".
    """
    from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

    if name == "cosine":
        return CosineAnnealingLR(optimizer, epochs)
    return StepLR(optimizer, step, gamma if name == "step" else 1.0)


def describe_schedule(name: str, epochs: int) -> str:
    """The schedule and the settings it depends on, so that --resume rejects a different schedule."""
    return f"cosine over {epochs} epochs" if name == "cosine" else name


def set_trainable(network: EmbeddingNet, epoch: int, warm: int) -> None:
    """Warm-up: before epoch `warm` (from 0) only the embedding layer and the proxies train, from then on everything.

    Everything includes the weights and biases of frozen BatchNorm layers: with `--bn-freeze 1`, `--warm 0` never trains
    them and `--warm 1` does after the warm-up; the published results depend on it. Layers of --freeze never train.
    """
    if epoch < warm:
        network.requires_grad_(False)
        network.model.embedding.requires_grad_(True)
    elif warm > 0:
        network.requires_grad_(True)
    for parameter in network.frozen_parameters():
        parameter.requires_grad_(False)


def parameters_with_gradient(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def train_one_epoch(
    network: nn.Module,
    loss_of,
    batches,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epoch: int,
    clipped: Iterable[nn.Module] = (),
    losses: list[float] | None = None,
    report=None,
) -> float:
    """Take a step for each batch (images, labels) and return the mean loss; report(loss), if given, follows each step.

    loss_of(images, labels) -> scalar. clipped: the modules whose gradients are clipped. losses: those of the epoch's
    earlier steps, if it was interrupted; the new ones are appended. The loss is read one step late, so that a GPU never
    waits for it. With several processes, `batches` has this process's share of each batch; the gradient is still that
    of the whole batch's loss. Raises FloatingPointError, with the epoch and the step, when the loss is not finite or a
    gradient is not; an enabled scaler skips the steps of such gradients instead.
    """
    import torch
    from torch import nn

    from proxy_anchor import collectives

    network.train()  # also during warm-up
    losses = [] if losses is None else losses
    names = {parameter: name for name, parameter in network.named_parameters()}

    def read(loss, trained, norms):
        """Check a step, given its loss, the parameters it trained and the norms of their gradients."""
        loss, *norms = torch.cat([loss.view(1), *norms]).tolist()
        losses.append(loss)
        where = f"in epoch {epoch}, step {len(losses) - 1}"
        if not math.isfinite(loss):
            lr = optimizer.param_groups[0]["lr"]
            raise FloatingPointError(f"The loss is {loss} {where}, at learning rate {lr:g}")
        if wrong := [parameter for parameter, norm in zip(trained, norms) if not math.isfinite(norm)]:
            # The last is the nearest to the loss, from where gradients come.
            name = names.get(wrong[-1], "the loss's own parameters")
            raise FloatingPointError(
                f"The gradients of {len(wrong)} of {len(trained)} parameters are not finite, or too large to "
                f"square, {where}, those of {name} first; the loss is {loss:g}"
            )
        if report:
            report(losses[-1])

    previous = None
    for images, labels in batches:
        loss = loss_of(images, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for module in clipped:
            nn.utils.clip_grad_value_(module.parameters(), CLIP_VALUE)
        trained = [] if scaler.is_enabled() else parameters_with_gradient(optimizer)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norms = [torch.stack(torch._foreach_norm(gradients))] if gradients else []
        scaler.step(optimizer)
        scaler.update()
        if previous is not None:
            read(*previous)
        previous = loss.detach(), trained, norms
    if previous is not None:
        read(*previous)
    collectives.broadcast_module(network)  # rounding, and BatchNorm on CPUs, may differ between processes
    return sum(losses) / len(losses)
