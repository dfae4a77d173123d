"""Reads the files of datasets: folders, annotation tables and images."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HIDDEN = {  # without a leading dot, in small letters
    "@eadir", "#recycle", "$recycle.bin", "__macosx", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found",
    "system volume information", "thumbs.db",
}  # fmt: skip


class BadFile(ValueError):
    """A file of a dataset that is not what it should be; the message names it."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that operating systems hide: of a leading dot, or of their own."""
    return name.startswith(".") or name.lower() in HIDDEN


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
        for folder in folders if os.path.isdir(folder or ".")
        for name in os.listdir(folder or ".")
    }  # fmt: skip
    return [path for path in paths if path not in present]


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image, from its header alone. Raises BadFile with the path."""
    return _open(path, lambda image: image.size)


def read_image(path: str) -> torch.Tensor:
    """Decode an image as uint8 RGB (3, H, W): alpha is dropped, 16 bits are scaled. Raises BadFile with the path."""
    return _open(path, _decode)


def _open(path, read):
    try:
        with Image.open(path) as image:  # reads the header, and refuses decompression bombs
            return read(image)
    except FileNotFoundError as error:
        raise BadFile(f"The image {path} is missing") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadFile(f"The image {path} cannot be read: {error}") from error


def _decode(image):
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_8_bits(pixels):
    """Scale 16-bit gray pixels, which may be stored in 32 bits; Pillow's own conversion would saturate at 255.

    Raises ValueError for pixels of another range, or that may be: the image would come out black or white.
    """
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" or low < 0 or high > 65535 or 0 < high <= 255:
        raise ValueError(
            f"its pixels are {pixels.dtype.name} from {low:g} to {high:g}, expected 16 bits from 0 to 65535; "
            "convert it to 8 bits per channel"
        )
    return (pixels / 257).round().astype(np.uint8)
