"""What the scripts share at the command line: checks of arguments, errors in one line."""

import argparse
import math
import multiprocessing
import os
import re
import select
import signal
import sys
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

from proxy_anchor import collectives
from proxy_anchor.checkpoint import CONTRACT, GEOMETRY, LARGEST
from proxy_anchor.files import printable
from proxy_anchor.progress import progress
from proxy_anchor.runs import run_folders
from proxy_anchor.runs.stopping import Interrupted

POSITIVE = (
    "embedding_size",
    "batch_size",
    "image_size",
    "lr",
    "alpha",
    "lr_decay_step",
    "lr_decay_gamma",
    "IPC",
    "neighbours",
    "nprobe",
    "source_embedding_size",
    "view",
    "sigma",
    "delta",
    "embedding_lr",
    "eps",
)
PATHS = ("data_root", "test_classes", "cache", "source_ckpt", "LOG_DIR", "report", "out", "index", "save", "check")
SHOWN, LONGEST = 200, 800  # characters of an error beside advice, and of one without
NOT_NEGATIVE = ("epochs", "warm", "workers", "weight_decay", "seed")


def options() -> argparse.ArgumentParser:
    """Command-line flags of all scripts."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("errors")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error, for a bug report")
    return parser


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, also where a file gave the argument."""

    def error(self, message):
        super().error(printable(" ".join(message.split()), LONGEST))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, and leaves texts of several lines as they are."""

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == "" or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if a number on the command line is out of its range, or a path is empty."""
    for name, value in vars(args).items():
        flag = "argument --" + (name if name.isupper() else name.replace("_", "-"))
        limit = torch.finfo(torch.float).max  # torch's numbers end somewhere
        if name in POSITIVE and value is not None and not 0 < value < limit:
            parser.error(f"{flag}: {value} is {'too large' if value > 0 else 'not positive'}")
        if value is not None and (largest := LARGEST.get(name.removeprefix("source_"))) and value > largest:
            parser.error(f"{flag}: {value} is too large; it can be {largest:,} at most")
        if name in NOT_NEGATIVE and not 0 <= value < 2**63:
            parser.error(f"{flag}: {value} is negative or too large")
        if name == "mrg" and not abs(value) < limit:
            parser.error(f"{flag}: {value} is {'too large' if math.isfinite(value) else 'not finite'}")
        if name == "gpu_id" and value < -1:
            parser.error(f"{flag}: {value} is no device; -1 means all")
        if name in PATHS and value == "":  # as of "$FOLDER" where no such variable is set
            parser.error(f"{flag}: expected a path, found an empty one")
        if name == "remark" and ("/" in value or os.sep in value):
            parser.error(f"{flag}: '{value}' cannot be part of the name of a folder")


def recorded_flags(parser: argparse.ArgumentParser, values: dict, source: Path) -> list[str]:
    """The flags that give arguments these values, as read from a file; a usage error names the file."""
    flags: list[str] = []
    for action in parser._actions:
        value = values.get(action.dest)
        if action.dest not in values or action.dest in ("resume", "debug") or value is action.default is None:
            continue
        types = (bool,) if action.nargs == 0 else (int, float) if action.type in (int, float) else (str,)
        if not isinstance(value, types) or (bool not in types and isinstance(value, bool)):
            parser.error(f"{source} has {action.dest} {value!r}, which --{action.dest.replace('_', '-')} cannot be")
        if value is not False:
            flags.append(action.option_strings[0] if value is True else f"{action.option_strings[0]}={value}")
    return flags


def parse_with_recipe(parser: argparse.ArgumentParser, argv: list[str] | None, recipe_of) -> argparse.Namespace:
    """Parse the command line of a training; defaults come from the dataset's recipe, or from the run to resume.

    recipe_of(name of a dataset) -> {argument: default}, of which the parser may lack some. args.recipe lists the
    defaults of the recipe that are in use.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume in (None, "auto"):
        known = {action.dest for action in parser._actions}
        recipe = {name: value for name, value in recipe_of(args.dataset).items() if name in known}
        parser.set_defaults(**recipe)
        args = parser.parse_args(argv)
        kept = [f"--{name.replace('_', '-')} {value}" for name, value in recipe.items() if getattr(args, name) == value]
        args.recipe = " ".join(kept)
        return args
    try:
        folder = run_folders.folder(args.resume)
        config = run_folders.read_config(folder)
        recorded = recorded_flags(parser, config, folder / run_folders.CONFIG)
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {error}")
    args = parser.parse_args([*recorded, *argv])  # arguments that are not given stay as they were
    args.resume, args.recipe = str(folder), printable(str(config.get("recipe", "")))
    return args


def parse_with_contract(parser: argparse.ArgumentParser, argv: list[str] | None, contract: dict, at: int = 0):
    """Parse the command line; arguments not given are those of a checkpoint's contract, other values are a usage error.

    at: where in argv flags may be inserted. Two arguments have no flag: geometry, how evaluation sees the images,
    which is None if it is unknown; and head, which then is linear.
    """
    argv = sys.argv[1:] if argv is None else argv
    told = {name: f"--{name.replace('_', '-')}" for name in CONTRACT if name in contract}
    args = parser.parse_args([*argv[:at], *[f"{flag}={contract[name]}" for name, flag in told.items()], *argv[at:]])
    for name, flag in told.items():
        if (given := getattr(args, name)) != contract[name]:
            parser.error(f"argument {flag}: the checkpoint was trained with {contract[name]}, not {given}")
    args.geometry = {name: contract[name] for name in GEOMETRY if name in contract} or None
    args.head = contract.get("head", "linear")
    distance = contract.get("distance", "cosine") if contract else args.distance or "cosine"
    if args.distance not in (None, distance):
        parser.error(f"argument --distance: the checkpoint was trained for {distance}, not {args.distance}")
    args.distance = distance
    return args


def make_ready(image_sets, skip_bad_images: bool, cache: str | None, workers: int) -> None:
    """Leave out the damaged images of datasets, and keep decoded ones in the cache folder, if asked to."""
    for images in image_sets if skip_bad_images else ():
        bad = collectives.from_rank_zero(lambda images=images: images.find_bad(workers))
        images.leave_out(bad)
        print(
            f"Left out: {len(bad)} unreadable image{'s' * (len(bad) != 1)}", *map(printable, bad.values()), sep="\n  "
        )
    for images in image_sets if cache else ():
        images.use_cache(cache, workers, progress, report=lambda line: print(printable(line)))


# What torch says when something runs out or does not suffice, and what to do about it.
ADVICE = {
    r"shared memory|</torch_|Bus error": "/dev/shm is too small for the workers: choose fewer --workers (0 needs none) "
    "or make it larger (docker run --shm-size=8g)",
    r"[cC]an't allocate memory|Cannot allocate memory|killed by signal: Killed": "The memory is exhausted: choose a "
    "smaller --batch-size or --image-size, or fewer --workers",
    r"exited unexpectedly": "A worker ended without giving a reason, most often because /dev/shm is too small for the "
    "workers: choose fewer --workers (0 needs none) or make it larger (docker run --shm-size=8g)",
    r"more than 1 value per channel": "BatchNorm cannot train on a single image: choose a larger --batch-size, or "
    "--bn-freeze 1",
}


@contextmanager
def errors_in_one_line(script: str, debug: bool):
    """Turn an error into one line on stderr and exit status 1; with debug, let the traceback through."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this, as with 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may be of any bytes
    try:
        yield
        sys.stdout.flush()
    except Interrupted as interruption:
        _say(f"{script}: {interruption}; everything is saved, --resume auto continues from here")
        sys.exit(128 + interruption.signum)
    except KeyboardInterrupt:
        _say(f"{script}: interrupted")
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and (closed := list(filter(_has_no_reader, (sys.stdout, sys.stderr)))):
            for stream in closed:
                _to_nowhere(stream)  # or Python would complain when it ends
            sys.exit(128 + signal.SIGPIPE)
        if debug:
            raise
        _say(f"{script}: error: {in_one_line(error)}")
        kill_workers()
        with _silent_destructors():
            traceback.clear_frames(error.__traceback__)
        sys.exit(1)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr)


@contextmanager
def _silent_destructors():
    """In this context, what was made by half may go without a complaint, as a DataLoader that got no workers."""
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
    """End the processes that read images, which take their time with a SIGTERM."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would make their death an error
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


def in_one_line(error: Exception) -> str:
    """What to say of an error: its message, which may have names from files in it, or advice."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU is out of memory; choose a smaller --batch-size (or --image-size)"
    text = str(error)
    shown = printable(" ".join(text.split()), SHOWN)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile cannot compile the network here: leave out --compile ({shown})"
    places = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) and places and places[-1].filename.endswith("multiprocessing/synchronize.py"):
        return (
            "The workers cannot be started, because /dev/shm is full or cannot be written: choose --workers 0, or make "
            f"it writable and larger (docker run --shm-size=8g) ({shown})"
        )
    for words, advice in ADVICE.items():
        if re.search(words, text):
            return f"{advice} ({shown})"
    if "in DataLoader worker process" in text:  # a traceback: indented lines, then "package.ErrorType: message"
        text = text.rpartition("Traceback (most recent call last):\n")[2]
        text = re.sub(r"\A(?: .*\n)*(?:[\w.]+: )?", "", text)
    return printable(" ".join(text.split()), LONGEST) or type(error).__name__
