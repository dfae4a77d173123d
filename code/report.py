"""A page on what a network has learnt: figures, queries and their neighbours, classes, similarities, a map.

The page is a folder: index.html, classes.csv and a folder of pictures, and nothing from elsewhere. A new report has
pictures of its own and takes the place of an earlier one when it is complete.
"""

import csv
import html
import secrets
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image

from proxy_anchor.evaluation import Result
from proxy_anchor.files import replacing
from proxy_anchor.retrieval import unit_vectors

QUERIES = 6  # of each kind
NEIGHBOURS = 8  # of each query
PAIRS = 12  # of confused classes
CLASSES = 100  # in the table, at most
SIMILARITIES = 200_000  # pairs of each kind, at most
MAPPED = 1_500  # images on the map, at most
MAP_SIZE, MAP_IMAGE = 2400, 48  # pixels
THUMBNAIL = 160  # pixels
BLOCK = 1024  # queries at a time
ROUNDING = 1e-5  # the most that coordinates of equal embeddings differ by
GENERATOR = '<meta name="generator" content="Proxy Anchor report">'  # by which a report is known


@dataclass
class TestSet:
    """Embeddings (N, D), labels (N,) and the images, which give (uint8 (3, H, W), label), with .paths and .classes."""

    embeddings: torch.Tensor
    labels: torch.Tensor
    images: object

    def __post_init__(self):
        self.embeddings = unit_vectors(self.embeddings)
        self.labels = self.labels.cpu()

    def name(self, label) -> str:
        return str(self.images.classes[int(label)])


def open_folder(folder: Path) -> None:
    """Make the folder of a report, in which an earlier one stays as it is.

    Raises ValueError for a folder that holds anything else, and OSError where nothing can be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    content = f"<!doctype html>{GENERATOR}<p>This report was not finished.</p>".encode()
    if any(folder.iterdir()):
        content = page.read_bytes() if page.is_file() else b""
    if GENERATOR.encode() not in content:
        raise ValueError(f"{folder} is neither empty nor a report: choose another folder for the report")
    with replacing(page) as temporary:  # also by what it was: to find out now whether that can be done
        temporary.write_bytes(content)


def write(
    folder: Path, title: str, subtitle: str, figures: dict[str, dict[str, float]], result: Result, environment: dict,
    queries: TestSet, gallery: TestSet | None = None,
) -> Path:  # fmt: skip
    """Write the report on the search of the queries in the gallery, or within themselves, into the folder.

    figures: the metrics of each line of the table, in 0..1. Returns the path of the page.
    """
    targets = gallery or queries
    new = folder / f"images-{secrets.token_hex(4)}"
    new.mkdir()
    pictures = Pictures(new)
    nearest = nearest_neighbour(queries, gallery)
    shown, listed, pairs, table = class_tables(queries, targets, nearest, result, pictures)
    draw_similarities(new / "similarities.svg", queries, gallery)
    mapped = draw_map(new / "map.jpg", queries)
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        generator=GENERATOR,
        pictures=new.name,
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        figures=figures_table(figures),
        remark=html.escape(result.remark()),
        queries=query_rows(queries, targets, gallery is None, result, pictures),
        pairs=pairs,
        listed=listed,
        classes=shown,
        mapped=f"{mapped:,} of the {len(queries.labels):,} test images, by the t-SNE of their embeddings: images lie "
        "together that the network holds for alike. A click opens the picture whole.",
        environment="".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in environment.items()
        ),
    )
    with replacing(folder / "classes.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["class", "queries", "R@1", "most often taken for", "times"], *table])
    path = folder / "index.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    for earlier in set(folder.glob("images-*")) - {new}:
        shutil.rmtree(earlier, ignore_errors=True)
    return path


class Pictures:
    """Thumbnails of test images in a folder, each written when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = {}

    def figure(self, images, index: int, caption: str, kind: str = "") -> str:
        """An image with a caption as HTML; kind: right, wrong or nothing."""
        key = (id(images), index)
        if key not in self.names:
            self.names[key] = f"{len(self.names):05d}.jpg"
            to_pillow(images, index, THUMBNAIL).save(self.folder / self.names[key], quality=88)
        source = f"{self.folder.name}/{self.names[key]}"
        return (
            f'<figure class="{kind}"><img src="{source}" width="{THUMBNAIL}" height="{THUMBNAIL}" '
            f'loading="lazy" alt="{html.escape(Path(images.paths[index]).name)}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def to_pillow(images, index: int, size: int) -> Image.Image:
    """An image as the network sees it, at another size."""
    pixels = images[index][0].permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((size, size), Image.Resampling.LANCZOS)


def figures_table(figures) -> str:
    columns = list(dict.fromkeys(name for metrics in figures.values() for name in metrics))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *columns])
    body = "".join(
        f'<tr><td class="name">{html.escape(name)}</td>'
        + "".join(f"<td>{100 * metrics[c]:.2f}</td>" if c in metrics else "<td>-</td>" for c in columns)
        + "</tr>"
        for name, metrics in figures.items()
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def nearest_neighbour(queries: TestSet, gallery: TestSet | None) -> torch.Tensor:
    """The index of the most similar other image of each query: (N,)."""
    targets = (gallery or queries).embeddings
    nearest = []
    for start in range(0, len(queries.embeddings), BLOCK):
        similarity = queries.embeddings[start : start + BLOCK] @ targets.T
        if gallery is None:
            similarity.diagonal(offset=start).fill_(-torch.inf)
        nearest.append(similarity.argmax(dim=1))
    return torch.cat(nearest).cpu()


def select(order: list[int], labels, count: int) -> list[int]:
    """The first images in this order, at first one of each class."""
    first = {}
    for i in order:
        first.setdefault(int(labels[i]), i)
    chosen = list(first.values())[:count]
    return chosen + [i for i in order if i not in chosen][: count - len(chosen)]


def query_rows(queries, targets, within: bool, result: Result, pictures: Pictures) -> str:
    """Queries of three kinds as HTML; those without an image to find are none of them."""
    answerable = torch.nonzero(result.ranks >= 0).flatten().tolist()
    score, ranks = result.average_precisions, result.ranks
    middle = score[answerable].median() if answerable else 0
    kinds = {
        "Best": lambda i: (-score[i].item(), i),
        "Typical, about as good as the median": lambda i: (abs(score[i] - middle).item(), i),
        "Worst, by the place of the first of their class": lambda i: (-ranks[i].item(), i),
    }
    parts = []
    for kind, key in kinds.items():
        parts.append(f"<h3>{kind}</h3>")
        for query in select(sorted(answerable, key=key), queries.labels, QUERIES):
            similarity = targets.embeddings @ queries.embeddings[query]
            if within:
                similarity[query] = -torch.inf
            values, found = similarity.topk(min(NEIGHBOURS, len(similarity) - within))
            label = queries.labels[query]
            caption = (
                f"<b>{html.escape(queries.name(label))}</b><br>MAP@R {100 * score[query]:.0f}, "
                f"first found at {ranks[query] + 1:,}"
            )
            neighbours = []
            for value, index in zip(values.tolist(), found.tolist()):
                right = targets.labels[index] == label
                text = f"{'✓' if right else '✗'} {value:.2f} {html.escape(targets.name(targets.labels[index]))}"
                neighbours.append(pictures.figure(targets.images, index, text, "right" if right else "wrong"))
            parts.append(
                f'<div class="row">{pictures.figure(queries.images, query, caption)}'
                f'<div class="neighbours">{"".join(neighbours)}</div></div>'
            )
    return "\n".join(parts)


def class_tables(queries, targets, nearest, result, pictures) -> tuple[str, str, str, list]:
    """As HTML: the table of classes, a line on what it lists, the most confused pairs; and the rows of classes.csv."""
    labels, taken_for = queries.labels.tolist(), targets.labels[nearest].tolist()
    confused = Counter((label, other) for label, other in zip(labels, taken_for) if label != other)
    worst_rival = {}
    for (label, other), count in confused.most_common():
        worst_rival.setdefault(label, (other, count))
    rows = []  # (recall, label, images, name, the class it is most often taken for, how often)
    right = Counter(label for label, rank in zip(labels, result.ranks.tolist()) if rank == 0)
    for label, count in Counter(labels).items():
        rival, times = worst_rival.get(label, (None, 0))
        name = "" if rival is None else queries.name(rival)
        rows.append((right[label] / count, label, count, queries.name(label), name, times))
    rows.sort()
    all_rows = [[name, count, recall, rival, times] for recall, _, count, name, rival, times in rows]

    listed, left_out = f"All {len(rows):,} classes, the hardest first.", ""
    easiest = []
    if len(rows) > CLASSES:
        listed = f"The {CLASSES // 2} hardest and the {CLASSES // 2} easiest of {len(rows):,} classes."
        left_out = f'<tr><td class="name" colspan="5">... {len(rows) - CLASSES:,} classes between ...</td></tr>'
        rows, easiest = rows[: CLASSES // 2], rows[-CLASSES // 2 :]

    def lines(rows):
        return "".join(
            f'<tr><td class="name">{html.escape(name)}</td><td>{count}</td><td>{100 * recall:.1f}</td>'
            f'<td><span class="bar"><i style="width:{100 * recall:.0f}%"></i></span></td>'
            f'<td class="name">{html.escape(rival)}{f" ({times} times)" if times else ""}</td></tr>'
            for recall, _, count, name, rival, times in rows
        )

    body = lines(rows) + left_out + lines(easiest)
    head = "<th>class</th><th>queries</th><th>R@1</th><th></th><th>most often taken for</th>"
    table = f"<table><tr>{head}</tr>{body}</table>"

    both = Counter()
    for (label, other), count in confused.items():
        both[min(label, other), max(label, other)] += count
    example = {}  # label: (images, index); a query's where the gallery has none
    for part in (targets, queries):
        for index, label in enumerate(part.labels.tolist()):
            example.setdefault(label, (part.images, index))
    pairs = "".join(
        '<div class="pair">'
        + "".join(pictures.figure(*example[label], html.escape(queries.name(label))) for label in (a, b))
        + f"<p>{count} times: {confused[a, b]} and {confused[b, a]}</p></div>"
        for (a, b), count in both.most_common(PAIRS)
    )
    return table, listed, pairs or "<p>No image's nearest neighbour is of another class.</p>", all_rows


def sample_similarities(queries: TestSet, gallery: TestSet | None) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of random pairs of one class and of two."""
    targets = gallery or queries
    random = np.random.default_rng(0)
    labels, target_labels = queries.labels.numpy(), targets.labels.numpy()
    order = np.argsort(target_labels, kind="stable")
    start = np.searchsorted(target_labels[order], labels)
    count = np.searchsorted(target_labels[order], labels, side="right") - start

    def similarities(first, second):
        keep = (gallery is not None) | (first != second)
        first, second = (torch.from_numpy(side[keep]).to(queries.embeddings.device) for side in (first, second))
        blocks = zip(first.split(BLOCK * 16), second.split(BLOCK * 16))
        return torch.cat(
            [torch.empty(0)] + [(queries.embeddings[a] * targets.embeddings[b]).sum(1).cpu() for a, b in blocks]
        ).numpy()

    first = (
        random.choice(np.flatnonzero(count), min(SIMILARITIES, 50 * len(labels))) if count.any() else np.empty(0, int)
    )
    same = similarities(first, order[start[first] + random.integers(0, np.maximum(count[first], 1))])
    first, second = (
        random.integers(0, len(side), min(SIMILARITIES, 50 * len(labels))) for side in (labels, target_labels)
    )
    apart = labels[first] != target_labels[second]
    return same, similarities(first[apart], second[apart])


def draw_similarities(path: Path, queries: TestSet, gallery: TestSet | None) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed only here

    same, other = sample_similarities(queries, gallery)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(min([0, *same, *other]), 1, 100)
    for values, name, colour in ((other, "other class", "#d73027"), (same, "same class", "#1a9850")):
        if len(values):
            axes.hist(values, bins, density=True, alpha=0.6, color=colour, label=f"{name} (mean {values.mean():.2f})")
    axes.set(xlabel="cosine similarity", ylabel="density")
    axes.spines[["top", "right"]].set_visible(False)
    if len(same) + len(other):
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")


def places_on_map(embeddings: np.ndarray) -> np.ndarray:
    """Places (N, 2) by t-SNE; where it has no two directions to start from, the first two coordinates."""
    from sklearn.manifold import TSNE  # slow to import, and needed only here

    count, dimensions = embeddings.shape
    if count > 2 and dimensions > 1 and np.ptp(embeddings, axis=0).max() > ROUNDING:
        tsne = TSNE(perplexity=min(30, (count - 1) / 3), init="pca", random_state=0)
        return tsne.fit_transform(embeddings)
    return np.pad(embeddings, ((0, 0), (0, 1)))[:, :2]


def draw_map(path: Path, queries: TestSet) -> int:
    """Images at the places that t-SNE gives their embeddings; the number of them."""
    count = min(MAPPED, len(queries.labels))
    chosen = np.sort(np.random.default_rng(0).permutation(len(queries.labels))[:count])
    places = places_on_map(queries.embeddings[chosen].cpu().numpy())
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-12) * (MAP_SIZE - MAP_IMAGE)
    canvas = Image.new("RGB", (MAP_SIZE, MAP_SIZE), "white")
    for index, place in zip(chosen, places.round().astype(int).tolist()):
        canvas.paste(to_pillow(queries.images, int(index), MAP_IMAGE), tuple(place))
    with replacing(path) as temporary:
        canvas.save(temporary, "JPEG", quality=85)
    return count
