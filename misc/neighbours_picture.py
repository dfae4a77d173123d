"""Draw the nearest neighbours of a few letters in an index of glyphs, with frames around wrong ones.

    python misc/neighbours_picture.py logs/glyphs.index misc/neighbours.png

The queries are the first letters, in the order of the index, that have exactly one wrong neighbour.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.files import read_image
from proxy_anchor import figures
from proxy_anchor.index.store import Index

QUERIES, NEIGHBOURS = 3, 9


def letter(path: str) -> str:
    """The letter in an image; the name of its folder is the code point."""
    return chr(int(Path(path).parent.name, 16))


def main(folder: str, picture: str) -> None:
    index = Index.open(Path(folder))
    vectors = torch.from_numpy(index.images.vectors.copy())
    rows: list[list[tuple[str, str]]] = []
    wrong: set[str] = set()
    seen: set[str] = set()
    for (query, _), answers in zip(index.images, index.search(vectors, NEIGHBOURS + 1)):
        others = [(path, value) for path, value in answers if path != query][:NEIGHBOURS]
        mistakes = [path for path, _ in others if letter(path) != letter(query)]
        if len(mistakes) == 1 and letter(query) not in seen:
            seen.add(letter(query))
            wrong.update(mistakes)
            captions = [(path, f"{letter(path)}  {value:.2f}") for path, value in others]
            rows.append([(query, f"query {letter(query)}"), *captions])
        if len(rows) == QUERIES:
            break
    figures.draw_images(rows, lambda path: read_image(path, upright=False), Path(picture), wrong)


if __name__ == "__main__":
    main(*sys.argv[1:])
