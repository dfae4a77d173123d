"""A gallery divided over processes: what each finds is what one process finds, to the last integer."""

import numpy as np
import pytest
import torch
from test_distributed import in_processes

from proxy_anchor import distributed, pairs, retrieval, tiles
from proxy_anchor.pairs import Pairs

# Where the parts of each number of processes end: unequal ones, an empty one, one without any positive.
CUTS = {1: [0, 1], 2: [0, 0.3, 1], 3: [0, 0.52, 0.52, 1], 4: [0, 0.01, 0.4, 0.75, 1]}


def part(x):
    """This process's part of all rows."""
    first, last = (round(len(x) * cut) for cut in CUTS[distributed.count()][distributed.rank() :][:2])
    return x[first:last]


def everything():
    """What is found in sets with duplicates, ties, lonely classes and groups, by both distances."""
    tiles.TILE["cpu"], retrieval.PANEL = 192, 192 * 192 * 2
    random, group, results = np.random.default_rng(0), distributed.group(), {}
    x = torch.from_numpy(random.normal(size=(700, 16)).astype(np.float32))
    x[100:300] = x[400:600]
    x[600:700] = x[400:500]  # with one of its class and one of another equally near
    on_a_grid = torch.from_numpy(random.integers(0, 3, size=(700, 4)).astype(np.float32)) + 1
    labels = torch.from_numpy(random.integers(0, 40, size=700))
    labels[:7] = torch.arange(100, 107)  # alone in their classes, and all that one of four processes has
    groups = torch.from_numpy(random.integers(0, 150, size=700))
    for name, vectors in {"random": x, "grid": on_a_grid}.items():
        for distance in tiles.DISTANCES:
            for sets in [(vectors, labels, groups)], [
                (vectors[:250], labels[:250], groups[:250]), (vectors[250:], labels[250:], groups[250:])
            ]:  # fmt: skip
                arguments = [part(y) for side in sets for y in side[:2]]
                own_groups = dict(zip(("groups", "gallery_groups"), (part(side[2]) for side in sets)))
                for keywords in {}, own_groups:
                    found = retrieval.search(*arguments, distance=distance, **keywords, group=group)
                    case = f"{name}, {distance}, {len(sets)}, {len(keywords)}"
                    results |= {f"{key}: {case}": value for key, value in vars(found).items()}
                    counted = Pairs.of(*arguments, distance=distance, **keywords, group=group)
                    results |= {f"pairs: {case}": torch.tensor(np.stack(counted.histograms()))}
                    edges, weights = np.array([0, 40_000, pairs.RESOLUTION + 1]), np.arange(94).reshape(47, 2) % 3
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
