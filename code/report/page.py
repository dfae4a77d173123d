"""The page of evaluate.py --report: metrics, queries and their neighbours, classes, similarities, and a map.

A report is a folder with index.html, classes.csv and a folder of pictures; it needs nothing else. An earlier report
stays until the new one, which has its own folder of pictures, is complete.
"""

import csv
import html
import math
import os
import re
import secrets
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image

from proxy_anchor.evaluation import Result
from proxy_anchor.files import csv_cell, printable, replacing
from proxy_anchor.report import confusion, layout, similarities
from proxy_anchor.report.confusion import ClassResult
from proxy_anchor.spec import Calibration
from proxy_anchor.thresholds.identification import Identification
from proxy_anchor.thresholds.intervals import LEVEL
from proxy_anchor.thresholds.verification import Verification
from proxy_anchor.vectors import Embeddings, comparable, similarity, to_nearness

QUERIES = 6  # of each kind
NEIGHBOURS = 8  # of each query
PAIRS = 12  # of confused classes
HARDEST = 30  # classes
MAPPED = 1_500  # images on the map, at most
MAP_IMAGE = 48  # pixels, at most
MAP_FILLED = 0.6  # the share of the map's cells that have an image
STORED, SHOWN = 448, 110  # pixels of a picture's file and on the page, at most
ENLARGED = 320, 640  # pixels of a picture after a click, at least and at most
GENERATOR = '<meta name="generator" content="Proxy Anchor report">'  # reports are recognized by it
EXPLANATIONS = {
    "R@1": "of the queries have a nearest neighbour of their class.",
    "R@": "of the queries have an image of their class among the {} nearest.",
    "MAP@R": "of the R nearest are of the query's class, weighted by rank; R is the number of images of its class to "
    "find.",
    "R-precision": "of the R nearest are of the query's class, in any order.",
}


@dataclass
class TestSet:
    """The embeddings of test images, and the images: (uint8 (3, H, W), label) by index, with .paths and .classes.

    distance: one of spec.DISTANCES.
    """

    embeddings: Embeddings
    images: Any
    distance: str = "cosine"

    def __post_init__(self):
        labels, groups = self.embeddings.labels.cpu(), self.embeddings.groups
        vectors = comparable(self.embeddings.vectors, self.distance)
        self.embeddings = Embeddings(vectors, labels, None if groups is None else groups.cpu())

    @property
    def labels(self) -> torch.Tensor:
        return self.embeddings.labels

    def class_name(self, label) -> str:
        return str(self.images.classes[int(label)])


def open_folder(folder: Path) -> None:
    """Make the folder of a report; an earlier report in it stays.

    Raises ValueError for a folder that holds anything else, and OSError if nothing can be written there.
    """
    if os.path.lexists(folder) and not folder.is_dir():  # a file, or a broken link
        raise ValueError(f"{folder} is a file: --report must be a folder, existing or new")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    content = f"<!doctype html>{GENERATOR}<p>This report was not finished.</p>".encode()
    if any(folder.iterdir()):
        content = page.read_bytes() if page.is_file() else b""
    if GENERATOR.encode() not in content:
        raise ValueError(f"{folder} is neither empty nor a report: choose another folder for the report")
    with replacing(page) as temporary:  # even if unchanged, to fail now rather than after the work
        temporary.write_bytes(content)


def write(
    folder: Path,
    name: str,
    subtitle: str,
    rows: dict[str, dict[str, float]],
    result: Result,
    pairs: Verification,
    identified: Identification,
    calibration: Calibration | None,
    environment: dict,
    queries: TestSet,
    gallery: TestSet | None = None,
    *,
    sorted_into_things: str = "",
) -> Path:
    """Write the report on a search of the gallery or, without one, of the queries themselves; returns the page's path.

    name: of what was evaluated; rows: the metrics in each column of the table, in 0..1; calibration: that of the
    checkpoint, if any; sorted_into_things: lines on how well images are, see thresholds/grouping.py.
    """
    targets = queries if gallery is None else gallery
    with new_folder(folder) as new:
        pictures = Pictures(new, queries, targets)
        size = queries.images[0][0].shape[-1]
        shown = 2 * size if 2 * size <= SHOWN else min(size, SHOWN)  # small images are doubled where there is room
        metric, value = next(iter(result.metrics.items()))
        gallery_embeddings = None if gallery is None else gallery.embeddings
        nearest = confusion.nearest_neighbour(queries.embeddings, gallery_embeddings, queries.distance)
        taken_for = torch.where(nearest < 0, queries.labels, targets.labels[nearest])
        classes, confused = confusion.by_class(queries.labels.tolist(), taken_for.tolist(), result.ranks.tolist())
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        page = Template(template).substitute(
            generator=GENERATOR,
            title=html.escape(f"{metric} {100 * value:.1f}% · {printable(name)}"),
            heading=breakable(f"{metric} {100 * value:.1f}% · {name}"),
            subtitle=breakable(subtitle),
            **similarities.WORDS[queries.distance],
            shown=shown,
            enlarged=min(max(ENLARGED[0], 2 * size), ENLARGED[1]),
            rendering="pixelated" if shown > size else "auto",
            metrics=metrics_table(rows),
            interval=interval(classes),
            remark=html.escape(result.remark()),
            queries=query_rows(queries, targets, gallery is None, result, nearest, pictures),
            recalls=recall_bars(classes),
            count=f"{len(classes):,}",
            hardest=hardest_classes(classes, pictures),
            pairs=confused_pairs(confused, pictures),
            similarities=similarities.chart(pairs, calibration, identified.size),
            rates=similarities.rates_table(pairs)
            + similarities.open_set(identified, calibration)
            + "".join(f"<p>{html.escape(line)}</p>" for line in sorted_into_things.splitlines()),
            map=draw_map(new / "map.webp", queries),
            environment="".join(
                f"<dt>{html.escape(name)}</dt><dd>{breakable(str(value))}</dd>" for name, value in environment.items()
            ),
            enlargements="\n".join(pictures.enlargements),
        )
        text: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # file names may be of any bytes
        with replacing(folder / "classes.csv") as temporary, open(temporary, "w", newline="", **text) as file:
            writer = csv.writer(file)
            writer.writerow(["class", "queries", "R@1", "most often taken for", "times"])
            for c in classes:
                rival = "" if c.rival is None else csv_cell(printable(queries.class_name(c.rival)))
                writer.writerow([csv_cell(printable(queries.class_name(c.label))), c.queries, c.recall, rival, c.times])
        path = folder / "index.html"
        former = path.read_text(**text)
        with replacing(path) as temporary:
            temporary.write_text(page, **text)
        for earlier in set(re.findall(r'<img [^>]*src="(images-[0-9a-f]{8})/', former)) - {new.name}:
            shutil.rmtree(folder / earlier, ignore_errors=True)
        return path


@contextmanager
def new_folder(folder: Path):
    """A new folder of pictures in a report's folder; removed again if the report fails."""
    new = folder / f"images-{secrets.token_hex(4)}"
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def breakable(text: str) -> str:
    """Text as HTML that can break after _ and -, of which long names consist."""
    return re.sub("([_-])(?=.)", r"\1<wbr>", html.escape(printable(text)))


class Pictures:
    """Pictures of test images in a folder, each written when it is first shown.

    enlargements: for each picture, the HTML of what a click on it opens, with the path of the image.
    """

    def __init__(self, folder: Path, queries: TestSet, targets: TestSet):
        self.folder = folder
        self.numbers: dict[tuple[int, int], int] = {}
        self.enlargements: list[str] = []
        self.class_name = queries.class_name
        self.examples: dict[int, tuple[Any, int]] = {}  # by label; a query where the gallery has none
        for test_set in (targets, queries):
            for index, label in enumerate(test_set.labels.tolist()):
                self.examples.setdefault(label, (test_set.images, index))

    def figure(self, images, index: int, caption: str, kind: str = "") -> str:
        """An image with a caption as HTML; kind: right, wrong, unjudged or nothing."""
        path = images.paths[index]
        number = self.numbers.setdefault((id(images), index), len(self.numbers))
        picture = (
            f'<img src="{self.folder.name}/{number:05d}.jpg" loading="lazy" '
            f'alt="{html.escape(printable(Path(path).name))}">'
        )
        if number == len(self.enlargements):
            to_pillow(images, index, STORED).save(self.folder / f"{number:05d}.jpg", quality=90, subsampling=0)
            self.enlargements.append(f'<div popover id="p{number}">{picture}<code>{breakable(path)}</code></div>')
        return (
            f'<figure class="{kind}"><button popovertarget="p{number}" title="{html.escape(printable(path))}">{picture}'
            f"</button><figcaption>{caption}</figcaption></figure>"
        )

    def example(self, label: int, caption: str, kind: str = "") -> str:
        """An image of the class as HTML, with the class's name and a caption."""
        name = f"<b>{breakable(self.class_name(label))}</b><br>"
        return self.figure(*self.examples[label], name + caption, kind)


def to_pillow(images, index: int, size: int) -> Image.Image:
    """An image as the network sees it, no larger than this size."""
    image = Image.fromarray(np.ascontiguousarray(images[index][0].permute(1, 2, 0).numpy()))
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return image


def metrics_table(rows) -> str:
    """A line for each metric as HTML: its value in each of the rows, and what it means."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    head = "".join(f"<th>{breakable(row)}</th>" for row in ["", *rows, ""])
    body = "".join(
        f"<tr><td>{name}</td>"
        + "".join(
            f"<td>{100 * metrics[name]:.2f}%</td>" if name in metrics else "<td>-</td>" for metrics in rows.values()
        )
        + f"<td>{(EXPLANATIONS.get(name) or EXPLANATIONS['R@']).format(name[2:])}</td></tr>"
        for name in names
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def interval(classes: list[ClassResult]) -> str:
    recall = confusion.recall_at_1(classes).percent()
    return f"R@1 {recall}; brackets: {100 * LEVEL:g}% bootstrap interval over {len(classes):,} classes."


def select(order: list[int], labels, count: int) -> list[int]:
    """The first images in this order: one of each class before a second of any."""
    first: dict[int, int] = {}
    for i in order:
        first.setdefault(int(labels[i]), i)
    chosen = list(first.values())[:count]
    return chosen + [i for i in order if i not in chosen][: count - len(chosen)]


def query_rows(
    queries: TestSet, targets: TestSet, within: bool, result: Result, nearest: torch.Tensor, pictures: Pictures
) -> str:
    """Queries of four kinds with their neighbours as HTML; those without an image to find are left out.

    nearest (N,): the index of each query's nearest image.
    """
    answerable = torch.nonzero(result.ranks >= 0).flatten()
    if not len(answerable):
        return "<p>No query has an image of its class to find.</p>"
    score = result.average_precisions[answerable]
    wrong = answerable[targets.labels[nearest[answerable]] != queries.labels[answerable]]
    wrong_neighbours = targets.embeddings.vectors[nearest[wrong]]
    confidence = similarity(queries.embeddings.vectors[wrong], wrong_neighbours, queries.distance).cpu()
    kinds = {
        "Best: the highest MAP@R": largest_first(answerable, score),
        "Typical: a MAP@R near the median": largest_first(answerable, -(score - score.median()).abs()),
        "Worst: the most images of other classes before the first of their own": largest_first(
            answerable, result.ranks[answerable]
        ),
        "Confidently wrong: the nearest image is of another class, and very near": largest_first(wrong, confidence),
    }
    rows = []
    for kind, order in kinds.items():
        rows.append(f'<h3 id="{kind.split(":")[0].lower().replace(" ", "-")}">{kind}</h3>')
        for query in select(order, queries.labels, QUERIES):
            caption = (
                f"<b>{breakable(queries.class_name(queries.labels[query]))}</b><br>"
                f"MAP@R {100 * result.average_precisions[query]:.0f}%<br>"
                f"first match: rank {result.ranks[query] + 1:,}"
            )
            neighbours = "".join(neighbour_figures(queries, targets, query, within, pictures))
            rows.append(
                f'<div class="row">{pictures.figure(queries.images, query, caption)}'
                f'<div class="neighbours">{neighbours}</div></div>'
            )
        if not order:
            rows.append("<p>No query's nearest neighbour is of another class.</p>")
    return "\n".join(rows)


def largest_first(queries: torch.Tensor, values: torch.Tensor) -> list[int]:
    """The queries (N,) by their values (N,); of equal ones, the first comes first."""
    return queries[values.argsort(descending=True, stable=True)].tolist()


def neighbour_figures(queries: TestSet, targets: TestSet, query: int, within: bool, pictures: Pictures) -> list[str]:
    """The nearest images of a query as HTML. As many are judged as there are images of its class to find."""
    x, y = queries.embeddings, targets.embeddings
    near = similarity(y.vectors, x.vectors[query], queries.distance).cpu()
    if within:
        near[query] = -torch.inf
    if x.groups is not None:
        near[y.groups == x.groups[query]] = -torch.inf
    candidates = near > -torch.inf
    relevant = int((candidates & (y.labels == x.labels[query])).sum())  # R
    values, indices = near.topk(min(NEIGHBOURS, int(candidates.sum())))
    figures = []
    for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist())):
        right = bool(y.labels[index] == x.labels[query])
        mark, kind = ("✓ ", "right") if right else ("✗ ", "wrong")
        if rank >= relevant:
            mark, kind = "", "unjudged"
        caption = f"{mark}{to_nearness(value, queries.distance):.2f} {breakable(targets.class_name(y.labels[index]))}"
        figures.append(pictures.figure(targets.images, index, caption, kind))
    return figures


def recall_bars(classes: list[ClassResult]) -> str:
    """The distribution of the classes' R@1 as HTML."""
    counts = Counter(10 * c.right // c.queries for c in classes)
    highest = max(counts.values())
    return "".join(
        f'<div>{counts[tens]:,}<i style="height:{120 * counts[tens] / highest:.1f}px"></i>{10 * tens}</div>'
        for tens in range(11)
    )


def hardest_classes(classes: list[ClassResult], pictures: Pictures) -> str:
    """The hardest classes, each next to the class it is most often taken for, as HTML."""
    pairs = []
    for c in [c for c in classes if c.right < c.queries][:HARDEST]:
        example = pictures.example(c.label, f"R@1 {100 * c.recall:.0f}%")
        if c.rival is not None:
            example += pictures.example(c.rival, f"{c.times:,} of {c.queries:,}", "wrong")
        pairs.append(f'<div class="pair">{example}</div>')
    return "".join(pairs) or "<p>Every query finds its class first.</p>"


def confused_pairs(confused: Counter, pictures: Pictures) -> str:
    """The pairs of classes that are most often taken for each other, as HTML."""
    both: Counter = Counter()
    for (label, other), count in confused.items():
        both[min(label, other), max(label, other)] += count
    pairs = [
        f'<div class="pair">{pictures.example(a, f"{confused[a, b]:,}&times;")}'
        f"{pictures.example(b, f'{confused[b, a]:,}&times;')}</div>"
        for (a, b), _ in both.most_common(PAIRS)
    ]
    return "".join(pairs) or "<p>No query's nearest neighbour is of another class.</p>"


def draw_map(path: Path, queries: TestSet) -> str:
    """Draw the test images with similar embeddings close together; returns HTML that shows the picture."""
    count = min(MAPPED, len(queries.labels))
    chosen = np.sort(np.random.default_rng(0).permutation(len(queries.labels))[:count])
    side = math.ceil(math.sqrt(count / MAP_FILLED))
    points = layout.by_similarity(queries.embeddings.vectors[chosen].cpu().numpy())
    cells = layout.on_grid(points, side)
    size = min(MAP_IMAGE, queries.images[0][0].shape[-1])
    canvas = Image.new("RGBA", (side * size, side * size))
    for index, cell in zip(chosen.tolist(), (cells * size).tolist()):
        canvas.paste(to_pillow(queries.images, index, size), tuple(cell))
    with replacing(path) as temporary:
        canvas.save(temporary, "WEBP", quality=85)
    source = f"{path.parent.name}/{path.name}"
    return (
        f"<p>{count:,} of the {len(queries.labels):,} test images, placed by t-SNE, none over another: those that "
        "are close together have similar embeddings. Click the map to see it in full size.</p>"
        f'<a href="{source}"><img class="picture" src="{source}" width="{canvas.width}" height="{canvas.height}" '
        'loading="lazy" alt="Map of the test images"></a>'
    )
