"""Rates over all pairs, and their intervals, against scikit-learn, closed forms and brute force."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from embeddings import SETS, random_set, sides
from sklearn.metrics import roc_auc_score, roc_curve

from proxy_anchor import tiles
from proxy_anchor.spec import DISTANCES
from proxy_anchor.thresholds import pairs
from proxy_anchor.thresholds.identification import calibrate
from proxy_anchor.thresholds.pairs import Pairs, Scale
from proxy_anchor.thresholds.verification import Curve, verify
from proxy_anchor.vectors import Embeddings


def all_pairs(queries, labels, gallery=None, gallery_labels=None, distance="cosine"):
    """(nearness, of one class, the two classes) of each pair, from all differences or products in float64."""
    targets, target_labels = (queries, labels) if gallery is None else (gallery, gallery_labels)
    x, y = (t.double().numpy() for t in (queries, targets))
    if distance == "cosine":
        nearness = (x[:, None] * y).sum(axis=2) / np.sqrt((x**2).sum(axis=1)[:, None] * (y**2).sum(axis=1))
    else:
        nearness = -np.sqrt(((x[:, None] - y) ** 2).sum(axis=2))
    pair = np.triu(np.ones_like(nearness, dtype=bool), k=1 if gallery is None else -len(x))
    first, second = np.broadcast_arrays(labels.numpy()[:, None], target_labels.numpy())
    return nearness[pair], (first == second)[pair], first[pair], second[pair]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("searched", SETS)
def test_rates_are_those_of_sklearn(searched, distance, tile):
    nearness, alike, _, _ = all_pairs(*SETS[searched], distance=distance)
    far, tar, thresholds = roc_curve(alike, nearness, drop_intermediate=False)
    fars = (0.5, 0.1, 0.03, 0.01)
    found = verify(*sides(*SETS[searched]), distance=distance, fars=fars, replicates=20)
    assert (found.same.sum(), found.other.sum()) == (alike.sum(), (~alike).sum())
    least = 1 / min(alike.sum(), (~alike).sum())
    assert found.auc.value == pytest.approx(roc_auc_score(alike, nearness), abs=1e-4)
    assert found.equal_error[1].value == pytest.approx(far[np.abs(far + tar - 1).argmin()], abs=2 * least)
    assert list(found.at_far) == list(fars) and not found.too_rare
    for rate, (threshold, share) in found.at_far.items():
        last = np.flatnonzero(far <= rate)[-1]
        below = thresholds[last + 1]  # would accept too many
        width = np.diff(found.scale.edges)[found.scale.edge_from(threshold.value) - 1]
        assert below - 1e-6 < threshold.value < below + width + 1e-6 or share.value == pytest.approx(tar[last])
        assert (nearness[~alike] >= threshold.value).mean() <= rate
        assert share.value == pytest.approx((nearness[alike] >= threshold.value).mean(), abs=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_rates_at_given_thresholds_are_those_of_a_loop(distance):
    nearness, alike, _, _ = all_pairs(*SETS["themselves"], distance=distance)
    given = [-50, 0.25, 50] if distance == "cosine" else [-50, -4.5, 50]
    found = verify(*sides(*SETS["themselves"]), distance=distance, thresholds=given, replicates=20)
    for threshold, (far, tar) in found.at_threshold.items():
        assert far.value == pytest.approx((nearness[~alike] >= threshold).mean(), abs=2e-4)
        assert tar.value == pytest.approx((nearness[alike] >= threshold).mean(), abs=2e-4)
    assert [list(map(float, rate)) for rate in found.at_threshold[-50]] == [[1, 1, 1]] * 2
    assert [list(map(float, rate)) for rate in found.at_threshold[50]] == [[0, 0, 0]] * 2


@pytest.mark.parametrize("scale", [Scale.for_cosines(), Scale.for_distances(32.0), Scale.for_distances(1e-3)])
def test_thresholds_are_rounded_up_to_an_edge(scale):
    """Exactly those of the scale are themselves, and the bins begin at them; the last edge accepts nothing."""
    last = len(scale) - 1
    for number in (0, 1, 777, 40_000, last - 1, last, last + 1):
        edge = scale.edges[number]
        below, above = edge - 1e-9, edge + 1e-9
        if scale.farthest:
            below, above = np.nextafter(edge, -np.inf), np.nextafter(edge, np.inf)
        assert scale.edge_from(edge) == number
        assert scale.edge_from(above) == min(number + 1, last + 1)
        if number < last or (not scale.farthest and number == last):
            around = torch.tensor([below, edge, above], dtype=torch.double)
            assert scale.bins(around).tolist() == [max(0, number - 1), number, number]
    assert scale.edges[-2] == (0 if scale.farthest else 1)
    zeros = torch.tensor([0.0, -0.0], dtype=torch.double)
    assert scale.bins(zeros).tolist() == [scale.edge_from(0)] * 2


@pytest.mark.parametrize("farthest", [1e-20, 1e-3, 1.0, 7.5, 3e4, 1e150])
def test_each_threshold_of_distances_is_as_exact_as_all_others(farthest):
    edges = -Scale.for_distances(farthest).edges[:-2]  # but for 0
    assert farthest <= edges[0] < farthest * (1 + 1 / pairs.STEPS) and edges[-1] < farthest / 2 ** (pairs.OCTAVES - 1)
    assert ((edges[:-1] - edges[1:]) / edges[1:]).max() <= 1 / pairs.STEPS


def spread(kind):
    """Embeddings of 40 classes, some of them, or many, much farther off than the others."""
    random = np.random.default_rng(5)
    labels = random.integers(0, 40, 400)
    x = 3 * random.normal(size=(40, 4))[labels] + 2 * random.normal(size=(400, 4))
    if kind == "heavy tails":
        x *= np.abs(random.standard_cauchy(size=(400, 1))) ** 2
    elif kind == "classes of different sizes":
        x *= 10.0 ** random.uniform(-3, 3, 40)[labels][:, None]
    else:
        x[17] += kind
    return torch.from_numpy(x), torch.from_numpy(labels)


@pytest.mark.parametrize("kind", [0, 1e3, 1e4, 1e5, 1e7, "heavy tails", "classes of different sizes"])
def test_outliers_leave_the_rates_of_distances_as_they_are(kind):
    x, labels = spread(kind)
    nearness, alike, _, _ = all_pairs(x, labels, distance="euclidean")
    far, tar, _ = roc_curve(alike, nearness, drop_intermediate=False)
    found = verify(Embeddings(x, labels), distance="euclidean", fars=[0.1, 0.01], replicates=20)
    assert found.auc.value == pytest.approx(roc_auc_score(alike, nearness), abs=1e-5)
    for rate, (threshold, share) in found.at_far.items():
        assert share.value == pytest.approx(tar[np.flatnonzero(far <= rate)[-1]], abs=3 / alike.sum())
        assert share.value == pytest.approx((nearness[alike] >= threshold.value).mean(), abs=1e-9)


@pytest.mark.parametrize("separation", [0.5, 2, 4])
def test_gaussian_similarities_have_the_closed_forms(separation):
    """AUC = Phi(d'/sqrt 2), EER = Phi(-d'/2), and TAR = Phi(d' + Phi^-1(FAR)), from counts of Gaussians in bins."""
    normal, sigma = NormalDist(), 0.1
    scale = Scale.for_cosines()
    shares = [
        np.array([NormalDist(mean, sigma).cdf(edge) for edge in scale.edges])
        for mean in (0.2 - separation * sigma / 2, 0.2 + separation * sigma / 2)
    ]
    other, same = (np.diff(share)[:, None] for share in shares)
    curve = Curve.from_counts(scale.edges, same, other)
    assert curve.auc()[0] == pytest.approx(normal.cdf(separation / math.sqrt(2)), abs=1e-6)
    threshold, rate = (value[0] for value in curve.equal_errors())
    assert (threshold, rate) == pytest.approx((0.2, normal.cdf(-separation / 2)), abs=1e-5)
    for far in (0.1, 0.001):
        threshold, tar = (value[0] for value in curve.at_far(far))
        assert tar == pytest.approx(normal.cdf(separation + normal.inv_cdf(far)), abs=1e-5)
        assert threshold == pytest.approx(0.2 - separation * sigma / 2 - sigma * normal.inv_cdf(far), abs=1e-5)


def test_gaussian_embeddings_have_the_closed_forms():
    """Of one dimension: the square of the distance of a pair is a chi-square with one degree of freedom, scaled."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 5, 2000)
    x = torch.from_numpy(np.repeat(centres, 2) + random.normal(0, 1, 4000))[:, None]
    found = verify(Embeddings(x, torch.arange(4000) // 2), distance="euclidean", replicates=20)
    near, far = (lambda d, s=s: 2 * NormalDist(0, s).cdf(d) - 1 for s in (math.sqrt(2), math.sqrt(52)))
    threshold, rate = (estimate.value for estimate in found.equal_error)
    assert 1 - near(-threshold) == pytest.approx(far(-threshold), abs=0.02)
    assert rate == pytest.approx(far(-threshold), abs=0.01)
    assert found.auc.value == pytest.approx(1 - 2 / math.pi * math.atan(math.sqrt(2 / 52)), abs=0.01)


@pytest.mark.parametrize("searched", SETS)
def test_bootstrap_counts_are_those_of_sets_made_of_the_classes_drawn(searched, tile, monkeypatch):
    """Each replicate by brute force: a list of classes, the pairs of each, and of each two that are not the same."""
    monkeypatch.setattr(pairs, "CELLS", 2000)  # several parts per tile
    nearness, alike, first, second = all_pairs(*SETS[searched])
    found = Pairs.from_embeddings(*sides(*SETS[searched]))
    classes = found.classes.tolist()
    assert classes == sorted({*first, *second})
    edges = np.array([0, 25_000, 32_768, 40_000, 50_000, len(found.scale)])
    weights = np.random.default_rng(0).multinomial(len(classes), np.full(len(classes), 1 / len(classes)), 6).T
    same, other = found.resampled(edges, weights)
    assert same.shape == other.shape == (5, 6)
    for replicate in range(6):
        drawn = np.repeat(classes, weights[:, replicate])
        one, two = [], []
        for a in range(len(drawn)):
            one += nearness[alike & (first == drawn[a])].tolist()
            for b in range(len(drawn)):
                if drawn[a] != drawn[b]:
                    two += nearness[(first == drawn[a]) & (second == drawn[b])].tolist()
        for counts, values in ((same, one), (other, two)):
            assert counts[:, replicate].tolist() == np.histogram(values, found.scale.edges[edges])[0].tolist()


def test_intervals_are_the_quantiles_of_the_replicates():
    """Those of brute force, on all thresholds instead of some."""
    found = verify(*sides(*SETS["themselves"]), fars=[0.05], thresholds=[0.3], replicates=100)
    every = Pairs.from_embeddings(*sides(*SETS["themselves"]))
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 100).T
    fine = np.unique([*range(0, pairs.RESOLUTION, 64), len(every.scale)])
    curve = Curve.from_counts(every.scale.edges[fine], *every.resampled(fine, weights))
    threshold, tar = curve.at_far(0.05)
    expected = [
        (found.auc, curve.auc()),
        (found.equal_error[1], curve.equal_errors()[1]),
        (found.at_far[0.05][0], threshold),
        (found.at_far[0.05][1], tar),
        (found.at_threshold[0.3][0], curve.far[np.searchsorted(curve.thresholds, 0.3)]),
    ]
    for estimate, replicates in expected:
        assert estimate[1:] == pytest.approx(np.quantile(replicates, [0.025, 0.975]), abs=0.01)
        assert estimate.low < estimate.value < estimate.high


def test_intervals_hold_the_true_rate():
    """Of 60 samples of 20 classes, 95% should; binomial chance makes it 51 or more. Pairs alone would hold fewer."""
    truth = verify(*sides(*random_classes(600, 0)), thresholds=[0.5], replicates=2).at_threshold[0.5]
    held = np.zeros(2)
    for seed in range(1, 61):
        rates = verify(*sides(*random_classes(20, seed)), fars=[], thresholds=[0.5], replicates=100).at_threshold[0.5]
        held += [rate.low <= true.value <= rate.high for rate, true in zip(rates, truth)]
    assert (held >= 51).all()


def random_classes(count, seed):
    random = np.random.default_rng(seed)
    spread = random.gamma(4, 0.25, size=count).repeat(5)[:, None]
    x = random.normal(size=(count, 4)).repeat(5, axis=0) + 0.7 * spread * random.normal(size=(5 * count, 4))
    return torch.from_numpy(x), torch.arange(count).repeat_interleave(5)


def test_rates_that_the_pairs_are_too_few_for():
    found = verify(*sides(*SETS["themselves"]), fars=[0.1, 1e-3, 1e-6])
    assert found.too_rare == [1e-3, 1e-6] and list(found.at_far) == [0.1]
    assert "too few different-class pairs for thresholds with 0.1%, 0.0001% false accepts" in found.text()


FEW = {
    "one image": ([[1.0, 0]], [0]),
    "one class": ([[1.0, 0], [0, 1], [1, 1]], [5, 5, 5]),
    "no two of one class": ([[1.0, 0], [0, 1], [1, 1]], [1, 2, 3]),
}


@pytest.mark.parametrize("kind", FEW)
def test_pairs_of_one_kind_have_no_threshold(kind):
    embeddings, labels = map(torch.tensor, FEW[kind])
    found = verify(Embeddings(embeddings, labels))
    assert found.auc is None and not found.at_far and "thresholds need both kinds" in found.text()


@pytest.mark.parametrize("distance", DISTANCES)
def test_network_that_maps_all_images_to_one_point(distance):
    found = verify(Embeddings(torch.ones(40, 3), torch.arange(40) % 4), distance=distance)
    assert found.auc[:] == (0.5, 0.5, 0.5) and found.equal_error[1].value == 0.5
    threshold, tar = found.at_far[0.1]
    assert tar.value == 0 and threshold.value > (1 if distance == "cosine" else 0)
    for estimate in (found.auc, *found.equal_error, threshold, tar):
        assert estimate.low <= estimate.value <= estimate.high
    with pytest.raises(ValueError, match="At a threshold that 10% of unknown queries reach, no known query matches"):
        calibrate(Embeddings(torch.ones(120, 3), torch.arange(120) % 8), 0.1, distance=distance)


COARSE = {
    "codes": lambda random, count: random.integers(0, 2, (count, 5)),
    "half of them one point": lambda random, count: random.normal(size=(count, 5)) * (np.arange(count) % 2)[:, None],
    "two points": lambda random, count: np.eye(5)[np.arange(count) % 2],
    "random": lambda random, count: random.normal(size=(count, 5)),
}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", COARSE)
@pytest.mark.parametrize("classes", [3, 9])
def test_intervals_contain_their_value(kind, classes, distance):
    random = np.random.default_rng(1)
    x = torch.from_numpy(COARSE[kind](random, 90).astype(np.float32))
    found = verify(
        Embeddings(x, torch.from_numpy(random.integers(0, classes, 90))), distance=distance, thresholds=[0.5, -1.0]
    )
    pairs_of = [*found.at_far.values(), *found.at_threshold.values(), found.equal_error]
    for estimate in (found.auc, *(one for two in pairs_of for one in two)):
        assert estimate.low <= estimate.value <= estimate.high
        ends = estimate.measured(distance)
        assert ends.low <= ends.value <= ends.high


def test_two_images():
    found = verify(Embeddings(torch.eye(2), torch.tensor([0, 0])))
    assert found.auc is None and found.same.sum() == 1
    x = torch.tensor([[0.0, 0], [0, 1], [7, 0]])
    found = verify(Embeddings(x, torch.tensor([0, 0, 1])), distance="euclidean", thresholds=[-1, -2], replicates=5)
    assert found.auc.value == 1 and found.at_threshold[-1][1].value == 1 and found.at_threshold[-2][0].value == 0


def test_two_classes_have_intervals_of_the_replicates_with_both():
    found = verify(Embeddings(torch.randn(40, 3), torch.arange(40) % 2), fars=[0.1])
    assert not math.isnan(found.auc.low) and found.auc.low <= found.auc.value + 0.01


@pytest.mark.parametrize("distance", DISTANCES)
def test_tiles_are_all_that_is_in_memory(distance, monkeypatch):
    """The largest tensor that any operation makes is the same for all numbers of pairs: that of the two histograms."""
    monkeypatch.setitem(tiles.TILE, "cpu", 96)
    monkeypatch.setattr(pairs, "CELLS", 1 << 14)
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest[-1] = max(largest[-1], result.numel())
            return result

    fewest = 600 if distance == "cosine" else 1400
    for count in (fewest, 2 * fewest):
        largest.append(0)
        with Watch():
            found = verify(*sides(*random_set(count, 10, 0, dimensions=2)), distance=distance, replicates=20)
    assert largest == [2 * len(found.scale) + 1] * 2 and largest[0] < fewest * (fewest - 1) / 2


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("searched", SETS)
def test_opis_is_that_of_all_pairs(searched, distance, tile):
    """U, the harmonic mean of a class's true accepts and true rejects, at 101 thresholds; its variance over classes."""
    nearness, alike, first, second = all_pairs(*SETS[searched], distance=distance)
    found = verify(*sides(*SETS[searched]), distance=distance, replicates=2)
    high, low = np.quantile(nearness[~alike], [0.99, 0.9])
    utilities = []
    for c in np.unique([*first, *second]):
        of_class = (first == c) | ((second == c) & (searched == "themselves"))
        same, other = nearness[of_class & alike], nearness[of_class & ~alike]
        if len(same) and len(other):
            rates = [((same >= d).mean(), (other < d).mean()) for d in np.linspace(low, high, 101)]
            utilities.append([2 * a * b / (a + b) if a + b else 0 for a, b in rates])
    assert found.opis == pytest.approx(np.var(utilities, axis=0).mean(), rel=0.05)
