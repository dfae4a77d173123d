"""The losses by name: their command-line flags, the baselines of Proxy-Anchor, and losses in files of users."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from proxy_anchor import cli
from proxy_anchor.files import sha256

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    from torch import nn

LOSSES = ("Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive", "Triplet", "NPair")
TRANSFER_LOSSES = ("Relaxed_Contra", "RKD", "PKT")  # see distillation.create
PAIR_LOSSES = ("MS", "Contrastive", "Triplet", "NPair")  # without proxies
PROXY_LR = 100.0  # as published
SMALLEST_SHARE = 1e-15  # the draws have steps of 2**-53


def options() -> argparse.ArgumentParser:
    """Command-line flags of the loss."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss",
        default="Proxy_Anchor",
        type=name_or_file,
        metavar="NAME|FILE.py:CLASS",
        help=f"{', '.join(LOSSES)}, with the paper's settings (the last four need --IPC 2 or more), or your own loss",
    )
    group.add_argument(
        "--loss-args",
        default="",
        type=assignments,
        nargs="+",
        action=JoinedAction,
        metavar="NAME=VALUE",
        help="arguments of your own loss, e.g. s=16 m=0.5: CLASS(num_classes, embedding_size, s=16, m=0.5)",
    )
    group.add_argument(
        "--alpha",
        default=32.0,
        type=cli.positive,
        metavar="A",
        help="scale of Proxy-Anchor; the larger it is, the more the hardest images count",
    )
    group.add_argument(
        "--mrg",
        default=0.1,
        type=cli.finite,
        metavar="M",
        help="margin of Proxy-Anchor, in cosine similarity; a larger one pulls and pushes further",
    )
    return parser


def transfer_options() -> argparse.ArgumentParser:
    """Command-line flags of the loss of an embedding transfer."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss",
        default="Relaxed_Contra",
        **cli.one_of(*TRANSFER_LOSSES),
        help="Relaxed_Contra: the relaxed contrastive loss; RKD, PKT: its baselines",
    )
    group.add_argument(
        "--sigma",
        default=1.0,
        type=cli.positive,
        metavar="S",
        help="scale of the teacher's distances, with Relaxed_Contra; the smaller, the fewer pairs attract each other",
    )
    group.add_argument(
        "--delta",
        default=1.0,
        type=cli.positive,
        metavar="D",
        help="margin, with Relaxed_Contra: the other pairs are pushed this far apart, relative to the mean distance",
    )
    return parser


def later_options() -> argparse.ArgumentParser:
    """Command-line flags of the loss in recipes after the paper."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("further settings")
    group.add_argument(
        "--proxy-lr",
        default=PROXY_LR,
        type=cli.positive,
        metavar="X",
        help="the learning rate of Proxy-Anchor's proxies is X times --lr",
    )
    group.add_argument(
        "--sample-proxies",
        default=1.0,
        type=cli.share(SMALLEST_SHARE),
        metavar="SHARE",
        help="share of the classes outside the batch that Proxy-Anchor samples in each step, for millions of classes; "
        "1 uses all of them",
    )
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for arguments that the loss cannot take; adds loss_sha256, by which a file is known."""
    args.loss_sha256 = None
    if args.loss not in LOSSES:
        try:
            args.loss_sha256 = sha256(args.loss.rpartition(":")[0])
        except OSError as error:
            parser.error(f"argument --loss: {error.filename}: {error.strerror}")
    elif args.loss_args:
        parser.error(f"argument --loss-args: {args.loss} takes none; they are for a loss of your own, FILE.py:CLASS")
    if args.sample_proxies < 1 and args.loss != "Proxy_Anchor":
        parser.error(f"argument --sample-proxies: only Proxy_Anchor can sample its proxies, not {label(args.loss)}")
    if args.proxy_lr != PROXY_LR and args.loss != "Proxy_Anchor":
        parser.error(
            f"argument --proxy-lr: it is for Proxy_Anchor; {label(args.loss)} has its own, as a loss in a file by its "
            "attribute proxy_lr"
        )
    if args.loss in PAIR_LOSSES and (args.IPC or 1) < 2:
        parser.error(
            f"argument --loss: {args.loss} compares images of the same class, and a random batch has hardly any: "
            "add --IPC 4 (four images per class)"
        )


def name_or_file(text: str) -> str:
    """The type of --loss: a name of LOSSES, or FILE.py:CLASS with the absolute path of the file."""
    path, _, class_name = text.rpartition(":")
    if path.endswith(".py") and class_name.isidentifier():
        return f"{os.path.abspath(path)}:{class_name}"
    if text not in LOSSES:
        names = ", ".join(LOSSES)
        raise argparse.ArgumentTypeError(
            f"invalid choice: '{text}' (choose from {names}, or FILE.py:CLASS of your own)"
        )
    return text


def assignments(text: str) -> str:
    """The type of --loss-args: NAME=VALUE, or several with spaces between them."""
    for assignment in text.split():
        name, sign, _ = assignment.partition("=")
        if not sign or not name.isidentifier():
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found '{assignment}'")
    return text


class JoinedAction(argparse.Action):
    """Stores the values of a flag as one text, with spaces between them."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, " ".join(values))


def keywords(arguments: str) -> dict[str, object]:
    """The values of --loss-args by their names: Python literals, or else texts."""
    values: dict[str, object] = {}
    for assignment in arguments.split():
        name, _, text = assignment.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def label(name: str) -> str:
    """The name of a loss without its file."""
    return name.rpartition(":")[2]


def settings_in_words(name: str, margin: float, alpha: float, arguments: str, proxy_lr: float = PROXY_LR) -> str:
    """The loss's settings in the name of a run's folder; as published, every loss of LOSSES shows margin and alpha."""
    if name in LOSSES:
        return f"alpha{alpha:g}_mrg{margin:g}" + (f"_proxylr{proxy_lr:g}" if proxy_lr != PROXY_LR else "")
    return "_".join(re.sub(r"[^\w.,+-]", "-", text.replace("=", "", 1)) for text in arguments.split())


def create(
    name: str,
    num_classes: int,
    embedding_size: int,
    margin: float = 0.1,
    alpha: float = 32.0,
    arguments: str = "",
    share: float = 1,
    seed: int = 0,
    proxy_lr: float = PROXY_LR,
    synthesis: float = 0,
) -> nn.Module:
    """A loss by its name in LOSSES or its FILE.py:CLASS: module (embeddings (B, D), labels (B,)) -> scalar.

    All settings but `arguments` are Proxy-Anchor's. share: of the classes outside the batch that each step samples;
    synthesis: how many synthetic images there are for each image; both drawn by this seed. With several processes its
    classes are sharded; every process computes the whole of any other loss. arguments are those of a file's class. The
    baselines are pytorch-metric-learning's, with the settings of the published comparison. A loss may have the
    attributes proxy_lr and clipped, see ProxyAnchor; without them its parameters learn as fast as the network, and
    their gradients are not clipped. Raises ValueError for another name, ImportError without that library.
    """
    if name == "Proxy_Anchor":
        criterion: Any = create_proxy_anchor(num_classes, embedding_size, margin, alpha, share, synthesis, seed)
        criterion.proxy_lr = proxy_lr
        return criterion
    if name in LOSSES:
        return create_baseline(name, num_classes, embedding_size)
    if ":" in name:
        return create_from_file(name, num_classes, embedding_size, keywords(arguments))
    raise ValueError(f"There is no loss '{name}'; there are {', '.join(LOSSES)}")


def create_proxy_anchor(
    num_classes: int, embedding_size: int, margin: float, alpha: float, share: float, synthesis: float, seed: int
) -> nn.Module:
    """Proxy-Anchor, with all of its classes or a sample of them, with synthetic ones or without; see create."""
    from proxy_anchor import collectives
    from proxy_anchor.losses import ProxyAnchor
    from proxy_anchor.sharded import SampledProxyAnchor, ShardedProxyAnchor
    from proxy_anchor.upgrades.synthesis import SyntheticProxyAnchor, SyntheticSampledProxyAnchor

    settings = num_classes, embedding_size, margin, alpha
    if synthesis and share < 1:
        return SyntheticSampledProxyAnchor(*settings, ratio=synthesis, share=share, seed=seed)
    if synthesis:
        return SyntheticProxyAnchor(*settings, ratio=synthesis, seed=seed)
    if share < 1:
        return SampledProxyAnchor(*settings, share, seed)
    return ShardedProxyAnchor(*settings) if collectives.world_size() > 1 else ProxyAnchor(*settings)


def create_from_file(name: str, num_classes: int, embedding_size: int, arguments: dict[str, object]) -> nn.Module:
    """FILE.py:CLASS, called as CLASS(num_classes, embedding_size, **arguments).

    Raises ValueError if there is no such class, if it does not accept the arguments or is no module, and, when it is
    called, if it does not return a scalar.
    """
    from torch import nn

    path, _, class_name = name.rpartition(":")
    make = getattr(import_file(path), class_name, None)
    if make is None:
        raise ValueError(f"{path} has no class {class_name}")
    try:
        inspect.signature(make).bind(num_classes, embedding_size, **arguments)
    except TypeError as error:
        names = ", ".join(["num_classes", "embedding_size", *arguments])
        raise ValueError(f"{class_name} does not accept the arguments {names}: {error}; see --loss-args") from error
    loss = make(num_classes, embedding_size, **arguments)
    if not isinstance(loss, nn.Module):
        raise ValueError(f"{path}: expected {class_name} to be a torch.nn.Module, found {type(loss).__name__}")
    loss.register_forward_hook(check_scalar)
    return loss


def import_file(path: str) -> ModuleType:
    """The module in a file, which can import others from its folder; dataclasses and pickle find it by its name."""
    if (folder := os.path.dirname(path)) not in sys.path:
        sys.path.append(folder)  # after this code's own modules, whose names it may have too
    module = ModuleType(f"loss_file_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))
    return module


def check_scalar(loss: nn.Module, _, value) -> None:
    """Raise ValueError if the loss has not returned a scalar."""
    import torch

    if not isinstance(value, torch.Tensor) or value.ndim:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{type(loss).__name__} returned {found}, expected a scalar such as the mean over the batch")


def with_miner(loss: nn.Module, miner: nn.Module) -> nn.Module:
    """A loss of pytorch-metric-learning over what one of its miners, for pairs or triplets, picks from the batch."""
    loss.miner = miner
    loss.register_forward_pre_hook(add_picks)
    return loss


def add_picks(loss: Any, batch: tuple) -> tuple:
    """The embeddings and labels of a batch, and what the loss's miner picks from it."""
    return *batch, loss.miner(*batch)


def create_baseline(name: str, num_classes: int, embedding_size: int) -> nn.Module:
    """One of the losses that Proxy-Anchor is compared with, see create."""
    # Each setting is given, even a default one: defaults change between versions.
    from pytorch_metric_learning import distances, losses, miners, reducers
    from torch import nn

    euclidean = {"distance": distances.LpDistance(normalize_embeddings=True, p=2, power=1)}
    cosine = {"distance": distances.CosineSimilarity(p=2, power=1)}
    mean, mean_of_nonzero = {"reducer": reducers.MeanReducer()}, {"reducer": reducers.AvgNonZeroReducer()}
    if name == "Proxy_NCA":
        squared = distances.LpDistance(normalize_embeddings=True, p=2, power=2)
        return losses.ProxyNCALoss(
            num_classes, embedding_size, softmax_scale=32, weight_init_func=nn.init.normal_, distance=squared, **mean
        )
    if name == "MS":
        return with_miner(
            losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, **cosine, **mean),
            miners.MultiSimilarityMiner(epsilon=0.1, **cosine),
        )
    if name == "Contrastive":
        return losses.ContrastiveLoss(pos_margin=0, neg_margin=0.5, **euclidean, **mean_of_nonzero)
    if name == "Triplet":
        return with_miner(
            losses.TripletMarginLoss(
                margin=0.1, swap=False, smooth_loss=False, triplets_per_anchor="all", **euclidean, **mean_of_nonzero
            ),
            miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard", **euclidean),
        )
    # NPair; it refuses embeddings that its distance normalises.
    return losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False, power=1), **mean)
