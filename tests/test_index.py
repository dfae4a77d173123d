"""Indexes that are built in blocks and searched in parts: interrupted, updated, and larger than memory."""

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from helpers import RECORD, described, fails
from helpers import make_index as make
from helpers import query_index as found
from pages import REPOSITORY

import search
from proxy_anchor.embedding import Embedder
from proxy_anchor.index import neighbours, rows
from proxy_anchor.index.store import Index

faiss = pytest.importorskip("faiss")
HAS_RABITQ = hasattr(faiss, "IndexIVFRaBitQ")  # FAISS 1.11
RABITQ = pytest.param("IVF8,RaBitQ", marks=pytest.mark.skipif(not HAS_RABITQ, reason="FAISS is older than 1.11"))
MADE = {"checkpoint": "a.pth", "weights": "0", "network": RECORD | {"embedding_size": 16}, "by_folder": False}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 4)
    monkeypatch.setattr(rows, "BLOCK", 3)


def content(index):
    """All that an index consists of, but for what tells when its files were written: their states, and a digest."""
    files = {file.name: file.read_bytes() for file in sorted(index.iterdir()) if not file.name.startswith(".")}
    description = json.loads(files["images.json"])
    del description["sha256"]
    for seal in description["files"].values():
        del seal["state"]
    return files | {"images.json": description}


def interrupted(monkeypatch, after, error, run):
    """Run until the error comes instead of the block after so many; returns how many images each block had."""
    seen = []

    def embed(self, loader, original=Embedder.embed):
        if len(seen) == after:
            raise error
        seen.append(len(loader.dataset))
        return original(self, loader)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed", embed)
        if after is None:
            run()
        else:
            with pytest.raises(type(error) if not isinstance(error, (KeyboardInterrupt, OSError)) else SystemExit):
                run()
    return seen


@pytest.mark.parametrize("factory", ["Flat", "IVF2,SQ8"])
def test_interrupted_build_continues(factory, weights, images, tmp_path, capsys, monkeypatch):
    """The result is that of an uninterrupted build, bit by bit, and no image is embedded twice."""
    index, whole = tmp_path / "index", tmp_path / "whole"
    make(weights, images, whole, "--index-factory", factory)
    run = lambda: make(weights, images, index, "--index-factory", factory)
    capsys.readouterr()
    assert interrupted(monkeypatch, 2, KeyboardInterrupt(), run) == [4, 4]
    out, err = capsys.readouterr()
    assert f"Building {index} of 18 images\n4 of 18 are done\n8 of 18 are done\n" in out
    assert err.endswith("Embedded images are saved: the same command continues from here\nsearch.py: interrupted\n")
    query = ["query", "--index", str(index), str(images)]
    fails(lambda: search.main(query), capsys, f"{index} holds no complete index: run the `search.py index` command")
    assert interrupted(monkeypatch, 1, OSError("no disk"), run) == [4]
    assert "8 of these were embedded before the interruption" in capsys.readouterr().out
    assert interrupted(monkeypatch, None, None, run) == [4, 2]
    assert "12 of these" in (out := capsys.readouterr().out) and "Indexed 18 images" in out
    assert content(index) == content(whole)
    assert interrupted(monkeypatch, None, None, run) == []


def test_kill_while_a_block_is_written(weights, images, tmp_path, capsys, monkeypatch):
    """By SIGKILL, when its vectors are there and its paths are not."""
    index = tmp_path / "index"
    make(weights, images, tmp_path / "whole")
    program = f"""
        import os, signal, sys
        sys.path[:0] = {[str(REPOSITORY), str(REPOSITORY / "tests")]}
        import helpers, search
        from proxy_anchor import files

        def replace(source, target, original=os.replace):
            if str(target).endswith("block-0.1.jsonl"):
                os.kill(os.getpid(), signal.SIGKILL)
            original(source, target)

        search.BLOCK, os.replace = 4, replace
        search.main(sys.argv[1:])
    """
    command = ["index", "--resume", weights / "a.pth", "--images", images, "--out", index, "--workers", "0"]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *command], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    left = {file.name for file in index.glob("block-*")}
    assert left == {"block-0.0.float32", "block-0.0.jsonl", "block-0.1.float32"}
    capsys.readouterr()
    assert interrupted(monkeypatch, None, None, lambda: make(weights, images, index)) == [4, 4, 4, 2]
    assert "4 of these were embedded before the interruption" in capsys.readouterr().out
    assert content(index).keys() == content(tmp_path / "whole").keys()
    a, b = (Index.open(folder) for folder in (index, tmp_path / "whole"))
    assert list(a.images) == list(b.images) and np.allclose(a.images.vectors, b.images.vectors, atol=1e-6)


class Kill(BaseException):
    """Nothing handles it."""


@pytest.mark.parametrize(
    "place", ["index.neighbours._write", "index.store.FaissFiles", "index.store.Index.describe", "index.rows.write"]
)
def test_update_that_is_killed_leaves_an_index(place, weights, images, tmp_path, capsys, monkeypatch):
    """That of before, until the new one takes its place; whatever is left of it does no harm."""
    index = tmp_path / "index"
    flags = ("--index-factory", "IVF2,Flat")
    make(weights, images, index, *flags)
    before = found(index, capsys, images / "cat", "-k", 3)
    trees.write_image(images / "bee" / "1.jpg", 1000)
    (images / "ant" / "2.jpg").unlink()
    for number in range(6):
        trees.write_image(images / "dog" / f"{number}.jpg", 2000 + number)
    run = lambda: make(weights, images, index)
    assert interrupted(monkeypatch, 1, Kill(), run) == [4]

    def kill(*args, **more):
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(f"proxy_anchor.{place}", kill)
        with pytest.raises(Kill):
            run()
    assert found(index, capsys, images / "cat", "-k", 3) == before
    deletes = Index._delete_others
    with monkeypatch.context() as patch:  # the new one is there, and so is all else
        patch.setattr(Index, "_delete_others", lambda self: kill() if self.number == 2 else deletes(self))
        with pytest.raises(Kill):
            run()
    assert sorted(described(index)["images"]) == search.images_at(str(images))
    capsys.readouterr()
    assert interrupted(monkeypatch, None, None, run) == []
    trees.write_image(images / "bee" / "1.jpg", 1001)
    assert interrupted(monkeypatch, None, None, run) == [1]
    assert {file.name.split("-")[-1].split(".")[0] for file in index.glob("*-*")} == {"3"}
    for result in found(index, capsys, images, "-k", 1, "--nprobe", 2):
        assert result["neighbours"] == [{"path": result["query"], "similarity": pytest.approx(1, abs=1e-5)}]


def test_what_has_changed_since_the_interruption(weights, images, tmp_path, capsys, monkeypatch):
    """Is embedded again, and dropped if it is gone; what was embedded of another folder stays."""
    index, other = tmp_path / "index", tmp_path / "other"
    for number in range(6):
        trees.write_image(other / f"{number}.jpg", 2000 + number)
    make(weights, images / "cat", index)
    os.utime(images / "cat" / "1.jpg", ns=(1, 1))
    run = lambda: make(weights, images, index)
    assert interrupted(monkeypatch, 3, Kill(), run) == [4, 4, 4]
    trees.write_image(images / "ant" / "1.jpg", 1000)
    (images / "ant" / "2.jpg").unlink()
    capsys.readouterr()
    assert interrupted(monkeypatch, 1, Kill(), lambda: make(weights, other, index)) == [4]
    assert "which holds 6 images" in (out := capsys.readouterr().out) and "new: 6, changed: 0, deleted: 0" in out
    assert interrupted(monkeypatch, None, None, run) == [2]  # the changed image and, of the first run, the last one
    assert "new: 11, changed: 1, deleted: 0\n10 of these were" in capsys.readouterr().out
    paths = list(described(index)["images"])
    assert len(paths) == len(set(paths)) == 17 + 4
    monkeypatch.setattr(search, "BLOCK", 100)
    make(weights, other, index)
    make(weights, images, tmp_path / "new")
    make(weights, other, tmp_path / "new")
    for one, new in zip(*(found(i, capsys, images, other, "-k", 1) for i in (index, tmp_path / "new")), strict=True):
        assert one["neighbours"][0]["path"] == new["neighbours"][0]["path"] == one["query"]


def test_by_folder_in_blocks(weights, images, tmp_path, monkeypatch):
    run = lambda: make(weights, images, tmp_path / "index", "--by-folder")
    assert interrupted(monkeypatch, 2, Kill(), run) == [5, 6]  # of 4 images or a few more
    assert interrupted(monkeypatch, None, None, run) == [6, 1]
    monkeypatch.setattr(search, "BLOCK", 100)
    make(weights, images, tmp_path / "whole", "--by-folder")
    a, b = (Index.open(tmp_path / name).images for name in ("index", "whole"))
    assert list(a) == list(b) and np.allclose(a.vectors, b.vectors, atol=1e-6)


def test_kind_that_cannot_be_made_costs_no_embedding(weights, images, tmp_path, capsys, monkeypatch):
    run = lambda factory: make(weights, images, tmp_path / "index", "--index-factory", factory)
    fails(lambda: run("IVF99,Flat"), capsys, "FAISS cannot make")
    fails(lambda: run("no"), capsys, "FAISS knows no index")
    assert interrupted(monkeypatch, None, None, lambda: run("SQ8")) == []
    assert "18 of these were embedded" in capsys.readouterr().out and described(tmp_path / "index")["factory"] == "SQ8"


def test_damaged_block_is_named(weights, images, tmp_path, capsys, monkeypatch):
    run = lambda: make(weights, images, tmp_path / "index")
    interrupted(monkeypatch, 1, Kill(), run)
    (tmp_path / "index" / "block-0.0.float32").write_bytes(b"text")
    fails(run, capsys, "block-0.0.float32 has 4 bytes, expected 4 vectors of 8 numbers): delete the files block-*")


def test_index_of_the_former_layout(weights, images, tmp_path, capsys):
    """It had the images in images.json."""
    make(weights, images, tmp_path / "index")
    whole = described(tmp_path / "index")
    (tmp_path / "index" / "images-1.jsonl").unlink()
    (tmp_path / "index" / "images.json").write_text(json.dumps(whole))
    for run in (lambda: make(weights, images, tmp_path / "index"), lambda: found(tmp_path / "index", capsys, images)):
        fails(run, capsys, "is damaged, of an older version or no index")


def test_names_of_any_characters(tmp_path):
    """Line feeds and bytes that are no text among them."""
    names = ["a\nb", "ü", 'say "hi"', os.fsdecode(b"\xff"), "\u2028"]
    index = Index.new(tmp_path, MADE, "Flat")
    index.add({name: [1, 2] for name in names}, torch.randn(5, 16))
    assert [path for path, _ in index.finish().images] == names


def vectors(count, ties=False):
    """Random ones, some of which occur twice."""
    generator = np.random.default_rng(count)
    x = generator.integers(-1, 2, (count, 16)) * 1.0 if ties else generator.standard_normal((count, 16))
    x[:, 0] += 0.5
    return torch.from_numpy(x.astype(np.float32))


def built(folder, factory, distance, *parts, dtype="float32"):
    """An index of the vectors, added in one or more runs."""
    folder.mkdir(exist_ok=True)
    index = Index.new(folder, MADE | {"network": MADE["network"] | {"distance": distance}}, factory, dtype)
    for x in parts:
        start = len(index.images)
        index.add({str(i): [0, i] for i in range(start, start + len(x))}, x)
        index = index.finish()
    return index


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    "factory", ["IVF8,Flat", "IVF8,SQ8", RABITQ, "OPQ4,IVF8,PQ4x4", "SQ8", "PCA8,Flat", "IVF8,PQ4x4fs"]
)
def test_parts_are_as_one(factory, distance, tmp_path, monkeypatch):
    """What is found in many small parts is what FAISS finds in one, trained with the same vectors, built in memory."""
    x, queries = vectors(2000), vectors(50)
    monkeypatch.setattr(rows, "BLOCK", 100)
    monkeypatch.setattr(neighbours, "SHARD", 300 * 4 * 16)
    index = built(tmp_path, factory, distance, x)
    assert len(list(tmp_path.glob("*.faiss*"))) > 1 + 2 * ("Flat" in factory)
    unit = index._vectors_of(x)
    assert np.array_equal(index.images.vectors, unit)
    sample = neighbours.sample(index.images)
    places = [int(np.flatnonzero((unit == vector).all(axis=1))[0]) for vector in sample]
    assert len(set(places)) == 300 and np.histogram(places, 4, (0, 2000))[0].min() > 50  # from all over
    whole = index._new_faiss_index()
    whole.train(sample)
    whole.add(unit)
    for nprobe in (1, 3) if index.cells else (None,):
        if nprobe:
            index.set_nprobe(nprobe)
            faiss.extract_index_ivf(whole).nprobe = nprobe
        values, found = index.neighbours.search(index._vectors_of(queries), 10)
        expected_values, expected = whole.search(index._vectors_of(queries), 10)
        assert np.allclose(values, expected_values, rtol=1e-4, atol=1e-5)
        same = [len(set(a) & set(b)) for a, b in zip(found, expected)]
        assert sum(same) >= 0.99 * found.size  # the last of several equal codes may be another


@pytest.mark.parametrize("factory", ["IVF8,SQ8", RABITQ, "SQ8", "IVF8,PQ4x4fs"])
def test_parts_are_extended(factory, tmp_path, monkeypatch):
    """An index that has grown is the one that would have been built at once with the first training."""
    monkeypatch.setattr(neighbours, "SHARD", 300 * 4 * 16)
    x, queries = vectors(2000), vectors(50)
    grown = built(tmp_path / "a", factory, "cosine", x[:900], x[900:1000], x[1000:])
    assert len(list((tmp_path / "a").glob("*.faiss*"))) > 1
    monkeypatch.setattr(neighbours, "SHARD", 2**28)
    first = built(tmp_path / "b", factory, "cosine", x[:900])
    monkeypatch.setattr(neighbours, "sample", lambda images: trained)
    monkeypatch.setattr(neighbours, "SHARD", 300 * 4 * 16)
    trained = first.images.take(np.sort(np.random.default_rng(0).choice(900, 300, replace=False)))
    at_once = built(tmp_path / "c", factory, "cosine", x)
    assert grown.search(queries, 5) == at_once.search(queries, 5)
    assert [file.name.replace("-3", "-1") for file in sorted((tmp_path / "a").glob("*.faiss*"))] == [
        file.name for file in sorted((tmp_path / "c").glob("*.faiss*"))
    ]


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_exact_search_in_slices(distance, tmp_path, monkeypatch):
    """As FAISS's own in one: the neighbours, the values, and the order of equal ones."""
    index = built(tmp_path, "Flat", distance, vectors(2000, ties=True))
    queries = index._vectors_of(vectors(40, ties=True))
    for count in (1, 7, 150):
        flat = faiss.IndexFlat(16, index._metric)
        flat.add(index.images.vectors)
        expected = flat.search(queries, count)
        for x, y in zip(index.neighbours.search(queries, count), expected):
            assert np.array_equal(x, y)
        with monkeypatch.context() as patch:
            patch.setattr(neighbours, "SHARD", 4 * 16 * 512)
            values, found = index.neighbours.search(queries, count)
        assert np.allclose(values, expected[0], rtol=1e-6, atol=1e-6)
        if distance == "euclidean":  # of equal inner products, which are the last ones depends on those before
            assert np.array_equal(found, expected[1])
        for row, own in zip(found, values):
            for a, b, equal in zip(row, row[1:], own[1:] == own[:-1]):
                assert not equal or (a < b) == (distance == "euclidean")


def test_many_blocks_need_few_open_files(tmp_path):
    """An interrupted run may have left more blocks than a process may have files."""
    index = Index.new(tmp_path, MADE, "Flat")
    for number, x in enumerate(vectors(60)):
        index.add({f"/old/{number}": "1 1"}, x[None])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, hard))
    try:
        assert [path for path, *_ in index.stored()] == [f"/old/{number}" for number in reversed(range(60))]
        assert index.move("/old", "/new", {f"/new/{number}": "1 1" for number in range(60)}) == 60
        assert len(index.finish().images) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8"])
def test_float16_is_an_index_of_rounded_vectors(factory, distance, tmp_path):
    """In half the bytes, in one run or two, and what is found is measured with the rounded vectors."""
    x, queries = vectors(2000), vectors(50)
    half = built(tmp_path / "a", factory, distance, x[:1500], x[1500:], dtype="float16")
    rounded = half._vectors_of(x).astype(np.float16).astype(np.float32)
    assert half.dtype == "float16" and half._file("vectors", "float16").stat().st_size == 2 * 16 * 2000
    assert not list((tmp_path / "a").glob("*.float32"))
    assert np.array_equal(half.images.vectors, rounded) and half.images.vectors.dtype == np.float32
    assert np.array_equal(half.images.take(np.array([3, 1999])), rounded[[3, 1999]])
    for result, query in zip(half.search(queries, 10), half._vectors_of(queries)):
        for name, value in result:
            row = rounded[int(name)].astype(np.float64)
            expected = row @ query if distance == "cosine" else np.linalg.norm(row - query)
            assert value == pytest.approx(expected, abs=1e-5)
    if factory == "Flat":
        whole = built(tmp_path / "b", factory, distance, x)
        names = [[{name for name, _ in result} for result in index.search(queries, 10)] for index in (half, whole)]
        assert sum(len(a & b) for a, b in zip(*names)) >= 0.99 * 10 * len(queries)


def test_index_without_images_is_made_anew(weights, images, tmp_path, capsys):
    """With another network and other numbers: nothing is in it that these would not fit."""
    (tmp_path / "none").mkdir()
    fails(lambda: make(weights, tmp_path / "none", tmp_path / "index"), capsys, "There are no images in")
    assert (tmp_path / "index" / "vectors-0.float32").exists()
    make(weights, images, tmp_path / "index", "--float16", name="b.pth")
    index = Index.open(tmp_path / "index")
    assert len(index.images) == 18 and index.made["checkpoint"] == str(weights / "b.pth")
    assert [file.name for file in index.folder.glob("vectors*")] == ["vectors-1.float16"]


def test_float16_that_cannot_hold_a_number(tmp_path):
    with pytest.raises(ValueError, match="is too large for float16: make a new index without"):
        built(tmp_path, "Flat", "euclidean", 1e5 * vectors(20), dtype="float16")


def test_kind_of_number_is_that_of_the_index(weights, images, tmp_path, capsys, monkeypatch):
    """Also in the blocks of an interrupted run, and in an update without the flag."""
    index, run = tmp_path / "index", lambda *more: make(weights, images, tmp_path / "index", *more)
    interrupted(monkeypatch, 1, Kill(), lambda: run("--float16"))
    assert (index / "block-0.0.float16").exists()
    run()
    assert [file.name for file in index.glob("*.float*")] == ["vectors-1.float16"]
    assert described(index)["dtype"] == "float16" and len(found(index, capsys, images / "ant")) == 6
    run("--float16")
    make(weights, images, tmp_path / "other")
    fails(
        lambda: make(weights, images, tmp_path / "other", "--float16"),
        capsys,
        "holds vectors in float32, not float16; make a new one",
    )
    content = json.loads((index / "images.json").read_text()) | {"dtype": "../float16"}
    del content["sha256"]
    (index / "images.json").write_text(json.dumps(content))
    fails(lambda: found(index, capsys, images), capsys, "is damaged, of an older version or no index")


def test_search_goes_on_while_an_update_replaces_the_index(tmp_path):
    """Its files are open, and deleted."""
    x = vectors(500)
    for factory in ("Flat", "IVF4,Flat", "SQ8"):
        folder = tmp_path / factory
        index = built(folder, factory, "cosine", x)
        expected = index.search(x[:5], 3)
        index.add({"new": [0, 0]}, x[:1])
        index.finish()
        assert not index._file("vectors", "float32").exists() and index.search(x[:5], 3) == expected
        assert expected != Index.open(folder).search(x[:5], 3)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_index(tmp_path):
    """Ten times the vectors, 92 MB more of them, take hardly more memory to build, to update and to search."""
    program = f"""
        import sys
        sys.path[:0] = {[str(Path(search.__file__).parent)]}
        from benchmarks import index_size
        from proxy_anchor.index import neighbours, rows

        rows.BLOCK, index_size.BLOCK, neighbours.SHARD = 2**10, 2**12, 2**20
        for factory in ("Flat", "IVF16,Flat"):
            for count in (4_000, 20_000, 200_000):  # the first warms up
                with index_size.Memory() as memory:
                    folder = index_size.Path(sys.argv[1], f"{{factory}} {{count}}")
                    folder.mkdir()
                    index = index_size.build(folder, count, 128, factory)
                    x = index_size.torch.from_numpy(index.images.take(index_size.np.arange(0, count, count // 100)))
                    index.search(x, 10)
                    index.compare({{}}, lambda path: path[-5] != "7")
                    index.finish().search(x, 10)
                print(memory.resident, memory.anonymous)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peaks = np.array([line.split() for line in done.stdout.splitlines()], float).reshape(2, 3, 2)
    assert (peaks[:, 2] - peaks[:, 1]).max() < 24, peaks
