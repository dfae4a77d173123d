"""search.py: the index, its neighbours, and what it refuses."""

import json
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
from dataset.transforms import Normalize
from proxy_anchor import checkpoint, evaluation

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


def fails(run, capsys, words, code=1):
    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == code
    message = capsys.readouterr().err
    assert words in message and (code == 2 or message.count("\n") == 1), message


def embeddings(weights, paths):
    """Of these images, in float64 and unit length, straight from the network."""
    network = net.create("resnet18", 8).eval()
    checkpoint.load(weights / "a.pth", network)
    images = dataset.ImageDataset(paths, np.zeros(len(paths), int), [""], transforms.evaluation(32))
    with torch.inference_mode():
        batch = Normalize(network.bgr)(torch.stack([image for image, _ in images]))
        x = network(batch).double()
    return x / x.norm(dim=1, keepdim=True)


def test_neighbours_are_those_of_brute_force(weights, images, tmp_path, capsys):
    make(weights, images, tmp_path / "index")
    assert "0 images are in" in capsys.readouterr().out
    indexed = json.loads((tmp_path / "index" / "images.json").read_text())["images"]
    assert len(indexed) == 18 and all(path.startswith("/") for path in indexed)
    results = found(tmp_path / "index", capsys, images / "ant", "-k", 5)
    similarity = embeddings(weights, [r["query"] for r in results]) @ embeddings(weights, indexed).T
    for row, result in zip(similarity, results, strict=True):
        expected, order = row.topk(5)
        assert [n["similarity"] for n in result["neighbours"]] == pytest.approx(expected.tolist(), abs=1e-5)
        assert [n["path"] for n in result["neighbours"]] == [indexed[i] for i in order]
        assert result["neighbours"][0]["path"].endswith(result["query"].split("/")[-1])  # itself


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


def test_picture_of_an_image_that_is_gone(weights, images, tmp_path, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **more: figures.append(figure))
    make(weights, images, tmp_path / "index")
    (images / "bee" / "3.jpg").unlink()
    (images / "bee" / "4.jpg").write_bytes(b"no image")
    query = ["query", "--index", str(tmp_path / "index"), str(images / "bee" / "2.jpg"), "-k", "18"]
    search.main([*query, "--save", str(tmp_path / "neighbours.png")])
    named = [ax.texts[0].get_text() for ax in figures[0].axes if ax.texts]
    framed = [ax for ax in figures[0].axes if ax.axison]
    assert set(named) <= {"3.jpg", "4.jpg"} and len(named) == len(framed) > 0


def test_images_are_added_without_embedding_the_others(weights, images, tmp_path, capsys, monkeypatch):
    embedded = []
    embed = evaluation.embed
    monkeypatch.setattr(evaluation, "embed", lambda *args: embedded.append(args[2]) or embed(*args))
    make(weights, images, tmp_path / "index")
    before = found(tmp_path / "index", capsys, images / "cat", "-k", 3)
    trees.folder(tmp_path / "more", classes=("ant", "dog"))
    make(weights, tmp_path / "more", tmp_path / "index")
    make(weights, images, tmp_path / "index")  # nothing is new
    assert embedded == [18, 6, 12]
    content = json.loads((tmp_path / "index" / "images.json").read_text())
    assert len(content["images"]) == len(set(content["images"])) == 30
    assert [path.name for path in (tmp_path / "index").glob("*.faiss")] == ["vectors-30.faiss"]
    after = found(tmp_path / "index", capsys, images / "cat", "-k", 30)
    old = [[n for n in result["neighbours"] if str(images) in n["path"]][:3] for result in after]
    assert old == [result["neighbours"] for result in before]


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


def test_recall_against_exact_search(weights, images, tmp_path, capsys):
    """Exact search finds all, and half of the cells not all of these random vectors."""
    made = {"checkpoint": "a.pth", "sha256": "0", "network": RECORD | {"embedding_size": 32}}
    x = torch.nn.functional.normalize(torch.randn(2000, 32))
    recalls = []
    for factory in ("Flat", "IVF64,Flat"):
        index = search.Index.new(tmp_path, made, factory)
        index.add([str(i) for i in range(2000)], x)
        recalls.append(index.recall(x))
    assert recalls[0] == 1 and 0.05 < recalls[1] < 0.9


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
    (file,) = (tmp_path / "index").glob("*.faiss")
    whole = file.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2]):
        file.write_bytes(data)
        fails(lambda: search.main(query), capsys, "is damaged")
    (tmp_path / "index" / "images.json").write_text("{}")
    fails(lambda: search.main(query), capsys, "is damaged")
    monkeypatch.setitem(sys.modules, "faiss", None)
    fails(lambda: make(weights, images, tmp_path / "new"), capsys, "pip install faiss-cpu")


def test_bad_images_are_left_out(weights, images, tmp_path, capsys):
    (images / "bee" / "2.jpg").write_bytes(b"no image")
    fails(lambda: make(weights, images, tmp_path / "index"), capsys, "2.jpg cannot be read")
    make(weights, images, tmp_path / "index", "--skip-bad-images")
    assert "Indexed 17 images" in capsys.readouterr().out
