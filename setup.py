"""Builds the package proxy_anchor from code/, net/ and dataset/; everything else about it is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """With proxy_anchor.py as the __init__.py of the package: code/ has none, as it would hide Python's own `code`."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [*modules, (package, "__init__", "proxy_anchor.py")] if package == "proxy_anchor" else modules


setup(cmdclass={"build_py": BuildPackage})
