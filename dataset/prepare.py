"""Lays out downloaded archives as the folder that a loader expects, safely: archives may come from anywhere."""

import filecmp
import fnmatch
import hashlib
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from dataset.files import BadFile, is_hidden
from proxy_anchor.files import locked

MAX_BYTES = 50e9  # that an archive may extract to; the largest dataset has about 3 GB
MAX_FILES = 1_000_000

# Dataset: {file or folder in an archive: the folder below the dataset's that it goes to}.
LAYOUTS = {
    "cub": {"images": "."},
    "cars": {
        "cars_annos.mat": ".",
        "car_ims": ".",
        "cars_train_annos.mat": "devkit",
        "cars_test_annos_withlabels.mat": "devkit",
        "cars_train": ".",
        "cars_test": ".",
    },
    "SOP": {"Ebay_*.txt": ".", "*_final": "."},
    "Inshop": {"list_eval_partition.txt": "Eval", "img": "Img", "img_highres": "Img"},
}
NEEDED = {  # the files and folders of each of a dataset's layouts, below its folder
    "cub": [["images"]],
    "cars": [
        ["cars_annos.mat", "car_ims"],
        ["devkit/cars_train_annos.mat", "devkit/cars_test_annos_withlabels.mat", "cars_train", "cars_test"],
    ],
    "SOP": [["Ebay_train.txt", "Ebay_test.txt", "*_final"]],
    "Inshop": [["Eval/list_eval_partition.txt", "Img/img"]],
}
DIGESTS = {  # of the published files, md5 or sha256
    "97eceeb196236b17998738112f37df78": "CUB_200_2011.tgz",
    "d5c8f0aa497503f355e17dc7886c3f14": "car_ims.tgz",
    "b407c6086d669747186bd1d764ff9dbc": "cars_annos.mat",
    "b0a2b23655a3edd16d84508592a98d10": "cars_test_annos_withlabels.mat",
    "7f73d41a2f44250d4779881525aea32e": "Stanford_Online_Products.zip",
    "77abb1e82af49f2f1f272dc6bd0b8480904f58742091764f9511b152cad1824e": "Ebay_train.txt",
    "63d559dc1ca1e03671224c58a26b18985bbff22ae20344d41dabcfe3873cc276": "Ebay_test.txt",
}


def original_name(name: str) -> str:
    """A file's name without what browsers and file managers add to that of a second copy: 'a (1).mat' is a.mat."""
    return re.sub(r"( ?\(\d+\)|[- ]\d+| - Copy| copy)(?=\.\w+$)", "", name)


def published_name(path: Path) -> str | None:
    """The name of the published file that this is, by its md5 or sha256, or None."""
    digests = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)
    return next((DIGESTS[d.hexdigest()] for d in digests if d.hexdigest() in DIGESTS), None)


def differs(path: Path) -> bool:
    """Whether a file has the name of a published one, but another checksum."""
    name = original_name(path.name)
    return name in DIGESTS.values() and published_name(path) != name


def extract(archive: Path, folder: Path) -> Iterator[str]:
    """Extract a tar or zip archive, or copy any other file, into a new folder; yields the names as they are written.

    Hidden members, such as those of macOS, are left out. Raises BadFile for an archive that is damaged, too large, or
    has members that are no plain files and folders within it; OSError, naming the member, where it cannot be written.
    """
    folder.mkdir()
    room = min(MAX_BYTES, shutil.disk_usage(folder).free)
    name = ""
    try:
        if tarfile.is_tarfile(archive):  # first: the end of a tar, where zip looks, may be a zip archive in it
            members = _tar_members(archive)
        elif zipfile.is_zipfile(archive):
            members = _zip_members(archive)
        else:
            members = iter([(archive.name, archive.stat().st_size, True, partial(open, archive, "rb"))])
        for count, (name, size, is_plain, open_member) in enumerate(members, start=1):
            target = _target(folder, name)
            if target is None or not is_plain or size < 0:
                raise BadFile(f"{archive} is refused: its member {name[:200]!r} is not a plain file within it")
            room -= size
            if room < 0 or count > MAX_FILES:
                raise BadFile(
                    f"{archive} holds more than {MAX_BYTES / 1e9:.0f} GB, more than {MAX_FILES:,} files, "
                    f"or more than the disk of {folder} has room for"
                )
            if any(map(is_hidden, PurePosixPath(name).parts)):
                continue
            if open_member is None:
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                # Never the archive's own way of writing: a new file, with the usual permissions, follows no link.
                with open_member() as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file)
            yield name
    except BadFile:
        raise
    except FileExistsError as error:
        raise BadFile(f"{archive} holds {name[:200]!r} twice, or as a file and as a folder") from error
    except OSError as error:  # also what gzip and zlib raise on damaged data
        raise OSError(f"{archive}: {name[:200]!r} cannot be extracted to {folder}: {error}") from error
    except Exception as error:  # tarfile and zipfile raise nearly anything on damaged archives
        raise BadFile(f"{archive} cannot be extracted: {name[:200]}: {error}") from error


def _target(folder: Path, name: str) -> Path | None:
    """The path of a member in the folder, None for a name that may be outside, here or on another system."""
    path = PurePosixPath(name.lstrip("/"))  # an absolute name is taken as a relative one, as tar does
    if ".." in path.parts or any(character in name for character in "\\:\0"):
        return None
    target = folder / path
    return target if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)) else None


def _tar_members(archive):
    """(name, size, whether it is a plain file or folder, function that opens it or None) of each member."""
    with tarfile.open(archive) as tar:
        for member in tar:
            is_file = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            opens = None if member.isdir() else lambda member=member: tar.extractfile(member)
            yield member.name, member.size, is_file or member.isdir(), opens


def _zip_members(archive):
    """As _tar_members."""
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            opens = None if member.filename.endswith("/") else lambda member=member: file.open(member)
            yield member.filename, member.file_size, is_plain and not member.filename.startswith("/"), opens


def prepare(name: str, root: Path, folder: str, archives: list[Path]) -> Iterator[str]:
    """Lay out a dataset in root/folder from archives and single files; yields each file's name as it is extracted.

    All is done beside the folder, which appears complete at the end. Raises OSError or ValueError, also if the folder
    exists already or a part of the dataset is in none of the archives.
    """
    target, staging = root / folder, root / f"{folder}.preparing"
    for archive in archives:
        if not archive.is_file():
            raise FileNotFoundError(f"There is no archive {archive}")
    root.mkdir(parents=True, exist_ok=True)
    with locked(target):  # two that prepare it take turns
        if target.is_symlink() or (target.is_dir() and any(target.iterdir())):
            raise FileExistsError(f"{target} exists already; remove it to prepare it again")
        if staging.is_symlink():
            raise FileExistsError(f"{staging} is a link, which may lead anywhere; remove it")
        if staging.exists() and not all(re.fullmatch(r"ready|extracted|\d+", path.name) for path in staging.iterdir()):
            raise FileExistsError(f"{staging} holds other files than an interrupted attempt leaves; move it away")
        shutil.rmtree(staging, ignore_errors=True)  # of an interrupted attempt
        staging.mkdir(mode=0o700)  # a new folder, in which nobody else can plant a link
        try:
            for number, archive in enumerate(archives):
                yield from extract(archive, staging / str(number))
                _place(staging / str(number), staging / "ready", LAYOUTS[name])
            sources = ", ".join(map(str, archives))
            if not (staging / "ready").exists():
                raise ValueError(f"Nothing of {name} is in {sources}: expected {', '.join(LAYOUTS[name])}")
            if missing := _missing(staging / "ready", NEEDED[name]):
                hint = ". The benchmark uses img.zip, not img_highres.zip" * any(staging.glob("ready/*/img_highres"))
                listed = ", ".join(missing)
                raise ValueError(f"{sources} holds a part of {name}: give the archives of {listed} too{hint}")
            os.replace(staging / "ready", target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _place(source: Path, target: Path, layout: dict[str, str]) -> None:
    """Move what the layout names, anywhere below source, to its place below target."""
    for parent, folders, files in os.walk(source):
        for entry in sorted(folders + files):
            path = Path(parent, entry)
            name = entry if path.is_dir() else original_name(entry)
            place = next((place for pattern, place in layout.items() if fnmatch.fnmatchcase(name, pattern)), None)
            if place is not None:
                while (path / name).is_dir() and os.listdir(path) == [name]:  # a folder in one of its own name
                    path /= name
                _merge(path, target / place / name)
                folders[:] = [folder for folder in folders if folder != entry]


def _merge(source: Path, target: Path) -> None:
    """Move a file or folder to a place where the same, or other files of the folder, may be already."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _merge(path, target / path.name)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    elif source.is_dir() or target.is_dir() or not filecmp.cmp(source, target, shallow=False):
        raise ValueError(f"{source.name} is in the archives twice, with different contents")


def _missing(folder: Path, layouts: list[list[str]]) -> list[str]:
    """What the folder lacks of one of the layouts: of the one that it holds the most of."""
    missing = {tuple(layout): [name for name in layout if not any(folder.glob(name))] for layout in layouts}
    return min(missing.items(), key=lambda item: (bool(item[1]), len(item[1]) - len(item[0])))[1]
