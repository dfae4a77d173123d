"""The installed package: what the wheel holds, what it needs, and that it does what the scripts do."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import trees
from pages import REPOSITORY

import net
import proxy_anchor
from proxy_anchor import load

FROM_DISK = ["--no-build-isolation", "--no-deps", "--no-index"]  # flags of pip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the package is built from."""
    try:  # looking for the module pip would make setuptools unusable in this process, which torch.compile imports
        version("pip"), version("setuptools")
    except PackageNotFoundError as error:  # uv installs no pip
        pytest.skip(f"{error.name} is missing")
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "proxy_anchor.py", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("code", "dataset", "net"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel that `pip install git+file://...` installs, built without a network."""
    settings = ("user.name=A", "user.email=a@b.c", "init.defaultBranch=main", "commit.gpgsign=false")
    git = ["git", *(word for setting in settings for word in ("-c", setting))]
    for command in (["init"], ["add", "."], ["commit", "-m", "All"]):
        run([*git, *command], source)
    built = tmp_path_factory.mktemp("built")
    run([sys.executable, "-m", "pip", "wheel", *FROM_DISK, "--wheel-dir", built, f"git+file://{source}"], built)
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel):
    """A folder with the content of the wheel, as pip would install it."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(wheel.parent / "site")
    return wheel.parent / "site"


@pytest.fixture(scope="module")
def project():
    """The content of pyproject.toml."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


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


def test_version_is_that_of_the_package(project, wheel):
    version = proxy_anchor.__version__
    assert project["project"]["version"] == version and wheel.name.startswith(f"proxy_anchor-{version}-")
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version


def test_requirements_for_pip_are_those_for_uv(project):
    def required(name):
        lines = [line.partition("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines()]
        return [line for line in lines if line]

    groups = project["dependency-groups"]
    assert required("requirements.txt") == groups["scripts"]
    assert groups["dev"][0] == {"include-group": "scripts"}
    assert required("requirements-dev.txt") == ["-r requirements.txt", *groups["dev"][1:]]


def test_lock_is_that_of_the_requirements_and_names_the_public_index_alone(project):
    text = (REPOSITORY / "uv.lock").read_text()
    assert set(re.findall(r"\w+://[^/\"]+", text)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    lock = tomllib.loads(text)
    (own,) = [package["metadata"] for package in lock["package"] if package["name"] == "proxy-anchor"]
    extras = project["project"]["optional-dependencies"]
    expected = {(None, requirement) for requirement in project["project"]["dependencies"]}
    expected |= {(extra, requirement) for extra in extras for requirement in extras[extra]}

    def required(package):
        return package["name"] + package.get("specifier", "")

    assert expected == {
        (re.search(r"'(.*)'", package["marker"])[1] if "marker" in package else None, required(package))
        for package in own["requires-dist"]
    }
    groups = project["dependency-groups"]
    for name, more in (("scripts", []), ("dev", groups["scripts"])):
        expected = {requirement for requirement in [*groups[name], *more] if isinstance(requirement, str)}
        assert {required(package) for package in own["requires-dev"][name]} == expected
    assert lock["requires-python"] == project["project"]["requires-python"]


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
    python = environment(tmp_path)
    run([python, "-m", "pip", "install", *FROM_DISK, wheel], tmp_path)
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


def test_editable_package_has_the_public_names(source, tmp_path):
    """Outside the checkout, where proxy_anchor.py is not found by its folder."""
    python = environment(tmp_path)
    run([python, "-m", "pip", "install", *FROM_DISK, "-e", source], tmp_path)
    program = "from proxy_anchor import ProxyAnchor, load; from proxy_anchor.net import create; create('resnet18', 8)"
    run([python, "-c", program], tmp_path)


def environment(folder):
    """The Python of a new virtual environment in a folder, which has the packages of this one."""
    run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", "env"], folder)
    base = run([sys.executable, "-c", "import torch, pip; print(torch.__path__[0])"], folder).strip()
    packages = str(base.rpartition("/")[0])  # the tests may run in a virtual environment of their own
    (path,) = (folder / "env" / "lib").glob("python*/site-packages")
    (path / "tests.pth").write_text(f"{packages}\n")
    return folder / "env" / "bin" / "python"


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
