"""Names of files, classes and groups as people and programs write them: white space, Unicode forms, backslashes."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

# White space, no-break spaces too, and characters without a width: byte order marks, marks of the direction of writing.
BLANK = r"[\s\0\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]+"


def stripped(text: str) -> str:
    """The text without white space and invisible characters around it."""
    return re.sub(rf"\A{BLANK}|{BLANK}\Z", "", text)


def by_form(names: Iterable[str]) -> dict[str, list[str]]:
    """{form: the names that have it}, see form."""
    names_of = defaultdict(list)
    for name in names:
        names_of[form(name)].append(name)
    return names_of


def form(name: str) -> str:
    """One spelling for all of a name: é is one character or two, and blanks around it do not count."""
    return stripped(unicodedata.normalize("NFC", name))


def spellings(paths: Iterable[str]) -> dict[str, str]:
    """{path: the path of the file that exists} for those of the paths that the disk spells in another way."""
    forms: dict[str, dict[str, list[str]]] = {}

    def find(path):
        if os.path.exists(path):
            return path
        folder, name = os.path.split(path)
        parent = find(folder) if folder not in ("", path) else folder
        if parent is None or not os.path.isdir(parent or "."):
            return None
        if parent not in forms:
            forms[parent] = by_form(os.listdir(parent or "."))
        matches = forms[parent].get(form(name), [])
        return os.path.join(parent, matches[0]) if len(matches) == 1 else None  # of several, none is meant for sure

    return {path: spelling for path in paths if (spelling := find(path))}


def oddity(path: str) -> str:
    """What is odd about a path that does not exist, for the end of a sentence; an empty text if nothing is."""
    if "\\" in path:
        return "; the path has backslashes: separate folders by /"
    if not path.isprintable() or any(part != stripped(part) for part in path.split("/")):
        return f"; the path has spaces or invisible characters in unusual places: {path!r}"
    return ""


def alike(names: Iterable[str]) -> list[list[str]]:
    """The names that differ only in case, white space or Unicode form, those of each kind in a list."""
    names_of = defaultdict(set)
    for name in names:
        names_of[re.sub(BLANK, "", unicodedata.normalize("NFKC", name).casefold())].add(name)
    return [sorted(same) for same in names_of.values() if len(same) > 1]


def describe_alike(kind: str, names: Iterable[str]) -> list[str]:
    """A line on the names that are alike, if any; kind: what they name."""
    listed = ["(" + ", ".join(map(ascii, same)) + ")" for same in alike(names)]  # ascii: they may look the same
    more = f" and {len(listed) - 10:,} more" if len(listed) > 10 else ""
    return [f"{kind} that differ only in case, white space or Unicode form: {', '.join(listed[:10])}{more}"] * bool(
        listed
    )
