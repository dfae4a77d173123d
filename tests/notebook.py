"""Runs the cells of the notebook of the quick start, in docs/ and without Jupyter: python tests/notebook.py."""

import json
import os
import subprocess

from pages import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "quick_start.ipynb"


def cells() -> list[dict]:
    """The cells of code; `source` is a list of lines."""
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def main():
    os.chdir(NOTEBOOK.parent)
    names: dict = {}
    for source in ("".join(cell["source"]) for cell in cells()):
        if source.startswith("!"):
            subprocess.run(source[1:].format(**names), shell=True, check=True)
        elif not source.startswith("%"):  # the packages are installed
            exec(source, names)


if __name__ == "__main__":
    main()
