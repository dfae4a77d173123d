"""The installed package: what the wheel holds, what it needs, and that it does what the scripts do."""

import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import trees
from pages import REPOSITORY

import net
import proxy_anchor
from proxy_anchor import load


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network."""
    pytest.importorskip("setuptools")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "setup.py", "proxy_anchor.py", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("code", "dataset", "net"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", built]
    run([sys.executable, "-m", "pip", "wheel", *flags, "."], source)
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel):
    """A folder with the content of the wheel, as pip would install it."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(wheel.parent / "site")
    return wheel.parent / "site"


def run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(site):
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"proxy_anchor"}
    installed = site / "proxy_anchor"
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    sources = {"": REPOSITORY / "code", "net/": REPOSITORY / "net", "dataset/": REPOSITORY / "dataset"}
    expected = {
        f"{prefix}{path.relative_to(folder)}"
        for prefix, folder in sources.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".html", ".css", ".typed")
    }
    assert found == expected | {"__init__.py"} and {"losses.py", "py.typed", "net/resnet.py"} <= found
    assert (installed / "__init__.py").read_bytes() == (REPOSITORY / "proxy_anchor.py").read_bytes()


def test_version_is_that_of_the_package():
    assert f'\nversion = "{proxy_anchor.__version__}"\n' in (REPOSITORY / "pyproject.toml").read_text()


def test_public_names():
    for name in proxy_anchor.__all__:
        assert getattr(proxy_anchor, name) is not None
    with pytest.raises(AttributeError, match="module 'proxy_anchor' has no attribute 'unknown'"):
        proxy_anchor.unknown  # noqa: B018


def test_loss_and_recall_of_the_package_need_torch_alone(site):
    program = """
import sys, torch
before = set(sys.modules)
from proxy_anchor import ProxyAnchor, __version__, recall_at_k
more = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert more <= {"proxy_anchor", "torch"}, more
import code, proxy_anchor
assert proxy_anchor.__file__.startswith(sys.path[-1]) and not code.__file__.startswith(sys.path[-1])
ProxyAnchor(2, 4)(torch.randn(8, 4), torch.arange(8) % 2).backward()
assert recall_at_k(torch.eye(4), torch.tensor([0, 0, 1, 1]), ks=[4]) == {4: 1.0}
"""
    run([sys.executable, "-I", "-c", f"import sys; sys.path.append({str(site)!r})" + program], site)


def test_installed_package_gives_the_embeddings_of_the_checkout(wheel, tmp_path):
    """In a virtual environment with the wheel, whose user has modules called net and dataset."""
    spec = {"model": "resnet18", "embedding_size": 16, "image_size": 32, "l2_norm": 1}
    trees.save_checkpoint(tmp_path / "a.pth", net.create("resnet18", 16), spec)
    trees.write_image(tmp_path / "1.jpg", 1)
    for name in ("net", "dataset"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    base = run([sys.executable, "-c", "import torch, pip; print(torch.__path__[0])"], tmp_path).strip()
    packages = str(base.rpartition("/")[0])  # the tests may run in a virtual environment of their own
    (path,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (path / "tests.pth").write_text(f"{packages}\n")
    run([python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], tmp_path)
    program = """
import numpy, pickle, sys
import net, dataset, proxy_anchor
from proxy_anchor import load
embed = load("a.pth")
assert net.mine and dataset.mine and "env" in proxy_anchor.__file__
assert (pickle.loads(pickle.dumps(embed))("1.jpg") == embed("1.jpg")).all()
numpy.save("found.npy", embed(["1.jpg"]))
"""
    run([python, "-c", program], tmp_path)
    assert np.array_equal(np.load(tmp_path / "found.npy"), load(tmp_path / "a.pth")([tmp_path / "1.jpg"]))


@pytest.mark.slow
def test_types_of_the_package_are_seen(site, tmp_path):
    """By a type checker that has its folder."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "from proxy_anchor import load, recall_at_k\n"
        'reveal_type(load("a.pth"))\n'
        "reveal_type(recall_at_k([], [], [1]))\n"
    )
    program = f"""
import os, sys
os.environ["MYPYPATH"] = {str(site)!r}
from mypy import api
print(*api.run(["--follow-imports=silent", "--ignore-missing-imports", "user.py"])[:2])
"""
    out = run([sys.executable, "-c", program], tmp_path)
    assert re.search(r'"proxy_anchor.api.ImageEmbedder"', out) and "dict[int, float]" in out and "error" not in out, out
