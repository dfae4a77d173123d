"""misc/embed_ray.py, on Ray itself, started on this machine: `pip install 'ray[data]'`, 240 MB."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import embed_ray
import pytest
import torch
import trees
from helpers import RECORD, fails
from pages import REPOSITORY

import net
import search
from proxy_anchor.index import exchange
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
    """What the script prints."""
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*more), cwd=folder, env=environment, check=False, timeout=240, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_files_make_the_index_of_search_py(folder, capsys):
    """To the bit, with equal batches; an unreadable image has a row of its own. What is there is not made again."""
    status, out, err = embed(folder)
    assert status == 0 and "3 of 3 files; 24 images" in out and "1 unreadable" in out, err
    files = sorted((folder / "vectors").glob("*.parquet"))
    assert len(files) == 3
    search.main(["index", "--vectors", str(folder / "vectors"), "--out", str(folder / "index")])
    assert "Left out, as they could not be read: 1 image" in capsys.readouterr().out
    images = ["--images", str(folder / "photos"), "--skip-bad-images", "--batch-size", "4", "--workers", "0"]
    flags = ["--resume", str(folder / "best.pth"), "--gpu-id", "0"]
    search.main(["index", *flags, *images, "--out", str(folder / "once")])
    of_parts, at_once = Index.open(folder / "index"), Index.open(folder / "once")
    assert list(of_parts.images) == list(at_once.images) and len(at_once.images) == 23
    assert of_parts.images.vectors.tobytes() == at_once.images.vectors.tobytes()
    assert of_parts.made == at_once.made and of_parts.folders == at_once.folders
    capsys.readouterr()
    search.main(["index", *flags, *images, "--out", str(folder / "index")])
    assert "new: 1, changed: 0, deleted: 0" in capsys.readouterr().out  # the damaged one
    assert list(Index.open(folder / "index").images) == list(at_once.images)

    times = {file: file.stat().st_mtime_ns for file in files}
    content = files[1].read_bytes()
    files[1].unlink()
    status, out, err = embed(folder)
    assert status == 0 and out.startswith("2 of 3 files are there\n3 of 3 files; 8 images"), err
    assert [file for file in files if file.stat().st_mtime_ns != times[file]] == [files[1]]
    assert files[1].read_bytes() == content
    assert embed(folder)[:2] == (0, "3 of 3 files are there\n")

    trees.write_image(folder / "photos" / "ant" / "new.jpg", 7)
    status, out, err = embed(folder)
    assert status == 1 and "is of other images" in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_continues_after_a_kill(folder):
    """SIGKILL once a file is there: what is left is complete, and the rest follows."""
    for number in range(10):
        shutil.copytree(folder / "photos" / "ant", folder / "photos" / f"ant{number}")
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command("--rows", "4"), cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not list((folder / "vectors").glob("*.parquet")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    files = list((folder / "vectors").glob("*.parquet"))
    assert files
    assert len(exchange.ParquetFiles(folder / "vectors").stamps) == 4 * len(files)
    status, out, err = embed(folder, "--rows", "4")
    assert status == 0 and "21 of 21 files" in out, err
    vectors = exchange.ParquetFiles(folder / "vectors")
    assert len(vectors.stamps) == 84 and len(vectors.errors) == 1


def test_plan_and_refusals(folder, monkeypatch, capsys):
    """What is decided before Ray starts."""
    monkeypatch.chdir(folder)
    search.real_folder.cache_clear()  # a relative folder is another one here
    argv = list(map(str, command()[2:]))
    rows = embed_ray.plan(embed_ray.parse(argv), embed_ray.load("best.pth"))
    content = json.loads(next(iter(rows.values()))["content"])
    assert content["folders"] == [str(folder / "photos")] and content["made"]["checkpoint"] == str(folder / "best.pth")
    assert content["made"]["network"]["orientation"] == "upright" and content["threshold"] is None
    planned = [json.loads(row["entries"]) for row in rows.values()]
    assert [len(block) for block in planned] == [8, 8, 8]
    assert [path for block in planned for path in block] == sorted(map(str, (folder / "photos").rglob("[0-9].jpg")))
    (folder / "vectors").mkdir()
    (folder / "vectors" / "000000-0.parquet").write_text("")
    fails(lambda: embed_ray.main(argv), capsys, "is of other images")
    fails(lambda: embed_ray.main([*argv, "--resume", "gone.pth"]), capsys, "gone.pth")
    monkeypatch.setitem(sys.modules, "ray", None)
    fails(lambda: embed_ray.main(argv), capsys, "pip install 'ray[data]'")


def test_worker_writes_a_file(folder, monkeypatch):
    """The same work in this process: the reason why an image cannot be read is in its row."""
    import pyarrow.parquet as pq

    monkeypatch.chdir(folder)
    (folder / "vectors").mkdir()
    rows = embed_ray.plan(embed_ray.parse(list(map(str, command()[2:]))), embed_ray.load("best.pth"))
    worker = embed_ray.Embed("best.pth", "cpu", {}, threads=2, batch=4)
    assert [worker(row) for row in rows.values()] == [{"images": 8, "errors": errors} for errors in (0, 1, 0)]
    for file, row in rows.items():
        for found, (path, stamp) in zip(
            pq.read_table(file).to_pylist(), json.loads(row["entries"]).items(), strict=True
        ):
            assert (found["path"], found["stamp"], found["folder"]) == (path, stamp, os.path.dirname(path))
            if path.endswith("bee/3.jpg"):
                assert not any(found["vector"]) and f"{path} cannot be read" in found["error"]
            else:
                expected = worker.embedder(path)[0]  # alone in its batch: sums are added in another order
                assert found["vector"] == pytest.approx(expected.tolist(), abs=1e-5) and found["error"] is None
    torch.manual_seed(1)
    trees.save_checkpoint(folder / "best.pth", net.create("resnet18", 8), RECORD | {"model": "resnet18"})
    with pytest.raises(ValueError, match="was replaced"):
        embed_ray.Embed("best.pth", "cpu", {}, threads=1, batch=4)(row)
