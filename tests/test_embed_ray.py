"""misc/embed_ray.py, on Ray itself, started on this machine: `pip install 'ray[data]'`, 240 MB."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace

import embed_ray
import pytest
import torch
import trees
from helpers import RECORD, fails
from pages import REPOSITORY

import net
import search
from proxy_anchor import cli
from proxy_anchor.files import lock_folder
from proxy_anchor.index import entries
from proxy_anchor.index.store import Index

for library in ("faiss", "pyarrow"):
    pytest.importorskip(library)


@pytest.fixture
def installed():
    pytest.importorskip("ray")


@pytest.fixture
def folder(tmp_path):
    """24 images, one of them damaged, and a checkpoint."""
    torch.manual_seed(0)
    trees.save_checkpoint(tmp_path / "best.pth", net.create("resnet18", 8), RECORD | {"model": "resnet18"})
    trees.folder(tmp_path / "photos", classes=("ant", "bee", "cat", "dog"))
    (tmp_path / "photos" / "bee" / "3.jpg").write_bytes(b"no image")
    return tmp_path


def command(*more):
    flags = ["photos", "--resume", "best.pth", "--out", "vectors", "--rows", "8", "--batch-size", "4", "--workers", "2"]
    return [sys.executable, REPOSITORY / "misc" / "embed_ray.py", *flags, *more]


def embed(folder, *more):
    """The script's exit status, what it prints, and the lines of its errors; without Ray's notices."""
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*more), cwd=folder, env=environment, check=False, timeout=240, capture_output=True, text=True
    )
    of_ray = ("[", "\033[33m(raylet)")  # on a worker that it ends, with work left, it prints either, to either stream
    out, errors = (
        [line for line in stream.splitlines(keepends=True) if not line.startswith(of_ray)]
        for stream in (done.stdout, done.stderr)
    )
    return done.returncode, "".join(out), [line.removesuffix("\n") for line in errors]


def planned(folder, **arguments):
    """The plan of the command in this process."""
    settings = {"images": "photos", "rows": 8, "embedder": embed_ray.load("best.pth")} | arguments
    (folder / "vectors").mkdir(exist_ok=True)
    return embed_ray.plan(folder / "vectors", **settings)


NEXT = "Next: python search.py index --vectors vectors --out photos.index\n"


def index(folder, name, *source):
    """The index that search.py makes; with --images, of the same batches."""
    images = ["--resume", str(folder / "best.pth"), "--batch-size", "4", "--workers", "0", "--skip-bad-images"]
    flags = images if source[0] == "--images" else []
    search.main(["index", source[0], str(folder / source[1]), *flags, "--out", str(folder / name)])
    return Index.open(folder / name)


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_files_make_the_index_of_search_py(folder, capsys):
    """To the bit where the batches are equal; an unreadable image has a row of its own.

    Later, a file is gone, and meanwhile a photo was added, one changed, one lost, and the checkpoint moved: that file
    alone is made again, and search.py finds the changes.
    """
    status, out, err = embed(folder)
    assert status == 0 and "3 of 3 files; 24 images" in out and "1 unreadable" in out, err
    assert out.startswith("Files to write: 3 of 3\n1 of 3 files; 8 images") and not err
    files = sorted((folder / "vectors").glob("*.parquet"))
    assert [file.name for file in files] == ["000000.parquet", "000001.parquet", "000002.parquet"]
    of_files = index(folder, "index", "--vectors", "vectors")
    assert "Left out, as they could not be read: 1 image" in capsys.readouterr().out
    at_once = index(folder, "once", "--images", "photos")
    assert list(of_files.images) == list(at_once.images) and len(at_once.images) == 23
    first, rest = slice(0, 8), slice(8, None)  # bee/3.jpg is unreadable: other batches follow
    assert of_files.images.vectors[first].tobytes() == at_once.images.vectors[first].tobytes()
    assert of_files.images.vectors[rest] == pytest.approx(at_once.images.vectors[rest], abs=1e-5)
    assert of_files.made == at_once.made and of_files.folders == at_once.folders
    index(folder, "index", "--images", "photos")
    assert "new: 1, changed: 0, deleted: 0" in capsys.readouterr().out  # the damaged one

    times = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    photos = folder / "photos"
    trees.write_image(photos / "ant" / "new.jpg", 7)
    trees.write_image(photos / "ant" / "1.jpg", 8)
    (photos / "cat" / "1.jpg").unlink()
    (folder / "best.pth").rename(folder / "moved.pth")
    status, out, err = embed(folder, "--resume", "moved.pth")
    assert status == 0 and out.startswith("Files to write: 1 of 3\n3 of 3 files; 8 images") and not err, err
    assert "2 unreadable" in out
    assert [file for file in files if file.stat().st_mtime_ns != times[file]] == [files[1]]
    assert embed(folder, "--resume", "moved.pth")[:2] == (0, f"Files to write: 0 of 3\n{NEXT}")
    index(folder, "later", "--vectors", "vectors")
    (folder / "moved.pth").rename(folder / "best.pth")
    capsys.readouterr()
    index(folder, "later", "--images", "photos")
    assert "new: 2, changed: 1, deleted: 0" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_continues_after_a_kill(folder):
    """SIGKILL once a file exists: it is complete, and the rest follows."""
    for number in range(10):
        shutil.copytree(folder / "photos" / "ant", folder / "photos" / f"ant{number}")
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command("--rows", "4"), cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not list((folder / "vectors").glob("*.parquet")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete = {file: file.read_bytes() for file in (folder / "vectors").glob("*.parquet")}
    assert complete
    status, out, err = embed(folder)  # --rows is that of the plan
    assert status == 0 and "21 of 21 files" in out, err
    assert all(file.read_bytes() == content for file, content in complete.items())
    assert len(index(folder, "index", "--vectors", "vectors").images) == 83


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_error_of_a_worker_is_one_line(folder):
    network = net.create("resnet18", 8)
    torch.nn.init.constant_(network.model.embedding.weight, float("nan"))
    trees.save_checkpoint(folder / "best.pth", network, RECORD | {"model": "resnet18"})
    status, out, err = embed(folder)
    assert status == 1 and out == "Files to write: 3 of 3\n", err
    (line,) = err  # of a full batch, or of the one with the unreadable image
    assert re.fullmatch(r"embed_ray.py: error: ([34]) of \1 embeddings are not finite; the first is number 0", line)


def test_code_alone_is_sent_to_the_workers(tmp_path, monkeypatch):
    """Of a checkout with photos, checkpoints and secrets in it; and it is all that a worker imports."""
    checkout, sent = tmp_path / "checkout", tmp_path / "sent"
    private = ("best.pth", ".env", "photos/1.jpg", "vectors/000000.parquet", "logs/code/a.py", "dataset/cub/1.jpg")
    for name in (*private, ".git/config"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("private")
    for name in ("code", "dataset", "net", "misc"):
        shutil.copytree(REPOSITORY / name, checkout / name, dirs_exist_ok=True)
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, checkout)
    monkeypatch.setattr(cli, "ROOT", checkout)
    embed_ray.copy_code(sent)
    files = {str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()}
    assert {name.partition("/")[0] for name in files} == {"proxy_anchor.py", "code", "dataset", "net"}
    assert {Path(name).suffix for name in files} == {".py"}
    program = "from proxy_anchor import cli, load; from proxy_anchor.index import exchange; from dataset import files"
    subprocess.run([sys.executable, "-c", program], cwd=sent, check=True)


def test_plan_is_made_once(folder, monkeypatch):
    """Later runs continue from it; another network, or another folder of images, is refused."""
    monkeypatch.chdir(folder)
    files = planned(folder)
    content, *blocks = map(json.loads, (folder / "vectors" / "plan.jsonl").read_text().splitlines())
    assert content["folders"] == [str(folder / "photos")] and content["made"]["checkpoint"] == str(folder / "best.pth")
    assert content["made"]["network"]["orientation"] == "upright" and content["threshold"] is None
    assert [len(block) for block in blocks] == [8, 8, 8]
    assert [*chain(*blocks)] == sorted(map(str, (folder / "photos").rglob("[0-9].jpg")))

    (folder / "photos" / "ant" / "1.jpg").unlink()
    trees.write_image(folder / "photos" / "ant" / "new.jpg", 7)
    assert planned(folder, rows=2) == files
    with pytest.raises(ValueError, match="vectors is for the images in .*photos, not in .*photos/ant: choose"):
        planned(folder, images="photos/ant")
    torch.manual_seed(1)
    trees.save_checkpoint(folder / "other.pth", net.create("resnet18", 8), RECORD | {"model": "resnet18"})
    with pytest.raises(ValueError, match="another network .*best.pth.*, not of other.pth: choose another --out"):
        planned(folder, embedder=embed_ray.load("other.pth"))
    (folder / "vectors" / "plan.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="plan.jsonl is damaged"):
        planned(folder)
    (folder / "vectors" / "plan.jsonl").rename(folder / "vectors" / "000000.parquet")
    with pytest.raises(ValueError, match="is neither empty nor has a plan.jsonl"):
        planned(folder)


def test_threshold_is_that_of_the_images_of_the_plan(folder, monkeypatch):
    monkeypatch.chdir(folder)
    embedder = embed_ray.load("best.pth")
    monkeypatch.setattr(type(embedder), "calibration", SimpleNamespace(at=lambda images: images / 100))
    planned(folder, embedder=embedder)
    (folder / "photos" / "ant" / "1.jpg").unlink()
    files = planned(folder, embedder=embedder)
    assert json.loads(Path(files[0]["plan"]).read_text().splitlines()[0])["threshold"] == 0.24


def test_refusals_before_ray_starts(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    argv = list(map(str, command()[2:]))
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    fails(lambda: embed_ray.main([*argv, "--resume", "gone.pth"]), capsys, "gone.pth")
    (folder / "vectors").mkdir()
    with lock_folder(folder / "vectors", ""):
        fails(lambda: embed_ray.main(argv), capsys, "is being written by process")
    name = os.fsdecode(b"photos/ant/\xff.jpg")
    trees.write_image(folder / name, 1)
    fails(lambda: embed_ray.main(argv), capsys, r"ant/\udcff.jpg is not UTF-8, which Parquet needs: rename the file")
    monkeypatch.setitem(sys.modules, "ray", None)
    fails(lambda: embed_ray.main(argv), capsys, "pip install 'ray[data]'")


def test_worker_writes_a_file(folder, monkeypatch):
    """In this process: an image that cannot be read, or that is gone, has the reason in its row."""
    import pyarrow.parquet as pq

    monkeypatch.chdir(folder)
    files = planned(folder)
    (folder / "photos" / "ant" / "1.jpg").unlink()
    worker = embed_ray.Embed("best.pth", "cpu", {}, threads=2, batch=4)
    assert [worker(file) for file in files] == [{"images": 8, "errors": errors, "problem": ""} for errors in (1, 1, 0)]
    blocks = [json.loads(line) for line in Path(files[0]["plan"]).read_text().splitlines()[1:]]
    for file, paths in zip(files, blocks, strict=True):
        for found, path in zip(pq.read_table(file["file"]).to_pylist(), paths, strict=True):
            assert (found["path"], found["folder"]) == (path, os.path.dirname(path))
            assert found["stamp"] == (entries.stamp([path]) if os.path.exists(path) else "")
            if path.endswith(("ant/1.jpg", "bee/3.jpg")):
                assert not any(found["vector"]) and path in found["error"]
            else:
                expected = worker.embedder(path)[0]  # alone in its batch: sums are added in another order
                assert found["vector"] == pytest.approx(expected.tolist(), abs=1e-5) and found["error"] is None
    torch.manual_seed(1)
    trees.save_checkpoint(folder / "best.pth", net.create("resnet18", 8), RECORD | {"model": "resnet18"})
    found = embed_ray.Embed("best.pth", "cpu", {}, threads=1, batch=4)(files[0])
    assert "best.pth was replaced while it was read: start again" in found["problem"]
    found = embed_ray.Embed("gone.pth", "cpu", {}, threads=1, batch=4)(files[0])
    assert "gone.pth" in found["problem"]


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_disk_that_is_not_mounted_leaves_no_file(left, folder, monkeypatch):
    monkeypatch.chdir(folder)
    file = planned(folder)[0]
    shutil.rmtree(folder / "photos")
    if left != "nothing":
        (folder / "photos").mkdir()
    found = embed_ray.Embed("best.pth", "cpu", {}, threads=1, batch=4)(file)
    assert re.search("photos is gone or empty on .*: mount its disk there", found["problem"])
    assert not os.path.exists(file["file"])


def test_vectors_are_those_of_search_py_to_the_bit(folder, monkeypatch):
    """With equal batches, all images readable."""
    monkeypatch.chdir(folder)
    (folder / "photos" / "bee" / "3.jpg").unlink()
    worker = embed_ray.Embed("best.pth", "cpu", {}, threads=2, batch=4)
    for file in planned(folder):
        worker(file)
    of_files, at_once = index(folder, "a", "--vectors", "vectors"), index(folder, "b", "--images", "photos")
    assert list(of_files.images) == list(at_once.images)
    assert of_files.images.vectors.tobytes() == at_once.images.vectors.tobytes()


def test_worker_holds_two_batches_of_images_at_most(folder, monkeypatch):
    """Whatever --rows is: one batch that is embedded, and one that is decoded meanwhile."""
    monkeypatch.chdir(folder)
    read = embedded = most = 0

    class Counted(embed_ray.Embed):
        def read(self, path):
            nonlocal read
            read += 1
            return super().read(path)

        def run(self, images):
            nonlocal embedded, most
            time.sleep(0.05)  # for the threads, to decode all that they may
            most = max(most, read - embedded)
            embedded += len(images)
            return super().run(images)

    (file,) = planned(folder, rows=100)
    assert Counted("best.pth", "cpu", {}, threads=2, batch=4)(file)["images"] == 24
    assert most == 8 and read == embedded == 24
