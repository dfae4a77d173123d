"""Shared by the scripts: types of flags, help texts, errors in one line."""

import argparse
import linecache
import math
import multiprocessing
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from proxy_anchor.files import BadFile, printable
from proxy_anchor.spec import SHARE

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "evaluate.py", "search.py", "transfer.py", "protocol.py", "export.py")
SHOWN, LONGEST = 200, 800  # characters of an error after advice, and of one without
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, also where a file gave the argument."""

    def error(self, message):
        super().error(printable(" ".join(message.split()), LONGEST))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows only defaults that inform, and keeps the line breaks of texts of several lines."""

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, "", []) or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


# Types of flags: argparse shows their errors after the name of the flag.


def integer(smallest: int, largest: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `smallest` to `largest`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < smallest:
            words = {0: "negative", 1: "not positive"}.get(smallest, f"less than {smallest}")
            raise argparse.ArgumentTypeError(f"{value} is {words}")
        if value > largest:
            raise argparse.ArgumentTypeError(f"{value} is too large; it can be {largest:,} at most")
        return value

    return parse


def number(fits: Callable[[float], bool], fault: str) -> Callable[[str], float]:
    """The type of a flag that takes the numbers that fit; fault: what the others are."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is {fault}")
        if abs(value) >= LARGEST_FLOAT:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return value

    return parse


finite = number(math.isfinite, "not finite")
positive = number(lambda value: value > 0, "not positive")
not_negative = number(lambda value: value >= 0, "not 0 or more")


def share(smallest: float) -> Callable[[str], float]:
    """The type of a flag that takes shares, from `smallest` to 1."""
    return number(lambda value: smallest <= value <= 1, f"not a share, from {smallest:g} to 1")


def path(text: str) -> str:
    """The type of a flag for a path; refuses an empty one, such as an unset "$FOLDER"."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty one")
    return text


def name_part(text: str) -> str:
    """The type of a flag that takes a part of the name of a folder."""
    if "/" in text or os.sep in text:
        raise argparse.ArgumentTypeError(f"'{text}' cannot be part of the name of a folder")
    return text


def add_calibrate(group, text: str) -> None:
    """Add --calibrate [SHARE] to a group of flags; text: its help."""
    kind = number(lambda value: 0 < value < 1, "not between 0 and 1")
    group.add_argument("--calibrate", nargs="?", type=kind, const=SHARE, metavar="SHARE", help=text)


def one_of(*values) -> dict[str, Any]:
    """Arguments of add_argument for a flag that takes one of these values.

    argparse checks `choices` on the command line only; this type also checks values that a file gave, see set_recorded.
    """
    named = {str(value): value for value in values}

    def parse(text: str):
        if text not in named:
            raise argparse.ArgumentTypeError(f"invalid choice: '{text}' (choose from {', '.join(named)})")
        return named[text]

    return {"type": parse, "metavar": f"{{{','.join(named)}}}"}


def adder(group, without: Collection[str]) -> Callable[..., Any]:
    """The add_argument of a group, ignoring the flags in `without`."""
    return lambda flag, **settings: None if flag in without else group.add_argument(flag, **settings)


def set_recorded(parser: argparse.ArgumentParser, values: dict, source: Path) -> None:
    """Make values that were read from a file the defaults of their flags, whose types check them.

    Values without a flag are left out. A wrong one is a usage error, which names the file.
    """
    parser.exit_on_error = False
    for name in vars(parser.parse_args([])).keys() & values.keys() - {"resume"}:
        default, value = parser.get_default(name), values[name]
        fits = isinstance(value, bool) == isinstance(default, bool) and (value is not None or default is None)
        # argparse passes a default to the type of its flag where it is a text.
        parser.set_defaults(**{name: value if value is None or isinstance(value, bool) else str(value)})
        try:
            parsed = getattr(parser.parse_args([]), name)
        except argparse.ArgumentError:
            fits = False
        if not fits or parsed != value:
            parser.error(f"argument --resume: {source} has {name} {value!r}, which is not accepted")
        parser.set_defaults(**{name: parsed})
    parser.exit_on_error = True


# Messages of torch and the system when memory runs out, with advice.
NO_MEMORY = "The memory is exhausted: choose a smaller --batch-size or --image-size, or fewer --workers"
SMALL_SHM = (
    "/dev/shm is too small for the workers: choose fewer --workers (0 needs none) or make it larger "
    "(docker run --shm-size=8g)"
)
ADVICE = {
    r"shared memory|</torch_|Bus error": SMALL_SHM,
    r"[cC]an't allocate memory|Cannot allocate memory|killed by signal: Killed": NO_MEMORY,
    r"exited unexpectedly": f"A worker ended without giving a reason, most often because {SMALL_SHM}",
}


@contextmanager
def errors_in_one_line(script: str):
    """Print an error that the user can mend as one line on stderr and exit with status 1; let others through."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as with 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may be of any bytes
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say(f"{script}: interrupted")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (closed := list(filter(_has_no_reader, (sys.stdout, sys.stderr)))):
            for stream in closed:
                _to_nowhere(stream)  # or Python would complain when it ends
            sys.exit(128 + signal.SIGPIPE)
        text = message(error)
        if text is None:
            kill_workers()
            raise
        _say(f"{script}: error: {text}")
        kill_workers()
        with _silent_destructors():
            traceback.clear_frames(error.__traceback__)
        sys.exit(1)


def message(error: Exception) -> str | None:
    """What to tell the user of an error that they can mend, in one line; None for others."""
    return advice(error) or (one_line(error) if is_deliberate(error) else None)


def is_deliberate(error: Exception) -> bool:
    """Whether this error is about a file or a missing package, or was raised on purpose: by a `raise` of this code."""
    if isinstance(error, (OSError, BadFile, ModuleNotFoundError)):
        return True
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    path = Path(frame.f_code.co_filename)
    # Not all files in the root: a user's loss may be there, whose errors keep their traceback.
    ours = any(path.is_relative_to(ROOT / name) for name in ("code", "net", "dataset", "misc", *SCRIPTS))
    return ours and linecache.getline(str(path), line).lstrip().startswith("raise ")


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr)


@contextmanager
def _silent_destructors():
    """Silence errors in destructors, such as that of a DataLoader whose workers never started."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


@contextmanager
def output_may_close():
    """In this context, what is printed goes nowhere once nobody reads it, as after `| head`: a run goes on."""
    with redirect_stdout(_Output(sys.stdout)), redirect_stderr(_Output(sys.stderr)):
        yield


class _Output:
    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self._attempt(self.stream.write, text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, function, *arguments):
        try:
            return function(*arguments)
        except BrokenPipeError:
            _to_nowhere(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _has_no_reader(stream) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _to_nowhere(stream) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def kill_workers() -> None:
    """Kill the DataLoader workers; SIGTERM can take them a minute."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would make their death an error
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


def advice(error: Exception) -> str | None:
    """Advice where memory ran out (a GPU's, the host's or /dev/shm); None for other errors."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return "The GPU is out of memory; choose a smaller --batch-size (or --image-size)"
    message = printable(" ".join(str(error).split()), SHOWN)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) and frames and frames[-1].filename.endswith("multiprocessing/synchronize.py"):
        return (
            "The workers cannot be started, because /dev/shm is full or cannot be written: choose --workers 0, or make "
            f"it writable and larger (docker run --shm-size=8g) ({message})"
        )
    if isinstance(error, MemoryError):
        return f"{NO_MEMORY} ({message})"
    if isinstance(error, (RuntimeError, OSError)):
        return next((f"{text} ({message})" for words, text in ADVICE.items() if re.search(words, str(error))), None)
    return None


def one_line(error: Exception) -> str:
    """The message of an error, which may hold names of files, without the traceback that a worker's begins with."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:  # of the operating system
        text = f"{error.filename}: {error.strerror}"
    if "in DataLoader worker process" in text:  # indented lines follow, then "package.ErrorType: message"
        text = text.rpartition("Traceback (most recent call last):\n")[2]
        text = re.sub(r"\A(?: .*\n)*(?:[\w.]+: )?", "", text)
    return printable(" ".join(text.split()), LONGEST) or type(error).__name__
