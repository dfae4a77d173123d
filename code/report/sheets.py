"""What search.py group writes: a table, and a page with a contact sheet of each thing that needs no other file."""

import csv
import html
from pathlib import Path
from string import Template

import numpy as np

from proxy_anchor.files import csv_cell, printable, quantity, replacing
from proxy_anchor.report.thumbnails import Thumbnail, data_uri, figure

THINGS, IMAGES, ALONE = 60, 12, 24  # that are shown: things, images of each, and images alone
STORED = 160  # pixels of a picture, at most


def write_table(path: Path, things: list[list[str]]) -> None:
    """Write a CSV file with the path of each image and the number of its thing, from 1; things: their images."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "thing"])
        writer.writerows([csv_cell(image), number] for number, images in enumerate(things, 1) for image in images)


def write(path: Path, title: str, things: list[list[str]], noun: str, thumbnail: Thumbnail, table: str) -> None:
    """Write the page on things, the largest first, each the paths of its images. Says what it leaves out.

    Of many images, some are shown at even distances, with the first and the last. noun: "image", or "folder" if the
    paths are of folders. table: the name of the file of write_table.
    """
    several = [images for images in things if len(images) > 1]
    alone = [image for images in things[len(several) :] for image in images]
    parts = [sheet(f"Thing {n:,}", images, IMAGES, noun, thumbnail) for n, images in enumerate(several[:THINGS], 1)]
    if len(several) > THINGS:
        parts.append(f"<h2>{quantity(len(several) - THINGS, 'smaller thing')} left out</h2>")
    if alone:
        parts.append(sheet("Alone", alone, ALONE, noun, thumbnail))
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    title, table = (html.escape(printable(text)) for text in (title, table))
    page = template.substitute(title=title, table=table, nouns=f"{noun}s", sheets="\n".join(parts))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def sheet(name: str, images: list[str], most: int, noun: str, thumbnail: Thumbnail) -> str:
    """A contact sheet of some images, at most this many, as HTML."""
    shown = [images[i] for i in np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)]
    size = quantity(len(images), noun) + (f", {len(shown)} of them shown" if len(shown) < len(images) else "")
    figures = "".join(
        figure(data_uri(path, STORED, thumbnail), printable("/".join(Path(path).parts[-2:])), path) for path in shown
    )
    return f'<h2>{name} <small>{size}</small></h2>\n<div class="sheet">{figures}</div>'
