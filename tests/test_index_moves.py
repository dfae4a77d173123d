"""search.py when photographs move, and when other libraries give them other vectors."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import trees
from helpers import described, fails
from helpers import make_index as make
from helpers import query_index as found

import search
from dataset import files
from proxy_anchor import api
from proxy_anchor.index.store import Index

pytest.importorskip("faiss")


def embedded(monkeypatch) -> list:
    """The paths of what is added to an index from now on."""
    paths: list[str] = []
    add = Index.add
    monkeypatch.setattr(Index, "add", lambda index, stamps, x: (paths.extend(stamps), add(index, stamps, x)))
    return paths


# Photographs that have moved


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
@pytest.mark.parametrize("by_folder", [(), ("--by-folder",)])
def test_moved_images_keep_their_vectors(weights, images, tmp_path, capsys, monkeypatch, factory, by_folder):
    index, new = tmp_path / "index", tmp_path / "elsewhere" / "photos"
    make(weights, images, index, "--index-factory", factory, *by_folder)
    before = Index.open(index)
    names, vectors = [path for path, _ in before.images], np.array(before.images.vectors)
    new.parent.mkdir()
    images.rename(new)
    paths = embedded(monkeypatch)
    make(weights, new, index, "--moved-from", str(images), *by_folder)
    assert "new: 0, changed: 0, deleted: 0\n" in (out := capsys.readouterr().out) and not paths
    assert f"{6 if by_folder else 18} {'folders' if by_folder else 'images'} have moved" in out
    after = Index.open(index)
    assert [path for path, _ in after.images] == [name.replace(str(images), str(new)) for name in names]
    assert np.array_equal(after.images.vectors, vectors)
    assert after.folders == [str(new)]
    make(weights, new, index, *by_folder)  # and from then on without the flag
    assert "new: 0, changed: 0, deleted: 0\n" in capsys.readouterr().out
    fails(
        lambda: make(weights, new, index, "--moved-from", str(images), *by_folder),
        capsys,
        f"No image of {index} has moved from {images} to {new}: it has {len(names)} in {new} already, and its folders",
    )


def test_some_of_the_moved_have_changed(weights, images, tmp_path, capsys, monkeypatch):
    """The others keep their vectors, and what else is in the index stays where it is."""
    index, new, other = tmp_path / "index", tmp_path / "new", trees.folder(tmp_path / "images of others")
    make(weights, images, index)
    make(weights, other, index)
    images.rename(new)
    trees.write_image(new / "bee" / "1.jpg", 1000)
    trees.write_image(new / "bee" / "new.jpg", 1001)
    (new / "cat" / "1.jpg").unlink()
    paths = embedded(monkeypatch)
    make(weights, new, index, "--moved-from", f"{images}/")
    out = capsys.readouterr().out
    assert "new: 1, changed: 1, deleted: 0\n" in out and f"{images} is gone or empty: its images (1) stay" in out
    assert "17 images have moved" in out
    make(weights, new, index, "--drop-missing")
    assert "new: 0, changed: 0, deleted: 1\n" in capsys.readouterr().out
    assert sorted(paths) == [str(new / "bee" / "1.jpg"), str(new / "bee" / "new.jpg")]
    assert described(index)["folders"] == sorted(map(str, (images, new, other)))
    make(weights, new, tmp_path / "made at once")
    make(weights, other, tmp_path / "made at once")
    moved, expected = (
        dict(zip(described(folder)["images"], Index.open(folder).images.vectors))
        for folder in (index, tmp_path / "made at once")
    )
    assert moved.keys() == expected.keys()
    assert all(np.allclose(moved[path], expected[path], atol=1e-6) for path in moved)


def test_images_that_were_indexed_again_where_they_are_now_count_once(weights, images, tmp_path, capsys):
    index, new = tmp_path / "index", tmp_path / "new"
    make(weights, images, index)
    images.rename(new)
    make(weights, new, index)
    assert "its images (18) stay" in capsys.readouterr().out and len(Index.open(index).images) == 36
    fails(lambda: make(weights, new, index, "--moved-from", str(images)), capsys, f"it has 18 in {new} already")
    make(weights, new, index, "--drop-missing")
    assert "new: 0, changed: 0, deleted: 18\n" in capsys.readouterr().out
    assert len(described(index)["images"]) == 18


def test_move_after_an_interruption(weights, images, tmp_path, capsys, monkeypatch):
    """Blocks of an interrupted run move too, as does the index below them."""
    index, new = tmp_path / "index", tmp_path / "new"
    make(weights, images, index)
    for number in range(4):
        trees.write_image(images / "dog" / f"{number}.jpg", 500 + number)
    with monkeypatch.context() as patch:
        patch.setattr("search.BLOCK", 2)
        patch.setattr(Index, "finish", lambda index: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            make(weights, images, index)
    images.rename(new)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "finish", lambda index: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            make(weights, new, index, "--moved-from", str(images))
    assert str(images / "ant" / "1.jpg") in described(index)["images"]  # as before
    paths = embedded(monkeypatch)
    make(weights, new, index, "--moved-from", str(images))
    assert not paths and len(described(index)["images"]) == 22
    assert all(os.path.isfile(path) for path in described(index)["images"])
    assert len(found(index, capsys, new / "dog" / "1.jpg", "-k", 3)[0]["neighbours"]) == 3


def test_only_some_have_moved(weights, images, tmp_path, capsys):
    """The others stay where they are; a wrong folder is refused, and changes nothing."""
    index, new = tmp_path / "index", tmp_path / "new"
    make(weights, images, index)
    new.mkdir()
    (images / "ant").rename(new / "ant")
    content = (index / "images.json").read_bytes()
    for wrong in (tmp_path, images / "ant", tmp_path / "nowhere"):
        words = "not two separate folders" if wrong == tmp_path else "No image of"
        fails(lambda wrong=wrong: make(weights, new, index, "--moved-from", str(wrong)), capsys, words)
    fails(lambda: make(weights, new, tmp_path / "none", "--moved-from", str(images)), capsys, "There is no index in")
    assert (index / "images.json").read_bytes() == content and not (tmp_path / "none").exists()
    make(weights, new, index, "--moved-from", str(images))
    assert "new: 0, changed: 0, deleted: 0\n6 images have moved" in capsys.readouterr().out
    paths = sorted(described(index)["images"])
    assert (
        sum(path.startswith(f"{new}/") for path in paths) == 6 and all(map(os.path.isfile, paths)) and len(paths) == 18
    )
    assert described(index)["folders"] == sorted(map(str, (images, new)))


def test_link_that_is_left_behind(weights, images, tmp_path, capsys):
    index, new = tmp_path / "index", tmp_path / "new"
    make(weights, images, index)
    images.rename(new)
    images.symlink_to(new)
    make(weights, new, index, "--moved-from", str(images))
    assert "new: 0, changed: 0, deleted: 0\n18 images have moved" in capsys.readouterr().out


# Other vectors of the same photographs


@pytest.fixture
def shift(monkeypatch):
    """Make all later reads darker or brighter, as a decoder of another version might."""
    read = files.read_image

    def by(levels: int) -> None:
        shifted = lambda *args: (read(*args).int() + levels).clamp(0, 255).byte()
        monkeypatch.setattr("dataset.images.read_image", shifted)
        monkeypatch.setattr("dataset.files.read_image", shifted)

    return by


def ask(index, image, capsys, *more) -> str:
    """What a query says on stderr."""
    capsys.readouterr()
    search.main(["query", "--index", str(index), "--threshold=-1", str(image), *more])
    return capsys.readouterr().err


@pytest.mark.parametrize("by_folder", [(), ("--by-folder",)])
def test_other_versions_that_move_vectors_are_a_warning(
    weights, images, tmp_path, capsys, monkeypatch, shift, by_folder
):
    index, query = tmp_path / "index", images / "ant"
    make(weights, images, index, *by_folder)
    here = described(index)["runtime"]
    assert here["device"] == "cpu" and here["amp"] == "none" and here["torch"] in torch.__version__
    shift(40)
    assert ask(index, query, capsys, *by_folder) == ""  # the same versions: nothing is embedded again
    monkeypatch.setattr(api, "runtime", lambda run: here | {"pillow": "99.1"})
    warning = ask(index, query, capsys, *by_folder)
    entries = "6 folders" if by_folder else "8 images"
    assert f"The vectors of {entries} of {index}, embedded again, moved by up to 0." in warning
    assert f"made with device cpu, amp none, torch {here['torch']}," in warning and "pillow 99.1. " in warning
    trees.write_image(images / "dog" / "new.jpg", 7)
    make(weights, images, index, *by_folder)
    assert "embedded again, moved by" in capsys.readouterr().err
    assert described(index)["runtime"] == {}  # some of its vectors are by these versions, most by those
    shift(0)
    shutil.rmtree(images / "dog")  # whose vector is of the other decoder
    assert ask(index, query, capsys, *by_folder) == ""  # other versions, the same vectors
    trees.write_image(images / "eel" / "new.jpg", 8)
    make(weights, images, index, *by_folder)
    assert capsys.readouterr().err == ""
    assert described(index)["runtime"] == here | {"pillow": "99.1"}


@pytest.fixture
def other_versions(monkeypatch):
    """From when it is called on."""
    return lambda: monkeypatch.setattr(api, "version", lambda name: "99.1")


def test_how_far_vectors_have_moved(weights, images, tmp_path, monkeypatch, other_versions):
    """The largest distance of the images, here of all, as proxy_anchor.load embeds them."""
    monkeypatch.setattr(api, "REFERENCES", 18)
    make(weights, images, tmp_path / "index")
    index, embedder = Index.open(tmp_path / "index"), api.load(weights / "a.pth")
    before = np.array(index.images.vectors)
    other_versions()
    turned = before @ np.linalg.qr(np.eye(8) + 0.01 * np.random.default_rng(0).standard_normal((8, 8)))[0]
    rows = index.images
    monkeypatch.setattr(rows, "take", lambda chosen: turned[chosen])
    expected = np.linalg.norm(embedder([path for path, _ in rows]) - turned, axis=1).max()
    assert f"moved by up to {expected:.4f} of their length" in api.check_drift(index, embedder.run)
    monkeypatch.setattr(api, "DRIFT", expected + 1e-6)
    assert api.check_drift(index, embedder.run) == ""


def test_references_that_are_gone_changed_or_unreadable_are_left_out(
    weights, images, tmp_path, capsys, shift, other_versions
):
    index = tmp_path / "index"
    make(weights, images, index)
    opened, embedder = Index.open(index), api.load(weights / "a.pth")
    other_versions()
    shift(40)
    chosen = [opened.images[row] for row in np.linspace(0, 17, 8).round().astype(int)]
    os.remove(chosen[0][0])
    trees.write_image(images.joinpath(chosen[1][0]), 4000)
    size, time = map(int, chosen[2][1].split())
    images.joinpath(chosen[2][0]).write_bytes(bytes(size))  # of the same size and time
    os.utime(chosen[2][0], ns=(time, time))
    assert api.check_drift(opened, embedder.run).startswith("The vectors of 5 images of ")
    shutil.rmtree(images)
    assert api.check_drift(opened, embedder.run) is None
    make(weights, trees.folder(tmp_path / "other", classes=("ant",)), index)
    assert described(index)["runtime"] == {}  # nothing could be compared


def test_older_index_without_a_record_of_versions(weights, images, tmp_path, capsys, shift):
    index = tmp_path / "index"
    make(weights, images, index)
    content = json.loads((index / "images.json").read_text())
    del content["runtime"], content["sha256"]
    (index / "images.json").write_text(json.dumps(content))
    assert ask(index, images / "ant", capsys) == ""
    shift(40)
    assert "made with unknown versions; here is device cpu" in ask(index, images / "ant", capsys)
