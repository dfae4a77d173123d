"""search.py: the index, its neighbours, and what it refuses."""

import json
import os
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from test_report import RECORD

import dataset
import net
import search
from dataset import transforms
from proxy_anchor import checkpoint, runs
from proxy_anchor.embedding import Embedder
from proxy_anchor.index import Index

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("a.pth", "b.pth")):
        torch.manual_seed(seed)
        checkpoint.save(folder / name, net.create("resnet18", 8), RECORD)
    return folder


@pytest.fixture
def images(tmp_path):
    return trees.folder(tmp_path / "images", classes=("ant", "bee", "cat"))


def make(weights, images, out, *more, name="a.pth"):
    search.main(["index", "--resume", str(weights / name), "--images", str(images), "--out", str(out),
                 "--workers", "0", *more])  # fmt: skip


def found(out, capsys, *more):
    capsys.readouterr()
    search.main(["query", "--index", str(out), "--json", *map(str, more)])
    return json.loads(capsys.readouterr().out)


def described(out):
    return json.loads((out / "images.json").read_text())


def fails(run, capsys, words, code=1):
    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == code
    message = capsys.readouterr().err
    assert words in message and (code == 2 or message.count("\n") == 1), message


def embeddings(weights, paths, l2_norm=True):
    """Of these images, in float64 and, with l2_norm, of unit length, straight from the network."""
    network = net.create("resnet18", 8, l2_norm=l2_norm).eval()
    checkpoint.load(weights / "a.pth", network)
    images = dataset.ImageDataset(paths, np.zeros(len(paths), int), [""], transforms.evaluation(32))
    with torch.inference_mode():
        batch = network.normalize(torch.stack([image for image, _ in images]))
        x = network(batch).double()
    return x / x.norm(dim=1, keepdim=True) if l2_norm else x


def test_neighbours_are_those_of_brute_force(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    assert "0 images are in" in capsys.readouterr().out
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
    network = net.create("resnet18", 8, l2_norm=False)
    checkpoint.save(folder / "a.pth", network, RECORD | {"l2_norm": 0, "distance": "euclidean"})
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
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "distance", "0.0000", one]


def test_unknown_distance_is_damage(images, tmp_path, capsys):
    checkpoint.save(tmp_path / "a.pth", net.create("resnet18", 8), RECORD | {"distance": "manhattan"})
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
    assert lines[0] == one and lines[1].split() == ["1", "1.0000", one] and len(lines) == 19  # all there are
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
    assert "0 images are in" in (out := capsys.readouterr().out) and "new: 18, changed: 0, deleted: 0" in out
    trees.write_image(images / "ant" / "1.jpg", 1000)
    os.utime(images / "ant" / "2.jpg", ns=(1, 1))  # of the same size
    (images / "bee" / "3.jpg").unlink()
    trees.write_image(images / "dog" / "1.jpg", 1001)
    make(weights, images, index)
    out = capsys.readouterr().out
    assert "18 images are in" in out and "new: 1, changed: 2, deleted: 1" in out and "Indexed 3 images" in out
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
        patch.setattr("proxy_anchor.index.json.dumps", lambda *args, **more: sys.exit(9))  # when all else is written
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
    held = runs.lock(tmp_path / "index")
    words = (
        f"is being written by process {os.getpid()} on {socket.gethostname()}; end that first, or choose another --out"
    )
    fails(lambda: make(weights, images, tmp_path / "index"), capsys, words)
    held.close()


def test_another_checkpoint_is_refused(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    words = "was made with another checkpoint than"
    fails(lambda: make(weights, images, tmp_path / "index", name="b.pth"), capsys, words)
    other = ["query", "--index", str(tmp_path / "index"), str(images), "--resume", str(weights / "b.pth")]
    fails(lambda: search.main(other), capsys, words)


def test_checkpoint_that_has_moved_is_named(weights, images, tmp_path, capsys):
    (tmp_path / "here.pth").write_bytes((weights / "a.pth").read_bytes())
    make(tmp_path, images, tmp_path / "index", name="here.pth")
    (tmp_path / "here.pth").unlink()
    words = f"There is no checkpoint {tmp_path / 'here.pth'}, which made {tmp_path / 'index'}: say with --resume where"
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
    for more in ([], ["--nprobe", 1], ["--nprobe", 2], ["--nprobe", 4], ["--nprobe", 10**20]):
        results = found(tmp_path / "index", capsys, images, "-k", 18, *more)
        counts.append(sum(len(result["neighbours"]) for result in results))
    assert counts[0] == counts[1] < counts[2] < counts[3] == counts[4] == 18 * 18
    query = ["query", str(images), "--index"]
    fails(lambda: search.main([*query, str(tmp_path / "index"), "--nprobe", "0"]), capsys, "not positive", code=2)
    make(weights, images, tmp_path / "flat")
    words = "flat is an index Flat: only those with IVF in it take --nprobe"
    fails(lambda: search.main([*query, str(tmp_path / "flat"), "--nprobe", "2"]), capsys, words)


def test_recall_against_exact_search(tmp_path):
    """Exact search finds all, and a few of the cells not all of these random vectors; each finds itself first."""
    made = {"checkpoint": "a.pth", "weights": "0", "network": RECORD | {"embedding_size": 32}}
    x = torch.nn.functional.normalize(torch.randn(2000, 32))
    recalls = []
    for factory in ("Flat", "IVF64,Flat", "PCA16,Flat", "IVF4,PQ8x4"):
        index = search.Index.new(tmp_path, made, factory)
        index.update(set(), {str(i): [0, 0] for i in range(2000)}, x)
        recalls.append(index.recall())
        index = search.Index.open(tmp_path)
        assert [row[0] for row in index.search(x, 1)] == [(str(i), pytest.approx(1)) for i in range(2000)]
    assert recalls[0] == 1 and all(0.05 < recall < 0.95 for recall in recalls[1:])


def test_what_is_missing_or_damaged_is_an_error(weights, images, tmp_path, capsys, monkeypatch):
    query = ["query", "--index", str(tmp_path / "index"), str(images)]
    fails(lambda: search.main(query), capsys, "There is no index in")
    make(weights, images, tmp_path / "index")
    fails(lambda: search.main([*query, str(tmp_path / "no.jpg")]), capsys, "There is no ")
    fails(lambda: search.main([*query, "-k", "0"]), capsys, "argument --neighbours: 0 is not positive", code=2)
    (tmp_path / "empty").mkdir()
    fails(lambda: make(weights, tmp_path / "empty", tmp_path / "index"), capsys, "There are no images in")
    fails(lambda: make(weights, images, tmp_path / "index", "--split", "eval"), capsys, "what to index", code=2)
    fails(lambda: make(weights, images, tmp_path / "index", "--model", "resnet50"), capsys, "was trained with", code=2)
    fails(lambda: make(weights, images, weights / "a.pth"), capsys, "a.pth is a file: an index is written to a folder")
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
        f"{name} {value}": lambda content, name=name, value=value: content
        | {"made": content["made"] | {"network": content["made"]["network"] | {name: value}}}
        for name, value in [("model", "no"), ("model", 1), ("image_size", 0), ("image_size", "32"), ("l2_norm", None),
                            ("embedding_size", 4), ("embedding_size", -1), ("embedding_size", 10**30)]
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make(weights, trees.folder(folder / "images", classes=("ant", "bee", "cat")), folder / "index")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_description(damage, weights, whole, tmp_path, capsys):
    index = shutil.copytree(whole / "index", tmp_path / "index")
    (index / "images.json").write_text(json.dumps(DAMAGES[damage](described(index))))
    fails(lambda: found(index, capsys, whole / "images"), capsys, f"The index in {index} is damaged")
    fails(lambda: make(weights, whole / "images", index), capsys, f"{index} ")  # of another network, where not damaged


def test_images_with_damaged_stamps_are_embedded_again(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    content = described(tmp_path / "index")
    for path, stamp in zip(list(content["images"]), (None, 0, [], "text", [1])):
        content["images"][path] = stamp
    (tmp_path / "index" / "images.json").write_text(json.dumps(content))
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
