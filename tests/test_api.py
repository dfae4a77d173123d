"""The embedding as a library: `load` and `Search` give what search.py gives, in other processes and threads too."""

import copy
import inspect
import io
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import trees
from helpers import exports_onnx, make_index, query_index, threshold
from pages import REPOSITORY
from PIL import Image

import export
import net
import proxy_anchor
from dataset.folder import images_at
from proxy_anchor import ProxyAnchor, Search, api, checkpoint, load
from proxy_anchor.index.store import Index

RECORD = {"model": "resnet18", "embedding_size": 16, "image_size": 32, "l2_norm": 1, "orientation": "upright"}
THRESHOLD = threshold(0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint in three forms, one for Euclidean distance, and images."""
    pytest.importorskip("onnxruntime")
    if torch.__version__ < (2, 10):
        pytest.skip(exports_onnx.kwargs["reason"])
    folder = tmp_path_factory.mktemp("made")
    trees.folder(folder / "images", classes=("ant", "bee", "cat"))
    trees.save_checkpoint(folder / "a.pth", net.create("resnet18", 16), RECORD)
    euclidean = RECORD | {"l2_norm": 0, "distance": "euclidean"}
    trees.save_checkpoint(folder / "euclidean.pth", net.create("resnet18", 16, l2_norm=False), euclidean)
    for ending in ("onnx", "safetensors"):
        flags = ["--resume", folder / "a.pth", "--check", folder / "images", "--out", folder / f"a.{ending}"]
        export.main(list(map(str, flags)))
    return folder


@pytest.fixture
def paths(made):
    return sorted(images_at(made / "images"))


@pytest.fixture
def embed(made):
    return load(made / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.onnx", "a.safetensors", "euclidean.pth"])
def test_embeddings_and_answers_are_those_of_search_py(name, made, paths, tmp_path, capsys):
    """To the bit."""
    pytest.importorskip("faiss")
    make_index(made, made / "images", tmp_path / "index", name=name)
    rows = Index.open(tmp_path / "index").images
    stored = {path: vector for (path, _), vector in zip(rows, rows.vectors)}
    vectors = load(made / name)(paths)
    assert vectors.dtype == np.float32 and vectors.shape == (len(paths), 16) and len(paths) == len(stored)
    assert np.array_equal(vectors, np.stack([stored[path] for path in paths]))

    search = Search(tmp_path / "index")
    expected = query_index(tmp_path / "index", capsys, "-k", 4, *paths)
    for answer, result in zip(search.query_all(paths, 4), expected, strict=True):
        assert answer.query == result["query"] and result["match"] is None and answer.matches == answer.nearest
        assert answer.nearest == [(near["path"], near[search.measure]) for near in result["neighbours"]]
    reopened = pickle.loads(pickle.dumps(search))
    assert reopened.query(paths[3], 4) == search.query(paths[3], 4)


def test_one_image_or_several_of_every_kind(embed, paths):
    expected = embed(paths[:2])
    pixels = [np.asarray(Image.open(path)) for path in paths[:2]]
    for images in (map(str, paths[:2]), [Image.open(path) for path in paths[:2]], pixels, np.stack(pixels)):
        assert np.array_equal(embed(images), expected)
    alone = embed(paths[0])
    for image in (Image.open(paths[0]), pixels[0], [paths[0]]):
        assert np.array_equal(embed(image), alone) and alone.shape == (1, 16)
    gray = np.asarray(Image.open(paths[0]).convert("L"))
    assert np.array_equal(embed(gray), embed(np.dstack([gray] * 3)))
    assert embed([]).shape == (0, 16) and embed([]).dtype == np.float32


def test_more_images_than_a_batch(embed, paths):
    several = paths * (2 * api.BATCH // len(paths) + 1)
    batches = [embed(several[start : start + api.BATCH]) for start in range(0, len(several), api.BATCH)]
    assert len(batches) > 2 and np.array_equal(embed(several), np.concatenate(batches))


@pytest.mark.parametrize("orientation", ["upright", "stored"])
def test_orientation_of_the_checkpoint_is_obeyed(orientation, made, tmp_path):
    content = torch.load(made / "a.pth")
    content["network"]["orientation"] = orientation
    torch.save(content, tmp_path / "b.pth")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    (exif := Image.Exif())[274] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    embed = load(tmp_path / "b.pth")
    expected = embed(np.asarray(upright if orientation == "upright" else image))
    assert np.array_equal(embed(tmp_path / "turned.png"), expected)
    assert np.array_equal(embed(Image.open(tmp_path / "turned.png")), expected)
    assert not np.array_equal(embed(np.asarray(image)), embed(np.asarray(upright)))


def test_damaged_image_is_an_error(embed, paths):
    """One that Pillow has opened, but cannot read."""
    with open(paths[0], "rb") as file:
        cut = io.BytesIO(file.read()[:-200])
    with pytest.raises(OSError):
        embed(Image.open(cut))


def test_wrong_images_are_errors(embed, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    for image, error, words in (
        (tmp_path / "none.jpg", ValueError, "none.jpg is missing"),
        (str(tmp_path / "bad.jpg"), ValueError, "bad.jpg cannot be read"),
        (np.zeros((8, 8, 3)), ValueError, r"uint8 pixels \(H, W, 3\) or \(H, W\), found float64 \(8, 8, 3\)"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"found uint8 \(8, 8, 4\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"found uint8 \(0, 8, 3\)"),
        (torch.zeros(3, 8, 8), TypeError, "found Tensor"),
        ([b"bytes"], TypeError, "found bytes"),
    ):
        with pytest.raises(error, match=words):
            embed(image)


def child(embed, paths, vectors):
    assert np.array_equal(embed(paths), vectors)
    return embed(paths[0]).tolist()


@pytest.mark.parametrize("name", ["a.pth", "a.onnx"])
def test_pickled_spawned_and_in_threads(name, made, paths):
    embed = load(made / name)
    vectors = embed(paths)
    copied = pickle.loads(pickle.dumps(embed))
    assert np.array_equal(copied(paths), vectors)
    assert (copied.spec, copied.identity, copied.calibration) == (embed.spec, embed.identity, None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(child, (embed, paths, vectors)) == embed(paths[0]).tolist()
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(found, vectors) for found in threads.map(embed, [paths] * 12))


def test_random_state_stays(made, paths, tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load(made / "a.safetensors")(paths)
    assert torch.equal(torch.get_rng_state(), state)


def test_recorded_threshold(made, paths, tmp_path, capsys):
    pytest.importorskip("faiss")
    (tmp_path / "a.pth").write_bytes((made / "a.pth").read_bytes())
    checkpoint.save_calibration(tmp_path / "a.pth", THRESHOLD, checkpoint.Checkpoint(tmp_path / "a.pth").identity)
    assert load(tmp_path / "a.pth").calibration == THRESHOLD
    make_index(tmp_path, made / "images", tmp_path / "index")
    search = Search(tmp_path / "index")
    assert search.threshold == 0.5
    nearest = search.query(paths[0], 18).nearest
    search.threshold = nearest[4][1]
    assert search.query(paths[0], 18).matches == nearest[:5]
    assert pickle.loads(pickle.dumps(search)).query(paths[0], 18).matches == nearest[:5]
    (result,) = query_index(tmp_path / "index", capsys, "-k", 18, "--threshold", search.threshold, paths[0])
    assert [(near["path"], near["similarity"]) for near in result["neighbours"]] == nearest[:5]
    content = checkpoint.read(tmp_path / "a.pth") | {"threshold": {"asked_far": 0.01, "dataset": "cub"}}
    torch.save(content, tmp_path / "a.pth")  # one of an earlier version: an error where it is asked for
    embed, search = load(tmp_path / "a.pth"), Search(tmp_path / "index")
    assert len(embed(paths)) == len(paths)
    for asked in (lambda: embed.calibration, lambda: search.query(paths[0])):
        with pytest.raises(ValueError, match="has a threshold for pairs of images"):
            asked()
    search.calibration, search.threshold = None, 0.5
    assert search.query(paths[0], 18).nearest == nearest
    make_index(tmp_path, made / "images", tmp_path / "folders", "--by-folder")
    assert Search(tmp_path / "folders").threshold is None  # it is one for images


def test_probability_is_that_of_the_gap_to_the_second_thing(made, paths, tmp_path):
    pytest.importorskip("faiss")
    (tmp_path / "a.pth").write_bytes((made / "a.pth").read_bytes())
    recorded = threshold(0.0, odds=(-1.0, 20.0))
    checkpoint.save_calibration(tmp_path / "a.pth", recorded, checkpoint.Checkpoint(tmp_path / "a.pth").identity)
    make_index(tmp_path, made / "images", tmp_path / "index")
    search = Search(tmp_path / "index")
    answer = search.query(paths[0], len(paths))
    gap = answer.things[0].best - answer.things[1].best
    assert answer.probability == pytest.approx(1 / (1 + math.exp(1 - 20 * gap)))
    of_one_thing = [near for near in answer.nearest if os.path.dirname(near[0]) == answer.things[0].folder]
    last = of_one_thing[0][1] - of_one_thing[-1][1]  # the second thing is no nearer than the last entry
    assert search.probability(of_one_thing) == pytest.approx(1 / (1 + math.exp(1 - 20 * last)))
    assert search.query(paths[0], 1).probability == answer.probability  # whatever is listed
    search.threshold = 1.1
    assert not search.query(paths[0]).matches and search.query(paths[0]).probability == answer.probability
    assert replace(recorded, odds=()).probability(0.1) is None


def test_pickled_search_finds_its_files_from_another_folder(made, paths, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    make_index(made, made / "images", tmp_path / "index")
    shutil.copy(made / "a.pth", tmp_path / "moved.pth")
    monkeypatch.chdir(tmp_path)
    search = Search("index", checkpoint="moved.pth")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert pickle.loads(pickle.dumps(search)).query(paths[0]) == search.query(paths[0])


def test_query_is_of_one_image(made, paths, tmp_path):
    pytest.importorskip("faiss")
    make_index(made, made / "images", tmp_path / "index")
    search = Search(tmp_path / "index")
    assert search.query(Image.open(paths[0])) == search.query([paths[0]])._replace(query="")
    with pytest.raises(ValueError, match="Expected one image, found 2: query_all takes several"):
        search.query(paths[:2])
    with pytest.raises(FileNotFoundError, match="There is no index"):
        Search(tmp_path)
    with pytest.raises(FileNotFoundError, match="other.pth"):
        Search(tmp_path / "index", checkpoint=tmp_path / "other.pth")
    with pytest.raises(ValueError, match="was built with another checkpoint"):
        Search(tmp_path / "index", checkpoint=made / "euclidean.pth")


def test_published_checkpoints_need_their_network(made, paths, tmp_path):
    torch.save({"model_state_dict": torch.load(made / "a.pth")["model_state_dict"]}, tmp_path / "a.pth")
    embed = load(tmp_path / "a.pth", backbone="resnet18", embedding_size=16)
    assert embed.spec.image_size == 224 and embed(paths[:1]).shape == (1, 16)
    with pytest.raises(ValueError, match="does not record its network: give backbone=... and embedding_size=..."):
        load(tmp_path / "a.pth", backbone="resnet18")
    with pytest.raises(ValueError, match="was trained with embedding_size 16, not 8"):
        load(made / "a.pth", embedding_size=8)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pth")


def test_another_module_of_the_name_is_named(tmp_path):
    (tmp_path / "dataset.py").touch()
    code = f"import sys; sys.path += [{str(REPOSITORY)!r}]; from proxy_anchor import load"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"ImportError: {tmp_path / 'dataset.py'} hides dataset/ of {REPOSITORY}" in done.stderr


class Module(torch.nn.Module):
    """As a LightningModule: the loss is a part of it, so that its proxies train, move and are saved with it."""

    def __init__(self):
        super().__init__()
        self.network, self.criterion = torch.nn.Linear(6, 4), ProxyAnchor(3, 4)

    def training_step(self, batch, _):
        x, y = batch
        return self.criterion(self.network(x), y)

    def configure_optimizers(self):
        groups = [
            {"params": self.network.parameters(), "lr": 1e-2},
            {"params": self.criterion.parameters(), "lr": 1e-2 * self.criterion.proxy_lr},
        ]
        return torch.optim.AdamW(groups)


def test_loss_in_the_loop_of_a_framework(tmp_path):
    module = Module()
    before = copy.deepcopy(module.criterion.proxies)
    optimizer = module.configure_optimizers()
    y = torch.arange(30) % 3
    x = torch.eye(6)[y] + 0.1 * torch.randn(30, 6)
    losses = []
    for step in range(60):
        loss = module.training_step((x, y), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and not torch.equal(before, module.criterion.proxies)
    torch.save(module.state_dict(), tmp_path / "last.ckpt")
    resumed = Module()
    resumed.load_state_dict(torch.load(tmp_path / "last.ckpt"))
    assert torch.equal(resumed.training_step((x, y), 0), module.training_step((x, y), 0))
    assert proxy_anchor.recall_at_k(module.network(x).detach().numpy(), y.tolist(), [1]) == {1: 1.0}


def test_loss_takes_embeddings_and_labels_alone():
    """It compares embeddings with proxies, so a miner's pairs have no place in it; rows are passed alone."""
    criterion, x, y = ProxyAnchor(3, 4), torch.randn(9, 4), torch.arange(9) % 3
    with pytest.raises(TypeError):
        criterion(x, y, (torch.tensor([0]), torch.tensor([3]), torch.tensor([1])))
    rows = torch.tensor([0, 3, 4])
    assert criterion(x[rows], y[rows]).ndim == 0


def test_signatures_of_the_page():
    """docs/api.md shows each public name with the parameters and defaults that it has."""
    text = (REPOSITORY / "docs" / "api.md").read_text()
    shown = re.findall(r"^### `([\w.]+)(\(.*\))`$", text, re.MULTILINE)
    objects = vars(api) | {name: getattr(proxy_anchor, name) for name in proxy_anchor.__all__}
    for name, parameters in shown:
        value = objects[name.split(".")[0]]
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        signature = inspect.signature(value)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
        expected = str(signature.replace(parameters=plain, return_annotation=signature.empty))
        assert parameters.replace('"', "'") == expected, name
    assert {name.split(".")[0] for name, _ in shown} >= {*proxy_anchor.PUBLIC, "ImageEmbedder"}
