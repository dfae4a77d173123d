"""Files that raise when they are opened, looked up or listed, however Python does it."""

import os
import sys
from contextlib import contextmanager

_poisoned: set[str] = set()


class Touched(BaseException):
    """What was not to be touched was; nothing that handles damaged files handles this."""


def _check(path, what):
    if _poisoned and isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)) in _poisoned:
        raise Touched(f"{what}: {path}")


def _audit(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        _check(arguments[0], event)


sys.addaudithook(_audit)  # for good, so it looks at the set


@contextmanager
def poisoned(paths, monkeypatch):
    """In this context, to open or list any of the paths raises Touched, and to look up a file among them."""
    _poisoned.update(os.path.abspath(path) for path in paths)
    files = {path for path in _poisoned if not os.path.isdir(path)}
    with monkeypatch.context() as patch:
        for name, original in {"stat": os.stat, "lstat": os.lstat, "readlink": os.readlink}.items():

            def look_up(path, *rest, original=original, name=name, **more):
                if not isinstance(path, int) and os.path.abspath(os.fsdecode(path)) in files:
                    raise Touched(f"{name}: {path}")
                return original(path, *rest, **more)

            patch.setattr(os, name, look_up)
        try:
            yield
        finally:
            _poisoned.clear()
