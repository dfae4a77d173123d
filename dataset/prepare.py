"""Lays out downloaded archives as the folder that a loader expects, safely: archives may come from anywhere."""

import fnmatch
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MAX_BYTES = 50e9  # that an archive may extract to; the largest dataset has about 3 GB
MAX_FILES = 1_000_000

# Dataset: {file or folder in an archive: the folder below the dataset's that it goes to}.
LAYOUTS = {
    "cub": {"images": "."},
    "cars": {
        "cars_annos.mat": ".", "car_ims": ".",
        "devkit": ".", "cars_test_annos_withlabels.mat": "devkit", "cars_train": ".", "cars_test": ".",
    },
    "SOP": {"Ebay_*.txt": ".", "*_final": "."},
    "Inshop": {"list_eval_partition.txt": "Eval", "img": "Img", "img_highres": "Img"},
}  # fmt: skip
DIGESTS = {  # of the published files, md5 or sha256
    "97eceeb196236b17998738112f37df78": "CUB_200_2011.tgz",
    "d5c8f0aa497503f355e17dc7886c3f14": "car_ims.tgz",
    "b407c6086d669747186bd1d764ff9dbc": "cars_annos.mat",
    "b0a2b23655a3edd16d84508592a98d10": "cars_test_annos_withlabels.mat",
    "7f73d41a2f44250d4779881525aea32e": "Stanford_Online_Products.zip",
    "77abb1e82af49f2f1f272dc6bd0b8480904f58742091764f9511b152cad1824e": "Ebay_train.txt",
    "63d559dc1ca1e03671224c58a26b18985bbff22ae20344d41dabcfe3873cc276": "Ebay_test.txt",
}


def published_name(path: Path) -> str | None:
    """The name of the published file that this is, by its md5 or sha256, or None."""
    digests = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)
    return next((DIGESTS[d.hexdigest()] for d in digests if d.hexdigest() in DIGESTS), None)


def extract(archive: Path, folder: Path) -> Iterator[str]:
    """Extract a tar or zip archive, or copy any other file, into the folder; yields the names as they are written.

    Raises ValueError for an archive that is damaged, too large, or has members that point out of the folder or
    are not files, folders or links within it; OSError, naming the member, where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = min(MAX_BYTES, shutil.disk_usage(folder).free)
    name = ""
    try:
        if zipfile.is_zipfile(archive):
            members = _zip_members(archive, folder)
        elif tarfile.is_tarfile(archive):
            members = _tar_members(archive, folder)
        else:
            members = [(archive.name, archive.stat().st_size, lambda: shutil.copyfile(archive, folder / archive.name))]
        for count, (name, size, write) in enumerate(members, start=1):
            room -= size
            if room < 0 or count > MAX_FILES:
                raise ValueError(
                    f"{archive} holds more than {MAX_BYTES / 1e9:.0f} GB, more than {MAX_FILES:,} files, "
                    f"or more than the disk of {folder} has room for"
                )
            write()
            yield name
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} cannot be extracted: {name}: {error}") from error
    except OSError as error:  # also what gzip and zlib raise on damaged data
        raise OSError(f"{archive}: '{name}' cannot be extracted to {folder}: {error}") from error


def _tar_members(archive, folder):
    """(name, size, function that writes it) of each member; tarfile's data filter refuses what is not safe."""
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("This Python cannot extract tar files safely: 3.10.12, 3.11.4 or later can")
    with tarfile.open(archive) as tar:
        for member in tar:
            yield member.name, member.size, lambda member=member: tar.extract(member, folder, filter="data")


def _zip_members(archive, folder):
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = PurePosixPath(member.filename)
            outside = path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename
            if outside or stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f"{archive} is refused: its member {member.filename!r} is not safe to extract")
            yield member.filename, member.file_size, lambda member=member: file.extract(member, folder)


def prepare(name: str, root: Path, folder: str, archives: list[Path]) -> Iterator[str]:
    """Lay out a dataset in root/folder from archives and single files; yields each file's name as it is extracted.

    All is done beside the folder, which appears complete at the end. Raises OSError or ValueError, also if the folder
    exists already.
    """
    target, staging = root / folder, root / f"{folder}.preparing"
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists already; remove it to prepare it again")
    for archive in archives:
        if not archive.is_file():
            raise FileNotFoundError(f"There is no archive {archive}")
    shutil.rmtree(staging, ignore_errors=True)  # of an interrupted attempt
    try:
        for archive in archives:
            yield from extract(archive, staging / "extracted")
        placed = _place(staging / "extracted", staging / "ready", LAYOUTS[name])
        if not placed:
            wanted = ", ".join(LAYOUTS[name])
            raise ValueError(f"Nothing of {name} is in {', '.join(map(str, archives))}: expected {wanted}")
        os.replace(staging / "ready", target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _place(source: Path, target: Path, layout: dict[str, str]) -> int:
    """Move what the layout names, anywhere below source, to its place below target; returns how many there were."""
    placed = 0
    for parent, folders, files in os.walk(source):
        for entry in (*folders, *files):
            place = next((place for pattern, place in layout.items() if fnmatch.fnmatchcase(entry, pattern)), None)
            if place is not None:
                (target / place).mkdir(parents=True, exist_ok=True)
                if (target / place / entry).exists():
                    raise ValueError(f"{entry} is in the archives twice")
                os.replace(Path(parent, entry), target / place / entry)
                placed += 1
        folders[:] = [folder for folder in folders if (Path(parent) / folder).exists()]  # without those just moved
    return placed
