"""Variants of the names of files, classes and groups: white space, Unicode forms, backslashes."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

# White space, including no-break spaces, and invisible characters: byte order marks, marks of writing direction.
BLANK = r"[\s\0\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]+"


def strip(text: str) -> str:
    """The text without surrounding white space and invisible characters."""
    return re.sub(rf"\A{BLANK}|{BLANK}\Z", "", text)


def by_form(names: Iterable[str]) -> dict[str, list[str]]:
    """{canonical form: names}, see form."""
    groups = defaultdict(list)
    for name in names:
        groups[form(name)].append(name)
    return groups


def form(name: str) -> str:
    """The canonical form of a name: composed characters (é is one), no surrounding blanks."""
    return strip(unicodedata.normalize("NFC", name))


def spellings(paths: Iterable[str]) -> dict[str, str]:
    """{path: path of the existing file} for paths that differ from it only in spelling, see form."""
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
        return os.path.join(parent, matches[0]) if len(matches) == 1 else None  # several would be ambiguous

    return {path: spelling for path in paths if (spelling := find(path))}


def oddity(path: str) -> str:
    """A probable mistake in a path that does not exist, to end a sentence with; "" if there is none."""
    if "\\" in path:
        return "; the path has backslashes: separate folders by /"
    if not path.isprintable() or any(name != strip(name) for name in path.split("/")):
        return f"; the path has spaces or invisible characters in unusual places: {path!r}"
    return ""


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Lists of names that differ only in case, white space or Unicode form."""
    groups = defaultdict(set)
    for name in names:
        groups[re.sub(BLANK, "", unicodedata.normalize("NFKC", name).casefold())].add(name)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def describe_similar(kind: str, names: Iterable[str]) -> list[str]:
    """A line on similar names, if there are any; kind: the plural of the named things, such as "Classes"."""
    # ascii, because they may look the same.
    listed = ["(" + ", ".join(map(ascii, group)) + ")" for group in similar_names(names)]
    more = f" and {len(listed) - 10:,} more" if len(listed) > 10 else ""
    line = f"{kind} that differ only in case, white space or Unicode form: {', '.join(listed[:10])}{more}"
    return [line] if listed else []
