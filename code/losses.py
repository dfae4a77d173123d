"""Proxy-Anchor loss (Kim et al., CVPR 2020, arXiv 2003.13911) and the losses it is compared with."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from proxy_anchor import cli
from proxy_anchor.vectors import norms

BLOCK_ELEMENTS = 1 << 19  # similarities at a time; they stay in a CPU's cache


def equation(
    embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor, margin=0.1, alpha=32.0
) -> torch.Tensor:
    """Equation 4 of the paper, see ProxyAnchor, on the whole matrix of similarities.

    It has derivatives of any order, also with respect to margin and alpha. Raises ValueError as ProxyAnchor does.
    """
    s = embeddings / norms(embeddings) @ (proxies / norms(proxies)).T  # (B, C)
    positive = F.one_hot(checked(labels, embeddings, *proxies.shape), len(proxies)).bool()
    one = torch.zeros_like(s[:1])  # log(1 + sum exp(z)) is logsumexp over z and a 0
    pull = torch.cat([one, (-alpha * (s - margin)).masked_fill(~positive, -torch.inf)]).logsumexp(dim=0)
    push = torch.cat([one, (alpha * (s + margin)).masked_fill(positive, -torch.inf)]).logsumexp(dim=0)
    return pull.sum() / positive.any(dim=0).sum() + push.mean()


def whole_numbers(labels: torch.Tensor, name: str = "labels") -> torch.Tensor:
    """Labels, of any integer type, as int64. Raises ValueError for anything else."""
    kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels)
    if not isinstance(kind, torch.dtype) or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        found = kind if isinstance(kind, torch.dtype) else kind.__name__
        raise ValueError(f"Expected {name} as a tensor of whole numbers, found {found}")
    return labels.long()


def checked(labels: torch.Tensor, embeddings: torch.Tensor, num_classes: int, embedding_size: int) -> torch.Tensor:
    """The labels of a batch as int64. Raises ValueError for others than 0 ... num_classes - 1 and for other shapes.

    On CUDA, labels out of range end the process by an assertion on the device, for which the host does not wait.
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


class ProxyAnchor(nn.Module):
    """Proxy-Anchor loss, equation 4 of the paper.

        1/|P+| sum_{p in P+} log(1 + sum_{x in X+_p} exp(-alpha (s(x, p) - margin)))
      + 1/|P|  sum_{p in P}  log(1 + sum_{x in X-_p} exp( alpha (s(x, p) + margin)))

    s is the cosine similarity, P are all proxies (one per class), P+ those with a positive in the batch, X+_p and X-_p
    the embeddings of p's class and of all others. Half-precision embeddings are converted to float32. It needs the
    memory of the proxies and their gradient, for any number of classes, and gives first derivatives alone; the
    function `equation` gives the others.
    """

    proxy_lr = 100  # learning rate of the proxies, as a multiple of the network's
    clipped = True  # gradients of the proxies are clipped, as the network's are

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0):
        super().__init__()
        self.num_classes = num_classes
        self.margin = margin
        self.alpha = alpha
        self.proxies = nn.Parameter(self.initial_proxies(embedding_size))  # (C, D)

    def initial_proxies(self, embedding_size: int) -> torch.Tensor:
        return nn.init.kaiming_normal_(torch.empty(self.num_classes, embedding_size), mode="fan_out")

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """embeddings (B, D), labels (B,) of 0 ... C - 1 -> scalar. Raises ValueError on other shapes or labels."""
        labels = checked(labels, embeddings, self.num_classes, self.proxies.shape[1])
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(torch.float32, torch.promote_types(embeddings.dtype, self.proxies.dtype))
            embeddings = embeddings.to(dtype)
            return self.of_unit_vectors(embeddings / norms(embeddings), labels)

    def of_unit_vectors(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.of_proxies(self.proxies, x, labels, rows=labels, weights=x.new_ones(len(self.proxies), 1))

    def of_proxies(self, proxies, x, labels, rows, weights) -> torch.Tensor:
        """The terms of the classes of these proxies, all or a part of them; see ProxyAnchorFunction."""
        proxies = proxies.to(x.dtype)
        return ProxyAnchorFunction.apply(x, proxies, labels, rows, weights, self.num_classes, self.margin, self.alpha)


class ProxyAnchorFunction(torch.autograd.Function):
    """The equation and its gradient in one pass over blocks of classes.

    A class's terms depend on others only by the factors 1/|P+| and 1/|P|, known beforehand, so the gradient of
    a block is complete as soon as its similarities are there, and nothing of size B x C is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, proxies, labels, rows, weights, num_classes, margin, alpha):
        """x (B, D) of unit length, proxies (c, D) of any length, labels (B,).

        rows (B,): where the proxies have that of each embedding's class; outside of 0 ... c - 1 if it is not among
        them. weights (c, 1): how many of the num_classes classes each proxy's negative term stands for.
        """
        batch = len(x)
        columns = torch.arange(batch, device=x.device)
        here = (rows >= 0) & (rows < len(proxies))
        same = labels[:, None] == labels  # (B, B)
        with_positive = (1 / same.sum(dim=1).to(x.dtype)).sum()  # |P+|: a class of n embeddings counts n times 1/n

        # Positives: one similarity for each embedding, that with the proxy of its class. log(1 + sum exp(z)) and its
        # derivatives exp(z) / (1 + sum exp(z)), without overflow, from log_softmax over z with a 0 in front.
        p = proxies[rows.clamp(0, len(proxies) - 1)]  # (B, D)
        p_norms = norms(p)
        s = (x * p).sum(dim=1) / p_norms[:, 0]  # (B,)
        z = torch.where(same, -alpha * (s - margin), -torch.inf)  # (B, B): row i holds all positives of i's class
        log_shares = F.log_softmax(F.pad(z, (1, 0)), dim=1)  # (B, 1 + B)
        # A class is in as many rows as it has embeddings.
        loss = -torch.where(here, log_shares[:, 0] / same.sum(dim=1), 0).sum() / with_positive
        positive_slopes = -alpha / with_positive * log_shares[columns, 1 + columns].exp()  # (B,): dL/ds

        grad_x = torch.zeros_like(x) if any(ctx.needs_input_grad) else None
        grad_proxies = torch.empty_like(proxies) if any(ctx.needs_input_grad) else None
        step = max(1, BLOCK_ELEMENTS // (1 + batch))
        for start in range(0, len(proxies), step):
            p = proxies[start : start + step]  # (c, D)
            p_norms = norms(p)  # (c, 1)
            s = p @ x.T / p_norms  # (c, B)
            # Negatives: all but each embedding's own class. The positives are overwritten by index, both in and out
            # of the block, for a search would make a GPU's host wait.
            own = (rows - start).clamp(0, len(p) - 1)  # (B,)
            in_block = (rows >= start) & (rows < start + len(p))
            z = F.pad(alpha * (s + margin), (1, 0))  # (c, 1 + B)
            z[own, 1 + columns] = torch.where(in_block, -torch.inf, z[own, 1 + columns])
            log_shares = F.log_softmax(z, dim=1)
            stand_for = weights[start : start + step]
            loss -= log_shares[:, 0].mul_(stand_for[:, 0]).sum() / num_classes
            if grad_x is None:
                continue
            slopes = log_shares[:, 1:].exp_().mul_(stand_for * (alpha / num_classes))  # (c, B): dL/ds
            slopes[own, columns] += torch.where(in_block, positive_slopes, 0)
            slopes /= p_norms  # from here the slopes by p . x
            grad_x.addmm_(slopes.T, p)
            grad_p = torch.mm(slopes, x, out=grad_proxies[start : start + step])
            # Through the proxies' normalization: minus the part along the proxy.
            grad_p.addcmul_(p, (slopes * s).sum(dim=1, keepdim=True) / p_norms, value=-1)
        ctx.save_for_backward(grad_x, grad_proxies)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # The gradients are constants to autograd: differentiated again, they would give 0, and a wrong sum with it.
        *_, margin, alpha = ctx.needs_input_grad
        if torch.is_grad_enabled() or margin or alpha:
            raise NotImplementedError(
                "ProxyAnchor gives first derivatives, and none with respect to margin or alpha; for others, call "
                "proxy_anchor.losses.equation(embeddings, proxies, labels, margin, alpha)"
            )
        grad_x, grad_proxies = ctx.saved_tensors
        return grad_x * grad_loss, grad_proxies * grad_loss, None, None, None, None, None, None


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
        **cli.one_of(*LOSSES),
        help="Proxy-Anchor, or one that it is compared with, set as in the paper; the last four need --IPC 2 or more",
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
    group = parser.add_argument_group("later recipes")
    group.add_argument(
        "--sample-proxies",
        default=1.0,
        type=cli.share(SMALLEST_SHARE),
        metavar="SHARE",
        help="Proxy-Anchor's share of the classes outside the batch in each step, for millions of classes; 1 is exact",
    )
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for a sample or a batch that the loss cannot take."""
    if args.sample_proxies < 1 and args.loss != "Proxy_Anchor":
        parser.error(f"argument --sample-proxies: {args.loss} takes all proxies or none; Proxy_Anchor samples them")
    if args.loss in OF_PAIRS and (args.IPC or 1) < 2:
        parser.error(
            f"argument --loss: {args.loss} compares images of one class with each other, of which a random batch may "
            "have none: add --IPC 4, say, for four images of each class"
        )


LOSSES = ("Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive", "Triplet", "NPair")
OF_PAIRS = ("MS", "Contrastive", "Triplet", "NPair")  # without proxies
SMALLEST_SHARE = 1e-15  # the draws have steps of 2**-53


def create(name: str, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32.0) -> nn.Module:
    """A loss by its name in LOSSES: module (embeddings (B, D), labels (B,)) -> scalar.

    margin and alpha are Proxy-Anchor's; the others are pytorch-metric-learning's, with the settings of the published
    comparison. A loss may have the attributes proxy_lr and clipped, see ProxyAnchor; without them its parameters learn
    as fast as the network, and their gradients are not clipped. Raises ValueError for another name, ImportError without
    that library.
    """
    if name == "Proxy_Anchor":
        return ProxyAnchor(num_classes, embedding_size, margin, alpha)
    return create_rival(name, num_classes, embedding_size)


def create_rival(name: str, num_classes: int, embedding_size: int) -> nn.Module:
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
    if name == "NPair":  # refuses embeddings that its distance normalises
        return losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False, power=1), **mean)
    raise ValueError(f"There is no loss '{name}'; there are {', '.join(LOSSES)}")
