"""The fast path of the Proxy-Anchor loss: losses.equation and its gradient in one pass over blocks of classes."""

import torch
import torch.nn.functional as F

from proxy_anchor.vectors import norms

BLOCK_ELEMENTS = 1 << 19  # similarities in a block; they fit into a CPU's cache


def equation(
    embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor, margin: float, alpha: float
) -> torch.Tensor:
    """losses.equation of embeddings (B, D), proxies (C, D) of the same type and checked labels (B,): a scalar.

    It needs the memory of the proxies and their gradient, for any number of classes. It has first derivatives with
    respect to embeddings and proxies; any others raise NotImplementedError.
    """
    x = embeddings / norms(embeddings)
    weights = x.new_ones(len(proxies), 1)
    return ProxyAnchorFunction.apply(x, proxies, labels, margin, alpha, labels, weights, len(proxies))


class ProxyAnchorFunction(torch.autograd.Function):
    """The terms of all classes, or of some of them: see forward.

    A class's terms depend on other classes only through the factors 1/|P+| and 1/|P|, which are known beforehand. So
    the gradient of a block is complete once its similarities are known, and nothing of size B x C is stored.
    """

    @staticmethod
    def forward(ctx, x, proxies, labels, margin, alpha, rows, weights, num_classes):
        """x (B, D) of unit length, proxies (c, D) of any length, labels (B,).

        rows (B,): the row of each embedding's own proxy, outside of 0 ... c - 1 if it is not among these proxies.
        weights (c, 1): how many of the num_classes classes each proxy's negative term represents.
        """
        batch = len(x)
        columns = torch.arange(batch, device=x.device)
        is_row = (rows >= 0) & (rows < len(proxies))
        same = labels[:, None] == labels  # (B, B)
        with_positive = (1 / same.sum(dim=1).to(x.dtype)).sum()  # |P+|: a class of n embeddings counts n times 1/n

        # Positives: one similarity per embedding, with its own proxy. log(1 + sum exp(z)) and its derivatives
        # exp(z) / (1 + sum exp(z)) come without overflow from the log_softmax of z with a 0 in front.
        p = proxies[rows.clamp(0, len(proxies) - 1)]  # (B, D)
        p_norms = norms(p)
        s = (x * p).sum(dim=1) / p_norms[:, 0]  # (B,)
        z = torch.where(same, -alpha * (s - margin), -torch.inf)  # (B, B): row i has all positives of i's class
        log_shares = F.log_softmax(F.pad(z, (1, 0)), dim=1)  # (B, 1 + B)
        # The row of a class appears once per embedding of it.
        loss = -torch.where(is_row, log_shares[:, 0] / same.sum(dim=1), 0).sum() / with_positive
        positive_slopes = -alpha / with_positive * log_shares[columns, 1 + columns].exp()  # (B,): dL/ds

        grad_x = torch.zeros_like(x) if any(ctx.needs_input_grad) else None
        grad_proxies = torch.empty_like(proxies) if any(ctx.needs_input_grad) else None
        step = max(1, BLOCK_ELEMENTS // (1 + batch))
        for start in range(0, len(proxies), step):
            p = proxies[start : start + step]  # (c, D)
            p_norms = norms(p)  # (c, 1)
            s = p @ x.T / p_norms  # (c, B)
            # Negatives: every embedding but those of the proxy's class. Positives are masked by index, whether or not
            # they are in the block: boolean indexing would force a host sync.
            row = (rows - start).clamp(0, len(p) - 1)  # (B,)
            in_block = (rows >= start) & (rows < start + len(p))
            z = F.pad(alpha * (s + margin), (1, 0))  # (c, 1 + B)
            z[row, 1 + columns] = torch.where(in_block, -torch.inf, z[row, 1 + columns])
            log_shares = F.log_softmax(z, dim=1)
            weight = weights[start : start + step]
            loss -= log_shares[:, 0].mul_(weight[:, 0]).sum() / num_classes
            if grad_x is None:
                continue
            slopes = log_shares[:, 1:].exp_().mul_(weight * (alpha / num_classes))  # (c, B): dL/ds
            slopes[row, columns] += torch.where(in_block, positive_slopes, 0)
            slopes /= p_norms  # from here on dL/d(p . x)
            grad_x.addmm_(slopes.T, p)
            grad_p = torch.mm(slopes, x, out=grad_proxies[start : start + step])
            # Through the normalization of the proxies: without the component along the proxy.
            grad_p.addcmul_(p, (slopes * s).sum(dim=1, keepdim=True) / p_norms, value=-1)
        ctx.save_for_backward(grad_x, grad_proxies)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # Autograd takes the stored gradients for constants, so second derivatives would be wrong without an error.
        _, _, _, margin, alpha, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or margin or alpha:
            raise NotImplementedError(
                "ProxyAnchor gives first derivatives, and none with respect to margin or alpha; for others, call "
                "proxy_anchor.losses.equation(embeddings, proxies, labels, margin, alpha)"
            )
        grad_x, grad_proxies = ctx.saved_tensors
        return grad_x * grad_loss, grad_proxies * grad_loss, None, None, None, None, None, None
