"""Texts with names from files, which may hold any character, for terminals, pages and spreadsheets."""

import re

# What moves a cursor, colours, breaks a line, reverses the direction of writing, or is no character at all.
CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str, longest: int | None = None) -> str:
    """The text in one line, with escapes for control characters; cut in the middle to so many characters, if any."""
    text = CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
    if longest is None or len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def csv_cell(text: str) -> str:
    """The text for a CSV file; what a spreadsheet would run as a formula has an apostrophe before it."""
    text = printable(text)
    is_number = re.fullmatch(r"[+-]?\d+(\.\d+)?", text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not is_number else text
