import numpy as np
import pytest
import torch
import trees
from helpers import examples

import evaluate
import net
from proxy_anchor import evaluation, metrics, retrieval, tiles
from proxy_anchor.retrieval import best_positive_rank, map_at_r, recall_at_k, search
from proxy_anchor.spec import DISTANCES
from proxy_anchor.thresholds.verification import verify
from proxy_anchor.vectors import Embeddings, concat_columns


def sides(*tensors):
    """The embeddings of the queries and, of four tensors, those of the gallery."""
    return [Embeddings(*tensors[i : i + 2]) for i in range(0, len(tensors), 2)]


def brute_force(queries, labels, gallery=None, gallery_labels=None, distance="cosine"):
    """Rank of the best positive by sorting all distances of a query; of equals, negatives come first.

    And whether it is the nearest image, and a negative is too.
    """
    within = gallery is None
    gallery, gallery_labels = (queries, labels) if within else (gallery, gallery_labels)
    x, y = queries[:, None].astype(np.float64), gallery.astype(np.float64)
    distances = ((x - y) ** 2 if distance == "euclidean" else -x * y).sum(axis=2)  # in one order for all
    ranks, tied = [], []
    for i in range(len(queries)):
        ranking = [
            (distances[i, j], gallery_labels[j] == labels[i]) for j in range(len(gallery)) if not (within and i == j)
        ]
        ranking.sort()  # at equal distances False sorts before True
        found = [positive for _, positive in ranking]
        ranks.append(found.index(True) if True in found else -1)
        tied.append(ranks[-1] > 0 and ranking[ranks[-1]][0] == ranking[0][0])
    return ranks, tied


@pytest.mark.parametrize(
    "distance, kind",
    [("cosine", "random"), ("cosine", "ties")] + [("euclidean", kind) for kind in ("random", "float64", "far", "ties")],
)
@pytest.mark.parametrize("tile", [192, 960])
def test_ranks_are_brute_force(kind, distance, tile, monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", tile)
    random = np.random.default_rng(0)
    x = examples(kind, distance, random)
    labels = random.integers(0, 12, size=200)
    x[30:40] = x[130:140] = x[170:180] = x[:10]  # duplicates, of the same class or not
    labels[130:140] = labels[:10]
    labels[190:] = np.arange(100, 110)  # classes of one image
    for arrays in (x, labels), (x[:90], labels[:90], x[90:], labels[90:]):
        queries, gallery = map(torch.from_numpy, arrays[:2]), map(torch.from_numpy, arrays[2:])
        arguments = [*queries, *(gallery if len(arrays) == 4 else (None, None)), distance]
        ranks, tied = brute_force(*arrays, distance=distance)
        assert any(tied)
        found = search(*sides(*map(torch.from_numpy, arrays)), distance=distance)
        assert [found.ranks.tolist(), found.tied.tolist()] == [ranks, tied]
        assert best_positive_rank(*arguments).tolist() == ranks
        assert recall_at_k(*arguments[:2], [1, 5], *arguments[2:])[5] == np.mean([0 <= rank < 5 for rank in ranks])


def test_measure_takes_the_distance():
    x, y = torch.randn(60, 8) + 3, torch.arange(60) % 20
    results = {distance: evaluation.measure(Embeddings(x, y), [1, 4], distance=distance) for distance in DISTANCES}
    for distance, result in results.items():
        assert torch.equal(result.ranks, best_positive_rank(x, y, distance=distance))
        assert torch.equal(result.average_precisions, map_at_r(x, y, distance=distance)[0])
    assert results["cosine"].metrics != results["euclidean"].metrics
    assert evaluation.measure(Embeddings(x, y), [1, 4]).metrics == results["cosine"].metrics


def test_distances_agree_on_unit_vectors():
    x, y = torch.nn.functional.normalize(torch.randn(300, 16, dtype=torch.double)), torch.arange(300) % 40
    for arguments in (x, y, None, None), (x[:100], y[:100], x[100:], y[100:]):
        for function in best_positive_rank, map_at_r:
            assert torch.equal(function(*arguments, "euclidean"), function(*arguments, "cosine"))
    scaled = x * torch.rand(300, 1).add(0.1)
    assert not torch.equal(best_positive_rank(scaled, y, distance="euclidean"), best_positive_rank(x, y))
    with pytest.raises(ValueError, match="There is no distance 'l1'; there are cosine, euclidean"):
        recall_at_k(x, y, [1], distance="l1")


def test_recall_follows_from_ranks():
    x, y = torch.randn(80, 8), torch.randint(0, 20, (80,))
    ranks = best_positive_rank(x, y)
    recalls = recall_at_k(x, y, [1, 4, 1000])
    assert recalls[1] == pytest.approx((ranks == 0).double().mean().item())
    assert recalls[4] == pytest.approx(((ranks >= 0) & (ranks < 4)).double().mean().item())
    assert recalls[1000] == pytest.approx((ranks >= 0).double().mean().item())


def test_similarity_is_cosine():
    x, y = torch.randn(50, 8), torch.randint(0, 10, (50,))
    assert best_positive_rank(x * torch.rand(50, 1).add(0.1), y).tolist() == best_positive_rank(x, y).tolist()


@pytest.mark.parametrize("size", [512, 128, 100])
def test_network_collapsed_to_a_point_finds_nothing(size):
    """Whatever the point: products of equal vectors are equal only if they are added in one order."""
    for count in [*range(2, 40), 57, 255, 1030]:
        x, y = torch.randn(1, size).repeat(count, 1), torch.arange(count) % 2
        assert recall_at_k(x, y, [1]) == {1: 0.0}
        assert recall_at_k(x[:3], y[:3], [1], x, y) == {1: 0.0}
        map_r, _ = map_at_r(x[:1], y[:1], x, y)  # all negatives rank before the first of the R positives
        r, negatives = (count + 1) // 2, count // 2
        assert map_r.item() == pytest.approx(sum(i / (negatives + i) for i in range(1, r - negatives + 1)) / r)


def test_equal_pairs_are_equal_anywhere():
    """In float64 too, whose kernels have other widths, among rows of all places: within tiles and at their ends."""
    for count in (64, 200, 1030):
        x, y = torch.randn(1, 100, dtype=torch.double).repeat(count, 1), torch.arange(count) % 2
        others = torch.randn(40, 100, dtype=torch.double)
        for distinct in x, others:
            for distance in DISTANCES:
                arguments = x, y, distance
                assert recall_at_k(distinct, torch.arange(len(distinct)) % 2, [1], *arguments) == {1: 0.0}
                _, r_precision = map_at_r(distinct, torch.arange(len(distinct)) % 2, *arguments)
                assert r_precision.max() == 0


def test_duplicate_image_is_found():
    """Self is left out by index: another image with the same embedding is a neighbour, and the nearest."""
    x = torch.nn.functional.normalize(torch.randn(10, 8))
    x[1] = x[0]
    y = torch.arange(10)
    y[1] = y[0]
    assert best_positive_rank(x, y).tolist() == [0, 0] + [-1] * 8


def test_query_without_positive_is_a_miss():
    x, y = torch.randn(5, 8), torch.tensor([0, 0, 1, 2, 3])
    assert recall_at_k(x, y, [100])[100] == pytest.approx(2 / 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_an_error(value):
    x = torch.randn(5, 8)
    x[3, 2] = value
    with pytest.raises(ValueError, match="1 of 5 embeddings are not finite; the first is number 3"):
        best_positive_rank(x, torch.zeros(5, dtype=torch.long))


def test_embeddings_beyond_float64_are_an_error():
    x, y = torch.randn(6, 8, dtype=torch.double), torch.arange(6) % 2
    for scale in 1e39, 1e200:
        with pytest.raises(ValueError, match="The embeddings are too large to square"):
            best_positive_rank(scale * x, y, distance="euclidean")
    assert torch.equal(
        best_positive_rank(1e37 * x, y, distance="euclidean"), best_positive_rank(x, y, distance="euclidean")
    )


@pytest.mark.parametrize("dtype, lengths", [(torch.float32, (1e20, 3e37)), (torch.float64, (1e160, 1e300))])
def test_embeddings_too_long_to_square_have_their_directions(dtype, lengths):
    """As rows among others, and all of them."""
    x, y = torch.randn(60, 8, dtype=dtype), torch.arange(60) % 6
    expected = search(Embeddings(x, y))
    factors = torch.ones(60, 1, dtype=dtype)
    factors[7], factors[31] = lengths
    for scaled in x * factors, x * lengths[1]:
        found = search(Embeddings(scaled, y))
        assert torch.equal(found.ranks, expected.ranks) and torch.equal(found.tied, expected.tied)
        together = concat_columns([Embeddings(scaled, y)] * 2).vectors
        torch.testing.assert_close(together[:, :8].norm(dim=1), torch.ones(60, dtype=dtype))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("of_gallery", FLOATS)
@pytest.mark.parametrize("of_queries", FLOATS)
def test_queries_and_gallery_of_different_precision(of_queries, of_gallery, distance):
    """Numbers that all of them hold; what is found is the same."""
    random = np.random.default_rng(0)
    x, z = (torch.from_numpy(random.integers(-8, 9, size=(n, 6)) / 4) for n in (40, 50))
    y, labels = torch.arange(40) % 5, torch.arange(50) % 5
    exact = sides(x, y, z, labels)
    rounded = sides(x.to(of_queries), y, z.to(of_gallery), labels)
    assert torch.equal(search(*rounded, distance).ranks, search(*exact, distance).ranks)
    verified, expected = (verify(*sets, distance, replicates=2).auc.value for sets in (rounded, exact))
    assert verified == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64], ids=str
)
def test_labels_of_any_integer_type(dtype):
    x, y = torch.randn(40, 8), torch.arange(40) % 5
    expected = search(*sides(x[:20], y[:20], x[20:], y[20:]))
    for labels, others in (y.to(dtype), y), (y, y.to(dtype)), (y.to(dtype), y.to(dtype)):
        found = search(*sides(x[:20], labels[:20], x[20:], others[20:]))
        assert torch.equal(found.ranks, expected.ranks)
    assert recall_at_k(x, y.to(dtype), [1]) == recall_at_k(x, y, [1])
    assert verify(Embeddings(x, y.to(dtype)), replicates=2).auc == verify(Embeddings(x, y), replicates=2).auc


@pytest.mark.parametrize("dtype", "int8 uint8 int16 uint16 int32 uint32 int64 uint64".split())
def test_numpy_arrays_and_lists_give_what_tensors_give(dtype):
    x, y, groups = torch.randn(40, 8), torch.arange(40) % 5, torch.arange(40) % 3
    tensors = {"gallery": x[20:], "gallery_labels": y[20:], "groups": groups[:20], "gallery_groups": groups[20:]}
    arrays = {k: v.numpy() if k == "gallery" else v.numpy().astype(dtype) for k, v in tensors.items()}
    lists = {name: value.tolist() for name, value in tensors.items()}
    for function in (best_positive_rank, map_at_r, lambda *both, **sets: recall_at_k(*both, [1, 2], **sets)):
        expected = function(x[:20], y[:20], **tensors)
        for found in (
            function(x[:20].numpy(), y[:20].numpy().astype(dtype), **arrays),
            function(np.asfortranarray(x[:20].numpy()), y[:20].tolist(), **arrays),
            function(x[:20].numpy()[::-1].copy()[::-1], y[:20].numpy().astype(">i4"), **arrays),
            function(list(x[:20]), list(y[:20]), **tensors),
            function(list(x[:20].numpy()), list(y[:20].numpy().astype(dtype)), **arrays),
            function(x[:20].tolist(), y[:20].tolist(), **lists),
            function(x[:20], tuple(y[:20].tolist()), **tensors),
        ):
            assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


@pytest.mark.parametrize(
    "function", [best_positive_rank, map_at_r, lambda *tensors: recall_at_k(*tensors[:2], [1], *tensors[2:])]
)
def test_what_is_no_array_of_numbers_is_an_error(function):
    for wrong, found in (
        (["ant"] * 5, "list"),
        (None, "NoneType"),
        (np.array(["ant"]), "ndarray"),
        ([[1, 2], [3]], "list"),
    ):
        for name, arguments in {
            "embeddings": (wrong, Y),
            "labels": (X, wrong),
            "gallery": (X, Y, wrong, Y),
            "gallery_labels": (X, Y, X, wrong),
        }.items():
            if wrong is None and len(arguments) == 4:  # no gallery
                continue
            with pytest.raises(
                TypeError, match=f"Expected {name} as a tensor, a numpy array or a list .* found {found}"
            ):
                function(*arguments)


@pytest.mark.parametrize("function", [best_positive_rank, map_at_r, lambda *tensors: verify(*sides(*tensors))])
def test_other_labels_are_an_error(function):
    for labels, found in ((Y.float(), "torch.float32"), (Y.bool(), "torch.bool")):
        with pytest.raises(ValueError, match=f"Expected labels as a tensor of whole numbers, found {found}"):
            function(X, labels)
        with pytest.raises(ValueError, match=f"Expected gallery_labels as a tensor of whole numbers, found {found}"):
            function(X, Y, X, labels)


X, Y = torch.ones(5, 8), torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize("function", [best_positive_rank, map_at_r])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X[:0], Y[:0]), r"There is nothing to search: embeddings \(0, 8\)"),
        ((X, Y, X[:0], Y[:0]), r"There is nothing to search: gallery \(0, 8\)"),
        ((X, Y[:4]), r"Expected embeddings \(N, 8\) and labels \(N,\), found \(5, 8\) and \(4,\)"),
        ((X[0], Y), r"Expected embeddings \(N, D\) and labels \(N,\), found \(8,\) and \(5,\)"),
        ((X, Y[:, None]), r"found \(5, 8\) and \(5, 1\)"),
        ((X, Y, X[:, :7], Y), r"Expected gallery \(N, 8\) and labels \(N,\), found \(5, 7\) and \(5,\)"),
        ((X, Y, X, Y[:4]), r"Expected gallery \(N, 8\) and labels \(N,\), found \(5, 8\) and \(4,\)"),
        ((X, Y, X), "A gallery and its labels come together"),
        ((X, Y, None, Y), "A gallery and its labels come together"),
    ],
)
def test_shapes_that_do_not_agree_are_an_error(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("k", [0, -1, 1.5, 2.0, "1"])
def test_k_is_a_whole_number_from_1(k):
    with pytest.raises(ValueError, match=f"Recall@K is for whole numbers K from 1, found {k}"):
        recall_at_k(X, Y, [1, k])
    assert recall_at_k(X, Y, np.array([1, 2])) == recall_at_k(X, Y, range(1, 3)) == {1: 1.0, 2: 1.0}


# MAP@R and R-precision


def test_map_at_r_by_hand():
    """One query along the axis; similarities fall with the angle: positive, negative, positive, positive, negative."""
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.double)
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    map_r, r_precision = map_at_r(query, torch.tensor([1]), gallery, torch.tensor([1, 0, 1, 1, 0]))
    assert map_r.item() == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert r_precision.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("block", [1, 5000, 1 << 23])
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_agrees_with_pytorch_metric_learning(gallery, distance, block, monkeypatch):
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    monkeypatch.setattr(retrieval, "PANEL", block)
    x, y = torch.randn(400, 16, dtype=torch.double), torch.arange(400) % 37
    x += torch.randn(37, 16, dtype=torch.double)[y]  # so that there is something to find
    arguments = (x[:150], y[:150], x[150:], y[150:]) if gallery else (x, y)
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "r_precision", "precision_at_1"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity() if distance == "cosine" else LpDistance(normalize_embeddings=False)),
    )
    theirs = calculator.get_accuracy(*arguments)
    map_r, r_precision = map_at_r(*arguments, distance=distance)
    assert map_r.mean().item() == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    assert r_precision.mean().item() == pytest.approx(theirs["r_precision"], abs=1e-6)
    ours = recall_at_k(arguments[0], arguments[1], [1], *arguments[2:], distance=distance)
    assert ours[1] == pytest.approx(theirs["precision_at_1"], abs=1e-6)


def test_map_at_r_ties_and_lonely_queries():
    x, y = torch.ones(6, 8), torch.tensor([0, 0, 1, 1, 1, 2])
    map_r, r_precision = map_at_r(x, y)
    assert map_r.tolist() == r_precision.tolist() == [0] * 6


# What evaluate.py prints


def evaluate_untrained(root, folder, network=None, **changed):
    trees.save_checkpoint(folder / "a.pth", network or net.create("tiny", 8), {})
    flags = {"dataset": "cub", "data-root": root, "model": "tiny", "embedding-size": 8, "image-size": 32}
    flags |= {"workers": 0, "resume": folder / "a.pth"} | changed
    return evaluate.main(
        ["--allow-partial", *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]
    )


def test_queries_in_dispute_are_counted(cub_root, tmp_path, capsys):
    """All the 18 images of 3 classes as one point: misses here, and hits by the published rule."""
    network = net.create("tiny", 8)
    with torch.no_grad():
        network.model.embedding.weight.zero_()
    assert evaluate_untrained(cub_root, tmp_path, network)["R@1"] == 0
    assert (
        "18 of 18 queries have an image of their class and one of another tied for first place: misses here, "
        "hits by the published rule, by which R@1 is 100.00 instead of 0.00.\n"
    ) in capsys.readouterr().out
    evaluate_untrained(cub_root, tmp_path)
    assert "are nearest to" not in capsys.readouterr().out


@pytest.mark.parametrize("remark, lines", [("", ["this checkpoint", "published"]), ("published", ["published"] * 2)])
def test_published_results_have_a_line_of_their_own(cub_root, tmp_path, monkeypatch, capsys, remark, lines):
    """Also where the user's name for the measured ones is that of the published."""
    monkeypatch.setitem(metrics.PUBLISHED, ("cub", "tiny"), {1: 12.34})
    measured = evaluate_untrained(cub_root, tmp_path, remark=remark)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(lines))]
    assert [row.startswith(name) for row, name in zip(rows, lines, strict=True)] == [True, True]
    assert f"{100 * measured['R@1']:.2f}" in rows[0] and "12.34" in rows[1]
