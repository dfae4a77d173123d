"""search.py export and index --vectors: an index in files that other programs read, and back."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import trees
from helpers import RECORD, described, fails, make_index, mutations, query_index, result_or_error, threshold
from pages import REPOSITORY, blocks, commands

import net
import search
from proxy_anchor.checkpoint import Checkpoint, save_calibration
from proxy_anchor.index import exchange
from proxy_anchor.index.store import Index, digest

for library in ("faiss", "pyarrow"):
    pytest.importorskip(library)
PAGE = REPOSITORY / "docs" / "vectors.md"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("a.pth", "b.pth")):
        torch.manual_seed(seed)
        trees.save_checkpoint(folder / name, net.create("tiny", 8), RECORD)
    return folder


@pytest.fixture
def images(tmp_path):
    return trees.folder(tmp_path / "images", classes=("ant", "bee", "cat"))


def export(index, file):
    search.main(["export", str(index), str(file)])


def take(vectors, out, *more):
    search.main(["index", "--vectors", str(vectors), "--out", str(out), *map(str, more)])


def contents(out):
    """All that an index records, and its vectors: two that are the same give the same."""
    index = Index.open(out)
    recorded = {name: described(out)[name] for name in ("made", "folders", "factory", "calibration", "images")}
    return recorded | {"order": list(recorded["images"]), "vectors": index.images.vectors.tobytes()}


@pytest.mark.parametrize("more", [(), ("--by-folder",), ("--calibrate", "0.6")])
def test_round_trip_is_exact(more, weights, images, tmp_path, capsys):
    make_index(weights, images, tmp_path / "index", *more)
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    take(tmp_path / "vectors.parquet", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "index")
    queries = [images / "ant", "--by-folder"] if "--by-folder" in more else [images / "ant"]
    answers = [query_index(tmp_path / name, capsys, *queries) for name in ("index", "again")]
    assert answers[0] == answers[1]
    assert ("--calibrate" in more) == (answers[0][0]["threshold"] is not None)


def test_order_of_an_updated_index_stays(weights, images, tmp_path):
    shutil.move(images / "ant", tmp_path / "ant")
    make_index(weights, images, tmp_path / "index")
    shutil.move(tmp_path / "ant", images / "ant")
    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    take(tmp_path / "vectors.parquet", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "index")


@pytest.mark.parametrize("by_folder", [(), ("--by-folder",)])
def test_parts_embedded_apart_are_the_index_made_at_once(by_folder, weights, images, tmp_path, monkeypatch):
    """Their names are in another order than the images, and blocks and groups of rows are small."""
    monkeypatch.setattr(exchange, "BLOCK", 4)
    monkeypatch.setattr(exchange, "GROUPS", 1)
    shutil.copytree(images / "cat", images / "cat a")  # sorts between cat and cat/1.jpg
    make_index(weights, images, tmp_path / "once", "--batch-size", "6", *by_folder)
    (tmp_path / "vectors").mkdir()
    for name, folder in enumerate(("cat", "bee", "cat a", "ant")):
        make_index(weights, images / folder, tmp_path / f"{name}.index", "--batch-size", "6", *by_folder)
        export(tmp_path / f"{name}.index", tmp_path / "vectors" / f"{name}.parquet")
    take(tmp_path / "vectors", tmp_path / "index")
    at_once, of_parts = contents(tmp_path / "once"), contents(tmp_path / "index")
    assert at_once.pop("folders") == [str(images)] and len(of_parts.pop("folders")) == 4
    assert of_parts == at_once


def test_later_updates_see_changed_vanished_and_new_files(weights, images, tmp_path, capsys):
    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    take(tmp_path / "vectors.parquet", tmp_path / "again")
    (images / "ant" / "1.jpg").unlink()
    trees.write_image(images / "bee" / "1.jpg", 77)
    trees.write_image(images / "dog" / "1.jpg", 78)
    capsys.readouterr()
    make_index(weights, images, tmp_path / "again")
    assert "holds 18 images; new: 1, changed: 1, deleted: 1" in capsys.readouterr().out
    make_index(weights, images, tmp_path / "index")
    assert contents(tmp_path / "again") == contents(tmp_path / "index")


def test_index_is_updated_from_files(weights, images, tmp_path, capsys):
    """Entries that are as they were stay; those that the files lack stay while their images exist."""
    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "old.parquet")
    take(tmp_path / "old.parquet", tmp_path / "again")
    trees.write_image(images / "bee" / "1.jpg", 77)
    trees.write_image(images / "dog" / "1.jpg", 78)
    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "new.parquet")
    capsys.readouterr()
    take(tmp_path / "new.parquet", tmp_path / "again")
    assert "holds 18 images; new: 1, changed: 1, deleted: 0" in capsys.readouterr().out
    assert contents(tmp_path / "again") == contents(tmp_path / "index")
    make_index(weights, images / "ant", tmp_path / "ant.index")
    export(tmp_path / "ant.index", tmp_path / "ant.parquet")
    take(tmp_path / "ant.parquet", tmp_path / "again")
    assert "holds 19 images; new: 0, changed: 0, deleted: 0" in capsys.readouterr().out


@pytest.mark.parametrize("listed", ["paths.txt", "paths.npy"])
def test_numpy_arrays(listed, weights, images, tmp_path, capsys):
    make_index(weights, images, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    paths = [path for path, _ in index.images]
    np.save(tmp_path / "vectors.npy", index.images.vectors)
    np.save(tmp_path / "paths.npy", paths)
    (tmp_path / "paths.txt").write_text("".join(f"{path}\n" for path in paths))
    more = ["--paths", tmp_path / listed, "--resume", weights / "a.pth"]
    take(tmp_path / "vectors.npy", tmp_path / "again", *more)
    assert "are not there" not in capsys.readouterr().out
    expected = contents(tmp_path / "index")
    recorded = contents(tmp_path / "again")
    for content in (expected, recorded):  # a checkpoint without orientation sees photos as they are stored
        content["made"]["network"].pop("orientation")
    assert recorded == expected
    make_index(weights, images, tmp_path / "again")
    assert "new: 0, changed: 0, deleted: 0" in capsys.readouterr().out


def test_image_that_is_not_there_is_embedded_when_it_is_found(weights, images, tmp_path, capsys):
    make_index(weights, images, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    np.save(tmp_path / "vectors.npy", index.images.vectors)
    (tmp_path / "paths.txt").write_text("".join(f"{path}\n" for path, _ in index.images))
    shutil.move(images / "bee" / "1.jpg", tmp_path / "1.jpg")
    more = ["--paths", tmp_path / "paths.txt", "--resume", weights / "a.pth"]
    take(tmp_path / "vectors.npy", tmp_path / "again", *more)
    assert f"1 of 18 images are not there, such as {images / 'bee' / '1.jpg'}" in capsys.readouterr().out
    shutil.move(tmp_path / "1.jpg", images / "bee" / "1.jpg")
    make_index(weights, images, tmp_path / "again")
    assert "new: 0, changed: 1, deleted: 0" in capsys.readouterr().out


def test_file_has_the_record_and_the_threshold(weights, images, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    make_index(weights, images, tmp_path / "index", "--calibrate", "0.6")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    table = pq.read_table(tmp_path / "vectors.parquet")
    record = json.loads(table.schema.metadata[b"proxy_anchor"])
    index = Index.open(tmp_path / "index")
    assert record["made"] == index.made and record["folders"] == [str(images)]
    assert record["threshold"] == index.calibration.at(18) and record["calibration"]["share"] == 0.6
    assert str(table.schema.field("vector").type).startswith("fixed_size_list<") and table["error"].null_count == 18
    rows = table.to_pylist()
    assert [(row["path"], row["stamp"]) for row in rows] == list(index.images)
    assert all(row["folder"] == os.path.dirname(row["path"]) for row in rows)


def test_threshold_of_the_checkpoint_is_recorded(weights, images, tmp_path, capsys):
    """That for the size of the index, also if the checkpoint has moved; the index itself gets none from it."""
    pq = pytest.importorskip("pyarrow.parquet")
    shutil.copyfile(weights / "a.pth", tmp_path / "a.pth")
    path, calibration = tmp_path / "a.pth", threshold(0.9, sizes=(36, 9), values=(0.9, 0.8))
    save_calibration(path, calibration, Checkpoint(path).identity)
    make_index(tmp_path, images, tmp_path / "index")

    def recorded(*more):
        search.main(["export", str(tmp_path / "index"), str(tmp_path / "v.parquet"), *more])
        return json.loads(pq.read_schema(tmp_path / "v.parquet").metadata[b"proxy_anchor"])

    assert recorded()["threshold"] == calibration.at(18) and not recorded()["calibration"]
    path.rename(tmp_path / "moved.pth")
    assert recorded()["threshold"] is None
    assert recorded("--resume", str(tmp_path / "moved.pth"))["threshold"] == calibration.at(18)
    fails(lambda: recorded("--resume", str(weights / "b.pth")), capsys, "was built with another checkpoint")
    take(tmp_path / "v.parquet", tmp_path / "again", "--resume", tmp_path / "moved.pth")
    assert described(tmp_path / "again")["made"]["checkpoint"] == str(tmp_path / "moved.pth")
    (answer,) = query_index(tmp_path / "again", capsys, images / "ant" / "1.jpg")
    assert answer["threshold"] == calibration.at(18) and not described(tmp_path / "again")["calibration"]


def test_interrupted_import_continues(weights, images, tmp_path, capsys, monkeypatch):
    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    monkeypatch.setattr(exchange, "BLOCK", 4)
    check = exchange.check_vectors

    def interrupt(vectors, paths, distance):
        if paths[0].endswith("bee/3.jpg"):
            raise KeyboardInterrupt
        check(vectors, paths, distance)

    paths = [path for path, _ in Index.open(tmp_path / "index").images]
    assert paths[8].endswith("bee/3.jpg"), paths
    monkeypatch.setattr(exchange, "check_vectors", interrupt)
    with pytest.raises(SystemExit):
        take(tmp_path / "vectors.parquet", tmp_path / "again")
    assert not len(Index.open(tmp_path / "again").images)
    monkeypatch.setattr(exchange, "check_vectors", check)
    capsys.readouterr()
    take(tmp_path / "vectors.parquet", tmp_path / "again")
    assert "8 of these were embedded before the interruption" in capsys.readouterr().out
    assert contents(tmp_path / "again") == contents(tmp_path / "index")


def test_file_that_is_replaced_while_it_is_read(weights, images, tmp_path):
    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    parts = exchange.Parts.open(tmp_path / "vectors.parquet")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    with pytest.raises(ValueError, match="was replaced while it was read"):
        parts._vectors([0], list(parts.stamps)[:1])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"folders": [["a"]]}, "'folders' is ['a'], expected str"),
        ({"made": {}}, "'checkpoint' is None, expected str"),
        ({"calibration": {"share": 1}}, "{'share': 1}"),
        ({"columns": ["path", "folder", "stamp", "vector"]}, "its columns are path string, folder string, stamp"),
        ({"metadata": {}}, "b'proxy_anchor'"),
        ({"path": "a.jpg"}, "a path is missing or not absolute"),
    ],
)
def test_files_of_others_are_refused(change, words, weights, images, tmp_path, capsys):
    """Also those whose record was made anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    table = pq.read_table(tmp_path / "vectors.parquet")
    content = json.loads(table.schema.metadata[b"proxy_anchor"])
    content.pop("sha256")
    content |= {name: value for name, value in change.items() if name in content}
    metadata = {b"proxy_anchor": json.dumps(content | {"sha256": digest(content)})}
    if "path" in change:
        texts = [*table["path"].to_pylist()[1:], change["path"]]
        table = table.set_column(0, table.schema.field("path"), pa.array(texts, pa.string()))
    table = table.select(change.get("columns", table.column_names))
    table = table.replace_schema_metadata(change.get("metadata", metadata))
    pq.write_table(table, tmp_path / "vectors.parquet")
    fails(lambda: take(tmp_path / "vectors.parquet", tmp_path / "new"), capsys, words)


@pytest.mark.parametrize("library", ["duckdb", "lancedb", "qdrant_client", "pymilvus"])
def test_page_finds_what_the_index_finds(library, weights, images, tmp_path, monkeypatch, capsys):
    """The programs of docs/vectors.md, as printed: each prints the matches of the query that search.py lists."""
    pytest.importorskip(library)
    make_index(weights, images, tmp_path / "photos.index", "--calibrate", "0.6")
    shutil.copyfile(weights / "a.pth", tmp_path / "best.pth")
    shutil.copyfile(images / "ant" / "2.jpg", tmp_path / "new.jpg")
    monkeypatch.chdir(tmp_path)
    exported, taken, _ = commands("python search.py", [PAGE])
    search.main(exported)
    search.main(taken)
    (answer,) = query_index("again.index", capsys, "new.jpg", "-k", "10")
    assert 1 < len(answer["neighbours"]) < 10  # the threshold decides
    programs = blocks(PAGE, "python")
    (program,) = [block for block in programs if re.search(f"^(import|from) {library}", block, re.MULTILINE)]
    assert len(program.splitlines()) <= 16
    exec(program, {})
    printed = [line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [path for path, _ in printed] == [near["path"] for near in answer["neighbours"]]
    similarities = [near["similarity"] for near in answer["neighbours"]]
    assert [float(value) for _, value in printed] == pytest.approx(similarities, abs=1e-4)


def test_refusals(weights, images, tmp_path, capsys):
    for name, folder, checkpoint, more in [
        ("ant", "ant", "a.pth", ()),
        ("bee", "bee", "b.pth", ()),
        ("cat", "cat", "a.pth", ("--by-folder",)),
        ("all", "", "a.pth", ()),
    ]:
        make_index(weights, images / folder, tmp_path / f"{name}.index", *more, name=checkpoint)
        export(tmp_path / f"{name}.index", tmp_path / f"{name}.parquet")

    def refused(names, words, *more):
        folder = tmp_path / "_".join(["of", *names])
        folder.mkdir()
        for name in names:
            shutil.copyfile(tmp_path / f"{name}.parquet", folder / f"{name}.parquet")
        fails(lambda: take(folder, tmp_path / "new", *more), capsys, words)

    refused(["ant", "bee"], "were embedded by different networks")
    refused(["ant", "cat"], "(images and folders)")
    refused(["ant", "all"], "has 2 vectors of")
    refused([], "There is no .parquet file in")
    refused(["bee"], "were embedded by different networks", "--resume", weights / "a.pth")
    assert not (tmp_path / "new").exists()
    fails(lambda: take(tmp_path / "bee.parquet", tmp_path / "ant.index"), capsys, "built with another checkpoint")
    fails(lambda: take(tmp_path / "gone.parquet", tmp_path / "new"), capsys, "gone.parquet")
    fails(lambda: export(tmp_path / "gone.index", tmp_path / "x.parquet"), capsys, "There is no index")
    for argv, words in [
        (["--vectors", "a.parquet", "--images", "b"], "argument --vectors: not with --images"),
        (["--vectors", "a.npy", "--resume", "b"], "argument --paths: it is for the .npy"),
        (["--vectors", "a.parquet", "--paths", "b"], "argument --paths: it is for the .npy"),
        (["--vectors", "a.npy", "--paths", "b"], "one of --resume or --backbone-only is required"),
    ]:
        fails(lambda argv=argv: search.main(["index", *argv, "--out", "c"]), capsys, words, code=2)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda vectors, paths: (vectors * 2, paths), "has length 2, expected unit length"),
        (lambda vectors, paths: (vectors * np.nan, paths), "has length nan, expected unit length"),
        (lambda vectors, paths: (vectors.astype(float), paths), "holds float64 (18, 8), expected float32 (18, 8)"),
        (lambda vectors, paths: (vectors[:, :7], paths), "holds float32 (18, 7), expected float32 (18, 8)"),
        (lambda vectors, paths: (vectors, paths[1:]), "holds float32 (18, 8), expected float32 (17, 8)"),
        (lambda vectors, paths: (vectors, [paths[1], *paths[1:]]), "has 2 vectors of"),
        (lambda vectors, paths: (vectors, np.arange(18)), "no list of paths (int64 (18,))"),
        (lambda vectors, paths: (np.array([vectors, 1], object), paths), "no .npy file of numbers"),
    ],
)
def test_wrong_arrays_are_refused(change, words, weights, images, tmp_path, capsys):
    make_index(weights, images, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    vectors, paths = change(index.images.vectors, [path for path, _ in index.images])
    np.save(tmp_path / "vectors.npy", vectors)
    np.save(tmp_path / "paths.npy", paths)
    more = ["--paths", tmp_path / "paths.npy", "--resume", weights / "a.pth"]
    fails(lambda: take(tmp_path / "vectors.npy", tmp_path / "new", *more), capsys, words)


def test_different_thresholds_are_left_out(weights, images, tmp_path, capsys):
    (tmp_path / "vectors").mkdir()
    for number, share in enumerate(("0.6", "0.7")):
        make_index(weights, images, tmp_path / "index", "--calibrate", share)
        export(tmp_path / "index", tmp_path / "vectors" / f"{number}.parquet")
        for folder in images.iterdir():
            folder.rename(images / f"{folder.name}{number}")
        shutil.rmtree(tmp_path / "index")
    take(tmp_path / "vectors", tmp_path / "new")
    assert "different thresholds" in capsys.readouterr().out and not described(tmp_path / "new")["calibration"]


def test_file_is_written_completely_or_not_at_all(weights, images, tmp_path, capsys, monkeypatch):
    make_index(weights, images, tmp_path / "index")
    (tmp_path / "vectors.parquet").write_text("the former one")
    monkeypatch.setattr(exchange, "_utf8", lambda texts: exchange.no_such_name)
    with pytest.raises(AttributeError):
        exchange.export(Index.open(tmp_path / "index"), tmp_path / "vectors.parquet", None)
    assert (tmp_path / "vectors.parquet").read_text() == "the former one"
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_name_that_parquet_cannot_hold(weights, images, tmp_path, capsys):
    os.rename(images / "ant" / "1.jpg", os.fsencode(images / "ant") + b"/\xff.jpg")
    make_index(weights, images, tmp_path / "index")
    fails(lambda: export(tmp_path / "index", tmp_path / "vectors.parquet"), capsys, "is not UTF-8")


def test_without_pyarrow(weights, images, tmp_path, capsys, monkeypatch):
    make_index(weights, images, tmp_path / "index")
    (tmp_path / "vectors.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(lambda: export(tmp_path / "index", tmp_path / "vectors.parquet"), capsys, "pip install pyarrow")
    fails(lambda: take(tmp_path / "vectors.parquet", tmp_path / "new"), capsys, "pip install pyarrow")


def test_damaged_files_are_refused(weights, images, tmp_path):
    """A mutation is an error of one line, or changes nothing that is read."""
    make_index(weights, images, tmp_path / "index", "--calibrate", "0.6")
    export(tmp_path / "index", tmp_path / "vectors.parquet")

    def read():
        parts = exchange.Parts.open(tmp_path / "vectors.parquet")
        vectors = parts._vectors(list(range(len(parts.stamps))), list(parts.stamps))
        return parts.made, parts.folders, parts.calibration, parts.stamps, parts.errors, vectors.tobytes()

    intact, refused = read(), 0
    for data in mutations((tmp_path / "vectors.parquet").read_bytes(), 700, seed=1):
        (tmp_path / "vectors.parquet").write_bytes(data)
        result = result_or_error(read)
        if isinstance(result, Exception):
            assert "\n" not in str(result) and "vectors.parquet" in str(result)
            refused += 1
        else:
            assert result == intact
    assert refused > 500
