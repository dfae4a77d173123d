"""Proxy-Anchor loss (Kim et al., CVPR 2020, arXiv 2003.13911) and the losses it is compared with."""

import argparse
import ast
import inspect
import os
import re
import runpy

import torch
import torch.nn.functional as F
from torch import nn

from proxy_anchor import blocked, cli
from proxy_anchor.files import sha256
from proxy_anchor.vectors import norms, whole_numbers


def equation(
    embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor, margin=0.1, alpha=32.0
) -> torch.Tensor:
    """Equation 4 of the paper, see ProxyAnchor: embeddings (B, D), proxies (C, D), labels (B,) -> scalar.

    It has derivatives of any order, also with respect to margin and alpha. Raises ValueError as ProxyAnchor does.
    """
    labels = checked_labels(labels, embeddings, *proxies.shape)

    s = embeddings / norms(embeddings) @ (proxies / norms(proxies)).T  # (B, C)
    positive = F.one_hot(labels, len(proxies)).bool()
    one = torch.zeros_like(s[:1])  # log(1 + sum exp(z)) is the logsumexp of z and a 0
    pull = torch.cat([one, (-alpha * (s - margin)).masked_fill(~positive, -torch.inf)]).logsumexp(dim=0)
    push = torch.cat([one, (alpha * (s + margin)).masked_fill(positive, -torch.inf)]).logsumexp(dim=0)
    return pull.sum() / positive.any(dim=0).sum() + push.mean()


class ProxyAnchor(nn.Module):
    """Proxy-Anchor loss, equation 4 of the paper.

        1/|P+| sum_{p in P+} log(1 + sum_{x in X+_p} exp(-alpha (s(x, p) - margin)))
      + 1/|P|  sum_{p in P}  log(1 + sum_{x in X-_p} exp( alpha (s(x, p) + margin)))

    s is the cosine similarity, P are all proxies (one per class), P+ those with a positive in the batch, X+_p and X-_p
    the embeddings of p's class and of all other classes. Half-precision embeddings are converted to float32.

    It computes `equation` in blocks of classes, with first derivatives only. For other derivatives, call `equation`.
    """

    proxy_lr = 100  # learning rate of the proxies, as a multiple of the network's
    clipped = True  # gradients of the proxies are clipped, as the network's are

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0):
        super().__init__()
        self.margin = margin
        self.alpha = alpha
        self.proxies = nn.Parameter(nn.init.kaiming_normal_(torch.empty(num_classes, embedding_size), mode="fan_out"))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """embeddings (B, D), labels (B,) of 0 ... C - 1 -> scalar. Raises ValueError on other shapes or labels."""
        labels = checked_labels(labels, embeddings, *self.proxies.shape)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, proxies = in_full_precision(embeddings, self.proxies)
            return blocked.equation(x, proxies, labels, self.margin, self.alpha)


def in_full_precision(embeddings: torch.Tensor, proxies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the same type: float32, or float64 if one of them is."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(embeddings.dtype, proxies.dtype))
    return embeddings.to(dtype), proxies.to(dtype)


def checked_labels(
    labels: torch.Tensor, embeddings: torch.Tensor, num_classes: int, embedding_size: int
) -> torch.Tensor:
    """The labels of a batch as int64. Raises ValueError for labels other than 0 ... num_classes - 1 or other shapes.

    On CUDA, labels out of range end the process by an assertion on the device: a check on the host would force a sync.
    """
    labels = whole_numbers(labels)
    fits = embeddings.ndim == 2 and embeddings.shape[1] == embedding_size and labels.shape == embeddings.shape[:1]
    if not fits or not len(labels):
        raise ValueError(
            f"Expected embeddings (B, {embedding_size}) and labels (B,) of one or more images, "
            f"found {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    in_range = ((labels >= 0) & (labels < num_classes)).all()
    if labels.is_cuda:
        torch._assert_async(in_range, f"Expected labels from 0 to {num_classes - 1}")
    elif not in_range:
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}, found {labels.min()} to {labels.max()}")
    return labels


class MinedLoss(nn.Module):
    """A loss of pytorch-metric-learning over the pairs or triplets that one of its miners picks from the batch."""

    def __init__(self, loss: nn.Module, miner: nn.Module):
        super().__init__()
        self.loss = loss
        self.miner = miner

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """embeddings (B, D), labels (B,) -> scalar."""
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


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


def later_options() -> argparse.ArgumentParser:
    """Command-line flags of the loss in recipes after the paper."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("further settings")
    group.add_argument(
        "--sample-proxies",
        default=1.0,
        type=cli.share(SMALLEST_SHARE),
        metavar="SHARE",
        help="share of the classes outside the batch that Proxy-Anchor samples in each step, for millions of classes; "
        "1: all, exact",
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
        parser.error(
            f"argument --sample-proxies: {label(args.loss)} takes all proxies or none; Proxy_Anchor samples them"
        )
    if args.loss in OF_PAIRS and (args.IPC or 1) < 2:
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


LOSSES = ("Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive", "Triplet", "NPair")
OF_PAIRS = ("MS", "Contrastive", "Triplet", "NPair")  # without proxies
SMALLEST_SHARE = 1e-15  # the draws have steps of 2**-53


def label(name: str) -> str:
    """The name of a loss without its file."""
    return name.rpartition(":")[2]


def settings_in_words(name: str, margin: float, alpha: float, arguments: str) -> str:
    """The settings in the name of a run's folder. Published names have margin and alpha for every loss of LOSSES."""
    if name in LOSSES:
        return f"alpha{alpha:g}_mrg{margin:g}"
    return "_".join(re.sub(r"[^\w.,+-]", "-", text.replace("=", "", 1)) for text in arguments.split())


def create(
    name: str, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0, arguments: str = ""
) -> nn.Module:
    """A loss by its name in LOSSES or its FILE.py:CLASS: module (embeddings (B, D), labels (B,)) -> scalar.

    margin and alpha are Proxy-Anchor's, arguments those of a file's class. The baselines are pytorch-metric-learning's,
    with the settings of the published comparison. A loss may have the attributes proxy_lr and clipped, see ProxyAnchor;
    without them its parameters learn as fast as the network, and their gradients are not clipped. Raises ValueError for
    another name, ImportError without that library.
    """
    if name == "Proxy_Anchor":
        return ProxyAnchor(num_classes, embedding_size, margin, alpha)
    if name in LOSSES:
        return create_baseline(name, num_classes, embedding_size)
    if ":" in name:
        return create_from_file(name, num_classes, embedding_size, keywords(arguments))
    raise ValueError(f"There is no loss '{name}'; there are {', '.join(LOSSES)}")


def create_from_file(name: str, num_classes: int, embedding_size: int, arguments: dict[str, object]) -> nn.Module:
    """FILE.py:CLASS, called as CLASS(num_classes, embedding_size, **arguments).

    Raises ValueError if there is no such class, if it does not accept the arguments or is no module, and, when it is
    called, if it does not return a scalar.
    """
    path, _, class_name = name.rpartition(":")
    make = runpy.run_path(path).get(class_name)
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


def check_scalar(loss: nn.Module, _, value) -> None:
    """Raise ValueError if the loss has not returned a scalar."""
    if not isinstance(value, torch.Tensor) or value.ndim:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{type(loss).__name__} returned {found}, expected a scalar such as the mean over the batch")


def create_baseline(name: str, num_classes: int, embedding_size: int) -> nn.Module:
    """One of the losses that Proxy-Anchor is compared with, see create."""
    # Only the comparison needs it. Each setting is given, even a default one: defaults change between versions.
    from pytorch_metric_learning import distances, losses, miners, reducers

    euclidean = {"distance": distances.LpDistance(normalize_embeddings=True, p=2, power=1)}
    cosine = {"distance": distances.CosineSimilarity(p=2, power=1)}
    mean, mean_of_nonzero = {"reducer": reducers.MeanReducer()}, {"reducer": reducers.AvgNonZeroReducer()}
    if name == "Proxy_NCA":
        squared = distances.LpDistance(normalize_embeddings=True, p=2, power=2)
        return losses.ProxyNCALoss(
            num_classes, embedding_size, softmax_scale=32, weight_init_func=nn.init.normal_, distance=squared, **mean
        )
    if name == "MS":
        return MinedLoss(
            losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, **cosine, **mean),
            miners.MultiSimilarityMiner(epsilon=0.1, **cosine),
        )
    if name == "Contrastive":
        return losses.ContrastiveLoss(pos_margin=0, neg_margin=0.5, **euclidean, **mean_of_nonzero)
    if name == "Triplet":
        return MinedLoss(
            losses.TripletMarginLoss(
                margin=0.1, swap=False, smooth_loss=False, triplets_per_anchor="all", **euclidean, **mean_of_nonzero
            ),
            miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard", **euclidean),
        )
    # NPair; it refuses embeddings that its distance normalises.
    return losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False, power=1), **mean)
