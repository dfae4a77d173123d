"""Import name of the sources in code/; `code` itself is a standard-library module."""

from pathlib import Path

__path__ = [str(Path(__file__).with_name("code"))]
