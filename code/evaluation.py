"""From a network and test images to metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from proxy_anchor import collectives
from proxy_anchor.collectives import Processes
from proxy_anchor.embedding import Embedder
from proxy_anchor.retrieval import recall_of_ranks, search
from proxy_anchor.vectors import Embeddings


@dataclass
class Result:
    """The metrics, R@K for each K, MAP@R and R-precision, in 0..1, and the values per query behind them.

    For each query: ranks, see best_positive_rank; average_precisions, whose mean is MAP@R; labels; and, if images are
    grouped, left_out: how many images of its own group are left out of its gallery.
    tied: how many queries have an image of their class and one of another class tied for first place.
    """

    metrics: dict[str, float]
    ranks: torch.Tensor
    average_precisions: torch.Tensor
    labels: torch.Tensor
    tied: int = 0
    left_out: torch.Tensor | None = None

    def remark(self) -> str:
        """Lines on images left out, on queries without an image to find and on ties, if there are any."""
        total, alone, hits = len(self.ranks), int((self.ranks < 0).sum()), int((self.ranks == 0).sum())
        lines = where = ""
        if self.left_out is not None:
            where = " outside their own group"
            lines += (
                f"Removed from galleries, because they are in the query's group: {int(self.left_out.sum()):,} images, "
                f"for {int((self.left_out > 0).sum()):,} of {total:,} queries.\n"
            )
        if alone:
            lines += f"{alone:,} of {total:,} queries have no image of their class to find{where}: they are misses.\n"
        if self.tied:
            lines += (
                f"{self.tied:,} of {total:,} queries have an image of their class and one of another tied for first "
                "place: misses here, hits by the published rule, by which R@1 is "
                f"{100 * (hits + self.tied) / total:.2f} instead of {100 * hits / total:.2f}.\n"
            )
        return lines

    def by_class(self) -> list[dict[str, int]]:
        """For each class: its number, how many queries it has, and how many of them are hits at K = 1."""
        numbers, indices, queries = self.labels.unique(return_inverse=True, return_counts=True)
        hits = torch.zeros_like(queries).index_add(0, indices, (self.ranks == 0).long())
        columns = (numbers.tolist(), queries.tolist(), hits.tolist())
        return [dict(zip(("class", "queries", "hits"), row)) for row in zip(*columns)]


def evaluate(
    embedder: Embedder, loaders, ks: Sequence[int], stop=None, distance: str = "cosine", prefix: str = ""
) -> Result:
    """Embed the test sets of the loaders and measure. prefix: of the metrics' names, see metrics.py.

    stop: a runs.stopping.Stop, which raises Interrupted here after a signal.
    """
    queries, gallery = embed(embedder, loaders, stop)
    if stop:
        stop.check()
    result = measure(queries, ks, gallery, distance)
    return replace(result, metrics={prefix + name: value for name, value in result.metrics.items()})


def embed(embedder: Embedder, loaders, stop=None) -> tuple[Embeddings, Embeddings | None]:
    """The embeddings of the queries and of the gallery, which is None for a single loader; see Embedder.embed."""
    queries, *gallery = [embedder.embed(loader, "evaluation", stop) for loader in loaders]
    return queries, gallery[0] if gallery else None


def measure(
    queries: Embeddings, ks: Sequence[int], gallery: Embeddings | None = None, distance: str = "cosine"
) -> Result:
    """Search the gallery or, without one, the queries themselves: Recall@K for each of ks, MAP@R and R-precision.

    distance: one of spec.DISTANCES. With several processes, each passes the embeddings of its share of the images,
    and the Result describes all queries. Raises ValueError as best_positive_rank does.
    """
    processes = collectives.world()
    results = search(queries, gallery, distance, processes)
    recalls = {f"R@{k}": recall for k, recall in recall_of_ranks(results.ranks, ks).items()}
    means = {"MAP@R": results.average_precisions.mean().item(), "R-precision": results.r_precisions.mean().item()}
    return Result(
        recalls | means,
        results.ranks.cpu(),
        results.average_precisions,
        torch.cat(processes.all_gather(queries.labels)).cpu(),
        int(results.tied.sum()),
        images_left_out(queries, gallery, processes),
    )


def images_left_out(queries: Embeddings, gallery: Embeddings | None, processes: Processes) -> torch.Tensor | None:
    """How many images of its own group each query (N,) has in its gallery; None without groups."""
    targets = queries if gallery is None else gallery
    if queries.groups is None or targets.groups is None:
        return None
    groups = torch.cat(processes.all_gather(queries.groups))
    target_groups = torch.cat(processes.all_gather(targets.groups))
    numbers, sizes = target_groups.unique(return_counts=True)
    index = torch.searchsorted(numbers, groups).clamp(max=len(numbers) - 1)
    return (torch.where(numbers[index] == groups, sizes[index], 0) - int(gallery is None)).cpu()
