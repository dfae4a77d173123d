"""`pip install .`: the loss and the measurement for other projects."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from pages import REPOSITORY


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the content of the wheel, as pip would install it; built without a network."""
    pytest.importorskip("setuptools")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "code", source / "code", ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", built]
    command = [sys.executable, "-m", "pip", "wheel", *flags, "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(built / "site")
    return built / "site"


def test_wheel_holds_code_as_proxy_anchor_and_nothing_else(site):
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"proxy_anchor"}
    installed, code = site / "proxy_anchor", REPOSITORY / "code"
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert found == {str(path.relative_to(code)) for path in code.rglob("*") if path.suffix in (".py", ".html")}
    assert {"losses.py", "retrieval.py"} <= found


def test_loss_and_recall_of_the_package_need_torch_alone(site):
    program = """
import sys, torch
before = set(sys.modules)
from proxy_anchor.losses import ProxyAnchor
from proxy_anchor.retrieval import recall_at_k
more = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert more <= {"proxy_anchor", "torch"}, more
import code, proxy_anchor.losses
assert proxy_anchor.losses.__file__.startswith(sys.path[-1]) and not code.__file__.startswith(sys.path[-1])
ProxyAnchor(2, 4)(torch.randn(8, 4), torch.arange(8) % 2).backward()
assert recall_at_k(torch.eye(4), torch.tensor([0, 0, 1, 1]), ks=[4]) == {4: 1.0}
"""
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.append({str(site)!r})" + program]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
