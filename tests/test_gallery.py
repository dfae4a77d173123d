"""A gallery divided over processes: what each finds is what one process finds, to the last integer."""

import math

import numpy as np
import pytest
import torch
from helpers import in_processes
from torch.utils._python_dispatch import TorchDispatchMode

from proxy_anchor import collectives, retrieval, tiles
from proxy_anchor.spec import DISTANCES
from proxy_anchor.thresholds.pairs import Pairs
from proxy_anchor.vectors import Embeddings

# Where the parts of each number of processes end: unequal ones, an empty one, one without any positive.
CUTS = {1: [0, 1], 2: [0, 0.3, 1], 3: [0, 0.52, 0.52, 1], 4: [0, 0.01, 0.4, 0.75, 1]}


def part(x):
    """This process's part of all rows."""
    first, last = (round(len(x) * cut) for cut in CUTS[collectives.world_size()][collectives.rank() :][:2])
    return x[first:last]


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        made = [x.numel() for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        return found


def share_of_memory(distance):
    """The largest tensor of this process, where each has an equal part of the gallery."""
    x = torch.randn(6000, 192)[collectives.shard(6000)]
    with Largest() as largest:
        retrieval.search(Embeddings(x, torch.arange(len(x)) // 5), distance=distance, processes=collectives.world())
    return largest.elements


def error(*sides):
    with pytest.raises(ValueError) as caught:
        retrieval.search(*sides, processes=collectives.world())
    return str(caught.value)


def in_each(count):
    """Checks of what depends on the number of processes, in each of them."""
    x, y = torch.randn(40, 8), torch.arange(40) % 5
    wrong = torch.where(torch.arange(40)[:, None] == 17, torch.nan, x)
    queries, damaged = Embeddings(part(x), part(y)), Embeddings(part(wrong), part(y))
    for sides in (damaged,), (queries, damaged):
        assert error(*sides) == "1 of 40 embeddings are not finite; the first is number 17"
    assert error(Embeddings(x[:0], y[:0])) == "There is nothing to search: embeddings (0, 8)"
    for distance in DISTANCES:
        assert share_of_memory(distance) == math.ceil(6000 / count / 192) * 192 * 192  # whole tiles of its vectors


def everything():
    """What is found in sets with duplicates, ties, lonely classes and groups, by both distances."""
    tiles.TILE["cpu"], retrieval.PANEL = 192, 192 * 192 * 2
    in_each(collectives.world_size())
    random, processes, results = np.random.default_rng(0), collectives.world(), {}
    x = torch.from_numpy(random.normal(size=(700, 16)).astype(np.float32))
    x[100:300] = x[400:600]
    x[600:700] = x[400:500]  # with one of its class and one of another equally near
    on_a_grid = torch.from_numpy(random.integers(0, 3, size=(700, 4)).astype(np.float32)) + 1
    labels = torch.from_numpy(random.integers(0, 40, size=700))
    labels[:7] = torch.arange(100, 107)  # alone in their classes, and all that one of four processes has
    groups = torch.from_numpy(random.integers(0, 150, size=700))
    for name, vectors in {"random": x, "grid": on_a_grid}.items():
        for distance in DISTANCES:
            for sets in (
                [(vectors, labels, groups)],
                [(vectors[:250], labels[:250], groups[:250]), (vectors[250:], labels[250:], groups[250:])],
            ):
                for columns in 2, 3:  # without groups, and with them
                    sides = [Embeddings(*map(part, side[:columns])) for side in sets]
                    found = retrieval.search(*sides, distance=distance, processes=processes)
                    case = f"{name}, {distance}, {len(sets)}, {columns}"
                    results |= {f"{key}: {case}": value for key, value in vars(found).items()}
                    counted = Pairs.from_embeddings(*sides, distance=distance, processes=processes)
                    results |= {f"pairs: {case}": torch.tensor(np.stack(counted.histograms()))}
                    edges, weights = np.array([0, 40_000, len(counted.scale)]), np.arange(94).reshape(47, 2) % 3
                    results |= {f"resampled: {case}": torch.tensor(np.stack(counted.resampled(edges, weights)))}
    return results


@pytest.fixture(scope="module")
def alone():
    tile, panel = tiles.TILE["cpu"], retrieval.PANEL
    yield everything()
    tiles.TILE["cpu"], retrieval.PANEL = tile, panel


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_find_what_one_finds(processes, alone):
    found = in_processes(processes, everything)
    assert found.keys() == alone.keys() and len(found) == 2 * 2 * 2 * 2 * 6
    for name, array in found.items():
        np.testing.assert_array_equal(array, alone[name].numpy(), err_msg=name)
        assert array.any()
