"""Sorting images into things: average linkage against brute force, its threshold, and search.py group."""

import csv
import html
import re
import shutil

import numpy as np
import pytest
import torch
import trees
from helpers import RECORD, arguments, described, examples, fails, threshold
from helpers import make_index as make
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

import evaluate
import net
import search
from proxy_anchor import checkpoint
from proxy_anchor.index import clustering
from proxy_anchor.index.store import Index
from proxy_anchor.report import sheets
from proxy_anchor.thresholds import grouping
from proxy_anchor.thresholds.identification import halves
from proxy_anchor.vectors import Embeddings, comparable


@pytest.fixture(params=["scipy", "rounds"])
def method(request, monkeypatch):
    """Either way of merging, for sets of any size."""
    if request.param == "rounds":
        monkeypatch.setattr(clustering, "LIMIT", 0)
    return request.param


def by_brute_force(x, distance, limit=None, count=1):
    """Groups by the definition, in float64: the two whose mean over all pairs of images is nearest are merged."""
    x = x.astype(np.float64)
    if distance == "cosine":
        near = x / np.linalg.norm(x, axis=1, keepdims=True)
        near = near @ near.T
    else:
        near = -((x[:, None] - x) ** 2).sum(axis=2)
    least = -np.inf if limit is None else limit if distance == "cosine" else -(limit**2)
    groups = [[i] for i in range(len(x))]
    while len(groups) > count:
        means = {(a, b): near[np.ix_(groups[a], groups[b])].mean() for a in range(len(groups)) for b in range(a)}
        a, b = max(means, key=means.get)
        if means[a, b] < least:
            break
        groups[b] += groups.pop(a)
    labels = np.empty(len(x), int)
    for number, rows in enumerate(sorted(groups, key=lambda rows: (-len(rows), min(rows)))):
        labels[rows] = number
    return labels


@pytest.mark.parametrize("distance, kind", [("cosine", "random"), ("euclidean", "random"), ("euclidean", "far")])
def test_groups_are_those_of_brute_force(method, distance, kind):
    x = examples(kind, distance, np.random.default_rng(0))[:50]
    vectors = torch.from_numpy(x)
    limits = {"cosine": (0.9, 0.4, 0.1, -0.5), "euclidean": (1e-2, 0.3, 10.0, 1e5)}[distance]
    found = [clustering.things(vectors, distance, limit) for limit in limits]
    assert [labels.tolist() for labels in found] == [by_brute_force(x, distance, limit).tolist() for limit in limits]
    assert len({labels.max() for labels in found}) > 2
    for count in (1, 2, 7, 49, 50):
        labels = clustering.things(vectors, distance, None, count)
        assert labels.tolist() == by_brute_force(x, distance, count=count).tolist() and labels.max() == count - 1


def test_rounds_give_the_tree_of_scipy():
    """The same merges at the same squares, and a limit leaves out only those above it."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(60, 24))
    x = torch.from_numpy(centres[random.integers(0, 60, 900)] + 0.7 * random.normal(size=(900, 24))).float()
    pairs, squares = clustering.merge_all(x, np.inf)
    in_rounds, squares_in_rounds = clustering.merge_mutual(x, np.inf)
    assert squares_in_rounds == pytest.approx(squares, rel=1e-5) and len(squares) == 899
    for count in (300, 700, 845, 890):
        a, b = (
            clustering.Merges(900, "cosine", p, s).after(count)
            for p, s in ((pairs, squares), (in_rounds, squares_in_rounds))
        )
        assert (a == b).all()
        limit = (squares[count - 1] + squares[count]) / 2
        some = clustering.merge_mutual(x, limit)
        assert (some[1] <= limit).sum() == count
        assert (clustering.Merges(900, "cosine", *some).after(count) == a).all()


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_planted_things_are_found_in_any_order(method, distance):
    random = np.random.default_rng(2)
    planted = np.repeat(np.arange(12), [20, 17, 13, 11, 9, 8, 7, 5, 4, 3, 1, 1])
    x = 5 * random.normal(size=(12, 16))[planted] + random.normal(size=(len(planted), 16))
    limit = {"cosine": 0.7, "euclidean": 9.0}[distance]
    assert clustering.things(torch.from_numpy(x), distance, limit).tolist() == planted.tolist()
    assert clustering.sizes(planted) == (10, 2)
    order = random.permutation(len(planted))
    for settings in ((limit,), (None, 12)):
        shuffled = clustering.things(torch.from_numpy(x[order]), distance, *settings)
        assert (shuffled == planted[order])[planted[order] < 10].all()
        assert set(shuffled[planted[order] >= 10]) == {10, 11}


def test_equal_distances_and_equal_images_end(method):
    """Of many ties, any order of merges is right, but every merge is one, and equal images are together first."""
    x = torch.from_numpy(examples("ties", "cosine", np.random.default_rng(3)))
    distinct = np.unique(x.numpy(), axis=0, return_inverse=True)[1].ravel()
    labels = clustering.things(x, "cosine", 0.999)
    assert adjusted_rand_score(labels, distinct) == 1 and labels.max() == distinct.max() == 15
    for count in (1, 3, 16, 100, 200):
        assert len(np.unique(clustering.things(x, "cosine", None, count))) == count
    assert clustering.things(torch.ones(40, 3), "euclidean", 0.0).max() == 0
    assert clustering.things(torch.ones(40, 3), "euclidean", -1.0).max() == 39


def test_three_images_that_rounding_puts_in_a_circle():
    """Of equally distant images, a may be nearest to b by rounding, b to c and c to a; so it is for some of these."""
    torch.manual_seed(0)
    for _ in range(1500):
        pairs, squares = clustering.merge_mutual(torch.linalg.qr(torch.randn(8, 8))[0][:3], np.inf)
        assert len(pairs) == 2 and squares == pytest.approx([2, 2], rel=1e-5)


def test_few_images(method):
    assert clustering.things(torch.ones(1, 3), "cosine", 0.5).tolist() == [0]
    assert clustering.things(torch.ones(1, 3), "cosine", None, 1).tolist() == [0]
    with pytest.raises(ValueError, match="2 images cannot show 3 things"):
        clustering.things(torch.eye(2), "cosine", None, 3)
    with pytest.raises(ValueError, match="1 of 2 embeddings are not finite"):
        clustering.things(torch.tensor([[1.0], [torch.nan]]), "cosine", 0.5)


def random_embeddings(classes=30, images=600, spread=1.0, seed=4):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    x = random.normal(size=(classes, 24))[labels] + spread * random.normal(size=(images, 24))
    return Embeddings(torch.from_numpy(x).float(), torch.from_numpy(labels))


def by_counting_pairs(a, b):
    """The adjusted Rand index by its definition: from whether each two images are together in a, and in b."""
    above = np.triu_indices(len(a), 1)
    together, expected = ((np.equal.outer(y, y))[above] for y in (a, b))
    chance = together.sum() * expected.sum() / len(together)
    return ((together & expected).sum() - chance) / ((together.sum() + expected.sum()) / 2 - chance)


def test_rand_index_after_each_merge():
    embeddings = random_embeddings(images=120, spread=0.8)
    merges = clustering.Merges.from_vectors(embeddings.vectors, "cosine")
    scores = clustering.rand_indices(merges, embeddings.labels.tolist())
    expected = [adjusted_rand_score(embeddings.labels, merges.after(count)) for count in range(120)]
    assert scores == pytest.approx(expected, abs=1e-12) and scores.max() > 0.5
    for count in (0, 60, 100, 115):
        assert by_counting_pairs(merges.after(count), embeddings.labels.numpy()) == pytest.approx(scores[count])


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_best_threshold_is_the_best_of_many(distance):
    embeddings = random_embeddings()
    best = clustering.best_threshold(embeddings, distance)

    def score(limit):
        return adjusted_rand_score(embeddings.labels, clustering.things(embeddings.vectors, distance, limit))

    limits = np.linspace(-0.2, 1, 61) if distance == "cosine" else np.linspace(2, 15, 61)
    others = [score(limit) for limit in limits]
    assert score(best) >= max(others) > 0.2 and max(others) - min(others) > 0.2


@pytest.mark.parametrize("labels", [range(6), [0] * 6, [0]])
def test_without_pairs_of_both_kinds_there_is_no_threshold(labels):
    labels = torch.tensor([*labels])
    assert clustering.best_threshold(Embeddings(torch.randn(len(labels), 4), labels), "cosine") is None


def test_of_many_images_whole_classes_choose(monkeypatch):
    monkeypatch.setattr(clustering, "LIMIT", 100)
    labels = torch.tensor([0] * 200 + [1 + i // 7 for i in range(210)])
    classes = clustering.sample_classes(labels)
    assert 0 not in classes and len(classes) == len(set(classes.tolist())) == 14
    x = random_embeddings(31, 410).vectors
    sample = torch.isin(labels, classes)
    expected = clustering.best_threshold(Embeddings(x[sample], labels[sample]), "cosine")
    assert clustering.best_threshold(Embeddings(x, labels), "cosine") == expected


def test_measure_chooses_on_the_other_half():
    embeddings = random_embeddings()
    chosen, checked = halves(embeddings.labels)
    best = grouping.measure(embeddings, "cosine")
    assert best.threshold == clustering.best_threshold(embeddings.of_classes(chosen), "cosine")
    rest = embeddings.of_classes(checked)
    assert (best.labels == rest.labels.numpy()).all() and not set(chosen.tolist()) & set(best.labels)
    sorted_by = [clustering.things(rest.vectors, "cosine", *s) for s in ((None, 15), (0.4,))]
    recorded = grouping.measure(embeddings, "cosine", 0.4)
    assert (recorded.given == sorted_by[0]).all() and (recorded.estimated == sorted_by[1]).all()
    text = grouping.describe(embeddings, "cosine", 0.4)
    scores = [f"ARI {f(rest.labels, y):.3f}" for y in sorted_by for f in (adjusted_rand_score,)]
    scores += [f"AMI {f(rest.labels, y):.3f}" for y in sorted_by for f in (adjusted_mutual_info_score,)]
    assert all(score in text for score in scores) and "15 classes" in text and "0.4000, as recorded" in text
    found, alone = clustering.sizes(sorted_by[1])
    assert f"{found} things of two or more images, {alone} image" in text


def test_what_is_not_measured_is_said(monkeypatch):
    embeddings = random_embeddings()
    monkeypatch.setattr(grouping, "find_spec", lambda name: None if name == "sklearn" else 1 / 0)
    assert "pip install scikit-learn" in grouping.describe(embeddings, "cosine")
    monkeypatch.setattr(clustering, "LIMIT", 200)
    assert "more than 200" in grouping.describe(embeddings, "cosine")
    monkeypatch.undo()
    alone = Embeddings(torch.randn(9, 4), torch.arange(9))
    assert grouping.measure(alone, "cosine") == "half of the classes have no two images of a class"
    assert grouping.describe(alone, "cosine").startswith("Not sorted into things: half of the classes have no two")


# search.py group


@pytest.fixture
def index(weights, images, tmp_path):
    make(weights, images, tmp_path / "index")
    return tmp_path / "index"


def group(*arguments):
    search.main(["group", *map(str, arguments)])


def read(path):
    with open(path, newline="") as file:
        return [(path, int(thing)) for path, thing in csv.reader(list(file)[1:])]


def test_index_is_sorted_without_its_network(index, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "read", lambda path: pytest.fail("the checkpoint is read"))
    vectors = Index.open(index).images.vectors.copy()
    paths = list(described(index)["images"])
    capsys.readouterr()
    for flags, settings in ((["--threshold", 0.99], {"limit": 0.99}), (["--things", 4], {"count": 4})):
        group(index, *flags, "--out", tmp_path / "groups.csv")
        rows = read(tmp_path / "groups.csv")
        expected = by_brute_force(vectors, "cosine", **settings)
        assert dict(rows) == dict(zip(paths, expected + 1)) and len(rows) == 18
        assert [thing for _, thing in rows] == sorted(expected + 1)
        found, alone = clustering.sizes(expected)
        assert f"18 images: {found} things of two or more images, {alone} image" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["groups.csv", "images", "index"]


def test_images_nearest_to_the_mean_come_first(index, tmp_path):
    group(index, "--things", 2, "--out", tmp_path / "groups.csv")
    row_of = {path: row for row, path in enumerate(described(index)["images"])}
    x = comparable(torch.from_numpy(Index.open(index).images.vectors.copy()), "cosine").numpy()
    rows = [row_of[path] for path, thing in read(tmp_path / "groups.csv") if thing == 1]
    distances = np.linalg.norm(x[rows] - x[rows].mean(axis=0), axis=1)
    assert len(rows) > 8 and (np.diff(distances) > -1e-6).all() and np.ptp(distances) > 1e-3


def test_folder_is_sorted_as_its_index(weights, images, index, tmp_path):
    resume = ["--resume", weights / "a.pth", "--workers", 0]
    group(images, *resume, "--things", 5, "--out", tmp_path / "a.csv")
    group(index, "--things", 5, "--out", tmp_path / "b.csv")
    assert dict(read(tmp_path / "a.csv")) == dict(read(tmp_path / "b.csv"))
    (images / "ant" / "broken.jpg").write_bytes(b"no image")
    group(images, *resume, "--things", 5, "--out", tmp_path / "c.csv", "--skip-bad-images")
    assert dict(read(tmp_path / "c.csv")) == dict(read(tmp_path / "b.csv"))


def test_calibrations_of_the_index_and_of_its_checkpoint(weights, images, tmp_path, capsys):
    shutil.copytree(weights, tmp_path / "w")
    index, table = tmp_path / "index", tmp_path / "groups.csv"
    make(tmp_path / "w", images, index)
    fails(lambda: group(index, "--out", table), capsys, "There is no threshold to sort")
    assert not table.exists()

    identity = checkpoint.Checkpoint(tmp_path / "w" / "a.pth").identity
    checkpoint.save_calibration(tmp_path / "w" / "a.pth", threshold(0.5, groups=0.987), identity)
    group(index, "--out", table)
    assert "by similarity 0.9870" in capsys.readouterr().out
    group(images, "--resume", tmp_path / "w" / "a.pth", "--workers", 0, "--out", tmp_path / "b.csv")
    assert "by similarity 0.9870" in capsys.readouterr().out and dict(read(table)) == dict(read(tmp_path / "b.csv"))

    make(tmp_path / "w", images, index, "--calibrate", "0.3")
    own = Index.open(index).calibration.groups
    folders = [path.rsplit("/", 1)[0] for path in described(index)["images"]]
    labels = torch.tensor([sorted(set(folders)).index(folder) for folder in folders])
    vectors = torch.from_numpy(Index.open(index).images.vectors.copy())
    assert own == clustering.best_threshold(Embeddings(vectors, labels), "cosine")
    assert f"To sort images into things, chosen on the same classes: similarity {own:.4f}" in capsys.readouterr().out
    (tmp_path / "w" / "a.pth").unlink()  # the index has all it needs
    group(index, "--out", table)
    assert f"by similarity {own:.4f}" in capsys.readouterr().out


def test_other_checkpoint_in_the_place_of_the_index_s_is_refused(weights, images, tmp_path, capsys):
    shutil.copytree(weights, tmp_path / "w")
    make(tmp_path / "w", images, tmp_path / "index")
    torch.manual_seed(5)
    trees.save_checkpoint(tmp_path / "w" / "a.pth", net.create("tiny", 8), RECORD)
    fails(lambda: group(tmp_path / "index", "--out", tmp_path / "a.csv"), capsys, "was built with another checkpoint")
    (tmp_path / "w" / "a.pth").unlink()
    fails(lambda: group(tmp_path / "index", "--out", tmp_path / "a.csv"), capsys, "a.pth of")
    fails(lambda: group(tmp_path / "index", "--out", tmp_path / "a.csv"), capsys, "is gone, so its threshold cannot be")
    group(tmp_path / "index", "--out", tmp_path / "a.csv", "--things", 2)


def test_folders_are_sorted_by_their_means(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index", "--by-folder")
    group(tmp_path / "index", "--things", 2, "--out", tmp_path / "groups.csv", "--page", tmp_path / "groups.html")
    rows = read(tmp_path / "groups.csv")
    assert [path for path, _ in sorted(rows)] == sorted(described(tmp_path / "index")["images"])
    text = (tmp_path / "groups.html").read_text()
    assert "ant/more" in text and "lists all folders" in text and " images" not in re.findall("<h2>(.*)</h2>", text)[0]
    assert re.search(r"\d folders: \d things? of two or more folders, \d folders? alone", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        group(tmp_path / "index", "--out", tmp_path / "a.csv")
    error = capsys.readouterr().err
    assert "index of folders, which has no threshold to sort by: give --things N or --threshold T" in error
    assert "--calibrate" not in error


@pytest.mark.parametrize(
    "flags, words, code",
    [
        (["INDEX", "--out", "IMAGES/ant/1.jpg", "--things", "2"], "expected a name that ends in .csv", 2),
        (["INDEX", "--out", "INDEX/images.json", "--things", "2"], "expected a name that ends in .csv", 2),
        (["INDEX", "--out", "a.csv", "--page", "IMAGES/ant/1.jpg"], "expected a name that ends in .html", 2),
        (["INDEX", "--out", "a.csv", "--things", "0"], "argument --things: 0 is not positive", 2),
        (["INDEX", "--out", "a.csv", "--things", "2", "--threshold", "0.5"], "not allowed with argument --things", 2),
        (["INDEX", "--out", "a.csv", "--threshold", "nan"], "nan is not finite", 2),
        (["INDEX", "--out", "a.csv", "--model", "tiny"], "one of --resume or --backbone-only is required", 2),
        (["INDEX", "--out", "a.csv", "--things", "19"], "18 images cannot show 19 things", 1),
        (["INDEX", "--out", "none/a.csv", "--things", "2"], "argument --out: there is no folder none", 2),
        (["INDEX", "--out", "a.csv", "--resume", "WEIGHTS/a.pth"], "is an index, which needs no network", 1),
        (["INDEX", "--out", "folder.csv", "--things", "2"], "argument --out: folder.csv is a folder", 2),
        (["INDEX", "--out", "a.csv", "--page", "folder.html"], "argument --page: folder.html is a folder", 2),
        (["INDEX", "--out", "a.csv", "--things", "2", "--skip-bad-images"], "argument --skip-bad-images: it is for", 2),
        (["INDEX", "--out", "a.csv", "--things", "2", "--batch-size", "7"], "argument --batch-size: it is for a", 2),
        (["INDEX", "--out", "a.csv", "--things", "2", "--workers", "0"], "argument --workers: it is for a folder", 2),
        (["INDEX", "--out", "a.csv", "--things", "2", "--gpu-id", "1"], "argument --gpu-id: it is for a folder", 2),
        (["IMAGES", "--out", "a.csv", "--things", "2", "--amp", "bf16"], "which needs --resume or --backbone-only", 2),
        (["IMAGES", "--out", "a.csv", "--things", "2"], "for a folder of images, give a network", 1),
        (["nowhere", "--out", "a.csv", "--things", "2", "--resume", "WEIGHTS/a.pth"], "There is no nowhere", 1),
        (["IMAGES", "--out", "a.csv", "--resume", "WEIGHTS/a.pth"], "There is no threshold", 1),
    ],
)
def test_what_is_refused_leaves_all_files(flags, words, code, weights, images, index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.csv", "folder.html"):
        (tmp_path / name).mkdir()
    places = {"INDEX": str(index), "IMAGES": str(images), "WEIGHTS": str(weights)}
    flags = [re.sub("INDEX|IMAGES|WEIGHTS", lambda match: places[match.group()], flag) for flag in flags]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fails(lambda: group(*flags), capsys, words, code)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_table_is_safe_in_a_spreadsheet_and_replaced_as_a_whole(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("old")
    (tmp_path / "hard.csv").hardlink_to(table)
    sheets.write_table(table, [["=1+1", "/a,b"], ['/"c"', "/new\nline", "/\udcff"]])
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "thing"],
        ["'=1+1", "1"],
        ["/a,b", "1"],
        ['/"c"', "2"],
        ["/new\\nline", "2"],
        ["/\\udcff", "2"],
    ]
    assert (tmp_path / "hard.csv").read_text() == "old"


def colour(path, size):
    """A thumbnail for a path of the page: one colour, or an error."""
    if "broken" in path:
        raise OSError(path)
    return Image.new("L", (size, 3 * size // 4), hash(path) % 256).convert("RGB")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """More things, images and images alone than are shown."""
    path = tmp_path_factory.mktemp("page") / "groups.html"
    things = [[f"/photos/{n}/{i:02d}.jpg" for i in range(max(2, 30 - n))] for n in range(65)]
    things[0][0] = '/photos/<b>"&/broken.jpg'
    alone = [[f"/photos/one/{i}.jpg"] for i in range(40)]
    sheets.write(path, "many & images", things + alone, "image", colour, "groups.csv")
    return path


def test_page_says_what_it_leaves_out(page):
    text = page.read_text()
    names = re.findall(r"<h2>(.*?)</h2>", text)
    assert names[0] == "Thing 1 <small>30 images, 12 of them shown</small>"
    assert names[18:20] == ["Thing 19 <small>12 images</small>", "Thing 20 <small>11 images</small>"]
    assert names[60:] == ["5 smaller things left out", "Alone <small>40 images, 24 of them shown</small>"]
    shown = [sum(min(12, max(2, 30 - n)) for n in range(60)), 24]
    assert text.count("<figure") == sum(shown) and text.count("<img") == sum(shown) - 1
    assert text.count('<div class="missing">missing or damaged</div>') == 1
    first = re.findall(r'<figure class="" title="([^"]*)"', text)[:12]
    assert html.unescape(first[0]) == '/photos/<b>"&/broken.jpg' and first[-1] == "/photos/0/29.jpg"
    assert "so errors are at the end of\nits row" in text and "lists all images" in text
    assert "many &amp; images" in text and "groups.csv" in text and "<b>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http:" not in text and "$" not in text


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (400, "dark")])
def test_browser_shows_the_page(page, browser, width, scheme):
    """Every picture loads, nothing is asked for outside of the file, and nothing is cut off."""
    requests, complaints = [], []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(page.as_uri())
    tab.evaluate("Promise.allSettled(Array.from(document.images, image => image.decode()))")
    images = tab.evaluate("Array.from(document.images, i => [i.width, i.naturalWidth])")
    edges = tab.evaluate("[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right)")
    ink, paper = tab.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    tab.close()
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    assert len(images) > 300 and all(0 < shown <= natural == sheets.STORED for shown, natural in images)
    assert not complaints and max(edges) <= width
    assert all(url.startswith((page.as_uri(), "data:")) for url in requests)


# evaluate.py


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return trees.folder(tmp_path_factory.mktemp("photos"), classes=[f"{c:02d}" for c in range(20)] + ["ant"], images=5)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_evaluation_measures_and_records(distance, photos, tmp_path, capsys):
    record = RECORD | {"distance": distance, "l2_norm": int(distance == "cosine")}
    torch.manual_seed(0)
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8, l2_norm=distance == "cosine"), record)
    flags = arguments(photos, dataset="folder", resume=tmp_path / "a.pth")
    evaluate.main([*flags, "--verify"])
    chosen = re.search(r"at (?:least|most) ([\d.]+), chosen on the other half.*: (ARI .*)", capsys.readouterr().out)
    evaluate.main([*flags, "--calibrate", "0.3"])
    recorded = checkpoint.Checkpoint(tmp_path / "a.pth").calibration.groups
    evaluate.main([*flags, "--report", str(tmp_path / "report")])
    lines = re.findall(r"with .* at (?:least|most) ([\d.]+), as recorded: (ARI .*)", capsys.readouterr().out)
    assert lines == [(chosen[1], chosen[2])] * 2 and float(chosen[1]) == pytest.approx(recorded, abs=1e-4)
    assert chosen[2] in (tmp_path / "report" / "index.html").read_text()
