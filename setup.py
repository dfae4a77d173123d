"""Builds the package proxy_anchor from code/, net/ and dataset/; everything else about it is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel


class BuildPackage(build_py):
    """With proxy_anchor.py as the __init__.py of the package: code/ has none, as it would hide Python's own `code`."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [*modules, (package, "__init__", "proxy_anchor.py")] if package == "proxy_anchor" else modules


class BuildLinks(editable_wheel):
    """`pip install -e .` links every file of the package: a link to the folder code/ would lack the __init__.py."""

    def finalize_options(self):
        super().finalize_options()
        self.mode = "strict"


setup(cmdclass={"build_py": BuildPackage, "editable_wheel": BuildLinks})
