"""Glyphs: letters of many scripts from the fonts of matplotlib; one class per letter, one image per typeface.

A small dataset without a download, for real training in minutes on a CPU. The images are drawn once, from fixed seeds,
and then read from disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .files import require

if TYPE_CHECKING:  # functions import them: --help does not wait for them
    import numpy as np
    from PIL import Image, ImageFont

FOLDER = "glyphs"
SIZES = {"train": (564, 8085), "eval": (282, 4035)}  # classes, images
KS = (1, 2, 4, 8, 16, 32)
UPRIGHT = False  # the known results depend on the images as stored
SOURCE = "It is drawn on first use."
LIKELY_CAUSE = "files were removed, or drawn with other versions of matplotlib's fonts; remove the folder to redraw it"
AUGMENTATION = {"scale": (0.5, 1.0), "flip": False}  # a mirrored b is a d, and a tenth of a letter is not recognizable

RECIPE = {
    "model": "resnet18",
    "pretrained": "none",
    "image_size": 32,
    "embedding_size": 128,
    "batch_size": 64,
    "lr": 5e-4,
    "warm": 0,
    "bn_freeze": 0,
    "epochs": 6,
    "lr_decay_step": 3,
}
CROP = 1.0  # evaluation sees the whole image, because accents reach into the margin

TYPEFACES = [
    *(
        f"DejaVu{family}{style}.ttf"
        for family in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
]
MIN_TYPEFACES = 12
IMAGE_SIZE = 64
FONT_SIZE = 42
SAME_LOOK = 0.99  # cosine similarity above which letters share a class (Latin A, Greek Alpha, ...)


def samples(folder: Path, split: str) -> list[tuple[str, str]]:
    """(path, letter) of each image of the split; draws the dataset if it is missing."""
    if not folder.exists():
        draw(folder)
    letters = sorted(require(folder / split, f"Remove {folder} to redraw it.").glob("*/"))
    return [(str(path), chr(int(letter.name, 16))) for letter in letters for path in sorted(letter.glob("*.png"))]


def draw(folder: Path) -> None:
    """Draw the dataset in a temporary folder, renamed at the end, so that it is never incomplete."""
    import numpy as np
    from PIL import ImageFont

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".glyphs-", dir=folder.parent))
    try:
        fonts = {name: ImageFont.truetype(_font_path(name), FONT_SIZE) for name in TYPEFACES}
        letters = {name: _characters(name) for name in TYPEFACES}
        for position, letter in enumerate(choose_letters(letters)):
            # Every third letter is for testing, so that both splits have letters of every script.
            class_folder = temporary / ("eval" if position % 3 == 2 else "train") / f"{letter:04X}"
            class_folder.mkdir(parents=True)
            for typeface, name in enumerate(TYPEFACES):
                if letter in letters[name]:
                    image = draw_letter(chr(letter), fonts[name], np.random.default_rng([letter, typeface]))
                    image.save(class_folder / f"{Path(name).stem}.png")
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def choose_letters(characters: dict[str, set[int]]) -> list[int]:
    """Code points of the letters in at least MIN_TYPEFACES typefaces with at most one diacritic, without lookalikes."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    typefaces = Counter(character for available in characters.values() for character in available)
    letters = [
        character
        for character in sorted(typefaces)
        if typefaces[character] >= MIN_TYPEFACES
        and unicodedata.category(chr(character)) in ("Lu", "Ll", "Lt", "Lo")
        and len(unicodedata.normalize("NFKD", chr(character))) <= 2
        and not 0x1E00 <= character < 0x2000  # Latin Extended Additional, Greek Extended: letters that differ in a dot
    ]
    font = ImageFont.truetype(_font_path(TYPEFACES[0]), FONT_SIZE)
    pictures = []
    for letter in letters:
        image = Image.new("L", (96, 96))
        ImageDraw.Draw(image).text((48, 64), chr(letter), font=font, fill=255, anchor="ms")
        pictures.append(np.asarray(image, dtype=np.float32).ravel())
    looks = np.stack(pictures)
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    first_lookalike = (looks @ looks.T > SAME_LOOK).argmax(axis=1)
    return [letters[i] for i in sorted(set(first_lookalike))]


def draw_letter(letter: str, font: ImageFont.FreeTypeFont, random: np.random.Generator) -> Image.Image:
    """The letter, dark on light in random colours, rotated by up to 5 degrees and shifted by up to 2 pixels."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    middle = IMAGE_SIZE / 2 + random.uniform(-2, 2, size=2)
    ImageDraw.Draw(mask).text((middle[0], middle[1] + FONT_SIZE * 0.3), letter, font=font, fill=255, anchor="ms")
    mask = mask.rotate(random.uniform(-5, 5), Image.Resampling.BICUBIC)
    light = tuple(random.integers(215, 256, size=3).tolist())
    dark = tuple(random.integers(0, 80, size=3).tolist())
    return Image.composite(Image.new("RGB", mask.size, dark), Image.new("RGB", mask.size, light), mask)


def _font_path(name):
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)


def _characters(name):
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(_font_path(name)).get_charmap())
