"""The answers of `search.py query` as JSON and as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from proxy_anchor.files import printable

if TYPE_CHECKING:
    from proxy_anchor.api import Answer


def to_json(answers: list[Answer], bad: dict[str, str], threshold: float | None, measure: str) -> str:
    """The answers, and {query: why it could not be read}."""
    errors = [{"query": path, "error": reason} for path, reason in bad.items()]
    rows = [
        {
            "query": answer.query,
            "threshold": threshold,
            "match": None if threshold is None else bool(answer.matches),
            "probability": answer.probability,
            "best": answer.nearest[0][1] if answer.nearest else None,
            "things": [
                {"folder": thing.folder, measure: thing.best, "images": thing.images} for thing in answer.things
            ],
            "neighbours": [{"path": path, measure: value} for path, value in answer.matches],
        }
        for answer in answers
    ]
    return json.dumps([*errors, *rows], indent=1)


def to_table(answers: list[Answer], threshold: float | None, measure: str) -> str:
    """Each query with the thing that it shows and its matches, or "no match"."""
    lines = []
    for answer in answers:
        lines.append(printable(answer.query))
        if answer.things or not answer.matches:
            lines.append(f"  {': '.join(filter(None, answer.verdict(measure, threshold)))}")
        for rank, (path, value) in enumerate(answer.matches, start=1):
            lines.append(f"{rank:>4}  {unit(measure)}{value:.4f}  {printable(path)}")
    return "\n".join(lines)


def unit(measure: str) -> str:
    """The word before a number: "distance "; a number alone is a similarity."""
    return "distance " if measure == "distance" else ""
