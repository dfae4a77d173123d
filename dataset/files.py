"""Reads the files of datasets: folders, annotation tables and images."""

import logging
import os
import re
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from proxy_anchor.files import BadFile

# Those of photographs, the most frequent first. Never those that Pillow hands to other programs, as EPS to Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
REMEDIES = dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif") | {
    ".avif": "pip install --upgrade pillow"
}
# What systems, cameras and network disks write into folders of photos, besides names that begin with a dot.
HIDDEN = set(
    "thumbs.db|ehthumbs.db|desktop.ini|icon\r|__macosx|@eadir|#recycle|#snapshot|@recycle|@recently-snapshot|"
    "$recycle.bin|recycler|system volume information|lost+found".split("|")
)
# Endings of files that nobody expects to be searched, and of notes that programs keep beside photos.
NOT_PHOTOS = set(
    ".txt .pdf .md .csv .tsv .json .jsonl .xml .yaml .yml .html .log .ini .db "
    ".toml .py .ipynb .sh .npy .npz .mat .pt .pth .pkl .xmp .aae .thm .md5 .float32 .faiss".split()
)
SHOWN = 6  # endings in a line
TURNS = {  # by the orientation in EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # those that exchange width and height
FULL_RANGE = 2**15  # what the largest of 16-bit values must reach; if none does, they may be of 9 to 15 bits
CONVERT = "convert it to 8 bits per channel"
# Tags of TIFF: bits per channel, whether 0 is white (0) or black, and whether channels are together (1) or apart (2).
BITS, PHOTOMETRIC, PLANAR = 258, 262, 284
LARGEST = {"L;2": 3, "L;4": 15}  # of gray PNGs

# Pillow warns of large images and damaged metadata in each worker; errors, which matter, name the file.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise logging prints Pillow's errors a second time


def require(path: Path, source: str) -> Path:
    """The path, if it exists; else FileNotFoundError saying where to get it."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. {source}")
    return path


def read_table(path: Path, columns: list[str], skip: int = 0) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each row of a table whose header, after `skip` lines, names these columns.

    Raises BadFile with the line number of a header or row that does not fit.
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
    """int(text), or BadFile naming the file, the line and what was read."""
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise BadFile(f"{path}, line {line}: the {what} '{text[:80]}' is not a whole number")
    return int(text)


def missing_files(paths: list[str]) -> list[str]:
    """The paths that are not there. Lists each folder once: 60,000 single look-ups are slow on network disks."""
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
    """Those of FORMATS that can be read here: HEIF needs a library, AVIF a recent Pillow."""
    try:
        import pillow_heif  # optional
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def endings() -> frozenset[str]:
    """The endings, in lower case, of files that are images."""
    readable = {*formats(), "MPO"}  # which is read as JPEG
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in readable)


def is_image(name: str) -> bool:
    """Whether a file of this name is an image, by its ending."""
    return _ending(name) in endings()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: it begins with a dot, or a system wrote it."""
    return name.startswith(".") or name.casefold() in HIDDEN


def others(names) -> Counter:
    """How many of the files of these names are left out because of their endings, {ending: count}."""
    unread = Counter(_ending(name) for name in names if not is_image(name) and not is_hidden(name))
    return Counter({ending: count for ending, count in unread.items() if ending not in NOT_PHOTOS})


def left_out(counts: Counter) -> str:
    """A line on the files that are left out, see others, and on how to have them read; "" if there are none."""
    if not counts:
        return ""
    listed = [f"{count:,} {ending or 'without an ending'}" for ending, count in counts.most_common(SHOWN)]
    if more := counts.total() - sum(count for _, count in counts.most_common(SHOWN)):
        listed.append(f"{more:,} other{'s' * (more > 1)}")
    remedies: dict[str, list[str]] = {}
    for ending in counts:
        remedies.setdefault(REMEDIES.get(ending, ""), []).append(ending)
    advice = [f"{remedy} reads {' and '.join(sorted(endings))}" for remedy, endings in remedies.items() if remedy]
    if "" in remedies:
        advice.append(f"convert {'other ' * bool(advice)}photos to JPEG")
    return f"Left out: {', '.join(listed)}; {'; '.join(advice)}"


def _ending(name):
    """The ending of a file's name in lower case; "" where what follows its last dot is more than a short word."""
    ending = os.path.splitext(name)[1].lower()
    return ending if re.fullmatch(r"\.\w{1,10}", ending) else ""


def image_size(path: str, upright: bool = True) -> tuple[int, int]:
    """(width, height) of an image as read_image gives it, from its header if that suffices. Raises BadFile."""
    return _open(path, lambda image: _size(image, upright))


def read_image(path: str, upright: bool = True) -> torch.Tensor:
    """Decode an image as uint8 RGB (3, H, W), see to_tensor. Raises BadFile with the path."""
    return _open(path, lambda image: to_tensor(image, upright))


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
            f"The image {path} cannot be read: it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, the most that "
            "are decoded; make it smaller"
        ) from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadFile(f"The image {path} cannot be read: {error}") from error


def _unidentified(path):
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and "HEIF" not in formats() and head[8:] not in (b"avif", b"avis"):
        return "it may be HEIC; pip install pillow-heif reads it"
    return f"it is damaged, or none of {', '.join(formats())}"


def _size(image, upright):
    # Pillow has turned the header of a TIFF already, but the pixels only when it decodes them.
    sideways = upright and image.format != "TIFF" and _orientation(image) in SIDEWAYS
    return image.size[::-1] if sideways else image.size


def to_tensor(image: Image.Image, upright: bool = True) -> torch.Tensor:
    """An opened image as uint8 RGB (3, H, W): on white where it is transparent; 16 bits are scaled to 8.

    upright: turned as its EXIF says, as viewers show it. Raises ValueError for pixels of an unknown range, and whatever
    Pillow raises for damaged ones.
    """
    largest = _largest(image)  # before it is loaded, which loses it
    known = image.format == "PPM" and 255 < largest < 65535  # Pillow has scaled it by its largest value
    image.load()
    turn = TURNS.get(_orientation(image)) if upright else None
    if image.mode.startswith(("I", "F")):
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
            raise ValueError(f"its white is stored as 0 in 16 bits, which Pillow takes for black; {CONVERT}")
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.info.get("transparency"), known))
    elif largest > 255 and not known:
        _check_range(image)
    if _is_transparent(image):
        if (value := image.info.get("transparency")) is not None and largest != 255:  # in numbers of the file
            image = image.copy()
            numbers = value * 255 // largest if isinstance(value, int) else tuple(part >> 8 for part in value)
            image.info["transparency"] = numbers
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if turn is not None:
        image = image.transpose(turn)
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _orientation(image):
    """The number in EXIF, one of TURNS or 1; damaged EXIF says nothing."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in TURNS else 1
    except Exception:  # of many kinds
        return 1


def _largest(image):
    """The largest value that a channel has room for in the file: 255, unless its header is known and says more."""
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
    """Raise ValueError for 16-bit colours, cut to 8 bits by Pillow, that are too dark to tell their range."""
    if image.format == "TIFF" and image.tag_v2.get(PLANAR) == 2:
        raise ValueError(f"its colours are stored one after the other in 16 bits, which Pillow misreads; {CONVERT}")
    highest = max(high for band, (_, high) in zip(image.getbands(), image.getextrema()) if band != "A")
    if highest < FULL_RANGE >> 8:
        raise ValueError(
            f"its colours are stored in 16 bits, of which they use less than half: they may be of fewer bits; {CONVERT}"
        )


def _to_8_bits(pixels, transparent, known):
    """Scale 16-bit gray pixels, which may be stored in 32 bits; Pillow's own conversion would saturate at 255.

    transparent: the value that becomes white, if any. known: the range is that of 16 bits, however dark the pixels are.
    Raises ValueError for pixels of another range, or that may be: the image would come out black or white.
    """
    low, high = pixels.min(), pixels.max()
    dark = f", and one of at least {FULL_RANGE:,}" if 0 < high < FULL_RANGE and not known else ""
    if pixels.dtype.kind == "f" or low < 0 or high > 65535 or dark:
        raise ValueError(
            f"its pixels are {pixels.dtype.name} from {low:g} to {high:g}, expected 16 bits from 0 to 65535"
            f"{dark}; {CONVERT}"
        )
    scaled = (pixels / 257).round().astype(np.uint8)
    return scaled if transparent is None else np.where(pixels == transparent, np.uint8(255), scaled)
