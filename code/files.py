"""Files that survive crashes and concurrent writers: atomic replacement, locks, checksums; and printable file names.

Only the standard library is needed.
"""

import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
from contextlib import contextmanager, suppress
from pathlib import Path


class BadFile(ValueError):
    """A file that is not what it should be; the message names it."""


@contextmanager
def replacing(path: Path):
    """Yields a temporary path beside `path` to write to; at the end the file is flushed and takes the place of `path`.

    The temporary file has a name that nobody can guess and is new, so that no other process writes to it and no planted
    link is followed; it has the permissions of any new file in the folder. What killed processes have left of `path` is
    removed. Raises OSError, naming the file, if it cannot be written; the old file is then still there.
    """
    temporary = descriptor = None
    try:
        _remove_leftovers(path)
        temporary, descriptor = _new_temporary(path)
        yield temporary
        os.fsync(descriptor)
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        if path.parent.is_dir():
            cause = f"the disk has {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB free"
        else:
            cause = f"there is no folder {path.parent}"
        raise OSError(f"{path} cannot be written ({' '.join(str(error).split())}); {cause}") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def _new_temporary(path: Path) -> tuple[Path, int]:
    """A new temporary file for `path` and its descriptor, which is locked for as long as it is in use."""
    while True:
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # not every network disk has locks; leftovers then stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else another process took it for a leftover just before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files for `path` that no process holds."""
    for leftover in path.parent.glob(f".{glob.escape(path.name[:40])}.{'[0-9a-f]' * 16}.tmp"):
        if leftover.is_symlink() or not leftover.is_file():  # planted: to open a pipe may take for ever
            continue
        with suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


LOCK = ".lock"


class Locked(RuntimeError):
    """Another process holds the folder."""


def hold(path: Path, wait: bool = True):
    """Hold a lock file until the returned file is closed, or this process ends however it ends.

    Forked workers, which may outlive a killed process, do not hold it too. Raises BlockingIOError where another process
    holds it, unless it is to wait for that.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    os.register_at_fork(after_in_child=file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file


def lock_folder(folder: Path, instead: str):
    """Lock the folder until the returned file is closed or this process ends, even by SIGKILL.

    Raises Locked if another process holds it; the message ends with `instead`, what else the user can do.
    """
    try:
        file = hold(folder / LOCK, wait=False)
    except BlockingIOError:
        holder = (folder / LOCK).read_text().strip() or "another process"
        raise Locked(f"{folder} is being written by {holder}; end that first, or {instead}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def numbered(path: Path):
    """path, path_2, path_3, ..."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}_{number}")
        number += 1


@contextmanager
def locked(path: Path):
    """Lock the name of a file, which need not exist; other processes that want to write it wait.

    Raises OSError, naming the file, where its folder takes no lock.
    """
    lock = path.with_name(f".{path.name[:40]}.lock")
    while True:
        try:
            file = hold(lock)
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error})") from error
        with file:
            if not _is_at(file, lock):  # another process has removed it while this one waited
                continue
            try:
                yield
            finally:
                if not os.fstat(file.fileno()).st_size:  # else it is another's file
                    lock.unlink()
            return


def _is_at(file, path: Path) -> bool:
    """Whether an open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def sha256(path: str | Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def seal(path: Path) -> dict:
    """A fingerprint of a file for is_intact: {"sha256", "state"}."""
    return {"sha256": sha256(path), "state": _state(path)}


def is_intact(path: Path, seal: dict) -> bool:
    """Whether a file is as it was sealed. Its content is read only if the file was touched, or copied, since then."""
    return _state(path) == seal["state"] or sha256(path) == seal["sha256"]


def _state(path: Path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


# What moves a cursor, colours, breaks a line, reverses the direction of writing, or is no character at all.
CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str, longest: int | None = None) -> str:
    """The text in one line, control characters escaped; cut in the middle to `longest` characters, if given."""
    text = CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
    if longest is None or len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def quantity(count: int, noun: str) -> str:
    """The count with its noun, which ends in s or has a plural in s: "1 class", "2,000 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def csv_cell(text: str) -> str:
    """The text for a CSV file; what a spreadsheet would run as a formula has an apostrophe before it."""
    text = printable(text)
    is_number = re.fullmatch(r"[+-]?\d+(\.\d+)?", text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not is_number else text
