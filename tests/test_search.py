"""search.py: the index, its neighbours, and what it refuses."""

import json
import math
import os
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
import trees
from helpers import RECORD, described, fails, threshold
from helpers import make_index as make
from helpers import query_index as found
from PIL import Image

import dataset
import net
import search
from dataset import transforms
from proxy_anchor import Search, checkpoint, files
from proxy_anchor.embedding import Embedder
from proxy_anchor.index.store import Index
from proxy_anchor.vectors import to_nearness

pytest.importorskip("faiss")


def describe(out, content):
    """Write what described reads; the images may be damaged, which their seals would tell."""
    if isinstance(content, dict):
        content.pop("files", None)
        content.pop("sha256", None)
    for old in out.glob("images*"):
        old.unlink()
    images = content.pop("images", None) if isinstance(content, dict) else None
    if images is not None:
        lines = images.items() if isinstance(images, dict) else images
        (out / "images-1.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (out / "images.json").write_text(json.dumps(content))


def embeddings(weights, paths, l2_norm=True):
    """Of these images, in float64 and, with l2_norm, of unit length, straight from the network."""
    network = net.create("tiny", 8, l2_norm=l2_norm).eval()
    checkpoint.load(weights / "a.pth", network)
    images = dataset.ImageDataset(paths, np.zeros(len(paths), int), [""], transforms.Evaluation(32))
    with torch.inference_mode():
        batch = network.normalize(torch.stack([image for image, _ in images]))
        x = network(batch).double()
    return x / x.norm(dim=1, keepdim=True) if l2_norm else x


def test_neighbours_are_those_of_brute_force(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    assert f"Building {tmp_path / 'index'} of 18 images\n" in capsys.readouterr().out
    indexed = list(described(tmp_path / "index")["images"])
    assert len(indexed) == 18 and all(path.startswith("/") for path in indexed)
    results = found(tmp_path / "index", capsys, images / "ant", "-k", 5)
    similarity = embeddings(weights, [r["query"] for r in results]) @ embeddings(weights, indexed).T
    for row, result in zip(similarity, results, strict=True):
        expected, order = row.topk(5)
        assert [n["similarity"] for n in result["neighbours"]] == pytest.approx(expected.tolist(), abs=1e-5)
        assert [n["path"] for n in result["neighbours"]] == [indexed[i] for i in order]
        assert result["neighbours"][0]["path"].endswith(result["query"].split("/")[-1])  # itself


@pytest.fixture(scope="module")
def euclidean(tmp_path_factory):
    """A checkpoint whose embeddings are compared by their Euclidean distance, as they are."""
    folder = tmp_path_factory.mktemp("euclidean")
    torch.manual_seed(0)
    network = net.create("tiny", 8, l2_norm=False)
    trees.save_checkpoint(folder / "a.pth", network, RECORD | {"l2_norm": 0, "distance": "euclidean"})
    return folder


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW4", "IVF1,Flat"])
def test_euclidean_neighbours_are_those_of_brute_force(factory, euclidean, images, tmp_path, capsys):
    make(euclidean, images, tmp_path / "index", "--index-factory", factory)
    indexed = list(described(tmp_path / "index")["images"])
    results = found(tmp_path / "index", capsys, images, "-k", 5)
    x = [embeddings(euclidean, paths, l2_norm=False) for paths in ([r["query"] for r in results], indexed)]
    for row, result in zip(torch.cdist(*x), results, strict=True):
        expected, order = row.topk(5, largest=False)
        assert all(set(n) == {"path", "distance"} for n in result["neighbours"])
        assert [n["distance"] for n in result["neighbours"]] == pytest.approx(expected.tolist(), abs=1e-5)
        assert [n["path"] for n in result["neighbours"]] == [indexed[i] for i in order]
    assert results[0]["neighbours"][0]["distance"] == 0 and not torch.allclose(x[1].norm(dim=1), torch.ones(1).double())


def test_table_of_distances(euclidean, images, tmp_path, capsys):
    make(euclidean, images, tmp_path / "index")
    one = str(images / "bee" / "3.jpg")
    capsys.readouterr()
    search.main(["query", "--index", str(tmp_path / "index"), one, "-k", "2"])
    assert capsys.readouterr().out.splitlines()[2].split() == ["1", "distance", "0.0000", one]


def test_unknown_distance_is_damage(images, tmp_path, capsys):
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), RECORD | {"distance": "manhattan"})
    fails(lambda: make(tmp_path, images, tmp_path / "index"), capsys, "a.pth is damaged: its record of the network")


@pytest.mark.parametrize("factory", ["PCA2,Flat", "PQ2x4", "IVF1,PQ2x4", "SQ4", "HNSW4"])
def test_similarities_are_exact_for_compressed_vectors(factory, weights, tmp_path, capsys):
    images = trees.folder(tmp_path / "images", classes=("ant", "bee", "cat"))
    make(weights, images, tmp_path / "index", "--index-factory", factory)
    indexed = list(described(tmp_path / "index")["images"])
    results = found(tmp_path / "index", capsys, images, "-k", 5)
    similarity = embeddings(weights, [r["query"] for r in results]) @ embeddings(weights, indexed).T
    for row, result in zip(similarity, results, strict=True):
        assert [n["similarity"] for n in result["neighbours"]] == pytest.approx(row.topk(5).values.tolist(), abs=1e-5)
        assert result["neighbours"][0]["path"] == result["query"]


def test_table_and_picture(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    capsys.readouterr()
    picture = tmp_path / "neighbours.png"
    one = str(images / "bee" / "3.jpg")
    search.main(["query", "--index", str(tmp_path / "index"), one, "--save", str(picture), "-k", "100"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == one and lines[2].split() == ["1", "1.0000", one] and len(lines) == 20  # all there are
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_picture_of_an_image_that_is_gone(weights, images, tmp_path):
    """In its place is a frame with its name, see test_figures.py."""
    make(weights, images, tmp_path / "index")
    (images / "bee" / "3.jpg").unlink()
    (images / "bee" / "4.jpg").write_bytes(b"no image")
    query = ["query", "--index", str(tmp_path / "index"), str(images / "bee" / "2.jpg"), "-k", "18"]
    search.main([*query, "--save", str(tmp_path / "neighbours.png")])
    assert (tmp_path / "neighbours.png").stat().st_size > 10_000


def test_images_are_added_without_embedding_the_others(weights, images, tmp_path, capsys, monkeypatch):
    embedded = []
    embed = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, data: embedded.append(len(data.dataset)) or embed(self, data))
    make(weights, images, tmp_path / "index")
    before = found(tmp_path / "index", capsys, images / "cat", "-k", 3)
    trees.folder(tmp_path / "more", classes=("ant", "dog"))
    make(weights, tmp_path / "more", tmp_path / "index")
    make(weights, images, tmp_path / "index")  # nothing is new
    assert [count for count in embedded if count] == [18, 6, 12]
    assert len(described(tmp_path / "index")["images"]) == 30
    assert [path.name for path in (tmp_path / "index").glob("vectors*")] == ["vectors-2.float32"]
    after = found(tmp_path / "index", capsys, images / "cat", "-k", 30)
    old = [[n for n in result["neighbours"] if str(images) in n["path"]][:3] for result in after]
    assert old == [result["neighbours"] for result in before]


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat", "PCA4,PQ2x3"])
def test_changed_and_deleted_images(factory, weights, images, tmp_path, capsys):
    """Whatever has changed in the folder, the index is that of the folder as it is now."""
    index = tmp_path / "index"
    make(weights, images, index, "--index-factory", factory)
    assert f"Building {index} of 18 images\n" in capsys.readouterr().out
    trees.write_image(images / "ant" / "1.jpg", 1000)
    os.utime(images / "ant" / "2.jpg", ns=(1, 1))  # of the same size
    (images / "bee" / "3.jpg").unlink()
    trees.write_image(images / "dog" / "1.jpg", 1001)
    make(weights, images, index)
    out = capsys.readouterr().out
    assert "which holds 18 images" in out and "new: 1, changed: 2, deleted: 1" in out and "Indexed 3 images" in out
    paths = list(described(index)["images"])
    assert sorted(paths) == search.images_at(str(images))
    for result in found(index, capsys, images, "-k", 1):
        assert result["neighbours"] == [{"path": result["query"], "similarity": pytest.approx(1, abs=1e-5)}]
    make(weights, images, index)
    assert "new: 0, changed: 0, deleted: 0" in (out := capsys.readouterr().out) and "Indexed" not in out
    (images / "bee" / "4.jpg").unlink()
    make(weights, images, index)
    assert "deleted: 1" in (out := capsys.readouterr().out) and "Indexed 0 images" in out
    assert sorted(described(index)["images"]) == search.images_at(str(images))


def test_images_of_other_folders_stay_while_they_live(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    other = trees.folder(tmp_path / "other", classes=("ant",))
    trees.write_image(images / "ant" / "1.jpg", 1000)
    (images / "ant" / "2.jpg").unlink()
    capsys.readouterr()
    make(weights, other, tmp_path / "index")
    assert "new: 6, changed: 0, deleted: 1" in capsys.readouterr().out  # it does not look for changes in the first
    assert len(described(tmp_path / "index")["images"]) == 23
    make(weights, images, tmp_path / "index")
    assert "new: 0, changed: 1, deleted: 0" in capsys.readouterr().out


def test_interrupted_update_leaves_the_old_index(weights, images, tmp_path, capsys, monkeypatch):
    index = tmp_path / "index"
    make(weights, images, index, "--index-factory", "IVF2,Flat")
    before = found(index, capsys, images / "ant")
    trees.write_image(images / "bee" / "1.jpg", 1000)
    with monkeypatch.context() as patch:
        patch.setattr("proxy_anchor.index.store.seal", lambda file: sys.exit(9))  # when all else is written
        with pytest.raises(SystemExit):
            make(weights, images, index)
    assert len(list(index.glob("vectors*"))) == 4
    assert found(index, capsys, images / "ant") == before
    make(weights, images, index)
    assert "changed: 1" in capsys.readouterr().out
    assert {path.name for path in index.glob("vectors*")} == {"vectors-2.float32", "vectors-2.faiss"}


@pytest.mark.parametrize("factory", ["Flat", "SQ8"])
def test_index_that_is_written_while_it_is_opened(factory, weights, images, tmp_path, capsys, monkeypatch):
    def read_vectors(index, read=Index._read_vectors):
        monkeypatch.undo()
        (images / "ant" / "1.jpg").unlink()
        make(weights, images, tmp_path / "index", "--index-factory", factory)
        read(index)

    make(weights, images, tmp_path / "index", "--index-factory", factory)
    monkeypatch.setattr(Index, "_read_vectors", read_vectors)
    assert len(Index.open(tmp_path / "index").images) == 17


def test_second_update_at_the_same_time_is_refused(weights, images, tmp_path, capsys):
    (tmp_path / "index").mkdir()
    held = files.lock_folder(tmp_path / "index", "wait")
    words = (
        f"is being written by process {os.getpid()} on {socket.gethostname()}; end that first, or choose another --out"
    )
    fails(lambda: make(weights, images, tmp_path / "index"), capsys, words)
    held.close()


def test_another_checkpoint_is_refused(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    words = "was built with another checkpoint ("
    fails(lambda: make(weights, images, tmp_path / "index", name="b.pth"), capsys, words)
    other = ["query", "--index", str(tmp_path / "index"), str(images), "--resume", str(weights / "b.pth")]
    fails(lambda: search.main(other), capsys, words)


def test_checkpoint_that_has_moved_is_named(weights, images, tmp_path, capsys):
    (tmp_path / "here.pth").write_bytes((weights / "a.pth").read_bytes())
    make(tmp_path, images, tmp_path / "index", name="here.pth")
    (tmp_path / "here.pth").unlink()
    words = f"The checkpoint {tmp_path / 'here.pth'} of {tmp_path / 'index'} is gone: pass its new path with --resume"
    fails(lambda: search.main(["query", "--index", str(tmp_path / "index"), str(images)]), capsys, words)
    assert found(tmp_path / "index", capsys, images / "ant", "--resume", weights / "a.pth")


def test_split_of_a_data_set(weights, cub_root, tmp_path, capsys):
    make(weights, "", tmp_path / "index", "--split", "eval", "--data-root", str(cub_root), "--allow-partial")
    assert "Indexed 18 images" in capsys.readouterr().out


def test_factory_string(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index", "--index-factory", "IVF2,Flat")
    assert "IVF2,Flat finds " in capsys.readouterr().out
    make(weights, images, tmp_path / "index")  # as it is
    fails(
        lambda: make(weights, images, tmp_path / "index", "--index-factory", "Flat"), capsys, "an index IVF2,Flat, not"
    )
    fails(lambda: make(weights, images, tmp_path / "b", "--index-factory", "no"), capsys, "FAISS knows no index 'no'")
    fails(lambda: make(weights, images, tmp_path / "c", "--index-factory", "IVF99,Flat"), capsys, "FAISS cannot make")


def test_recall_is_printed_whenever_images_are_indexed(weights, images, tmp_path, capsys):
    for classes in (("ant",), ("ant", "bee")):
        trees.folder(tmp_path / "more", classes=classes)
        make(weights, tmp_path / "more", tmp_path / "index", "--index-factory", "IVF4,Flat")
        recalls = re.findall(r"IVF4,Flat finds ([\d.]+)% of the 10 .* --nprobe (\d)", capsys.readouterr().out)
        assert [nprobe for _, nprobe in recalls] == ["1", "4"] and float(recalls[0][0]) < float(recalls[1][0]) == 100
    make(weights, images, tmp_path / "hnsw", "--index-factory", "HNSW8")
    assert re.search(r"HNSW8 finds [\d.]+% of the 10 nearest images\n", capsys.readouterr().out)


def test_nprobe(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index", "--index-factory", "IVF4,Flat")
    counts = []
    for more in ([], ["--nprobe", 1], ["--nprobe", 2], ["--nprobe", 4], ["--nprobe", 10**18]):
        results = found(tmp_path / "index", capsys, images, "-k", 18, *more)
        counts.append(sum(len(result["neighbours"]) for result in results))
    assert counts[0] == counts[1] < counts[2] < counts[3] == counts[4] == 18 * 18
    query = ["query", str(images), "--index"]
    fails(lambda: search.main([*query, str(tmp_path / "index"), "--nprobe", "0"]), capsys, "not positive", code=2)
    make(weights, images, tmp_path / "flat")
    words = "flat is an index Flat: --nprobe needs an IVF index"
    fails(lambda: search.main([*query, str(tmp_path / "flat"), "--nprobe", "2"]), capsys, words)


def test_recall_against_exact_search(tmp_path):
    """Exact search finds all, and a few of the cells not all of these random vectors; each finds itself first."""
    made = {"checkpoint": "a.pth", "weights": "0", "network": RECORD | {"embedding_size": 32}, "by_folder": False}
    x = torch.nn.functional.normalize(torch.randn(2000, 32))
    recalls = []
    for factory in ("Flat", "IVF64,Flat", "PCA16,Flat", "IVF4,PQ8x4"):
        index = Index.new(tmp_path, made, factory)
        index.add({str(i): [0, 0] for i in range(2000)}, x)
        index = index.finish()
        recalls.append(index.recall())
        index = Index.open(tmp_path)
        assert [row[0] for row in index.search(x, 1)] == [(str(i), pytest.approx(1)) for i in range(2000)]
    assert recalls[0] == 1 and all(0.05 < recall < 0.95 for recall in recalls[1:])


def test_what_is_missing_or_damaged_is_an_error(weights, images, tmp_path, capsys, monkeypatch):
    query = ["query", "--index", str(tmp_path / "index"), str(images)]
    fails(lambda: search.main(query), capsys, "There is no index in")
    make(weights, images, tmp_path / "index")
    fails(lambda: search.main([*query, str(tmp_path / "no.jpg")]), capsys, "There is no ")
    fails(lambda: search.main([*query, "-k", "0"]), capsys, "argument --neighbours/-k: 0 is not positive", code=2)
    (tmp_path / "empty").mkdir()
    fails(lambda: make(weights, tmp_path / "empty", tmp_path / "index"), capsys, "There are no images in")
    fails(
        lambda: make(weights, images, tmp_path / "index", "--split", "eval"),
        capsys,
        "one of --images, --split or --vectors is required",
        code=2,
    )
    fails(lambda: make(weights, images, tmp_path / "index", "--model", "resnet50"), capsys, "was trained with", code=2)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for out in (weights / "a.pth", tmp_path / "link"):
        fails(lambda out=out: make(weights, images, out), capsys, f"{out} is a file: --out must be a folder")
    monkeypatch.setitem(sys.modules, "faiss", None)
    fails(lambda: make(weights, images, tmp_path / "new"), capsys, "pip install faiss-cpu")


@pytest.mark.parametrize("factory", ["Flat", "PCA4,Flat"])
def test_vectors_that_are_missing_or_damaged(factory, weights, images, tmp_path, capsys):
    index = tmp_path / "index"
    make(weights, images, index, "--index-factory", factory)
    for file in index.glob("vectors*"):
        whole = file.read_bytes()
        for data in (b"", b"text", whole[: len(whole) // 2], whole[:-1], None):
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            fails(lambda: found(index, capsys, images), capsys, f"The index in {index} is damaged")
            file.write_bytes(whole)
    assert found(index, capsys, images)


DAMAGES = {
    "not an object": lambda content: [],
    "of a version that knew files": lambda content: (
        content | {"made": {"checkpoint": "a.pth", "sha256": "0", "network": content["made"]["network"]}}
    ),
    "by_folder text": lambda content: content | {"made": content["made"] | {"by_folder": "no"}},
    "empty": lambda content: {},
    "made empty": lambda content: content | {"made": {}},
    "made null": lambda content: content | {"made": None},
    "network empty": lambda content: content | {"made": content["made"] | {"network": {}}},
    "checkpoint a number": lambda content: content | {"made": content["made"] | {"checkpoint": 1}},
    "factory a number": lambda content: content | {"factory": 3},
    "factory another": lambda content: content | {"factory": "IVF2,Flat"},
    "factory unknown": lambda content: content | {"factory": "no"},
    "number text": lambda content: content | {"number": "../1"},
    "number another": lambda content: content | {"number": 7},
    "numbers as paths": lambda content: content | {"images": list(range(18))},
    "paths without stamps": lambda content: content | {"images": list(content["images"])},  # of an older version
    "images missing": lambda content: {name: value for name, value in content.items() if name != "images"},
    "an image too few": lambda content: content | {"images": dict(list(content["images"].items())[1:])},
    "an image too many": lambda content: content | {"images": content["images"] | {"more.jpg": [0, 0]}},
    **{
        f"{name} {value}": lambda content, name=name, value=value: (
            content | {"made": content["made"] | {"network": content["made"]["network"] | {name: value}}}
        )
        for name, value in [
            ("model", "no"),
            ("model", 1),
            ("image_size", 0),
            ("image_size", "32"),
            ("l2_norm", None),
            ("embedding_size", 4),
            ("embedding_size", -1),
            ("embedding_size", 10**30),
        ]
    },
}


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make(weights, trees.folder(folder / "images", classes=("ant", "bee", "cat")), folder / "index")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_description(damage, weights, whole, tmp_path, capsys):
    index = shutil.copytree(whole / "index", tmp_path / "index")
    describe(index, DAMAGES[damage](described(index)))
    fails(lambda: found(index, capsys, whole / "images"), capsys, f"The index in {index} is damaged")
    fails(lambda: make(weights, whole / "images", index), capsys, f"{index} ")  # of another network, where not damaged


def test_images_with_damaged_stamps_are_embedded_again(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    content = described(tmp_path / "index")
    for path, stamp in zip(list(content["images"]), (None, 0, [], "text", [1])):
        content["images"][path] = stamp
    describe(tmp_path / "index", content)
    make(weights, images, tmp_path / "index")
    assert "changed: 5" in capsys.readouterr().out


def test_image_that_has_become_bad_is_dropped(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    (images / "bee" / "2.jpg").write_bytes(b"no image")
    fails(lambda: make(weights, images, tmp_path / "index"), capsys, "2.jpg cannot be read")
    make(weights, images, tmp_path / "index", "--skip-bad-images")
    assert "Indexed 0 images" in capsys.readouterr().out and len(described(tmp_path / "index")["images"]) == 17
    for path in search.images_at(str(images)):
        with open(path, "wb") as file:
            file.write(b"no image")
    words = f"No image would be left in {tmp_path / 'index'}"
    fails(lambda: make(weights, images, tmp_path / "index", "--skip-bad-images"), capsys, words)
    assert len(described(tmp_path / "index")["images"]) == 17


def test_bad_images_are_left_out(weights, images, tmp_path, capsys):
    (images / "bee" / "2.jpg").write_bytes(b"no image")
    fails(lambda: make(weights, images, tmp_path / "index"), capsys, "2.jpg cannot be read")
    make(weights, images, tmp_path / "index", "--skip-bad-images")
    assert "Indexed 17 images" in capsys.readouterr().out


# Thresholds


def asked(index, capsys, *more):
    """What the table says of each query: {path: lines}."""
    capsys.readouterr()
    search.main(["query", "--index", str(index), *map(str, more)])
    blocks: dict = {}
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            blocks[line] = own = []
        else:
            own.append(line)
    return blocks


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_unknown_images_have_no_match(distance, weights, euclidean, images, tmp_path, capsys):
    """Those nearer than the threshold are listed, all of brute force and no other; with none of them, 'no match'."""
    weights = {"cosine": weights, "euclidean": euclidean}[distance]
    make(weights, images, tmp_path / "index")
    unknown = tmp_path / "unknown"
    for number in range(12):
        trees.write_image(unknown / f"{number}.jpg", 5000 + number)
    everything = found(tmp_path / "index", capsys, unknown, "-k", 18)
    measure = {"cosine": "similarity", "euclidean": "distance"}[distance]
    assert all(result["threshold"] is None and result["match"] is None for result in everything)
    best = sorted(result["neighbours"][0][measure] for result in everything)
    limit = best[6]  # is a match itself
    near = (lambda value: value >= limit) if distance == "cosine" else (lambda value: value <= limit)
    results = found(tmp_path / "index", capsys, unknown, "-k", 18, "--threshold", limit)
    for before, after in zip(everything, results, strict=True):
        expected = [n for n in before["neighbours"] if near(n[measure])]
        assert after["neighbours"] == expected and after["threshold"] == limit and after["match"] == bool(expected)
    assert sum(result["match"] for result in results) == (6 if distance == "cosine" else 7)
    tables = asked(tmp_path / "index", capsys, unknown, "-k", 18, "--threshold", limit)
    for result, before in zip(results, everything):
        lines = tables[result["query"]]
        words = f"  no match: the best {measure} is {before['neighbours'][0][measure]:.4f}, the threshold {limit:.4f}"
        assert len(lines) == 1 + len(result["neighbours"]) or lines == [words]


def calibrated(weights, folder, **changed):
    """A checkpoint with a threshold."""
    path = shutil.copy(weights / "a.pth", folder / "a.pth")
    checkpoint.save_calibration(path, threshold(0.999, **changed), checkpoint.Checkpoint(path).identity)
    return folder


def test_threshold_of_the_checkpoint_is_used_unless_another_is_given(weights, images, tmp_path, capsys):
    """Also by an index from before the calibration, which leaves the network as it was."""
    (tmp_path / "own").mkdir()
    shutil.copy(weights / "a.pth", tmp_path / "own" / "a.pth")
    make(tmp_path / "own", images, tmp_path / "index")
    calibrated(weights, tmp_path / "own")
    (result,) = found(tmp_path / "index", capsys, images / "ant" / "1.jpg")
    assert result["threshold"] == 0.999 and result["match"] and len(result["neighbours"]) < 10
    assert all(n["similarity"] >= 0.999 for n in result["neighbours"])
    (result,) = found(tmp_path / "index", capsys, images / "ant" / "1.jpg", "--threshold", "none")
    assert result["threshold"] is result["match"] is None and len(result["neighbours"]) == 10
    (result,) = found(tmp_path / "index", capsys, images / "ant" / "1.jpg", "--threshold", "1.1")
    assert result == {
        "query": result["query"],
        "threshold": 1.1,
        "match": False,
        "probability": None,
        "best": pytest.approx(1),
        "things": [],
        "neighbours": [],
    }
    query = ["query", "--index", str(tmp_path / "index"), str(images), "--threshold"]
    for text in ("high", "nan", "inf"):
        fails(lambda text=text: search.main([*query, text]), capsys, f"invalid threshold value: '{text}'", code=2)
    for changed in ({"share": 7.0}, {"unknown": (-0.1, 0, 1)}, {"sizes": (10, 20)}, {"values": (math.nan, 0.9)}):
        calibrated(weights, tmp_path / "own", **changed)
        fails(lambda: search.main(query[:-1]), capsys, "a.pth is damaged: its record of the threshold is {'distance'")
    torch.save(checkpoint.read(tmp_path / "own" / "a.pth") | {"threshold": 3}, tmp_path / "own" / "a.pth")
    fails(lambda: search.main(query[:-1]), capsys, "a.pth is damaged: its record of the threshold is 3")
    make(tmp_path / "own", images, tmp_path / "index")  # does not ask for it


def test_threshold_is_that_for_the_size_of_the_index(weights, images, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    measured = threshold(0.9, sizes=(72, 36), values=(0.9, 0.8))
    calibrated(weights, tmp_path / "own", sizes=(72, 36), values=(0.9, 0.8))
    make(tmp_path / "own", images, tmp_path / "index")
    capsys.readouterr()
    search.main(["query", "--index", str(tmp_path / "index"), "--json", str(images / "ant" / "1.jpg")])
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["threshold"] == measured.at(18) == 0.8
    assert "Threshold for 18 images: similarity 0.8000; at most 5% of unknown queries are expected" in err
    calibrated(weights, tmp_path / "own", sizes=(9, 3), values=(0.7, 0.6))
    capsys.readouterr()
    search.main(["query", "--index", str(tmp_path / "index"), str(images / "ant" / "1.jpg")])
    assert "expected to reach it (extrapolated from 9 images)" in capsys.readouterr().err


def test_old_threshold_of_pairs_is_refused_with_the_command(weights, images, tmp_path, capsys):
    path = shutil.copy(weights / "a.pth", tmp_path / "a.pth")
    torch.save(checkpoint.read(path) | {"threshold": {"asked_far": 0.01, "dataset": "glyphs"}}, path)
    make(tmp_path, images, tmp_path / "index")
    words = f"python evaluate.py --dataset glyphs --resume {path} --calibrate"
    fails(lambda: search.main(["query", "--index", str(tmp_path / "index"), str(images)]), capsys, words)


def test_answer_is_a_thing(weights, images, tmp_path, capsys):
    """The folder of the best match first, with how many of its images match, in the table and as JSON."""
    make(weights, images, tmp_path / "index")
    (result,) = found(tmp_path / "index", capsys, images / "ant" / "1.jpg", "-k", 18)
    folders = [os.path.dirname(near["path"]) for near in result["neighbours"]]
    assert [thing["folder"] for thing in result["things"]] == list(dict.fromkeys(folders))
    for thing in result["things"]:
        assert thing["images"] == folders.count(thing["folder"])
        assert thing["similarity"] == result["neighbours"][folders.index(thing["folder"])]["similarity"]
    limit = result["neighbours"][4]["similarity"]
    (lines,) = asked(tmp_path / "index", capsys, images / "ant" / "1.jpg", "-k", 18, "--threshold", limit).values()
    assert lines[0] == f"  ant: similarity 1.0000, {folders.count(folders[0])} of the 18 nearest images"
    assert len(lines) == 6 and folders[:5].count(folders[0]) < folders.count(folders[0])
    make(weights, images, tmp_path / "folders", "--by-folder")
    (lines,) = asked(tmp_path / "folders", capsys, images / "ant" / "1.jpg", "-k", 2).values()
    name = os.path.basename(lines[1].split()[-1])
    assert lines[0] == f"  {name}: similarity {lines[1].split()[1]}" and len(lines) == 3


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_index_calibrates_itself(distance, by_folder, weights, euclidean, tmp_path, capsys):
    """By brute force: with each thing left out in turn, the share of its queries that the nearest other is near to."""
    folder, random = tmp_path / "things", np.random.default_rng(0)
    for thing in range(24):
        (folder / f"{thing:02d}").mkdir(parents=True)
        colours = random.integers(0, 200, (2, 2, 3))  # of four quarters
        for number in range(3):
            pixels = colours.repeat(20, axis=0).repeat(16, axis=1) + random.integers(0, 55, (40, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{thing:02d}" / f"{number}.png")
    weights = {"cosine": weights, "euclidean": euclidean}[distance]
    make(weights, folder, tmp_path / "index", "--calibrate", "0.25", *["--by-folder"] * by_folder)
    assert (
        "Chosen on 24 things, each left out, so that at most 25% of unknown queries match: " in capsys.readouterr().out
    )
    index = Index.open(tmp_path / "index")
    assert len(index.images) == (24 if by_folder else 72)
    x = index.images.vectors.astype(np.float64)
    things = [path if by_folder else os.path.dirname(path) for path, _ in index.images]
    nearness = x @ x.T if distance == "cosine" else -np.linalg.norm(x[:, None] - x, axis=2)
    nearness[np.equal.outer(things, things)] = -np.inf
    best = np.sort(nearness.max(axis=1))[::-1]
    limit = to_nearness(index.calibration.values[0], distance)
    assert (best >= limit + 1e-6).mean() <= 0.25 < (best >= limit - 1e-6).mean()
    assert index.calibration.unknown[0] <= 0.25 and bool(index.calibration.known) is not by_folder
    query = ["--by-folder", folder / "03"] if by_folder else [folder / "03" / "1.png"]
    (result,) = found(tmp_path / "index", capsys, *query)
    assert result["threshold"] == index.calibration.at(len(index.images))
    result, *_ = found(tmp_path / "index", capsys, query[-1], *["--by-folder"] * (not by_folder))  # of another kind
    assert result["threshold"] is None
    trees.write_image(folder / "new" / "1.jpg", 77)
    make(weights, folder, tmp_path / "index", *["--by-folder"] * by_folder)  # the calibration stays
    assert Index.open(tmp_path / "index").calibration == index.calibration


def test_images_directly_in_what_was_indexed_show_no_thing(weights, images, tmp_path, capsys):
    make(weights, images / "ant" / "more", tmp_path / "index")
    (result,) = found(tmp_path / "index", capsys, images / "ant" / "1.jpg")
    assert result["things"] == [] and len(result["neighbours"]) == 1
    (lines,) = asked(tmp_path / "index", capsys, *(images / "ant" / "more").iterdir()).values()
    assert lines[0].startswith("   1  1.0000  ")


def test_loose_image_is_of_no_thing(weights, images, tmp_path, capsys):
    """It is not named, has no probability, and is no thing to calibrate with."""
    shutil.copytree(images, tmp_path / "photos")
    shutil.copy(images / "ant" / "1.jpg", tmp_path / "photos" / "loose.jpg")
    make(weights, tmp_path / "photos", tmp_path / "index", "--calibrate", "0.3")
    assert "Chosen on 6 things, each left out" in capsys.readouterr().out
    (result,) = found(tmp_path / "index", capsys, images / "ant" / "1.jpg", "-k", 3, "--threshold", "none")
    assert {os.path.basename(near["path"]) for near in result["neighbours"][:2]} == {"1.jpg", "loose.jpg"}
    assert os.path.basename(result["things"][0]["folder"]) == "ant"
    search = Search(tmp_path / "index")
    loose, *others = sorted(search.query(images / "ant" / "1.jpg").nearest, key=lambda near: "loose" not in near[0])
    assert search.probability([loose, *others]) is None and search.probability(others) is not None


def test_queries_of_another_kind_have_no_probability(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index", "--calibrate", "0.3")
    result, *_ = found(tmp_path / "index", capsys, images / "bee", "--by-folder")
    assert result["threshold"] is None and result["probability"] is None
    (result,) = found(tmp_path / "index", capsys, images / "bee" / "1.jpg")
    assert 0 < result["probability"] < 1


def test_folders_of_a_dataset_are_not_its_things(weights, tmp_path, capsys):
    command = ["index", "--resume", str(weights / "a.pth"), "--split", "eval", "--out", str(tmp_path / "index")]
    fails(lambda: search.main([*command, "--calibrate"]), capsys, "use evaluate.py --calibrate", code=2)


def test_index_without_things_is_not_calibrated(weights, images, tmp_path, capsys):
    words = "search.py: error: 18 queries that show 6 things allow --calibrate 0.2778 or more"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        make(weights, images, tmp_path / "index", "--calibrate")
    assert words in capsys.readouterr().err
    assert len(Index.open(tmp_path / "index").images) == 18 and Index.open(tmp_path / "index").calibration is None


def test_picture_says_no_match(weights, images, tmp_path, monkeypatch):
    make(weights, images, tmp_path / "index")
    drawn = []
    monkeypatch.setattr(search.figures, "draw_images", lambda rows, read, path: drawn.extend(rows))
    one, query = str(images / "bee" / "3.jpg"), ["query", "--index", str(tmp_path / "index"), "--save", "a.png"]
    search.main([*query, one, "--threshold", "2"])
    search.main([*query, one, "--threshold", "0.9999999"])  # finds itself, which is not shown
    search.main([*query, one])
    assert drawn[:2] == [[(one, "no match\nbee")], [(one, "query\nbee")]] and len(drawn[2]) == 10


# Folders


def means(weights, folders, distance="cosine"):
    """Of the images that lie in each folder, by their vectors straight from the network."""
    rows = []
    for folder in folders:
        files = sorted(str(path) for path in folder.glob("[!.]*.jpg"))
        rows.append(embeddings(weights, files, l2_norm=distance == "cosine").mean(dim=0))
    rows = torch.stack(rows)
    return rows / rows.norm(dim=1, keepdim=True) if distance == "cosine" else rows


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_folders_are_the_means_of_their_images(distance, weights, euclidean, images, tmp_path, capsys):
    """Of those that lie in it, not in folders below; of a query's images too."""
    weights = {"cosine": weights, "euclidean": euclidean}[distance]
    make(weights, images, tmp_path / "index", "--by-folder")
    out = capsys.readouterr().out
    assert f"Building {tmp_path / 'index'} of 6 folders\n" in out and "Indexed 6 folders" in out
    folders = [images / name / more for name in ("ant", "bee", "cat") for more in ("", "more")]
    assert sorted(described(tmp_path / "index")["images"]) == sorted(map(str, folders))
    mine = trees.folder(tmp_path / "mine", classes=("ant", "dog"))
    results = found(tmp_path / "index", capsys, mine, "--by-folder", "-k", 6)
    asked_for = [mine / name / more for name in ("ant", "dog") for more in ("", "more")]
    assert sorted(result["query"] for result in results) == sorted(map(str, asked_for))
    x, y = means(weights, asked_for, distance), means(weights, folders, distance)
    expected = x @ y.T if distance == "cosine" else torch.cdist(x, y)
    measure = {"cosine": "similarity", "euclidean": "distance"}[distance]
    for result in results:
        row = expected[asked_for.index(type(mine)(result["query"]))]
        assert len(result["neighbours"]) == 6
        for neighbour in result["neighbours"]:
            value = row[folders.index(type(mine)(neighbour["path"]))]
            assert neighbour[measure] == pytest.approx(float(value), rel=1e-5, abs=1e-5)
    single = found(tmp_path / "index", capsys, mine / "ant" / "1.jpg", "-k", 6)  # images are found in folders too
    assert len(single) == 1 and single[0]["query"].endswith("1.jpg") and len(single[0]["neighbours"]) == 6


def test_folder_is_embedded_again_when_any_of_its_files_changes(weights, images, tmp_path, capsys, monkeypatch):
    index = tmp_path / "index"
    make(weights, images, index, "--by-folder")
    embedded = []
    embed = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, data: embedded.append(len(data.dataset)) or embed(self, data))

    def updated(words):
        capsys.readouterr()
        make(weights, images, index, "--by-folder")
        assert words in (out := capsys.readouterr().out), out
        as_new = tmp_path / f"new-{len(list(tmp_path.iterdir()))}"
        count = len(embedded)
        make(weights, images, as_new, "--by-folder")
        del embedded[count:]
        for one, other in zip(*(found(where, capsys, images, "-k", 1) for where in (index, as_new)), strict=True):
            a, b = one["neighbours"][0], other["neighbours"][0]
            assert a["path"] == b["path"] and a["similarity"] == pytest.approx(b["similarity"], abs=1e-5)
        del embedded[count:]
        assert sorted(described(index)["images"]) == sorted(described(as_new)["images"])

    updated("new: 0, changed: 0, deleted: 0")
    trees.write_image(images / "ant" / "1.jpg", 1000)  # changed
    (images / "bee" / "2.jpg").unlink()  # vanished
    trees.write_image(images / "cat" / "new.jpg", 1001)  # appeared
    updated("new: 0, changed: 3, deleted: 0")
    assert embedded == [5 + 4 + 6]
    (images / "ant" / "more" / "0.jpg").unlink()  # the only one in its folder, which stays
    trees.write_image(images / "dog" / "1.jpg", 1002)
    updated("new: 1, changed: 0, deleted: 1")
    shutil.rmtree(images / "bee")
    updated("new: 0, changed: 0, deleted: 2")
    assert embedded == [15, 1]


def test_folder_with_bad_images(weights, images, tmp_path, capsys):
    """The mean of the others; a folder without others is left out."""
    (images / "bee" / "2.jpg").write_bytes(b"no image")
    (images / "cat" / "more" / "0.jpg").write_bytes(b"no image")
    make(weights, images, tmp_path / "index", "--by-folder", "--skip-bad-images")
    assert "Indexed 5 folders" in capsys.readouterr().out
    (images / "bee" / "2.jpg").unlink()
    (result,) = found(tmp_path / "index", capsys, images / "bee" / "1.jpg", "-k", 5)
    similarities = {neighbour["path"]: neighbour["similarity"] for neighbour in result["neighbours"]}
    value = means(weights, [images / "bee"]) @ embeddings(weights, [str(images / "bee" / "1.jpg")]).T
    assert similarities[str(images / "bee")] == pytest.approx(float(value), abs=1e-5)


def test_index_of_folders_is_not_one_of_images(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "folders", "--by-folder")
    make(weights, images, tmp_path / "index")
    fails(lambda: make(weights, images, tmp_path / "folders"), capsys, "is an index of folders: update it with --by-")
    words = "is an index of images: update it without --by-folder, or make a new one"
    fails(lambda: make(weights, images, tmp_path / "index", "--by-folder"), capsys, words)


def test_threshold_of_images_is_not_used_for_folders(weights, images, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    calibrated(weights, tmp_path / "own")
    make(tmp_path / "own", images, tmp_path / "index", "--by-folder")
    capsys.readouterr()
    picture = ["--save", str(tmp_path / "folders.png")]
    search.main(["query", "--index", str(tmp_path / "index"), "--json", str(images), "--by-folder", *picture])
    out, err = capsys.readouterr()
    assert (
        "There is no threshold for this index, so no query can be refused: give --threshold or, if each folder" in err
    )
    results = json.loads(out)
    assert len(results) == 6 and all(r["match"] is None and len(r["neighbours"]) == 6 for r in results)
    assert all(r["neighbours"][0]["path"] == r["query"] for r in results)
    assert (tmp_path / "folders.png").stat().st_size > 10_000
    results = found(tmp_path / "index", capsys, images, "--by-folder", "--threshold", 0.99999)
    assert all(r["match"] and [n["path"] for n in r["neighbours"]] == [r["query"]] for r in results)


# The user's own files


def test_folder_of_photos_is_no_place_for_an_index(weights, images, tmp_path, capsys):
    for name in ("images-1.jpg", "vectors-1.jpg", "block-1.jpg", "images.json"):
        trees.write_image(images / name, 1)
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    for folder in (images, images / "ant"):
        words = f"{folder} is neither empty nor an index: choose another --out"
        fails(lambda folder=folder: make(weights, images, folder), capsys, words)
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before


def test_update_deletes_no_file_but_its_own(weights, images, tmp_path):
    index = tmp_path / "index"
    make(weights, images, index)
    own = {
        "images-20261128.jsonl",
        "vectors-7.float32",
        "block-diagram.svg",
        "images-list.txt",
        "vectors-1.png",
        "x.tmp",
    }
    for name in own:
        (index / name).write_text("")
    for number in range(2):
        trees.write_image(images / "bee" / "1.jpg", 1000 + number)
        make(weights, images, index)
    names = {path.name for path in index.iterdir()}
    assert names - own == {".lock", "images.json", "images-3.jsonl", "vectors-3.float32"} and own < names


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
def test_damage_of_any_file_is_noticed(weights, images, tmp_path, capsys, factory):
    """Its size and its times stay as they were."""
    make(weights, images, tmp_path / "index", "--index-factory", factory)
    for file in (tmp_path / "index").glob("*-1.*"):
        before, content = os.stat(file), file.read_bytes()
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        words = (
            f"{tmp_path / 'index'} is damaged, of an older version or no index ({file.name} has changed since it was"
        )
        fails(lambda: found(tmp_path / "index", capsys, images), capsys, words)
        file.write_bytes(content)
    copy = shutil.copytree(tmp_path / "index", tmp_path / "copy")
    assert found(copy, capsys, images) == found(tmp_path / "index", capsys, images)


def test_damage_of_any_byte_of_the_description_is_noticed(weights, images, tmp_path):
    """Also where it then says something else: that photos are taken as stored, say, or another crop."""
    make(weights, images, tmp_path / "index")
    file = tmp_path / "index" / "images.json"
    content = file.read_bytes()
    meant = json.loads(content)
    for place in range(len(content)):
        damaged = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        file.write_bytes(damaged)
        try:
            Index.open(tmp_path / "index")
        except ValueError as error:
            assert "is damaged, of an older version or no index" in str(error)
        else:  # white space, or a seal that says less about the files than they do themselves
            assert json.loads(damaged) == meant, damaged[place - 20 : place + 20]


@pytest.mark.parametrize("gone", ["moved", "empty", "hidden files only", "of an index of before"])
def test_disk_that_is_not_mounted_is_not_deleted(weights, images, tmp_path, capsys, gone):
    index, other = tmp_path / "index", trees.folder(tmp_path / "laptop", classes=("ant", "dog"), images=3)
    make(weights, images, index)
    if gone == "of an index of before":
        content = json.loads((index / "images.json").read_text())
        del content["folders"], content["files"], content["sha256"]
        (index / "images.json").write_text(json.dumps(content))
    make(weights, other, index)
    images.rename(tmp_path / "away")
    if gone in ("empty", "hidden files only"):
        images.mkdir()
    if gone == "hidden files only":
        (images / ".nomount").write_text("")
    trees.write_image(other / "dog" / "new.jpg", 77)
    capsys.readouterr()
    make(weights, other, index)
    out = capsys.readouterr().out
    assert "new: 1, changed: 0, deleted: 0\n" in out and "--drop-missing drops them" in out
    if gone != "of an index of before":
        assert f"{images} is gone or empty: its images (18) stay. --drop-missing drops them; if they have moved" in out
    assert len(found(index, capsys, other / "dog" / "new.jpg", "-k", 30)[0]["neighbours"]) == 25
    if images.exists():
        shutil.rmtree(images)
    (tmp_path / "away").rename(images)
    capsys.readouterr()
    make(weights, images, index)
    assert "new: 0, changed: 0, deleted: 0\n" in capsys.readouterr().out
    shutil.rmtree(images)
    make(weights, other, index, "--drop-missing")
    assert "new: 0, changed: 0, deleted: 18\n" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["disk", "home"])
def test_disk_below_another_folder_and_links_to_a_disk(weights, images, tmp_path, capsys, first):
    """Both folders were indexed, and the outer one is there and not empty; links to files are there, too."""
    home, disk = tmp_path / "home", tmp_path / "home" / "disk"
    trees.folder(home / "own", classes=("ant",), images=2)
    shutil.copytree(images, disk)
    (home / "links").mkdir()
    (home / "links" / "1.jpg").symlink_to(disk / "ant" / "1.jpg")
    for folder in (disk, home) if first == "disk" else (home, disk):  # which then has no image that is new
        make(weights, folder, tmp_path / "index")
    assert len(described(tmp_path / "index")["images"]) == 21
    disk.rename(tmp_path / "away")
    disk.mkdir()
    capsys.readouterr()
    make(weights, home, tmp_path / "index")
    out = capsys.readouterr().out
    assert "new: 0, changed: 0, deleted: 0\n" in out and f"{disk} is gone or empty: its images (19) stay" in out
    make(weights, home, tmp_path / "index", "--drop-missing")
    assert "deleted: 19\n" in capsys.readouterr().out


def test_folder_that_is_reached_through_a_link_counts_once(weights, images, tmp_path, capsys):
    link, inside = tmp_path / "link", tmp_path / "inside"
    link.symlink_to(images)
    inside.mkdir()
    (inside / "photos").symlink_to(images)
    make(weights, images, tmp_path / "index")
    for folder in (link, link / "ant", inside, f"{images}/../images"):
        capsys.readouterr()
        make(weights, folder, tmp_path / "index")
        assert "new: 0, changed: 0, deleted: 0\n" in capsys.readouterr().out
    make(weights, link, tmp_path / "other")
    make(weights, images, tmp_path / "other")
    assert described(tmp_path / "other")["images"] == described(tmp_path / "index")["images"]


def test_picture_is_not_written_over_a_query(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    photo = shutil.copy(images / "ant" / "1.jpg", tmp_path / "photo.jpg")
    (tmp_path / "link.jpg").symlink_to(photo)
    (tmp_path / "hard.jpg").hardlink_to(photo)
    before = (tmp_path / "photo.jpg").read_bytes()
    for name in ("photo.jpg", "link.jpg", "hard.jpg", "images/../photo.jpg"):
        save = str(tmp_path / name)
        query = ["query", "--index", str(tmp_path / "index"), str(photo), "--save", save]
        fails(lambda query=query: search.main(query), capsys, f"--save {save} would overwrite a query")
    assert (tmp_path / "photo.jpg").read_bytes() == before
    query = ["query", "--index", str(tmp_path / "index"), str(images), "--save", str(images / "bee" / "2.jpg")]
    fails(lambda: search.main(query), capsys, "would overwrite a query")


@pytest.mark.parametrize("kind", [[], ["--by-folder"]])
def test_picture_is_not_written_over_an_indexed_image(weights, images, tmp_path, capsys, kind):
    make(weights, images, tmp_path / "index", *kind)
    photo, save = shutil.copy(images / "ant" / "1.jpg", tmp_path / "photo.jpg"), images / "cat" / "2.jpg"
    (tmp_path / "link.jpg").symlink_to(save)
    before = save.read_bytes()
    for file in (save, tmp_path / "link.jpg"):
        query = ["query", "--index", str(tmp_path / "index"), str(photo), "--save", str(file)]
        fails(lambda query=query: search.main(query), capsys, f"--save {file} would overwrite an indexed image")
    assert save.read_bytes() == before


def test_bad_image_among_queries_spoils_its_own_answer_alone(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"x")
    paths = [str(images / "ant" / "1.jpg"), str(bad), str(images / "bee" / "2.jpg")]
    query = ["query", "--index", str(tmp_path / "index"), "-k", "1", *paths, "--threshold", "none"]
    capsys.readouterr()
    for flags in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            search.main([*query, *flags])
        out, err = capsys.readouterr()
        assert end.value.code == 1 and err.startswith(f"The image {bad} cannot be read") and err.count("\n") == 1
        assert out.count("1.0000  ") == 2 or [r.get("error", "")[:9] for r in json.loads(out)] == ["The image", "", ""]
    fails(lambda: search.main([*query[:5], str(bad)]), capsys, f"error: The image {bad} cannot be read", 1)


def test_names_forge_no_lines_of_an_answer(weights, images, tmp_path, capsys):
    name = "x\x1b[2J\x9b31m\r\u202e\n   1  1.0000  forged"
    for folder in (name, "ant"):
        trees.write_image(images / folder / f"{name}.jpg", 7)
    make(weights, images, tmp_path / "index")
    capsys.readouterr()
    picture = tmp_path / "a.png"
    search.main(["query", "--index", str(tmp_path / "index"), str(images / name), "-k", "3", "--save", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and [line.split()[0] for line in lines[2:]] == ["1", "2", "3"] and picture.exists()
    assert not any(re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", line) for line in lines) and r"\x1b[2J" in lines[0]
    (result,) = found(tmp_path / "index", capsys, images / name)
    assert result["query"] == str(images / name / f"{name}.jpg")  # JSON is of other programs, and escapes by itself
    fails(
        lambda: search.main(["query", "--index", str(tmp_path / "index"), str(tmp_path / f"{name}.jpg")]),
        capsys,
        r"x\x1b[2J",
    )
