"""A page on what a network has learned: metrics, queries and their neighbours, classes, similarities, a map.

The report is a folder: index.html, classes.csv and a folder of pictures; it needs nothing else. An earlier report stays
until the new one, which has its own folder of pictures, is complete.
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
from proxy_anchor.vectors import comparable, nearness, to_nearness
from proxy_anchor.verification import Verification

QUERIES = 6  # of each kind
NEIGHBOURS = 8  # of each query
PAIRS = 12  # of confused classes
HARDEST = 30  # classes
MAPPED = 1_500  # images on the map, at most
MAP_IMAGE = 48  # pixels, at most
MAP_FILLED = 0.6  # the share of the map's cells that have an image
THUMBNAIL, SHOWN = 160, 110  # pixels of the file and of the page, at most
GENERATOR = '<meta name="generator" content="Proxy Anchor report">'  # that reports are recognized by
EXPLANATIONS = {
    "R@1": "of the queries have a nearest neighbour of their class.",
    "R@": "of the queries have an image of their class among the {} nearest.",
    "MAP@R": "says how many of the R nearest are of the query's class, and how early they come; R is the number of "
    "images of its class to find.",
    "R-precision": "of the R nearest are of the query's class, in any order.",
}


@dataclass
class TestSet:
    """Embeddings (N, D), labels (N,) and the images, which give (uint8 (3, H, W), label), with .paths and .classes.

    distance: of vectors.DISTANCES, by which they were searched. The images may have .groups (N,), too.
    """

    embeddings: torch.Tensor
    labels: torch.Tensor
    images: object
    distance: str = "cosine"

    def __post_init__(self):
        self.embeddings = comparable(self.embeddings, self.distance)
        self.labels = self.labels.cpu()
        groups = getattr(self.images, "groups", None)
        self.groups = None if groups is None else torch.as_tensor(groups)

    def name(self, label) -> str:
        return printable(str(self.images.classes[int(label)]))


def sides(queries: TestSet, gallery: TestSet | None) -> tuple[list, list, list]:
    """The embeddings, the labels and the groups, of the queries and of the gallery each, None where there are none."""
    parts = (queries, gallery)
    return [s and s.embeddings for s in parts], [s and s.labels for s in parts], [s and s.groups for s in parts]


def open_folder(folder: Path) -> None:
    """Make the folder of a report, in which an earlier one stays as it is.

    Raises ValueError for a folder that holds anything else, and OSError where nothing can be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():  # a file, or a link to nothing
        raise ValueError(f"{folder} is no folder: a report is written to one, which need not exist")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    content = f"<!doctype html>{GENERATOR}<p>This report was not finished.</p>".encode()
    if any(folder.iterdir()):
        content = page.read_bytes() if page.is_file() else b""
    if GENERATOR.encode() not in content:
        raise ValueError(f"{folder} is neither empty nor a report: choose another folder for the report")
    with replacing(page) as temporary:  # even if unchanged: to find out now whether it can be written
        temporary.write_bytes(content)


def write(
    folder: Path,
    name: str,
    subtitle: str,
    rows: dict[str, dict[str, float]],
    result: Result,
    pairs: Verification,
    threshold: dict,
    environment: dict,
    queries: TestSet,
    gallery: TestSet | None = None,
) -> Path:
    """Write the report on the search of the queries in the gallery, or within themselves, into the folder.

    name: of what was evaluated; rows: the metrics of each line of the table, in 0..1; threshold: the checkpoint's own,
    see checkpoint.threshold. Returns the path of the page.
    """
    targets = gallery or queries
    with new_folder(folder) as new:
        pictures = Pictures(new, queries, targets)
        size = queries.images[0][0].shape[-1]
        shown = 2 * size if 2 * size <= SHOWN else min(size, SHOWN)  # small images are doubled where there is room
        metric, value = next(iter(result.metrics.items()))
        vectors, _, groups = sides(queries, gallery)
        nearest = confusion.nearest_neighbour(*vectors, queries.distance, *groups)
        taken_for = torch.where(nearest < 0, queries.labels, targets.labels[nearest])
        classes, confused = confusion.by_class(queries.labels.tolist(), taken_for.tolist(), result.ranks.tolist())
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        page = Template(template).substitute(
            generator=GENERATOR,
            title=html.escape(f"{metric} {100 * value:.1f}% · {printable(name)}"),
            subtitle=html.escape(printable(subtitle)),
            **similarities.WORDS[queries.distance],
            shown=shown,
            rendering="pixelated" if shown > size else "auto",
            metrics=metrics_table(rows),
            remark=html.escape(result.remark()),
            queries=query_rows(queries, targets, gallery is None, result, pictures),
            recalls=recall_bars(classes),
            count=f"{len(classes):,}",
            hardest=hardest_classes(classes, pictures),
            pairs=confused_pairs(confused, pictures),
            similarities=similarities.chart(pairs, threshold),
            rates=similarities.rates_table(pairs),
            map=draw_map(new / "map.webp", queries),
            environment="".join(
                f"<dt>{html.escape(name)}</dt><dd>{html.escape(printable(str(value)))}</dd>"
                for name, value in environment.items()
            ),
        )
        text: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # file names may be of any bytes
        with replacing(folder / "classes.csv") as temporary, open(temporary, "w", newline="", **text) as file:
            writer = csv.writer(file)
            writer.writerow(["class", "queries", "R@1", "most often taken for", "times"])
            writer.writerows(
                [
                    csv_cell(queries.name(c.label)),
                    c.queries,
                    c.recall,
                    "" if c.rival is None else csv_cell(queries.name(c.rival)),
                    c.times,
                ]
                for c in classes
            )
        path = folder / "index.html"
        former = path.read_text(**text)
        with replacing(path) as temporary:
            temporary.write_text(page, **text)
        for earlier in set(re.findall(r'<img [^>]*src="(images-[0-9a-f]{8})/', former)) - {new.name}:
            shutil.rmtree(folder / earlier, ignore_errors=True)
        return path


@contextmanager
def new_folder(folder: Path):
    """A new folder of pictures in that of a report, which is removed if something goes wrong."""
    new = folder / f"images-{secrets.token_hex(4)}"
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


class Pictures:
    """Thumbnails of test images in a folder, each written when it is first asked for."""

    def __init__(self, folder: Path, queries: TestSet, targets: TestSet):
        self.folder = folder
        self.names = {}
        self.class_name = queries.name
        self.examples = {}  # label: (images, index); a query's where the gallery has none
        for part in (targets, queries):
            for index, label in enumerate(part.labels.tolist()):
                self.examples.setdefault(label, (part.images, index))

    def figure(self, images, index: int, caption: str, kind: str = "") -> str:
        """An image with a caption as HTML; kind: right, wrong or nothing."""
        key = (id(images), index)
        if key not in self.names:
            self.names[key] = f"{len(self.names):05d}.jpg"
            to_pillow(images, index, THUMBNAIL).save(self.folder / self.names[key], quality=90, subsampling=0)
        return (
            f'<figure class="{kind}"><img src="{self.folder.name}/{self.names[key]}" '
            f'loading="lazy" alt="{html.escape(printable(Path(images.paths[index]).name))}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    def example(self, label: int, caption: str, kind: str = "") -> str:
        """An image of the class as HTML, with its name and a caption."""
        name = f"<b>{html.escape(self.class_name(label))}</b><br>"
        return self.figure(*self.examples[label], name + caption, kind)


def to_pillow(images, index: int, size: int) -> Image.Image:
    """An image as the network sees it, no larger than this size."""
    image = Image.fromarray(np.ascontiguousarray(images[index][0].permute(1, 2, 0).numpy()))
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return image


def metrics_table(rows) -> str:
    """A line for each metric: its value in each of the rows, and what it means."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    head = "".join(f"<th>{html.escape(printable(row))}</th>" for row in ["", *rows, ""])
    body = "".join(
        f"<tr><td>{name}</td>"
        + "".join(
            f"<td>{100 * metrics[name]:.2f}%</td>" if name in metrics else "<td>-</td>" for metrics in rows.values()
        )
        + f"<td>{(EXPLANATIONS.get(name) or EXPLANATIONS['R@']).format(name[2:])}</td></tr>"
        for name in names
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def select(order: list[int], labels, count: int) -> list[int]:
    """The first images in this order, at first one of each class."""
    first = {}
    for i in order:
        first.setdefault(int(labels[i]), i)
    chosen = list(first.values())[:count]
    return chosen + [i for i in order if i not in chosen][: count - len(chosen)]


def query_rows(queries, targets, within: bool, result: Result, pictures: Pictures) -> str:
    """Queries of three kinds as HTML; those without an image to find are left out."""
    answerable = torch.nonzero(result.ranks >= 0).flatten().tolist()
    if not answerable:
        return "<p>No query has an image of its class to find.</p>"
    score, ranks = result.average_precisions, result.ranks
    middle = score[answerable].median()
    kinds = {
        "Best: the highest MAP@R": lambda i: (-score[i].item(), i),
        "Typical: a MAP@R near the median": lambda i: (abs(score[i] - middle).item(), i),
        "Worst: the most images of other classes before the first of their own": lambda i: (-ranks[i].item(), i),
    }
    parts = []
    for kind, key in kinds.items():
        parts.append(f'<h3 id="{kind.split(":")[0].lower()}">{kind}</h3>')
        for query in select(sorted(answerable, key=key), queries.labels, QUERIES):
            near = nearness(targets.embeddings, queries.embeddings[query], queries.distance)
            if within:
                near[query] = -torch.inf
            if queries.groups is not None:
                near[(targets.groups == queries.groups[query]).to(near.device)] = -torch.inf
            values, found = near.topk(min(NEIGHBOURS, int((near > -torch.inf).sum())))
            label = queries.labels[query]
            caption = (
                f"<b>{html.escape(queries.name(label))}</b><br>MAP@R {100 * score[query]:.0f}%"
                f"<br>first match: place {ranks[query] + 1:,}"
            )
            neighbours = []
            for value, index in zip(values.tolist(), found.tolist()):
                right = targets.labels[index] == label
                name = html.escape(targets.name(targets.labels[index]))
                text = f"{'✓' if right else '✗'} {to_nearness(value, queries.distance):.2f} {name}"
                neighbours.append(pictures.figure(targets.images, index, text, "right" if right else "wrong"))
            parts.append(
                f'<div class="row">{pictures.figure(queries.images, query, caption)}'
                f'<div class="neighbours">{"".join(neighbours)}</div></div>'
            )
    return "\n".join(parts)


def recall_bars(classes: list[ClassResult]) -> str:
    """The distribution of the classes' R@1 as HTML."""
    counts = Counter(10 * c.right // c.queries for c in classes)
    highest = max(counts.values())
    return "".join(
        f'<div>{counts[tens]:,}<i style="height:{120 * counts[tens] / highest:.1f}px"></i>{10 * tens}</div>'
        for tens in range(11)
    )


def hardest_classes(classes: list[ClassResult], pictures: Pictures) -> str:
    """The hardest classes, each beside the one that it is most often taken for, as HTML."""
    parts = []
    for c in [c for c in classes if c.right < c.queries][:HARDEST]:
        parts.append(f'<div class="pair">{pictures.example(c.label, f"R@1 {100 * c.recall:.0f}%")}')
        if c.rival is not None:
            parts.append(pictures.example(c.rival, f"{c.times:,} of {c.queries:,}", "wrong"))
        parts.append("</div>")
    return "".join(parts) or "<p>Every query finds its class first.</p>"


def confused_pairs(confused: Counter, pictures: Pictures) -> str:
    """The pairs of classes that are most often taken for each other, as HTML."""
    both = Counter()
    for (label, other), count in confused.items():
        both[min(label, other), max(label, other)] += count
    parts = [
        f'<div class="pair">{pictures.example(a, f"{confused[a, b]:,}&times;")}'
        f"{pictures.example(b, f'{confused[b, a]:,}&times;')}</div>"
        for (a, b), _ in both.most_common(PAIRS)
    ]
    return "".join(parts) or "<p>No query's nearest neighbour is of another class.</p>"


def draw_map(path: Path, queries: TestSet) -> str:
    """Draw the test images, those with similar embeddings close together; returns the HTML that shows the picture."""
    count = min(MAPPED, len(queries.labels))
    chosen = np.sort(np.random.default_rng(0).permutation(len(queries.labels))[:count])
    side = math.ceil(math.sqrt(count / MAP_FILLED))
    places = layout.by_similarity(queries.embeddings[chosen].cpu().numpy())
    cells = layout.on_grid(places, side)
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
