"""evaluate.py --report: what the page says, and that a browser shows all of it without the network."""

import csv
import html
import multiprocessing
import os
import re
import sys

import numpy as np
import pytest
import torch
import trees
from helpers import RECORD, Squares, arguments, threshold
from sklearn.metrics import roc_auc_score

import evaluate
import net
from proxy_anchor.evaluation import measure
from proxy_anchor.report import confusion, layout, similarities
from proxy_anchor.report import page as report_page
from proxy_anchor.retrieval import best_positive_rank
from proxy_anchor.thresholds import identification, verification
from proxy_anchor.vectors import Embeddings


def random_set(count, classes, seed=0, distance="cosine"):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    embeddings = random.normal(size=(classes, 16))[labels] + random.normal(size=(count, 16))
    images = Squares(labels, [f"<b>class & {c}</b>" for c in range(classes)])
    return report_page.TestSet(
        Embeddings(torch.from_numpy(embeddings).float(), torch.from_numpy(labels)), images, distance
    )


def write(folder, queries, gallery=None, name="a network", threshold=None, **rows):
    embeddings = queries.embeddings, gallery and gallery.embeddings
    result = measure(queries.embeddings, [1, 2], embeddings[1], queries.distance)
    pairs = verification.verify(*embeddings, queries.distance)
    report_page.open_folder(folder)
    return report_page.write(
        folder,
        name,
        "",
        {"ours": result.metrics, **rows},
        result,
        pairs,
        identification.identify(*embeddings, queries.distance),
        threshold,
        {"device": "a <CPU>"},
        queries,
        gallery,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on an untrained network and a small In-shop, whose queries are searched in a gallery."""
    folder = tmp_path_factory.mktemp("report")
    trees.inshop(folder / "data")
    torch.manual_seed(0)
    trees.save_checkpoint(folder / "a.pth", net.create("tiny", 8), RECORD)
    flags = {"dataset": "Inshop", "resume": folder / "a.pth", "report": folder / "page"}
    evaluate.main(arguments(folder / "data", **flags))
    return folder / "page" / "index.html"


def test_page_needs_nothing_from_elsewhere(page):
    text = page.read_text()
    for source in re.findall(r'(?:src|href)="([^"#][^"]*)"', text):
        assert source.startswith("data:") or (page.parent / source).is_file(), source
    assert "http" not in re.sub(r"http-equiv", "", text) and "$" not in text
    (pictures,) = page.parent.glob("images-*")
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "classes.csv", pictures.name}
    assert {path.name for path in pictures.iterdir()} - set(re.findall(r"/([\w.]+)\"", text)) == set()


@pytest.fixture(scope="module")
def page_of_photographs(tmp_path_factory):
    """With larger images, long names and two columns of metrics."""
    queries = random_set(60, 6)
    queries.images = Squares(queries.labels.numpy(), [f"{c:03d}.Black_footed_Albatross" for c in range(6)], side=224)
    return write(tmp_path_factory.mktemp("photographs"), queries, **{"a_remark" * 5: {"R@1": 0.5}})


@pytest.mark.slow
@pytest.mark.parametrize("which", ["page", "page_of_photographs"])
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (400, "dark")])
def test_browser_shows_the_page(request, browser, which, width, scheme):
    """Every image loads, at no more than twice its size; nothing is asked for outside of the folder; all is in view."""
    page = request.getfixturevalue(which)
    requests, complaints = [], []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    tab.evaluate("Promise.allSettled(Array.from(document.images, image => image.decode()))")
    images = tab.evaluate("Array.from(document.images, i => [i.src, i.width, i.naturalWidth])")
    edges = "[...document.querySelectorAll('body *')].map(e => [e.tagName, e.getBoundingClientRect().right])"
    cut_off = [(tag, right) for tag, right in tab.evaluate(edges) if right > width]
    ink, paper = tab.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    tab.close()
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    assert len(images) > 20 and all(0 < shown <= 2 * natural for _, shown, natural in images)
    assert not complaints and not cut_off
    assert all(url.startswith((page.parent.as_uri(), "data:")) for url in requests) and len(requests) > 10


@pytest.mark.parametrize("gallery", [None, random_set(300, 12, seed=1)])
def test_neighbours_and_classes_are_those_of_brute_force(tmp_path, gallery):
    queries = random_set(200, 12)
    targets = gallery or queries
    similarity = (queries.embeddings.vectors @ targets.embeddings.vectors.T).double().numpy()
    if gallery is None:
        np.fill_diagonal(similarity, -np.inf)
    nearest = similarity.argmax(axis=1)
    assert confusion.nearest_neighbour(queries.embeddings, gallery and gallery.embeddings).tolist() == nearest.tolist()
    write(tmp_path, queries, gallery)
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["R@1"]) for row in rows] == sorted(float(row["R@1"]) for row in rows) and len(rows) == 12
    for row in rows:
        label = queries.images.classes.index(row["class"])
        own = np.flatnonzero(queries.labels.numpy() == label)
        found = targets.labels.numpy()[nearest[own]]
        assert int(row["queries"]) == len(own) and float(row["R@1"]) == pytest.approx((found == label).mean())
        wrong = np.bincount(found[found != label], minlength=12)
        assert int(row["times"]) == wrong.max()
        if wrong.any():
            assert wrong[queries.images.classes.index(row["most often taken for"])] == wrong.max()


@pytest.mark.parametrize("gallery", [None, random_set(300, 12, seed=1, distance="euclidean")])
def test_page_of_a_euclidean_network(tmp_path, gallery):
    queries = random_set(200, 12, distance="euclidean")
    targets = gallery or queries
    distances = torch.cdist(queries.embeddings.vectors.double(), targets.embeddings.vectors.double())
    if gallery is None:
        distances.fill_diagonal_(torch.inf)
    found = confusion.nearest_neighbour(queries.embeddings, gallery and gallery.embeddings, "euclidean")
    assert torch.equal(found, distances.argmin(dim=1))
    text = write(tmp_path, queries, gallery).read_text()
    assert "is its Euclidean distance to the query" in text and "imilarities</h2>" not in text and "osine" not in text
    recall = (targets.labels[found] == queries.labels).float().mean()
    assert f"<h1>R@1 {100 * recall:.1f}%" in text
    rows = text[text.index('id="queries"') : text.index('id="classes"')].split('<div class="row">')[1:]
    for row in rows:
        shown = [float(value) for value in re.findall(r"[✓✗] ([\d.]+) ", row)]
        query = int(re.search(r'alt="(\d+).jpg"', row)[1])
        expected = distances[query].topk(report_page.NEIGHBOURS, largest=False).values.tolist()
        assert shown == pytest.approx(expected, abs=0.006)
    same = targets.labels == queries.labels[:, None]
    if gallery is None:
        same.fill_diagonal_(False)
    means = [float(value) for value in re.findall(r"class(?:es)?: mean ([\d.]+),", text)]
    of_one = distances[same & distances.isfinite()]
    of_two = distances[targets.labels != queries.labels[:, None]]
    assert sorted(means) == pytest.approx(sorted([float(of_one.mean()), float(of_two.mean())]), abs=0.006)
    threshold = float(re.search(r"At the threshold ([\d.]+) ", text)[1])
    rate = float(re.search(r"are equal: ([\d.]+)% \[[^]]*\] of the same-class pairs are above it", text)[1])
    assert rate / 100 == pytest.approx(float((of_one > threshold).double().mean()), abs=0.01)
    assert rate / 100 == pytest.approx(float((of_two <= threshold).double().mean()), abs=0.01)
    farthest = max(float(value) for value in re.findall(r"%\">([\d.]+)</span>", text))
    assert 1 - drawn_at("threshold", text) == pytest.approx(threshold / farthest, abs=0.01)


def test_page_escapes_names_and_frames_neighbours(tmp_path):
    queries = random_set(200, 12)
    text = write(tmp_path, queries).read_text()
    assert "<b>class" not in text and "&lt;b&gt;class &amp; 3&lt;/b&gt;" in text and "a &lt;CPU&gt;" in text
    text = text[text.index('id="queries"') : text.index('id="classes"')]
    assert text.count('<div class="row">') == 4 * report_page.QUERIES
    assert text.count('<figure class="right">') == text.count("✓ ")
    assert sum(text.count(f'<figure class="{kind}">') for kind in ("right", "wrong", "unjudged")) == 4 * 6 * 8
    ranks = [int(place.replace(",", "")) for place in re.findall(r"first match: rank ([\d,]+)", text)]
    expected = sorted((best_positive_rank(queries.embeddings.vectors, queries.labels) + 1).tolist())
    assert ranks[12] == expected[-1] and ranks[12:18] == sorted(ranks[12:18], reverse=True) and set(ranks[:6]) == {1}


def test_only_as_many_neighbours_are_judged_as_there_are_images_to_find(tmp_path):
    """Classes of four: three to find; what comes after the third neighbour is neither right nor wrong."""
    random = np.random.default_rng(0)
    text = write(tmp_path, set_of(random.normal(size=(20, 4)), [0, 1, 2, 3, 4] * 4)).read_text()
    rows = text[text.index('id="queries"') : text.index('id="classes"')].split('<div class="row">')[1:]
    for row in rows:
        kinds = re.findall(r'<figure class="(\w*)">', row)
        assert kinds[0] == "" and kinds[4:] == ["unjudged"] * 5 and set(kinds[1:4]) <= {"right", "wrong"}
        assert len(re.findall("[✓✗] ", row)) == 3


def test_confidently_wrong_queries_are_those_with_the_nearest_wrong_neighbours(tmp_path):
    queries = random_set(200, 12)
    similarity = (queries.embeddings.vectors @ queries.embeddings.vectors.T).fill_diagonal_(-2)
    values, nearest = similarity.max(dim=1)
    wrong = queries.labels[nearest] != queries.labels
    text = write(tmp_path, queries).read_text()
    rows = text[text.index('id="confidently-wrong"') : text.index('id="classes"')].split('<div class="row">')[1:]
    shown = [int(re.search(r'alt="(\d+).jpg"', row)[1]) for row in rows]
    assert shown[0] == values.where(wrong, -2).argmax() and wrong[shown].all()
    assert values[shown].tolist() == sorted(values[shown].tolist(), reverse=True)
    assert all(
        re.search(r'<figure class="wrong">.*?✗ ([\d.]+)', row)[1] == f"{values[i]:.2f}" for row, i in zip(rows, shown)
    )


def test_pictures_open_with_their_path_and_names_can_break(tmp_path):
    queries = random_set(40, 3)
    queries.images.classes[:] = ["a_long-name_"] * 3
    queries.images.paths[:] = [f"photos_of/<{i}>-1.jpg" for i in range(40)]
    text = write(tmp_path, queries, name="resnet18 on my_photos").read_text()
    assert "<b>a_<wbr>long-<wbr>name_</b>" in text and "resnet18 on my_<wbr>photos</h1>" in text
    opened = re.findall(r'<button popovertarget="(p\d+)" title="photos_of/&lt;(\d+)&gt;-1.jpg"><img src="(.*?)"', text)
    assert len(opened) > 100
    for target, number, source in set(opened):
        enlarged = re.search(rf'<div popover id="{target}"><img src="(.*?)" .*?><code>(.*?)</code></div>', text)
        assert enlarged.groups() == (source, f"photos_<wbr>of/&lt;{number}&gt;-<wbr>1.jpg")


def test_recall_has_an_interval_over_the_classes(tmp_path):
    """That of classes drawn again, by brute force."""
    queries = random_set(300, 20)
    hits = (best_positive_rank(queries.embeddings.vectors, queries.labels) == 0).numpy()
    random, labels, recalls = np.random.default_rng(1), queries.labels.numpy(), []
    for _ in range(1000):
        chosen = np.concatenate([hits[labels == label] for label in random.integers(0, 20, 20)])
        recalls.append(100 * chosen.mean())
    text = write(tmp_path, queries).read_text()
    shown = re.search(r"R@1 ([\d.]+)% \[([\d.]+), ([\d.]+)\]; brackets: 95% bootstrap interval over 20 classes", text)
    assert float(shown[1]) == pytest.approx(100 * hits.mean(), abs=0.01)
    assert [float(end) for end in shown.groups()[1:]] == pytest.approx(np.quantile(recalls, [0.025, 0.975]), abs=1)


def test_names_may_be_of_any_bytes(tmp_path):
    queries = random_set(40, 3)
    queries.images.classes[1] = os.fsdecode(b"\xff")
    assert r"<b>\udcff</b>" in write(tmp_path, queries).read_text(encoding="utf-8")
    assert r"\udcff," in (tmp_path / "classes.csv").read_text(encoding="utf-8")


def test_names_bring_no_control_characters_and_no_formulas(tmp_path):
    queries = random_set(60, 4)
    names = ["x\x1b[2J\n</td>\r\u202ey", "=cmd|' /C calc'!A0", "\t-1+1", "-3"]
    queries.images.classes[:] = names
    queries.images.paths[:] = [f"a/{names[0]}.jpg" for _ in queries.images.paths]
    text = write(tmp_path, queries, name=names[0]).read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"x\x1b[2J\n&lt;/td&gt;\r\u202ey" in text
    content = (tmp_path / "classes.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(content.splitlines()))
    expected = {r"x\x1b[2J\n</td>\r\u202ey", "'=cmd|' /C calc'!A0", r"\t-1+1", "-3"}
    assert {row["class"] for row in rows} == expected and {row["most often taken for"] for row in rows} <= expected | {
        ""
    }
    assert all(float(row["R@1"]) <= 1 and int(row["queries"]) > 0 for row in rows) and "\x1b" not in content


def test_title_is_the_result_and_each_metric_is_explained(tmp_path):
    queries = random_set(200, 12)
    text = write(tmp_path, queries, name="<a> network").read_text()
    recall = 100 * (best_positive_rank(queries.embeddings.vectors, queries.labels) == 0).float().mean()
    title = f"R@1 {recall:.1f}% · &lt;a&gt; network"
    assert f"<title>{title}</title>" in text and f"<h1>{title}</h1>" in text and "<a> network" not in text
    table = text[: text.index('id="queries"')]
    lines = re.findall(r"<tr><td>(.*?)</td><td>(.*?)%</td><td>(.*?)</td></tr>", table)
    assert [name for name, _, _ in lines] == ["R@1", "R@2", "MAP@R", "R-precision"]
    assert lines[0][1] == f"{recall:.2f}" and "among the 2 nearest" in lines[1][2]
    assert all(words.endswith(".") for _, _, words in lines) and "igures" not in text


def test_bars_count_all_classes_and_the_hardest_are_shown(tmp_path):
    text = write(tmp_path, random_set(300, 100)).read_text()
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    bars = re.findall(r"<div>([\d,]+)<i style=[^>]*></i>(\d+)</div>", text)
    expected = [int(100 * float(row["R@1"]) + 1e-9) // 10 * 10 for row in rows]
    assert [(int(count), int(tens)) for count, tens in bars] == [(expected.count(t), t) for t in range(0, 101, 10)]
    hardest = text[text.index("The hardest classes") : text.index("Most often confused")]
    shown = re.findall(r"<b>([^<]*)</b><br>R@1 (\d+)%", hardest)
    assert shown == [(html.escape(row["class"]), f"{100 * float(row['R@1']):.0f}") for row in rows[:30]]


def test_similarities_say_how_many_pairs_they_are_of_and_the_threshold_is_drawn(tmp_path):
    queries, gallery = random_set(200, 12), random_set(300, 12, seed=1)
    text = write(tmp_path, queries, gallery).read_text()
    similarity = (queries.embeddings.vectors @ gallery.embeddings.vectors.T).double().numpy()
    alike = queries.labels[:, None].numpy() == gallery.labels.numpy()
    same, other = similarity[alike], similarity[~alike]
    assert f"AUC {100 * roc_auc_score(alike.ravel(), similarity.ravel()):.2f}% [" in text
    assert f"same class: mean {same.mean():.2f}, {len(same):,} pairs" in text
    assert f"different classes: mean {other.mean():.2f}, {len(other):,} pairs" in text
    threshold, rate = map(float, re.search(r"At the threshold ([\d.]+) .*? are equal: ([\d.]+)%", text).groups())
    assert rate == pytest.approx(100 * (same < threshold).mean(), abs=0.3)
    assert rate == pytest.approx(100 * (other >= threshold).mean(), abs=0.1)
    low = min(0, same.min(), other.min())
    assert (at := drawn_at("threshold", text)) == pytest.approx((threshold - low) / (1 - low), abs=2e-3)
    assert "recorded" not in text[text.index("</style>") :]
    rows = re.findall(r"<tr><td>([\d.]+)%</td><td>([\d.]+)% \[.*?\]</td><td>([-\d.]+) \[.*?\]</td></tr>", text)
    assert [far for far, _, _ in rows] == ["10", "1", "0.1"]  # of some 50,000 pairs
    for far, tar, threshold in rows:
        assert float(tar) == pytest.approx(100 * (same >= float(threshold)).mean(), abs=0.2)
        assert float(far) == pytest.approx(100 * (other >= float(threshold)).mean(), abs=0.02)
    assert "too few different-class pairs for thresholds with 0.01% false accepts" in text and 0 < at < 1
    for kind, height in (("right", same), ("wrong", other)):  # the drawing is their histogram
        drawn = re.search(rf'<path class="{kind}" d="M0 100(.*?)V100Z', text)[1]
        heights = [100 - float(y) for y in re.findall(r"V([\d.]+)H", drawn)]
        counts = np.histogram(height, similarities.BINS, (low, 1))[0]
        assert np.corrcoef(heights, counts)[0, 1] > 0.99


def drawn_at(kind, text):
    """Where the line of a threshold stands, from 0 to 1."""
    (at,) = re.findall(rf'class="{kind}" d="M([\d.]+) 0V100"', text)
    return float(at) / similarities.BINS


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_threshold_of_the_checkpoint_is_drawn(tmp_path, distance):
    queries = random_set(200, 12, distance=distance)
    record = threshold(0.6, distance=distance, dataset="<mine>")
    text = write(tmp_path, queries, threshold=record).read_text()
    assert "threshold of the checkpoint 0.60, for 5% unknown matches" in text and "&lt;mine&gt;" in text
    assert "images, the checkpoint has the threshold 0.600" in text and "2.00% [0.00, 10.00] did" in text
    x, y = queries.embeddings.vectors.double(), queries.labels
    x = torch.nn.functional.normalize(x) if distance == "cosine" else x
    nearness = x @ x.T if distance == "cosine" else -torch.cdist(x, x)
    limit = 0.6 if distance == "cosine" else -0.6
    nearest = nearness.masked_fill(y[:, None] == y, -torch.inf).amax(dim=1)
    own = nearness.fill_diagonal_(-torch.inf).masked_fill(y[:, None] != y, -torch.inf).amax(dim=1)
    unknown, known = (nearest >= limit).double().mean(), ((own >= limit) & (own > nearest)).double().mean()
    assert re.search(rf", {100 * unknown:.2f}% \[.*? of unknown queries match, and {100 * known:.2f}%", text)
    assert float(re.search(r'class="recorded" d="M([\d.]+) 100V0"', text)[1]) == pytest.approx(min(100 * unknown, 50))
    (line,) = re.findall(r'class="right" style="fill:none" d="M(.*?)"', text)
    drawn = [100 - float(point.split()[1]) for point in line.split("L")]
    limits = nearest.sort(descending=True).values[(torch.arange(51) * len(y)) // 100]
    expected = [float(100 * ((own > limit) & (own > nearest)).double().mean()) for limit in limits]
    assert drawn == pytest.approx(expected, abs=0.6)
    equal = float(re.search(r"At the threshold ([\d.]+) ", text)[1])
    if distance == "cosine":
        least = min(0, float((queries.embeddings.vectors @ queries.embeddings.vectors.T).min()))
        assert drawn_at("recorded", text) == pytest.approx((0.6 - least) / (1 - least), abs=0.01)
    else:
        farthest = float(torch.pdist(queries.embeddings.vectors).max())
        assert drawn_at("recorded", text) == pytest.approx(1 - 0.6 / farthest, abs=0.01)
    assert (drawn_at("recorded", text) > drawn_at("threshold", text)) == ((equal < 0.6) == (distance == "cosine"))


@pytest.mark.parametrize("kind", ["spread", "heaps", "one heap"])
def test_images_on_the_map_have_cells_of_their_own(kind):
    random = np.random.default_rng(0)
    places = {"spread": random.random((60, 2)), "heaps": np.eye(2)[[0, 1] * 30], "one heap": np.zeros((60, 2))}[kind]
    cells = layout.on_grid(places, 10)
    assert len(set(map(tuple, cells.tolist()))) == 60 and cells.min() >= 0 and cells.max() < 10
    if kind == "heaps":  # around its two places, in corners
        assert (np.abs(cells - 9 * places).sum(axis=1) <= 9).all()
    if kind == "spread":
        assert np.abs(cells / 9 - places).max() < 0.35 and np.corrcoef(cells[:, 0], places[:, 0])[0, 1] > 0.9


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class GoneInTheEnd(Squares):
    def __getitem__(self, index):
        if sys._getframe(2).f_code.co_name == "draw_map":
            raise OSError("the disk of the images is gone")
        return super().__getitem__(index)


def test_earlier_report_stays_until_the_new_one_is_complete(tmp_path):
    write(tmp_path, random_set(60, 6))
    earlier = files(tmp_path)
    queries = random_set(70, 7)
    queries.images = GoneInTheEnd(queries.labels.numpy(), queries.images.classes)
    with pytest.raises(OSError, match="gone"):
        write(tmp_path, queries)
    assert files(tmp_path) == earlier
    text = write(tmp_path, random_set(70, 7)).read_text()
    assert len(list(tmp_path.glob("images-*"))) == 1
    assert all((tmp_path / source).is_file() for source in re.findall(r'src="([^"]*)"', text))


def set_of(embeddings, labels, distance="cosine"):
    embeddings, labels = torch.tensor(embeddings, dtype=torch.float32), torch.tensor(labels)
    return report_page.TestSet(Embeddings(embeddings, labels), Squares(labels.numpy(), "abcde"), distance)


FOUR_CLASSES = [0, 1, 2, 3] * 10
FEW_OR_EQUAL = {
    "one image": set_of([[1, 0, 0]], [0]),
    "two images": set_of([[1, 0, 0], [0, 1, 0]], [0, 0]),
    "three images": random_set(3, 2),
    "five images": random_set(5, 2),
    "one class": set_of(np.random.default_rng(0).normal(size=(40, 3)), [0] * 40),
    "one dimension": set_of([[1.0], [-1.0]] * 20, FOUR_CLASSES),
    "all equal": set_of([[1, 0, 0]] * 40, FOUR_CLASSES),  # a collapsed network
    "all but one equal": set_of([[1, 0, 0]] * 39 + [[0, 1, 0]], FOUR_CLASSES),
    "all equal, Euclidean": set_of([[1, 0, 0]] * 40, FOUR_CLASSES, "euclidean"),
    "duplicates": set_of(np.eye(4)[FOUR_CLASSES], FOUR_CLASSES),
}


GALLERY_LACKS_ALL = "a gallery that lacks all classes"


def write_each(folder, sets):
    for kind, queries in sets.items():
        write(folder / kind, queries)
    write(folder / GALLERY_LACKS_ALL, FEW_OR_EQUAL["all equal"], set_of([[1, 0, 0]] * 3, [4] * 3))


def test_all_embeddings_that_can_be_ranked_have_a_report(tmp_path):
    """In a process of its own: t-SNE from a start that is not finite ends it without a message."""
    child = multiprocessing.get_context("spawn").Process(target=write_each, args=(tmp_path, FEW_OR_EQUAL))
    child.start()
    child.join()
    pages = {kind: tmp_path / kind / "index.html" for kind in [*FEW_OR_EQUAL, GALLERY_LACKS_ALL]}
    assert [kind for kind, page in pages.items() if not page.exists() or "not finished" in page.read_text()] == []
    assert child.exitcode == 0


def test_class_that_the_gallery_lacks(tmp_path):
    queries, gallery = random_set(60, 6), random_set(90, 5, seed=1)
    gallery.images.classes = queries.images.classes
    text = write(tmp_path, queries, gallery).read_text()
    rows = {row["class"]: row for row in csv.DictReader((tmp_path / "classes.csv").open())}
    assert float(rows["<b>class & 5</b>"]["R@1"]) == 0 and int(rows["<b>class & 5</b>"]["times"]) > 0
    assert "queries have no image of their class to find" in text


def test_folder_of_others_is_refused(tmp_path, cub_root, capsys):
    """Also a web page of somebody's, whose pictures would go; a report is written over."""
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), RECORD)
    site = tmp_path / "site"
    (site / "images").mkdir(parents=True)
    (site / "index.html").write_text("<html>mine</html>")
    flags = arguments(cub_root, resume=tmp_path / "a.pth")
    for folder in (site, tmp_path):
        with pytest.raises(SystemExit):
            evaluate.main([*flags, "--report", str(folder)])
        assert "neither empty nor a report" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a.pth is a file: --report must be a folder"):
        report_page.open_folder(tmp_path / "a.pth")
    report_page.open_folder(tmp_path / "page")  # as by an evaluation that then failed
    for _ in range(2):
        evaluate.main([*flags, "--report", str(tmp_path / "page")])
    assert "not finished" not in (tmp_path / "page" / "index.html").read_text()
