"""Reads the files of datasets: folders, annotation tables and images."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, UnidentifiedImageError

from proxy_anchor.files import BadFile

if TYPE_CHECKING:  # functions import it: --help does not wait for it
    import torch

# Photograph formats, the most frequent first. None that Pillow passes to other programs, as EPS to Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
REMEDIES = dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif") | {
    ".avif": "pip install --upgrade pillow"
}
# Files and folders that systems, cameras and network disks create, besides names that begin with a dot.
HIDDEN = set(
    "thumbs.db|ehthumbs.db|desktop.ini|icon\r|__macosx|@eadir|#recycle|#snapshot|@recycle|@recently-snapshot|"
    "$recycle.bin|recycler|system volume information|lost+found".split("|")
)
# Extensions of files that are obviously not photos, or are metadata of photos.
NOT_PHOTOS = set(
    ".txt .pdf .md .csv .tsv .json .jsonl .xml .yaml .yml .html .log .ini .db "
    ".toml .py .ipynb .sh .npy .npz .mat .pt .pth .pkl .xmp .aae .thm .md5 .float32 .float16 .faiss .parquet".split()
)
SHOWN = 6  # extensions in a line
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
FULL_RANGE = 2**15  # lowest acceptable maximum of 16-bit values; below it, they may have 9 to 15 bits
CONVERT = "convert it to 8 bits per channel"
# TIFF tags: bits per channel, whether 0 is white (0) or black (1), whether channels are interleaved (1) or planar (2).
BITS, PHOTOMETRIC, PLANAR = 258, 262, 284
LARGEST = {"L;2": 3, "L;4": 15}  # largest values of gray PNGs

# Every worker would repeat Pillow's warnings on large images and damaged metadata; errors name the file.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise logging prints Pillow's errors a second time


def require(path: Path, source: str) -> Path:
    """Return the path if it exists. Raises FileNotFoundError with a hint where to get it."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. {source}")
    return path


def read_table(path: Path, columns: list[str], skip: int = 0) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each row of a table with these columns, whose header follows `skip` lines.

    Raises BadFile with the line number of a wrong header or row.
    """
    rows = []
    for number, line in enumerate(read_lines(path)[skip:], start=skip + 1):
        fields = line.split()
        if number == skip + 1 and fields != columns:
            raise BadFile(f"{path}, line {number}: expected the header '{' '.join(columns)}', found '{line[:80]}'")
        if len(fields) != len(columns) and fields:
            raise BadFile(
                f"{path}, line {number}: expected {len(columns)} columns ({' '.join(columns)}), found '{line[:80]}'"
            )
        rows.append((number, fields))
    if not rows:
        raise BadFile(f"{path} ends before its header, line {skip + 1}: '{' '.join(columns)}'")
    return [(number, fields) for number, fields in rows[1:] if fields]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises BadFile if it is not a text file."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not a text file: {error}") from error


def whole_number(text: str, path: Path, line: int, what: str) -> int:
    """int(text). Raises BadFile naming the file, the line and the text."""
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise BadFile(f"{path}, line {line}: the {what} '{text[:80]}' is not a whole number")
    return int(text)


def missing_files(paths: list[str]) -> list[str]:
    """The paths that do not exist. Lists each folder once: 60,000 single look-ups are slow on network disks."""
    folders = {os.path.dirname(path) for path in paths}
    present = {
        os.path.join(folder, name)
        for folder in folders
        if os.path.isdir(folder or ".")
        for name in os.listdir(folder or ".")
    }
    return [path for path in paths if path not in present]


@cache
def formats() -> tuple[str, ...]:
    """The readable ones of FORMATS: HEIF needs a library, AVIF a recent Pillow."""
    try:
        import pillow_heif  # optional
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def extensions() -> frozenset[str]:
    """The extensions of image files, in lower case."""
    readable = {*formats(), "MPO"}  # MPO is read as JPEG
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in readable)


def is_image(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return _extension(name) in extensions()


def is_hidden(name: str) -> bool:
    """Whether a file or folder name begins with a dot or is reserved by a system."""
    return name.startswith(".") or name.casefold() in HIDDEN


def count_skipped(names) -> Counter:
    """{extension: number of files} of possible photos among these names that cannot be read."""
    counts = Counter(_extension(name) for name in names if not is_image(name) and not is_hidden(name))
    return Counter({extension: count for extension, count in counts.items() if extension not in NOT_PHOTOS})


def describe_skipped(counts: Counter) -> str:
    """A line on skipped files, see count_skipped, with remedies; "" if there are none."""
    if not counts:
        return ""
    listed = [f"{count:,} {extension or 'without an extension'}" for extension, count in counts.most_common(SHOWN)]
    if more := counts.total() - sum(count for _, count in counts.most_common(SHOWN)):
        listed.append(f"{more:,} other{'s' * (more > 1)}")
    remedies: dict[str, list[str]] = {}
    for extension in counts:
        remedies.setdefault(REMEDIES.get(extension, ""), []).append(extension)
    advice = [f"{remedy} reads {' and '.join(sorted(readable))}" for remedy, readable in remedies.items() if remedy]
    if "" in remedies:
        advice.append(f"convert {'other ' * bool(advice)}photos to JPEG")
    return f"Left out: {', '.join(listed)}; {'; '.join(advice)}"


def _extension(name):
    """The extension of a file name in lower case; "" if the text after its last dot is not a short word."""
    extension = os.path.splitext(name)[1].lower()
    return extension if re.fullmatch(r"\.\w{1,10}", extension) else ""


def image_size(path: str, upright: bool = True) -> tuple[int, int]:
    """(width, height) of the image that read_image returns, from the header if possible. Raises BadFile."""
    return _open(path, lambda image: _size(image, upright))


def read_image(path: str, upright: bool = True) -> torch.Tensor:
    """Decode an image as uint8 RGB (3, H, W), see to_tensor. Raises BadFile naming the path."""
    return _open(path, lambda image: to_tensor(image, upright))


def read_thumbnail(path: str, size: int, upright: bool = True) -> Image.Image:
    """A copy of an image, no larger than size x size pixels, RGB. Raises BadFile naming the path."""

    def read(image):
        image.draft(None, (size, size))  # decode no more of a JPEG than that needs
        small = Image.fromarray(to_tensor(image, upright).permute(1, 2, 0).numpy())
        small.thumbnail((size, size))
        return small

    return _open(path, read)


def _open(path, read):
    try:
        with Image.open(path, formats=formats()) as image:
            return read(image)
    except FileNotFoundError as error:
        raise BadFile(f"The image {path} is missing") from error
    except UnidentifiedImageError as error:
        raise BadFile(f"The image {path} cannot be read: {_unidentified(path)}") from error
    except Image.DecompressionBombError as error:
        raise BadFile(
            f"The image {path} cannot be read: it has more than the allowed {2 * Image.MAX_IMAGE_PIXELS:,} "
            "pixels; make it smaller"
        ) from error
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        raise BadFile(f"The image {path} cannot be read: {error}") from error


def _unidentified(path):
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and "HEIF" not in formats() and head[8:] not in (b"avif", b"avis"):
        return "it may be HEIC; pip install pillow-heif reads it"
    return f"it is damaged, or none of {', '.join(formats())}"


def _size(image, upright):
    # Pillow already rotates the size in the header of a TIFF.
    sideways = upright and image.format != "TIFF" and _orientation(image) in SIDEWAYS
    return image.size[::-1] if sideways else image.size


def to_tensor(image: Image.Image, upright: bool = True) -> torch.Tensor:
    """Convert an open image to uint8 RGB (3, H, W): transparency becomes white, 16 bits are scaled to 8.

    upright: rotate it according to EXIF, as viewers do. Raises ValueError for pixels of an unknown range, and Pillow's
    errors for damaged images.
    """
    import numpy as np
    import torch

    largest = _largest(image)  # loading the image would lose it
    full_range = image.format == "PPM" and 255 < largest < 65535  # Pillow has scaled it by its largest value
    image.load()
    turn = TURNS.get(_orientation(image)) if upright else None
    if image.mode.startswith(("I", "F")):
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
            raise ValueError(f"its white is stored as 0 in 16 bits, which Pillow takes for black; {CONVERT}")
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.info.get("transparency"), full_range))
    elif largest > 255 and not full_range:
        _check_range(image)
    if _is_transparent(image):
        if (value := image.info.get("transparency")) is not None and largest != 255:  # in units of the file
            image = image.copy()
            scaled = value * 255 // largest if isinstance(value, int) else tuple(channel >> 8 for channel in value)
            image.info["transparency"] = scaled
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if turn is not None:
        image = image.transpose(turn)
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _orientation(image):
    """The EXIF orientation: a key of TURNS, or 1; also 1 if the EXIF is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in TURNS else 1
    except Exception:  # damaged EXIF raises many kinds of errors
        return 1


def _largest(image):
    """The largest possible value of a channel in the file, from its header; 255 if unknown."""
    if image.format == "TIFF":
        return 2 ** max(image.tag_v2.get(BITS, (1,))) - 1
    if image.format not in ("PNG", "PPM") or not image.tile:
        return 255
    decoder, _, _, arguments = image.tile[0]
    mode, *more = (arguments,) if isinstance(arguments, str) else arguments
    return more[0] if decoder.startswith("ppm") else 65535 if ";16" in mode else LARGEST.get(mode, 255)


def _is_transparent(image):
    palette = image.mode == "P" and image.palette.mode.endswith("A")
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info or palette


def _check_range(image):
    """Raise ValueError for 16-bit colours, cut to 8 bits by Pillow, that are too dark to determine their range."""
    if image.format == "TIFF" and image.tag_v2.get(PLANAR) == 2:
        raise ValueError(f"its colours are stored one after the other in 16 bits, which Pillow misreads; {CONVERT}")
    highest = max(high for band, (_, high) in zip(image.getbands(), image.getextrema()) if band != "A")
    if highest < FULL_RANGE >> 8:
        raise ValueError(
            f"its colours are stored in 16 bits, but use less than half of the range: they may have fewer; {CONVERT}"
        )


def _to_8_bits(pixels, transparent, full_range):
    """Scale 16-bit gray pixels, which may be stored in 32 bits; Pillow's own conversion would saturate at 255.

    transparent: the value that becomes white, or None. full_range: the range is known to be 16 bits, however dark the
    pixels are. Raises ValueError for pixels of another or uncertain range: the image would come out black or white.
    """
    import numpy as np

    low, high = pixels.min(), pixels.max()
    dark = f", and one of at least {FULL_RANGE:,}" if 0 < high < FULL_RANGE and not full_range else ""
    if pixels.dtype.kind == "f" or low < 0 or high > 65535 or dark:
        raise ValueError(
            f"its pixels are {pixels.dtype.name} from {low:g} to {high:g}, expected 16 bits from 0 to 65535"
            f"{dark}; {CONVERT}"
        )
    scaled = (pixels / 257).round().astype(np.uint8)
    return scaled if transparent is None else np.where(pixels == transparent, np.uint8(255), scaled)
