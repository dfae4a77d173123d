"""README.md, the other pages beside it and in docs/, and the commands in them."""

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TOP = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(page: Path, language: str = "") -> list[str]:
    """The blocks of code on a page, of one language or none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def commands(start: str, pages=PAGES) -> list[list[str]]:
    """The arguments of the commands with this start, e.g. "python train.py", in the order of the pages."""
    lines = [line.split(" && ")[-1] for page in pages for block in blocks(page) for line in block.splitlines()]
    return [shlex.split(line.removeprefix(start)) for line in lines if f"{line} ".startswith(f"{start} ")]
