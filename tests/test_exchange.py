"""search.py export and index --vectors: an index in files that other programs read, and back."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import trees
from helpers import RECORD, described, fails, make_index, mutations, query_index, result_or_error, threshold
from pages import REPOSITORY, blocks, commands
from PIL import Image

import search
from proxy_anchor.checkpoint import Checkpoint, save_calibration
from proxy_anchor.index import entries, exchange
from proxy_anchor.index.store import Index, digest

for library in ("faiss", "pyarrow"):
    pytest.importorskip(library)
PAGE = REPOSITORY / "docs" / "vectors.md"


def export(index, file):
    search.main(["export", str(index), str(file)])


def take(vectors, out, *more):
    search.main(["index", "--vectors", str(vectors), "--out", str(out), *map(str, more)])


def contents(out):
    """All that an index records, and its vectors: two that are the same give the same."""
    index = Index.open(out)
    recorded = {name: described(out)[name] for name in ("made", "folders", "factory", "calibration", "images")}
    return recorded | {"order": list(recorded["images"]), "vectors": index.images.vectors.tobytes()}


@pytest.mark.parametrize("more", [(), ("--by-folder",), ("--calibrate", "0.6"), ("--float16",)])
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
    assert "Not found" not in capsys.readouterr().out
    expected = contents(tmp_path / "index")
    recorded = contents(tmp_path / "again")
    assert expected.pop("folders") == [str(images)] and recorded.pop("folders") == []
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
    assert f"Not found, but indexed: 1 of 18 images, such as {images / 'bee' / '1.jpg'}" in capsys.readouterr().out
    shutil.move(tmp_path / "1.jpg", images / "bee" / "1.jpg")
    make_index(weights, images, tmp_path / "again")
    assert "new: 0, changed: 1, deleted: 0" in capsys.readouterr().out


def save_array(folder, index, vectors=None):
    """vectors.npy and paths.txt of an index, or of other vectors for its paths."""
    np.save(folder / "vectors.npy", index.images.vectors if vectors is None else vectors)
    (folder / "paths.txt").write_text("".join(f"{path}\n" for path, _ in index.images))


@pytest.fixture
def array(weights, tmp_path):
    """The arguments of take for what save_array writes."""
    return tmp_path / "vectors.npy", ["--paths", tmp_path / "paths.txt", "--resume", weights / "a.pth"]


def test_array_that_comes_again_into_half_the_bytes(array, weights, images, tmp_path, capsys):
    """Its rounded numbers are those of the index."""
    file, more = array
    make_index(weights, images, tmp_path / "index")
    save_array(tmp_path, Index.open(tmp_path / "index"))
    for _ in range(2):
        take(file, tmp_path / "half", "--float16", *more)
    assert "new: 0, changed: 0, deleted: 0" in capsys.readouterr().out


def test_array_that_was_corrected_is_refused(array, weights, images, tmp_path, capsys, monkeypatch):
    """Also after an interruption; the same array may come again, and another vector of an image that has changed."""
    file, more = array
    make_index(weights, images, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    save_array(tmp_path, index, index.images.vectors[::-1])
    interrupted(monkeypatch, 2, file, tmp_path / "halfway", *more)
    take(file, tmp_path / "complete", *more)
    take(file, tmp_path / "complete", *more)
    assert "new: 0, changed: 0" in capsys.readouterr().out
    save_array(tmp_path, index)
    for name in ("complete", "halfway"):
        fails(lambda name=name: take(file, tmp_path / name, *more), capsys, f"{name} has another vector of ")
    save_array(tmp_path, index, index.images.vectors[::-1])
    take(file, tmp_path / "halfway", *more)
    assert "8 of these were embedded before the interruption" in capsys.readouterr().out
    assert contents(tmp_path / "halfway") == contents(tmp_path / "complete")

    trees.write_image(images / "bee" / "1.jpg", 77)
    make_index(weights, images, tmp_path / "complete")
    index = Index.open(tmp_path / "complete")
    save_array(tmp_path, index)
    capsys.readouterr()
    take(file, tmp_path / "halfway", *more)
    assert "new: 0, changed: 1, deleted: 0" in capsys.readouterr().out
    assert dict(Index.open(tmp_path / "halfway").images) == dict(index.images)


def test_arrays_of_several_disks_stay_while_one_is_not_mounted(array, weights, tmp_path, capsys):
    """As in an index of the images themselves."""
    disks = [trees.folder(tmp_path / "disks" / name, classes=("ant", "bee"), images=3) for name in ("a", "b")]
    make_index(weights, tmp_path / "disks", tmp_path / "index")
    save_array(tmp_path, Index.open(tmp_path / "index"))
    file, more = array
    take(file, tmp_path / "again", *more)
    disks[0].rename(tmp_path / "away")
    disks[0].mkdir()
    capsys.readouterr()
    make_index(weights, disks[1], tmp_path / "again")
    out = capsys.readouterr().out
    assert "deleted: 0" in out and f"{disks[0] / 'ant'} is gone or empty: its images (2) stay" in out
    make_index(weights, disks[1], tmp_path / "again", "--drop-missing")
    assert "deleted: 6" in capsys.readouterr().out


def test_array_of_images_that_are_away_keeps_their_stamps(array, weights, images, tmp_path, capsys):
    file, more = array
    make_index(weights, images, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    save_array(tmp_path, index)
    take(file, tmp_path / "again", *more)
    images.rename(tmp_path / "away")
    capsys.readouterr()
    take(file, tmp_path / "again", *more)
    out = capsys.readouterr().out
    assert "Not found, but indexed: 18 of 18 images" in out and "new: 0, changed: 0, deleted: 0" in out
    save_array(tmp_path, index, index.images.vectors[::-1])
    fails(lambda: take(file, tmp_path / "again", *more), capsys, "again has another vector of ")
    (tmp_path / "away").rename(images)
    make_index(weights, images, tmp_path / "again")
    assert "new: 0, changed: 0, deleted: 0" in capsys.readouterr().out


def with_errors(index, file, errors):
    """Export an index, but the rows of {path: reason} as misc/embed_ray.py writes those that it cannot read."""
    content = exchange.record(index.made, index.folders, index.calibration, None)
    stamps = {path: entries.stamp([path]) for path, _ in index.images}
    reasons = [errors.get(path) for path in stamps]
    vectors = index.images.vectors * [[reason is None] for reason in reasons]
    exchange.write(file, content, [(list(stamps), list(stamps.values()), vectors, reasons)])


def test_image_that_can_no_longer_be_read_is_dropped(weights, images, tmp_path, capsys):
    """As index --images --skip-bad-images does; an image that has not changed keeps its vector."""
    make_index(weights, images, tmp_path / "index")
    shutil.copytree(tmp_path / "index", tmp_path / "again")
    bad, same = images / "ant" / "1.jpg", images / "ant" / "2.jpg"
    bad.write_bytes(b"no image")
    with_errors(Index.open(tmp_path / "index"), tmp_path / "v.parquet", {str(bad): "damaged", str(same): "a timeout"})
    make_index(weights, images, tmp_path / "index", "--skip-bad-images")
    capsys.readouterr()
    take(tmp_path / "v.parquet", tmp_path / "again")
    out = capsys.readouterr().out
    assert "Left out, as they could not be read: 2 images, such as" in out and "new: 0, changed: 1, deleted: 0" in out
    assert contents(tmp_path / "again") == contents(tmp_path / "index")


def test_image_that_one_file_has_and_another_could_not_read_is_refused(weights, images, tmp_path, capsys):
    make_index(weights, images, tmp_path / "index")
    index, path = Index.open(tmp_path / "index"), str(images / "ant" / "1.jpg")
    (tmp_path / "vectors").mkdir()
    with_errors(index, tmp_path / "vectors" / "1.parquet", {})
    with_errors(index, tmp_path / "vectors" / "2.parquet", dict.fromkeys(dict(index.images), "damaged"))
    fails(lambda: take(tmp_path / "vectors", tmp_path / "new"), capsys, f"vectors lists {path} twice")
    words = "holds no vector: none of its 18 images could be read"
    fails(lambda: take(tmp_path / "vectors" / "2.parquet", tmp_path / "new"), capsys, words)


def test_entries_that_the_files_lack_stay(weights, tmp_path, capsys):
    """Their photographs may be on another machine: --drop-missing, or a later index --images, drops them."""
    for name in ("a", "b"):
        make_index(weights, trees.folder(tmp_path / "photos" / name, classes=("ant",)), tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}.parquet")
    for image in (tmp_path / "photos" / "a" / "ant").iterdir():
        image.rename(image.with_stem(f"other{image.stem}"))
    take(tmp_path / "a.parquet", tmp_path / "index")
    count = len(Index.open(tmp_path / "a").images)
    capsys.readouterr()
    take(tmp_path / "b.parquet", tmp_path / "index")
    assert f"new: {count}, changed: 0, deleted: 0" in capsys.readouterr().out
    assert len(Index.open(tmp_path / "index").images) == 2 * count
    take(tmp_path / "b.parquet", tmp_path / "index", "--drop-missing")
    assert f"new: 0, changed: 0, deleted: {count}" in capsys.readouterr().out


def test_threshold_that_is_not_recorded(weights, images, tmp_path, capsys):
    """None of folders, for queries are images; a checkpoint that is not used is refused."""
    pq = pytest.importorskip("pyarrow.parquet")
    make_index(weights, images, tmp_path / "folders", "--by-folder", "--calibrate", "0.9")
    make_index(weights, images, tmp_path / "calibrated", "--calibrate", "0.6")
    make_index(weights, images, tmp_path / "plain")
    capsys.readouterr()
    reasons = {
        "folders": "is for folders, not for images",
        "plain": "--calibrate, if each folder shows one thing",
        "calibrated": "",
    }
    for name, words in reasons.items():
        export(tmp_path / name, tmp_path / "v.parquet")
        content = json.loads(pq.read_schema(tmp_path / "v.parquet").metadata[b"proxy_anchor"])
        out = capsys.readouterr().out
        assert (content["threshold"] is None) == ("No threshold is recorded: " in out) == bool(words)
        assert words in out and bool(content["calibration"]) == (name != "plain")
    for name in ("folders", "calibrated"):
        fails(
            lambda name=name: search.main(
                ["export", str(tmp_path / name), str(tmp_path / "v.parquet"), "--resume", str(weights / "a.pth")]
            ),
            capsys,
            "does not use the threshold of a checkpoint: leave out --resume",
        )


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
    capsys.readouterr()
    assert recorded()["threshold"] is None
    words = f"No threshold is recorded: the checkpoint {path} is gone: give its new path with --resume"
    assert words in capsys.readouterr().out
    assert recorded("--resume", str(tmp_path / "moved.pth"))["threshold"] == calibration.at(18)
    fails(lambda: recorded("--resume", str(weights / "b.pth")), capsys, "was built with another checkpoint")
    take(tmp_path / "v.parquet", tmp_path / "again", "--resume", tmp_path / "moved.pth")
    assert described(tmp_path / "again")["made"]["checkpoint"] == str(tmp_path / "moved.pth")
    (answer,) = query_index(tmp_path / "again", capsys, images / "ant" / "1.jpg")
    assert answer["threshold"] == calibration.at(18) and not described(tmp_path / "again")["calibration"]


def interrupted(monkeypatch, blocks, vectors, out, *more):
    """index --vectors, with Ctrl-C after this many blocks of 4 rows."""
    add = Index.add_vectors
    left = iter(range(blocks))

    def interrupt(index, stamps, vectors):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(index, stamps, vectors)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(exchange, "BLOCK", 4)
        patch.setattr(Index, "add_vectors", interrupt)
        take(vectors, out, *more)
    assert not len(Index.open(out).images)


@pytest.mark.parametrize("blocks", [0, 2])
def test_interrupted_import_continues(blocks, weights, images, tmp_path, capsys, monkeypatch):
    make_index(weights, images, tmp_path / "index", "--calibrate", "0.6")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    interrupted(monkeypatch, blocks, tmp_path / "vectors.parquet", tmp_path / "again")
    capsys.readouterr()
    take(tmp_path / "vectors.parquet", tmp_path / "again")
    assert ("8 of these were embedded before the interruption" in capsys.readouterr().out) == (blocks == 2)
    assert contents(tmp_path / "again") == contents(tmp_path / "index")
    assert contents(tmp_path / "again")["calibration"]


def test_threshold_of_files_is_left_out_in_an_index_that_has_images(weights, images, tmp_path, capsys):
    make_index(weights, images, tmp_path / "index", "--calibrate", "0.6")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    make_index(weights, images / "ant", tmp_path / "ant.index")
    capsys.readouterr()
    take(tmp_path / "vectors.parquet", tmp_path / "index")  # which has the same
    assert "The threshold of the files is left out" not in capsys.readouterr().out
    take(tmp_path / "vectors.parquet", tmp_path / "ant.index")
    assert "The threshold of the files is left out" in capsys.readouterr().out
    assert not described(tmp_path / "ant.index")["calibration"]


def test_file_that_is_replaced_while_it_is_read(weights, images, tmp_path):
    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    file = tmp_path / "vectors.parquet"
    for replace in (
        lambda: export(tmp_path / "index", file),
        lambda: (shutil.copy2(file, tmp_path / "copy"), os.replace(tmp_path / "copy", file)),  # of the same time
        lambda: (shutil.copy2(file, tmp_path / "copy"), shutil.copy2(tmp_path / "copy", file)),  # in its place
    ):
        vectors = exchange.ParquetFiles(file)
        assert vectors._vectors(np.arange(1)).shape == (1, 8)
        vectors._read.cache_clear()
        replace()
        with pytest.raises(ValueError, match="was replaced while it was read"):
            vectors._vectors(np.arange(1))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"folders": [["a"]]}, "'folders' is ['a'], expected str"),
        ({"folders": [""]}, "its folder '' is not absolute"),
        ({"threshold": "0.5"}, "its threshold is '0.5'"),
        ({"threshold": True}, "its threshold is True"),
        ({"made": {}}, "'checkpoint' is None, expected str"),
        ({"made.model": "no such"}, "vectors.parquet is damaged, or of another version: "),
        ({"calibration": {"share": 1}}, "{'share': 1}"),
        ({"columns": ["path", "folder", "stamp", "vector"]}, "its columns are path string, folder string, stamp"),
        ({"metadata": {}}, "it has no record of the network; vectors of another program can come as .npy"),
        ({"metadata": {b"proxy_anchor": "[" * 200_000}}, "recursion"),
        ({"vector": 2}, "has length 2, expected 1: divide"),
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
    if "made.model" in change:
        content["made"]["network"]["model"] = change["made.model"]
    metadata = {b"proxy_anchor": json.dumps(content | {"sha256": digest(content)})}
    if "path" in change:
        texts = [*table["path"].to_pylist()[1:], change["path"]]
        table = table.set_column(0, table.schema.field("path"), pa.array(texts, pa.string()))
    if "vector" in change:  # the last one
        vectors = [*table["vector"].to_pylist()[:-1], [change["vector"], *[0] * 7]]
        table = table.set_column(3, table.schema.field("vector"), pa.array(vectors, table.schema.field("vector").type))
    table = table.select(change.get("columns", table.column_names))
    table = table.replace_schema_metadata(change.get("metadata", metadata))
    pq.write_table(table, tmp_path / "vectors.parquet", row_group_size=4)
    fails(lambda: take(tmp_path / "vectors.parquet", tmp_path / "new"), capsys, words)
    assert not (tmp_path / "new").exists()


def test_record_gives_the_known_entries_alone(weights, images, tmp_path):
    """Another orientation would take precedence over that of the network."""
    make_index(weights, images, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    index.made["orientation"] = "stored"
    content = exchange.record(index.made, index.folders, None, None)
    paths, stamps = zip(*index.images)
    exchange.write(tmp_path / "vectors.parquet", content, [(paths, stamps, index.images.vectors, [None] * 18)])
    take(tmp_path / "vectors.parquet", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "index")


@pytest.mark.parametrize("kind", ["permission", "disk", "memory"])
def test_errors_of_the_system_are_not_called_damage(kind, weights, images, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_index(weights, images, tmp_path / "index")
    export(tmp_path / "index", tmp_path / "vectors.parquet")
    errors = {
        "permission": PermissionError(13, "Permission denied"),
        "disk": OSError(5, "Input/output error"),
        "memory": pa.ArrowMemoryError("malloc failed"),
    }

    def fail(*arguments, **options):
        raise errors[kind]

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(type(errors[kind])) as raised:
        exchange.ParquetFiles(tmp_path / "vectors.parquet")
    assert raised.value is errors[kind]


@pytest.mark.parametrize("library", ["duckdb", "lancedb", "qdrant_client", "pymilvus"])
def test_page_finds_what_the_index_finds(library, weights, images, tmp_path, monkeypatch, capsys):
    """The programs of docs/vectors.md, as printed: each prints the matches of the query that search.py lists.

    An unreadable image is none of them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pytest.importorskip(library)
    make_index(weights, images, tmp_path / "photos.index", "--calibrate", "0.6")
    shutil.copyfile(weights / "a.pth", tmp_path / "best.pth")
    photo = Image.open(images / "ant" / "2.jpg")
    exif = photo.getexif()
    exif[0x0112] = 6  # upright in the index, though not in the training of this checkpoint
    photo.save(tmp_path / "new.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    exported, taken, _ = commands("python search.py", [PAGE])
    search.main(exported)
    search.main(taken)
    table = pq.read_table("vectors.parquet")
    unreadable = table.slice(0, 1).to_pylist()[0] | {"path": "/bad.jpg", "vector": [0.0] * 8, "error": "damaged"}
    table = pa.concat_tables([pa.Table.from_pylist([unreadable], table.schema), table])
    pq.write_table(table, "vectors.parquet")
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
    content = json.loads(table.schema.metadata[b"proxy_anchor"]) | {"threshold": None}
    pq.write_table(table.replace_schema_metadata({b"proxy_anchor": json.dumps(content)}), "vectors.parquet")
    with pytest.raises(TypeError, match="NoneType"):  # not "no match"
        exec(program, {})


def test_networks_that_differ_are_named():
    """A checkpoint by its path, a backbone alone by its weights."""
    made = {"checkpoint": "/a.pth", "weights": "0", "network": RECORD, "by_folder": False}
    alone = {"checkpoint": "none", "weights": "1", "network": RECORD | {"backbone_only": True}}
    with pytest.raises(ValueError, match=r"different networks \(/a.pth and tiny --pretrained none\)"):
        exchange.check_same(made, made | alone, "a.parquet", "b.parquet")


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
    refused(["ant", "cat"], "cat.parquet of folders: they cannot be in one index")
    refused(["ant", "all"], "of_ant_all lists ")
    refused([], "There is no .parquet file in")
    fails(lambda: take(tmp_path / "ant.index", tmp_path / "new"), capsys, "ant.index is an index: `search.py export`")
    refused(["bee"], "were embedded by different networks", "--resume", weights / "a.pth")
    assert not (tmp_path / "new").exists()
    words = "were embedded by different networks"
    fails(lambda: take(tmp_path / "bee.parquet", tmp_path / "ant.index"), capsys, words)
    words = "cat.index is of folders, "
    fails(lambda: take(tmp_path / "ant.parquet", tmp_path / "cat.index"), capsys, words)
    words = "holds an index Flat, not IVF2,Flat"
    fails(lambda: take(tmp_path / "ant.parquet", tmp_path / "ant.index", "--index-factory", "IVF2,Flat"), capsys, words)
    fails(lambda: take(tmp_path / "gone.parquet", tmp_path / "new"), capsys, "gone.parquet")
    fails(lambda: export(tmp_path / "gone.index", tmp_path / "x.parquet"), capsys, "There is no index")
    for argv, words in [
        (["--vectors", "a.parquet", "--images", "b"], "argument --vectors: not with --images"),
        (["--vectors", "a.npy", "--resume", "b"], "argument --vectors: a.npy needs --paths"),
        (["--vectors", "a.parquet", "--paths", "b"], "argument --paths: it is for a .npy file of --vectors"),
        (["--vectors", "a.npy", "--paths", "b"], "one of --resume or --backbone-only is required"),
        (
            ["--images", "a", "--resume", weights / "a.pth", "--data-root", "b"],
            "argument --data-root: it is for --split",
        ),
        *(
            (["--vectors", "a.parquet", *flags.split()], f"argument {flags.split()[0]}: it is for images")
            for flags in ("--dataset folder", "--data-root a", "--test-classes a", "--allow-partial", "--workers 1")
        ),
    ]:
        fails(lambda argv=argv: search.main(["index", *map(str, argv), "--out", "c"]), capsys, words, code=2)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda vectors, paths: (vectors * 2, paths), "has length 2, expected 1: divide"),
        (lambda vectors, paths: (vectors * np.nan, paths), "has length nan, expected finite numbers"),
        (lambda vectors, paths: (vectors.astype(float), paths), "holds float64 (18, 8), expected float32 (18, 8)"),
        (lambda vectors, paths: (vectors[:, :7], paths), "holds float32 (18, 7), expected float32 (18, 8)"),
        (lambda vectors, paths: (vectors, paths[1:]), "holds float32 (18, 8), expected float32 (17, 8)"),
        (lambda vectors, paths: (vectors, [paths[1], *paths[1:]]), "ant/2.jpg twice"),
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


def test_file_is_written_completely_or_not_at_all(weights, images, tmp_path):
    make_index(weights, images, tmp_path / "index")
    (tmp_path / "vectors.parquet").write_text("the former one")
    index = Index.open(tmp_path / "index")
    paths, stamps = zip(*index.images)

    def blocks():
        yield paths, stamps, index.images.vectors, [None] * 18
        raise OSError("No space left")

    with pytest.raises(OSError, match="No space left"):
        exchange.write(tmp_path / "vectors.parquet", exchange.record(index.made, [], None, None), blocks())
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
        files = exchange.ParquetFiles(tmp_path / "vectors.parquet")
        vectors = files._vectors(np.arange(len(files.stamps))).tobytes()
        return files.made, files.folders, files.calibration, files.stamps, files.errors, vectors

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
