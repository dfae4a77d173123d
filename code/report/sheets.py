"""What search.py group writes: a table, and a page with a contact sheet of each thing that needs no other file."""

import base64
import csv
import html
import io
from collections.abc import Callable
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image

from proxy_anchor.files import csv_cell, printable, quantity, replacing

THINGS, IMAGES, ALONE = 60, 12, 24  # that are shown: things, images of each, and images alone
STORED = 160  # pixels of a picture, at most


def write_table(path: Path, things: list[list[str]]) -> None:
    """Write a CSV file with the path of each image and the number of its thing, from 1; things: their images."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "thing"])
        writer.writerows([csv_cell(image), number] for number, images in enumerate(things, 1) for image in images)


def write(
    path: Path, title: str, things: list[list[str]], read_image: Callable[[str], torch.Tensor], table: str
) -> None:
    """Write the page on things, the largest first, each the paths of its images. Says what it leaves out.

    Of many images, some are shown at even distances, with the first and the last. read_image gives uint8 (3, H, W) for
    a path; an image that it cannot read is an empty frame. table: the name of the file of write_table.
    """
    several = [images for images in things if len(images) > 1]
    alone = [image for images in things[len(several) :] for image in images]
    parts = [sheet(f"Thing {n:,}", images, IMAGES, read_image) for n, images in enumerate(several[:THINGS], 1)]
    if len(several) > THINGS:
        parts.append(f"<h2>{quantity(len(several) - THINGS, 'smaller thing')} left out</h2>")
    if alone:
        parts.append(sheet("Alone", alone, ALONE, read_image))
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(printable(title)), table=html.escape(printable(table)), sheets="\n".join(parts)
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def sheet(name: str, images: list[str], most: int, read_image: Callable[[str], torch.Tensor]) -> str:
    """A contact sheet of some images, at most this many, as HTML."""
    shown = [images[i] for i in np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)]
    size = quantity(len(images), "image") + (f", {len(shown)} of them shown" if len(shown) < len(images) else "")
    figures = "".join(figure(path, read_image) for path in shown)
    return f'<h2>{name} <small>{size}</small></h2>\n<div class="sheet">{figures}</div>'


def figure(path: str, read_image: Callable[[str], torch.Tensor]) -> str:
    """A small picture of an image as HTML, with the names of its folder and its file."""
    try:
        image = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
        image.thumbnail((STORED, STORED))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=80)
        picture = f'<img src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}" alt="">'
    except (OSError, ValueError):
        picture = "<i></i>"
    name, full = (html.escape(printable(text)) for text in ("/".join(Path(path).parts[-2:]), path))
    return f'<figure title="{full}">{picture}<figcaption>{name}</figcaption></figure>'
