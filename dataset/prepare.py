"""Safely extract downloaded archives from anywhere into the folder layout of a dataset."""

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

from proxy_anchor.files import locked

from .files import BadFile, is_hidden

MAX_BYTES = 50e9  # of an extracted archive; the largest dataset has about 3 GB
MAX_FILES = 1_000_000

# {dataset: {file or folder in an archive: its destination below the dataset's folder}}.
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
REQUIRED = {  # files and folders below a dataset's folder, for each of its layouts
    "cub": [["images"]],
    "cars": [
        ["cars_annos.mat", "car_ims"],
        ["devkit/cars_train_annos.mat", "devkit/cars_test_annos_withlabels.mat", "cars_train", "cars_test"],
    ],
    "SOP": [["Ebay_train.txt", "Ebay_test.txt", "*_final"]],
    "Inshop": [["Eval/list_eval_partition.txt", "Img/img"]],
}
DIGESTS = {  # md5 or sha256 of published files
    "97eceeb196236b17998738112f37df78": "CUB_200_2011.tgz",
    "d5c8f0aa497503f355e17dc7886c3f14": "car_ims.tgz",
    "b407c6086d669747186bd1d764ff9dbc": "cars_annos.mat",
    "b0a2b23655a3edd16d84508592a98d10": "cars_test_annos_withlabels.mat",
    "7f73d41a2f44250d4779881525aea32e": "Stanford_Online_Products.zip",
    "77abb1e82af49f2f1f272dc6bd0b8480904f58742091764f9511b152cad1824e": "Ebay_train.txt",
    "63d559dc1ca1e03671224c58a26b18985bbff22ae20344d41dabcfe3873cc276": "Ebay_test.txt",
}


def original_name(name: str) -> str:
    """A file name without the suffix of copies by browsers and file managers: 'a (1).mat' becomes a.mat."""
    return re.sub(r"( ?\(\d+\)|[- ]\d+| - Copy| copy)(?=\.\w+$)", "", name)


def published_name(path: Path) -> str | None:
    """The name of the published file with the same md5 or sha256, or None."""
    digests = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)
    return next((DIGESTS[d.hexdigest()] for d in digests if d.hexdigest() in DIGESTS), None)


def checksum_differs(path: Path) -> bool:
    """Whether a file has the name of a published file, but another checksum."""
    name = original_name(path.name)
    return name in DIGESTS.values() and published_name(path) != name


def extract(archive: Path, folder: Path) -> Iterator[str]:
    """Extract a tar or zip archive, or copy any other file, into a new folder; yields the names of written files.

    Skips hidden members, such as those of macOS. Raises BadFile for an archive that is damaged, too large, or has
    members other than plain files and folders within it; OSError, naming the member, if it cannot be written.
    """
    folder.mkdir()
    space = min(MAX_BYTES, shutil.disk_usage(folder).free)
    name = ""
    try:
        if tarfile.is_tarfile(archive):  # before zip, which a zip member at the end of a tar would match
            members = _tar_members(archive)
        elif zipfile.is_zipfile(archive):
            members = _zip_members(archive)
        else:
            members = iter([(archive.name, archive.stat().st_size, True, partial(open, archive, "rb"))])
        for count, (name, size, is_plain, open_member) in enumerate(members, start=1):
            target = _target(folder, name)
            if target is None or not is_plain or size < 0:
                raise BadFile(f"{archive} is refused: its member {name[:200]!r} is not a plain file within it")
            space -= size
            if space < 0 or count > MAX_FILES:
                raise BadFile(
                    f"{archive} holds more than {MAX_BYTES / 1e9:.0f} GB, more than {MAX_FILES:,} files, "
                    f"or more than fits on the disk of {folder}"
                )
            if any(map(is_hidden, PurePosixPath(name).parts)):
                continue
            if open_member is None:
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                # Not by the archive's library: a new file with default permissions cannot follow a link.
                with open_member() as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file)
            yield name
    except BadFile:
        raise
    except FileExistsError as error:
        raise BadFile(f"{archive} holds {name[:200]!r} twice, or as a file and as a folder") from error
    except OSError as error:  # including errors of gzip and zlib on damaged data
        raise OSError(f"{archive}: {name[:200]!r} cannot be extracted to {folder}: {error}") from error
    except Exception as error:  # tarfile and zipfile raise many kinds of errors on damaged archives
        raise BadFile(f"{archive} cannot be extracted: {name[:200]}: {error}") from error


def _target(folder: Path, name: str) -> Path | None:
    """The path of a member in the folder; None if it might be outside, on this or another system."""
    path = PurePosixPath(name.lstrip("/"))  # absolute names become relative, as in tar
    if ".." in path.parts or any(character in name for character in "\\:\0"):
        return None
    target = folder / path
    return target if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)) else None


def _tar_members(archive):
    """Yield (name, size, is_plain, open_member) of each member; open_member is None for folders."""
    with tarfile.open(archive) as tar:
        for member in tar:
            is_file = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            open_member = None if member.isdir() else lambda member=member: tar.extractfile(member)
            yield member.name, member.size, is_file or member.isdir(), open_member


def _zip_members(archive):
    """Yield the same tuples as _tar_members."""
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            open_member = None if member.filename.endswith("/") else lambda member=member: file.open(member)
            yield member.filename, member.file_size, is_plain and not member.filename.startswith("/"), open_member


def prepare(name: str, root: Path, folder: str, archives: list[Path]) -> Iterator[str]:
    """Lay out a dataset in root/folder from archives and single files; yields the names of extracted files.

    Works in a staging folder, which gets its name at the end. Raises OSError or ValueError, also if the folder exists
    or the archives are incomplete.
    """
    target, staging = root / folder, root / f"{folder}.preparing"
    for archive in archives:
        if not archive.is_file():
            raise FileNotFoundError(f"There is no archive {archive}")
    root.mkdir(parents=True, exist_ok=True)
    with locked(target):  # one process at a time
        if target.is_symlink() or (target.is_dir() and any(target.iterdir())):
            raise FileExistsError(f"{target} exists already; remove it to prepare it again")
        if staging.is_symlink():
            raise FileExistsError(f"{staging} is a link, which may lead anywhere; remove it")
        if staging.exists() and not all(re.fullmatch(r"ready|extracted|\d+", path.name) for path in staging.iterdir()):
            raise FileExistsError(f"{staging} holds files that are not of an interrupted attempt; move it away")
        shutil.rmtree(staging, ignore_errors=True)  # of an interrupted attempt
        staging.mkdir(mode=0o700)  # a new folder, in which nobody else can plant a link
        try:
            for number, archive in enumerate(archives):
                yield from extract(archive, staging / str(number))
                _arrange(staging / str(number), staging / "ready", LAYOUTS[name])
            sources = ", ".join(map(str, archives))
            if not (staging / "ready").exists():
                raise ValueError(f"{sources} holds nothing of {name}: expected {', '.join(LAYOUTS[name])}")
            if missing := _missing(staging / "ready", REQUIRED[name]):
                hint = ". The benchmark uses img.zip, not img_highres.zip" * any(staging.glob("ready/*/img_highres"))
                listed = ", ".join(missing)
                raise ValueError(f"{sources} holds only some of {name}: give the archives of {listed} too{hint}")
            os.replace(staging / "ready", target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _arrange(source: Path, target: Path, layout: dict[str, str]) -> None:
    """Move files and folders of the layout from anywhere below source to their destinations below target."""
    for parent, folders, files in os.walk(source):
        for entry in sorted(folders + files):
            path = Path(parent, entry)
            name = entry if path.is_dir() else original_name(entry)
            parents = [parent for pattern, parent in layout.items() if fnmatch.fnmatchcase(name, pattern)]
            if parents:
                while (path / name).is_dir() and os.listdir(path) == [name]:  # nested folders of the same name
                    path /= name
                _merge(path, target / parents[0] / name)
                folders[:] = [folder for folder in folders if folder != entry]


def _merge(source: Path, target: Path) -> None:
    """Move a file, or merge a folder, into a target that may already exist. Raises ValueError for differing files."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _merge(path, target / path.name)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    elif source.is_dir() or target.is_dir() or not filecmp.cmp(source, target, shallow=False):
        raise ValueError(f"{source.name} is in the archives twice, with different contents")


def _missing(folder: Path, layouts: list[list[str]]) -> list[str]:
    """The missing entries of the layout that the folder matches best."""
    missing = {tuple(layout): [name for name in layout if not any(folder.glob(name))] for layout in layouts}
    return min(missing.items(), key=lambda item: (bool(item[1]), len(item[1]) - len(item[0])))[1]
