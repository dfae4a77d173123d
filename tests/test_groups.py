"""Images of a query's own group (burst, session, camera) are left out of its gallery, in every metric."""

import csv
import shutil

import numpy as np
import pytest
import torch
import trees
from helpers import Squares, examples, in_processes, read_metrics, write_csv

import dataset
import evaluate
import net
import train
from dataset.__main__ import main as dataset_main
from dataset.images import fingerprint
from proxy_anchor import collectives, evaluation, retrieval, tiles
from proxy_anchor.report import confusion, page
from proxy_anchor.retrieval import best_positive_rank, from_arrays, map_at_r, recall_at_k, search
from proxy_anchor.thresholds import verification
from proxy_anchor.vectors import Embeddings


def by_sorting(queries, labels, groups, gallery, gallery_labels, gallery_groups, within, distance):
    """Rank, tie, MAP@R and R-precision of each query in float64, from the sorted images that remain for it.

    Negatives come first at equal distances.
    """
    x, y = queries[:, None].astype(np.float64), gallery.astype(np.float64)
    distances = ((x - y) ** 2 if distance == "euclidean" else -x * y).sum(axis=2)
    results = []
    for i in range(len(queries)):
        remaining = [j for j in range(len(gallery)) if gallery_groups[j] != groups[i] and not (within and i == j)]
        ranking = sorted((distances[i, j], gallery_labels[j] == labels[i]) for j in remaining)
        found = [positive for _, positive in ranking]
        r = sum(found)
        rank = found.index(True) if r else -1
        tied = rank > 0 and ranking[rank][0] == ranking[0][0]
        precisions = [sum(found[: place + 1]) / (place + 1) for place in range(r) if found[place]]
        results.append((rank, tied, sum(precisions) / max(r, 1), sum(found[:r]) / max(r, 1)))
    return map(list, zip(*results))


@pytest.mark.parametrize("distance, kind", [("cosine", "random"), ("cosine", "ties"), ("euclidean", "ties")])
def test_metrics_are_brute_force(kind, distance, monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", 192)
    monkeypatch.setattr(retrieval, "PANEL", 5000)
    random = np.random.default_rng(0)
    x, labels = examples(kind, distance, random), random.integers(0, 12, size=200)
    groups = random.integers(0, 40, size=200)  # of images of several classes
    x[30:40] = x[130:140] = x[:10]  # duplicates, of the same group or not
    labels[130:140], groups[30:40] = labels[:10], groups[:10]
    labels[180:190], groups[180:190] = 100, 100  # a class that is one group: nothing to find
    sides = [part[:90] for part in (x, labels, groups)], [part[90:] for part in (x, labels, groups)]
    for within, (queries, gallery) in ((True, [(x, labels, groups)] * 2), (False, sides)):
        ranks, tied, average_precisions, r_precisions = by_sorting(*queries, *gallery, within, distance)
        assert not within or (any(tied) and -1 in ranks)
        searched = [None, None] if within else [torch.from_numpy(part) for part in gallery[:2]]
        arguments = [*map(torch.from_numpy, queries[:2]), *searched, distance]
        keywords = {"groups": torch.from_numpy(queries[2])}
        keywords |= {} if within else {"gallery_groups": torch.from_numpy(gallery[2])}
        both = search(
            *[Embeddings(*map(torch.from_numpy, side)) for side in (queries, gallery)[: 2 - within]], distance=distance
        )
        assert [both.ranks.tolist(), both.tied.tolist()] == [ranks, tied]
        assert best_positive_rank(*arguments, **keywords).tolist() == ranks
        hits = recall_at_k(*arguments[:2], [1, 5], *arguments[2:], **keywords)
        assert hits == {k: np.mean([0 <= rank < k for rank in ranks]) for k in (1, 5)}
        found = map_at_r(*arguments, **keywords)
        torch.testing.assert_close(found, torch.tensor([average_precisions, r_precisions], dtype=torch.double))


def test_an_image_alone_is_a_group_of_its_own():
    """Which changes nothing."""
    x, y, numbers = torch.randn(300, 8), torch.randint(0, 20, (300,)), torch.randperm(300)
    for parts in ([slice(0, 300)], [slice(0, 90), slice(90, 300)]):
        alone = search(*[Embeddings(x[part], y[part], numbers[part]) for part in parts])
        without = search(*[Embeddings(x[part], y[part]) for part in parts])
        for key, value in vars(alone).items():
            assert torch.equal(value, vars(without)[key])


def test_planted_duplicates_are_found_without_groups_and_not_with_them():
    """Every image twice: without groups it finds its double, with them an image by chance."""
    classes, images = 20, 1000
    x, y = torch.randn(images, 16), torch.randint(0, classes, (images,))
    x, y, groups = torch.cat([x, x + 1e-4 * torch.randn_like(x)]), torch.cat([y, y]), torch.arange(images).repeat(2)
    assert recall_at_k(x, y, [1]) == {1: 1.0}
    for result in (
        recall_at_k(x, y, [1], groups=groups),
        recall_at_k(x[:1000], y[:1000], [1], x[1000:], y[1000:], groups=groups[:1000], gallery_groups=groups[1000:]),
    ):
        assert abs(result[1] - 1 / classes) < 4 * (1 / classes / images) ** 0.5


Y = torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"groups": Y[:4]}, r"Expected groups \(5,\), a number for each image, found \(4,\)"),
        ({"groups": Y.float()}, "Expected groups as a tensor of whole numbers, found torch.float32"),
        ({"gallery_groups": Y}, "pass gallery_groups only with a gallery"),
        ({"groups": Y, "gallery_groups": Y.clone()}, "pass gallery_groups only with a gallery"),
    ],
)
def test_groups_that_do_not_agree_are_an_error(groups, message):
    for function in best_positive_rank, map_at_r:
        with pytest.raises(ValueError, match=message):
            function(torch.ones(5, 8), Y, **groups)
    with pytest.raises(ValueError, match="The groups of queries and gallery come together"):
        best_positive_rank(torch.ones(5, 8), Y, torch.ones(6, 8), torch.zeros(6, dtype=torch.long), groups=Y)


class Numbers(Squares):
    """Images that hold their index, with groups."""

    def __init__(self, labels, groups):
        super().__init__(labels, "abcdefgh")
        self.groups = groups

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.full((3, 2, 2), index, dtype=torch.uint8), int(self.labels[index])


def evaluated():
    """Ranks and average precisions of images with groups, embedded by all processes, each its part."""
    tiles.TILE["cpu"] = 192
    random = np.random.default_rng(0)
    parts = [Numbers(random.integers(0, 8, n), random.integers(0, 30, n)) for n in (101, 150)]
    share = collectives.rank(), collectives.world_size()
    vectors = torch.from_numpy(random.normal(size=(150, 8)))

    class Fixed:
        """An Embedder whose embedding of an image is the vector of its index."""

        def embed(self, loader, *_):
            batches = [(vectors[images[:, 0, 0, 0].long()], labels) for images, labels in loader]
            return Embeddings(*map(torch.cat, zip(*batches)), torch.as_tensor(loader.dataset.groups)[loader.sampler])

    results = {}
    for sets in parts[1:], parts:
        loaders = [dataset.eval_loader(images, 16, 0, share) for images in sets]
        result = evaluation.evaluate(Fixed(), loaders, [1, 4])
        results |= {f"{len(sets)} ranks": result.ranks, f"{len(sets)} precisions": result.average_precisions}
        results |= {f"{len(sets)} left out": result.left_out}
        groups = [torch.as_tensor(images.groups) for images in sets]
        own = groups[0][:, None] == groups[-1]
        assert torch.equal(result.left_out, own.sum(dim=1) - int(len(sets) == 1))
    return results


def test_groups_stay_with_their_images_in_several_processes(monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", 192)
    alone = evaluated()
    for name, array in in_processes(2, evaluated).items():
        np.testing.assert_array_equal(array, alone[name].numpy(), err_msg=name)


def test_what_is_left_out_is_said():
    x, y = torch.eye(5), torch.tensor([0, 0, 1, 1, 1])
    queries = Embeddings(x, y, torch.tensor([7, 7, 1, 1, 2]))
    result = evaluation.measure(queries, [1])
    assert result.remark().splitlines()[:2] == [
        "Removed from galleries, because they are in the query's group: 4 images, for 4 of 5 queries.",
        "2 of 5 queries have no image of their class to find outside their own group: they are misses.",
    ]
    assert "group" not in evaluation.measure(Embeddings(x, y), [1]).remark()
    result = evaluation.measure(queries, [1], Embeddings(x[:2], y[:2], torch.tensor([7, 9])))
    assert result.left_out.tolist() == [1, 1, 0, 0, 0]


def test_neighbours_and_pairs_of_the_report_are_of_other_groups(tmp_path):
    random = np.random.default_rng(0)
    x, labels, groups = random.normal(size=(60, 4)), random.integers(0, 5, 60), random.integers(0, 12, 60)
    groups[labels == 4] = 99  # pairs of one class are then of one group
    queries = Embeddings(*map(torch.from_numpy, (x, labels, groups)))
    nearest = confusion.nearest_neighbour(queries)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = np.where(groups[:, None] == groups, -np.inf, unit @ unit.T)
    assert nearest.tolist() == similarity.argmax(axis=1).tolist()
    one_group = Embeddings(queries.vectors, queries.labels, 0 * queries.groups)
    assert confusion.nearest_neighbour(one_group, one_group, "euclidean").tolist() == 60 * [-1]

    first, second = np.triu_indices(60, 1)
    apart = groups[first] != groups[second]
    one_class = (labels[first] == labels[second])[apart]
    pairs = verification.verify(queries, distance="euclidean")
    distances = np.linalg.norm(x[first] - x[second], axis=1)[apart]
    for counts, chosen in ((pairs.same, one_class), (pairs.other, ~one_class)):
        assert counts.sum() == chosen.sum()
        expected = np.histogram(-distances[chosen], pairs.scale.edges)[0]
        assert abs(counts.cumsum() - expected.cumsum()).max() <= 1  # rounding at an edge

    images = Numbers(labels, groups)
    result = evaluation.measure(queries, [1])
    page.open_folder(tmp_path)
    queries = page.TestSet(queries, images)
    pictures = page.Pictures(tmp_path, queries, queries)
    shown = []
    pictures.figure = lambda images, index, caption, kind="": shown.append((index, kind)) or ""
    page.query_rows(queries, queries, True, result, nearest, pictures)
    query = None
    for index, kind in shown[::-1]:  # a row is the neighbours, then the query
        query = index if not kind else query
        assert not kind or groups[index] != groups[query]
    assert len(shown) > 100


# From the CSV file to the metrics


def photos(folder, with_groups=True):
    """A CSV file of 4 training and 6 test classes; each test image is there twice, in one group."""
    rows = []
    for c in range(10):
        for i in range(4):
            trees.write_image(folder / f"{c}" / f"{i}.jpg", 100 * c + i)
            shutil.copy(folder / f"{c}" / f"{i}.jpg", folder / f"{c}" / f"{i}again.jpg")
            rows += [(f"{c}/{i}{again}.jpg", c, "train" if c < 4 else "eval", f"{c} {i}") for again in ("", "again")]
    rows[-1] = (*rows[-1][:3], "")
    columns = ("path", "label", "split", "group")[: 3 + with_groups]
    return write_csv(folder / "images.csv", [row[: len(columns)] for row in rows], columns)


def test_groups_are_read(tmp_path):
    table = photos(tmp_path)
    (images,) = dataset.eval_sets("csv", table, 32)
    assert images.groups.tolist() == [i // 2 for i in range(46)] + [23, 24]  # the empty cell is a group of its own
    images.leave_out(images.paths[:3])
    assert images.groups.tolist() == [i // 2 for i in range(3, 46)] + [23, 24]
    with open(table) as file:
        rows = list(csv.reader(file))[1:]
    for i, row in enumerate(rows):
        row[2] = ("query", "gallery")[i % 2] if row[2] == "eval" else "train"
    queries, gallery = dataset.eval_sets("csv", write_csv(table, rows, ("path", "label", "split", "group")), 32)
    assert queries.groups.tolist() == list(range(24)) and gallery.groups.tolist() == [*range(23), 24]


def test_other_groups_are_other_data(tmp_path):
    with_groups, without = (photos(tmp_path / name, name == "a") for name in "ab")
    digests = [fingerprint(dataset.load("csv", path, "eval"), path) for path in (with_groups, without)]
    text = with_groups.read_text()
    with_groups.write_text(text.replace("9 2", "9 1"))
    digests.append(fingerprint(dataset.load("csv", with_groups, "eval"), with_groups))
    assert len(set(digests)) == 3


def test_scripts_leave_groups_out(tmp_path, capsys):
    """Copies of the images are found at once, unless the file says that they are of one group."""
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), {})
    flags = ["--batch-size", "16", "--workers", "0", "--dataset", "csv", "--model", "tiny", "--embedding-size", "8"]
    flags += ["--image-size", "32", "--data-root"]
    tables = {name: str(photos(tmp_path / name, name == "with")) for name in ("with", "without")}
    evaluation_flags = ["--resume", str(tmp_path / "a.pth")]
    assert evaluate.main([*flags, tables["without"], *evaluation_flags])["R@1"] == 1
    assert "own group" not in capsys.readouterr().out
    words = "Removed from galleries, because they are in the query's group: 46 images, for 46 of 48 queries.\n"
    found = evaluate.main([*flags, tables["with"], *evaluation_flags])
    assert found["R@1"] < 0.8 and words in capsys.readouterr().out

    train.main([*flags, tables["with"], "--pretrained", "none", "--epochs", "1", "--LOG_DIR", str(tmp_path / "logs")])
    assert words in capsys.readouterr().out
    (run,) = tmp_path.glob("logs/logs_csv/*")
    metrics = evaluate.main([*flags, tables["with"], "--resume", str(run / "csv_tiny_best.pth")])
    assert metrics["R@1"] == float(read_metrics(run)[0]["R@1"])
    assert metrics["MAP@R"] == float(read_metrics(run)[0]["MAP@R"])


def test_check_counts_groups(tmp_path, capsys):
    dataset_main(["check", "csv", "--data-root", str(photos(tmp_path)), "--workers", "0"])
    assert (
        "Test images: 24 groups, 1 ungrouped; left out of the galleries because of the query's group: 46\n"
    ) in capsys.readouterr().out


def test_person_and_camera_are_the_group_of_re_identification():
    """The numbers of docs/data.md: an image of a camera resembles the others of this camera, whoever they show."""
    persons, cameras, number = np.array([(p, c, n) for p in range(3) for c in range(2) for n in range(2)]).T
    x = torch.from_numpy(np.concatenate([10 * np.eye(2)[cameras], np.eye(3)[persons], 0.01 * number[:, None]], axis=1))
    queries, gallery = number == 0, number == 1  # each person has been taken twice by each camera
    person, camera = torch.from_numpy(persons), torch.from_numpy(cameras)

    def recall(groups):
        given = {"groups": groups[queries], "gallery_groups": groups[gallery]}
        return recall_at_k(x[queries], person[queries], [1], x[gallery], person[gallery], "euclidean", **given)[1]

    # The protocol, spelled out: without the gallery's images of the query's person by the query's camera.
    distances = torch.cdist(x[queries], x[gallery])
    same_person, same_camera = (a[queries][:, None] == a[gallery] for a in (person, camera))
    nearest = distances.masked_fill(same_person & same_camera, torch.inf).argmin(dim=1)
    assert (person[gallery][nearest] == person[queries]).sum() == 0
    assert recall(2 * person + camera) == 0
    assert recall(camera) == 1


def test_a_query_in_the_gallery_is_left_out_by_one_group(tmp_path):
    for label, number in (("ant", 1), ("ant", 2), ("bee", 3)):
        trees.write_image(tmp_path / label / f"{number}.jpg", number)
    shutil.copy(tmp_path / "ant" / "1.jpg", tmp_path / "copy.jpg")
    rows = [("copy.jpg", "ant", "query", "ant 1"), ("ant/1.jpg", "ant", "gallery", "ant 1")]
    rows += [("ant/2.jpg", "ant", "gallery", ""), ("bee/3.jpg", "bee", "gallery", "")]
    table = write_csv(tmp_path / "a.csv", rows, ("path", "label", "split", "group"))
    queries, gallery = dataset.eval_sets("csv", table, 32)
    x, y = (torch.stack([image.flatten().double() for image, _ in images]) for images in (queries, gallery))
    labels = torch.as_tensor(queries.labels), torch.as_tensor(gallery.labels)
    given = {"groups": torch.as_tensor(queries.groups), "gallery_groups": torch.as_tensor(gallery.groups)}
    sides = Embeddings(x, labels[0]), Embeddings(y, labels[1])
    assert confusion.nearest_neighbour(*sides, "euclidean").tolist() == [0]
    sides = from_arrays(x, labels[0], y, labels[1], **given)
    assert confusion.nearest_neighbour(*sides, "euclidean").tolist() != [0]
    assert recall_at_k(x, labels[0], [2], y, labels[1], "euclidean", **given) == {2: 1.0}  # the other ant is there
