"""export.py: its files give the network's embeddings, wherever they are loaded; what is refused."""

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import threading

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from helpers import exports_onnx, fails
from pages import REPOSITORY, blocks
from PIL import Image

import dataset
import evaluate
import export
import hubconf
import net
import search
from dataset import transforms
from dataset.files import read_image
from proxy_anchor import checkpoint, exported
from proxy_anchor.report import card
from proxy_anchor.spec import NetworkSpec

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
safetensors = pytest.importorskip("safetensors")
pytestmark = exports_onnx

RECORD = {"model": "resnet18", "embedding_size": 16, "image_size": 32, "l2_norm": 1, "crop": 0.875}
MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16")
SIZES = ((33, 47), (90, 31), (37, 201), (64, 64), (5, 3), (1, 1), (120, 81), (36, 36))
USE = REPOSITORY / "docs" / "use.md"


def odd_image(path, number, mode=None):
    """Noise on a colour of its own, in a size and a mode that nobody asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    pixels = random.integers(0, 256, 3) * 0.7 + random.integers(0, 76, (height, width, 3))
    image, mode = Image.fromarray(pixels.astype(np.uint8)), mode or MODES[number // 3 % len(MODES)]
    gray = Image.fromarray((32768 + pixels[..., 0] * 125).astype(np.uint16))
    (gray if mode == "I;16" else image.convert(mode)).save(path, format="TIFF")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and its exports, and a folder of odd images: of 3 test classes, 24 images."""
    folder = tmp_path_factory.mktemp("export")
    for number in range(40):
        odd_image(folder / "images" / f"class {number // 8}" / f"{number}.tif", number)
    torch.manual_seed(0)
    trees.save_checkpoint(folder / "a.pth", net.create("resnet18", 16), RECORD)
    for ending in exported.ENDINGS:
        run(folder, folder / f"a{ending}")
        (folder / "a-card.md").rename(folder / f"a{ending}.md")  # the next would take its place
    return folder


def run(made, out, *more, resume="a.pth", data=True):
    data = ["--dataset", "folder", "--data-root", str(made / "images")] if data else []
    export.main(["--resume", str(made / resume), "--out", str(out), *data, *map(str, more)])


@pytest.fixture(scope="module")
def pixels(made):
    """All images as evaluation sees them: (40, 3, 32, 32)."""
    paths = sorted(map(str, (made / "images").rglob("*.tif")))
    return torch.stack([transforms.Evaluation(32)(read_image(path)) for path in paths])


def by_hand(path, pixels, bgr=False, unit=True):
    """Embeddings in float64, straight from the layers of the network, normalized as its weights expect."""
    content = torch.load(path, weights_only=True)
    network = net.create(content["network"]["model"], content["network"]["embedding_size"], l2_norm=False)
    network.load_state_dict(content["model_state_dict"])
    network.double().eval()
    if bgr:
        x = pixels.double()[:, [2, 1, 0]] - torch.tensor([104.0, 117, 128]).view(3, 1, 1)
    else:
        x = pixels.double() / 255 - torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
        x = x / torch.tensor([0.229, 0.224, 0.225]).double().view(3, 1, 1)
    with torch.inference_mode():
        embeddings = network(x)
    return F.normalize(embeddings) if unit else embeddings


def by_onnxruntime(path, pixels, batch=64):
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(
        np.concatenate([session.run(["embeddings"], {"images": part.numpy()})[0] for part in pixels.split(batch)])
    )


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_onnx_gives_the_embeddings_in_every_batch(batch, made, pixels):
    found = by_onnxruntime(made / "a.onnx", pixels.repeat(2, 1, 1, 1)[:batch], batch)
    expected = by_hand(made / "a.pth", pixels.repeat(2, 1, 1, 1)[:batch])
    assert found.dtype == torch.float32 and found.shape == (batch, 16)
    assert (found - expected).abs().max() < 1e-5
    assert batch == 1 or expected.std(dim=0).max() > 1e-3  # not one and the same


def test_safetensors_hold_the_weights(made):
    state = safetensors.safe_open(made / "a.safetensors", "pt")
    own = torch.load(made / "a.pth", weights_only=True)["model_state_dict"]
    assert set(state.keys()) == set(own) and all(torch.equal(state.get_tensor(name), own[name]) for name in own)


def test_bgr_and_embeddings_of_any_length_stay_what_they_are(made, tmp_path, capsys):
    """BN-Inception takes blue first, from 0 to 255; a network for Euclidean distance is left as it is."""
    contract = RECORD | {"model": "bn_inception", "image_size": 64, "l2_norm": 0, "distance": "euclidean"}
    trees.save_checkpoint(tmp_path / "b.pth", net.create("bn_inception", 16, l2_norm=False), contract)
    run(tmp_path, tmp_path / "b.onnx", "--check", made / "images", resume="b.pth", data=False)
    pixels = torch.stack([transforms.Evaluation(64)(read_image(path)) for path in map(str, made.rglob("?.tif"))])
    expected = by_hand(tmp_path / "b.pth", pixels, bgr=True, unit=False)
    assert ((by_onnxruntime(tmp_path / "b.onnx", pixels) - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
    assert (expected.norm(dim=1) - 1).abs().min() > 1e-2
    assert exported.read(tmp_path / "b.onnx")["normalization"] == {
        "channels": "BGR",
        "largest": 255,
        "mean": [104.0, 117.0, 128.0],
        "std": [1.0, 1.0, 1.0],
    }
    assert "Not measured: the export was checked" in (tmp_path / "b-card.md").read_text()


def test_embeddings_for_cosine_are_of_unit_length(made, pixels):
    network = net.create("resnet18", 16, l2_norm=False)
    checkpoint.load(made / "a.pth", network)
    found = exported.InferenceNet(network, "cosine")(pixels)
    assert (found - by_hand(made / "a.pth", pixels)).abs().max() < 1e-5


@pytest.mark.parametrize("ending", exported.ENDINGS)
def test_changed_mean_is_refused(ending, made, tmp_path, monkeypatch, capsys):
    """Whatever makes the file's embeddings others than the checkpoint's."""
    save = exported.save

    def changed(path, ending, served, *more):
        if ending == ".safetensors":
            served.network.model.conv1.weight.data[:, 0] *= 1.1
        served.network.normalize.mean += 0.05
        save(path, ending, served, *more)

    monkeypatch.setattr(exported, "save", changed)
    fails(lambda: run(made, tmp_path / f"a{ending}"), capsys, "at most 1e-05 are allowed")
    assert not list(tmp_path.iterdir())


def test_embeddings_that_are_not_finite_are_refused(made, tmp_path, capsys):
    network = net.create("resnet18", 16)
    network.model.embedding.bias.data[0] = torch.nan
    trees.save_checkpoint(tmp_path / "a.pth", network, RECORD)
    out = tmp_path / "a.safetensors"
    fails(lambda: run(tmp_path, out, "--check", made / "images", data=False), capsys, "differ by up to nan")
    assert not out.exists()


def test_file_is_run_in_batches_of_several_sizes(made, tmp_path, monkeypatch, capsys):
    """Also where there are fewer images than the largest batch has."""
    sizes, forward = [], exported.InferenceNet.forward
    monkeypatch.setattr(exported.InferenceNet, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    run(made, tmp_path / "a.safetensors", "--check", made / "images" / "class 2", data=False)
    assert set(sizes) == {1, 7, 64} and "8 images" in capsys.readouterr().out


def test_difference_is_of_angles_and_of_lengths():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert exported.difference(a, a) == pytest.approx(0, abs=1e-15)
    assert exported.difference(a, a * 1.1) == pytest.approx(1 - 1 / 1.1)
    assert exported.difference(torch.tensor([[1.0, 1.0]]), a[1:]) == pytest.approx(2**0.5 - 1)
    assert exported.difference(torch.tensor([[0.0, 2.0]]), a[1:] * 2) == pytest.approx(1)


def test_evaluation_of_the_files_is_that_of_the_checkpoint(made, capsys):
    data = ["--dataset", "folder", "--data-root", str(made / "images"), "--workers", "0"]
    expected = evaluate.main([*data, "--resume", str(made / "a.pth")])
    assert 0.2 < expected["R@1"] < 1
    for ending in (".onnx", ".safetensors"):
        assert evaluate.main([*data, "--resume", str(made / f"a{ending}")]) == pytest.approx(expected, abs=1e-9)
    assert "onnxruntime runs it" in capsys.readouterr().out
    assert f"| a.onnx | {100 * expected['R@1']:.2f} |" in (made / "a.onnx.md").read_text()


@pytest.mark.parametrize("ending", [".onnx", ".safetensors"])
def test_search_with_a_file(ending, made, tmp_path, capsys):
    pytest.importorskip("faiss")
    neighbours = {}
    for name in ("a.pth", f"a{ending}"):
        index = str(tmp_path / name)
        images = ["--images", str(made / "images"), "--workers", "0"]
        search.main(["index", "--resume", str(made / name), *images, "--out", index])
        capsys.readouterr()
        search.main(["query", "--index", index, str(made / "images" / "class 1"), "--json"])
        neighbours[name] = json.loads(capsys.readouterr().out)
    for one, other in zip(*neighbours.values(), strict=True):
        assert [n["path"] for n in one["neighbours"]] == [n["path"] for n in other["neighbours"]]
        similarities = [[n["similarity"] for n in result["neighbours"]] for result in (one, other)]
        assert similarities[0] == pytest.approx(similarities[1], abs=1e-5)
    fails(
        lambda: search.main(["query", "--index", index, "--resume", str(made / "a.pth"), str(made / "images")]),
        capsys,
        "another",
    )


def test_record(made, tmp_path, capsys):
    """What the file is of, and how it is used; a threshold too, which search.py then takes."""
    threshold = helpers.threshold(0.75)
    (tmp_path / "a.pth").write_bytes((made / "a.pth").read_bytes())
    checkpoint.save_calibration(tmp_path / "a.pth", threshold, checkpoint.Checkpoint(tmp_path / "a.pth").identity)
    run(tmp_path, tmp_path / "a.safetensors", "--check", made / "images", data=False)
    assert checkpoint.Checkpoint(tmp_path / "a.safetensors").calibration == threshold
    assert (
        "by the size of the gallery: similarity 0.7500 for 20 images (0.7500 for 10)."
        in (tmp_path / "a-card.md").read_text()
    )
    for ending in (".onnx", ".safetensors"):
        record = exported.read(made / f"a{ending}")
        for held in ("onnx", "session", "sha256", "model_state_dict"):
            record.pop(held, None)
        assert checkpoint.Checkpoint(made / f"a{ending}").spec == NetworkSpec(**RECORD)
        assert record["source"] == checkpoint.Checkpoint(made / "a.pth").identity and "threshold" not in record
        assert record["preprocessing"] == {"resize": 36, "interpolation": "bilinear", "crop": 32}
        assert record["normalization"]["mean"] == [0.485, 0.456, 0.406] and "torch" in record["versions"]


def test_no_file_holds_a_pickle_or_a_path(made, monkeypatch, capsys):
    """They load where nothing can be unpickled."""
    model = onnx.load(made / "a.onnx")
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    for ending in exported.ENDINGS:
        content = (made / f"a{ending}").read_bytes()
        assert str(REPOSITORY).encode() not in content and b"site-packages" not in content

    def never(*args, **more):
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    exported.read(made / "a.safetensors")
    exported.OnnxNet(made / "a.onnx", (made / "a.onnx").read_bytes(), 32, 16)


def test_fp16_says_what_it_costs(made, tmp_path, pixels, capsys):
    for ending in (".onnx", ".safetensors"):
        run(made, out := tmp_path / f"half{ending}", "--fp16")
        printed = capsys.readouterr().out
        assert "Half precision costs" in printed and "\ncheckpoint" in printed and f"\nhalf{ending}" in printed
        assert "Half precision costs" in (tmp_path / "half-card.md").read_text()
        assert out.stat().st_size < 0.52 * (made / f"a{ending}").stat().st_size
    expected, found = by_hand(made / "a.pth", pixels), by_onnxruntime(tmp_path / "half.onnx", pixels)
    assert 1e-6 < (found - expected).abs().max() < 1e-2  # rounded, and by no more than that
    data = ["--dataset", "folder", "--data-root", str(made / "images"), "--workers", "0"]
    rows = [evaluate.main([*data, "--resume", str(tmp_path / f"half{e}")]) for e in (".onnx", ".safetensors")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-9)


@pytest.mark.parametrize(
    "geometry, tolerance",
    [
        ({}, 1),
        ({"crop": 1.0}, 1),
        ({"interpolation": "bilinear"}, 0),
        ({"interpolation": "bicubic", "crop": 0.95}, 0),
        ({"interpolation": "bicubic", "crop_mode": "squash"}, 0),
    ],
)
@pytest.mark.parametrize("size", [32, 224])
def test_pillow_on_the_page_sees_images_as_evaluation_does(geometry, tolerance, size, tmp_path):
    """With networks that resize as published, within 1 of 255; with those of timm, exactly."""
    names = {}
    exec(page_on_loading().split("session =")[0], names)
    recipe, seen = transforms.recipe(size, **geometry), transforms.Evaluation(size, **geometry)
    differences = []
    for number in range(2 * len(SIZES)):
        odd_image(path := tmp_path / "image", number, MODES[number % (len(MODES) - 1)])  # 8 bits
        ours, theirs = seen(read_image(str(path))).numpy().astype(int), names["pixels"](path, **recipe).astype(int)
        assert ours.shape == theirs.shape == (3, size, size)
        differences.append(np.abs(ours - theirs))
    assert max(difference.max() for difference in differences) <= tolerance
    assert np.mean([(difference > 0).mean() for difference in differences]) < 0.05


def page_on_loading():
    (program,) = [block for block in blocks(USE, "python") if "onnxruntime" in block]
    return program


def test_file_is_used_without_torch(made, tmp_path):
    """The page's lines in a fresh process that has onnxruntime, numpy and Pillow alone, and no network."""
    (tmp_path / "model.onnx").write_bytes((made / "a.onnx").read_bytes())
    for number in (1, 2):
        odd_image(tmp_path / f"{number}.jpg", number, "RGB")
    program = (
        "import socket, sys\nsys.modules |= dict.fromkeys(('torch', 'torchvision', 'onnx', 'safetensors'))\n"
        f"socket.socket = None\n{page_on_loading()}\nnp.save('out.npy', embeddings); np.save('in.npy', images)\n"
        "assert abs(similarity - (embeddings[0] * embeddings[1]).sum()) < 1e-6\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = by_hand(made / "a.pth", torch.from_numpy(np.load(tmp_path / "in.npy")))
    assert np.abs(np.load(tmp_path / "out.npy") - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("ending", exported.ENDINGS)
def test_lines_of_the_card_run(ending, made, tmp_path, monkeypatch):
    text = (made / f"a{ending}.md").read_text()
    program = text.split("```python\n")[1].split("```")[0]
    assert len(program.splitlines()) == 5
    assert hashlib.sha256((made / f"a{ending}").read_bytes()).hexdigest() in text
    (tmp_path / "proxy-anchor").symlink_to(REPOSITORY)
    (tmp_path / f"a{ending}").write_bytes((made / f"a{ending}").read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(program, names := {})
    assert names["embeddings"].shape == (1, 16)


def test_card_says_what_is_known_of_the_training(tmp_path):
    (tmp_path / "folder_resnet18_best_results.txt").write_text("Best Epoch: 3\nBest Recall@1: 75.0000\n")
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "folder", "pretrained": "none", "device": "x"}))
    settings, results = card.training(tmp_path / "folder_resnet18_best.pth")
    assert settings == {"dataset": "folder", "pretrained": "none"}
    assert "Measured during training, not by the export: Best Epoch: 3, Best Recall@1: 75.0000" in results
    assert card.training(tmp_path / "last.pth") == ({}, "")


def test_licenses(made):
    assert "unknown" in net.license_of("bn_inception") and "torchvision" in net.license_of("resnet50")
    assert f"pretrained weights: {net.license_of('resnet18')}" in (made / "a.onnx.md").read_text()
    pytest.importorskip("timm")
    assert net.license_of("vit_small_patch16_224.augreg_in21k_ft_in1k") == "apache-2.0"
    assert net.license_of("vit_small_patch16_dinov3.lvd1689m") == "dinov3-license"


def test_usage_errors(made, tmp_path, capsys):
    out = tmp_path / "a.onnx"
    for more, words in (
        (["--model", "resnet50"], "--model: the checkpoint was trained with resnet18"),
        (["--embedding-size", 8], "--embedding-size: the checkpoint was trained with 16"),
        (["--backbone-only"], "unrecognized arguments: --backbone-only"),
        (["--fp16", "--check", made], "argument --fp16"),
        (["--check", ""], "argument --check: expected a path"),
    ):
        fails(lambda more=more: run(made, out, *more), capsys, words, code=2)
    fails(lambda: run(made, tmp_path / "a.tflite"), capsys, "a.tflite must end in .onnx or .safetensors", code=2)
    fails(lambda: run(made, out, resume="a.onnx"), capsys, "exported already", code=2)
    fails(lambda: run(made, out, "--check", tmp_path, data=False), capsys, "no images in")
    fails(lambda: run(made, tmp_path / "none" / "a.onnx"), capsys, "there is no folder", code=2)
    assert not list(tmp_path.iterdir())


def test_what_is_refused_for_files(made, capsys):
    def evaluated(name, *more):
        data = ["--dataset", "folder", "--data-root", str(made / "images"), "--workers", "0"]
        return lambda: evaluate.main([*data, "--resume", str(made / name), *more])

    for name in ("a.onnx", "a.safetensors"):
        fails(evaluated(name, "--calibrate"), capsys, "calibrate it and export it again", code=2)
        fails(evaluated(name, "--model", "resnet50"), capsys, "trained with resnet18", code=2)
        fails(evaluated(name, "--embedding-size", "8"), capsys, "trained with 16", code=2)
    fails(evaluated("a.onnx", "--amp", "bf16"), capsys, "runs in float32 on the CPU: --amp is for checkpoints")
    fails(evaluated("none.onnx"), capsys, "There is no ")


@pytest.mark.parametrize(
    "package, ending",
    [("onnx", ".onnx"), ("onnxscript", ".onnx"), ("onnxruntime", ".onnx"), ("safetensors", ".safetensors")],
)
def test_missing_packages_are_named(package, ending, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    fails(lambda: run(made, tmp_path / f"a{ending}"), capsys, "pip install ")
    if package in ("onnxruntime", "safetensors"):
        fails(lambda: evaluate.main(["--resume", str(made / f"a{ending}")]), capsys, f"pip install {package}")
    assert not list(tmp_path.iterdir())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damages(made, folder, ending):
    """Files with this ending that are not what they should be."""
    good = (made / f"a{ending}").read_bytes()
    yield "empty", b""
    yield "garbage", b"\x80\x02" + bytes(range(256)) * 10
    yield "truncated", good[: len(good) // 2]
    yield "text", b"version https://git-lfs.github.com/spec/v1\n"
    yield "pickle", pickle.dumps(Bomb(folder / "exploded"))
    torch.save({"model_state_dict": {}, "network": Bomb(folder / "exploded")}, buffer := io.BytesIO())
    yield "checkpoint with a pickle", buffer.getvalue()
    records = [None, "no JSON", "[" * 100_000, "[]", json.dumps({"network": {}}), json.dumps({"network": []})]
    if ending == ".safetensors":
        from safetensors.torch import save

        for number, record in enumerate([*records, json.dumps({"network": RECORD})]):
            yield f"record {number}", save({"x": torch.ones(1)}, {} if record is None else {"record": record})
    else:
        model = onnx.load(made / "a.onnx")
        for number, record in enumerate([*records, json.dumps({"network": RECORD | {"embedding_size": 8}})]):
            model.metadata_props.clear()
            if record is not None:
                onnx.helper.set_model_props(model, {"record": record})
            yield f"record {number}", model.SerializeToString()


@pytest.mark.parametrize("ending", [".onnx", ".safetensors"])
def test_damaged_and_hostile_files_are_one_line(ending, made, tmp_path, capsys):
    data = ["--dataset", "folder", "--data-root", str(made / "images"), "--workers", "0"]
    path = tmp_path / f"bad{ending}"
    for name, content in damages(made, tmp_path, ending):
        path.write_bytes(content)
        with pytest.raises(SystemExit) as error:
            evaluate.main([*data, "--resume", str(path)])
        message = capsys.readouterr().err
        assert error.value.code == 1 and message.count("\n") == 1 and str(path) in message, (name, message)
        assert not (tmp_path / "exploded").exists(), name


def of_rows(path, made, change, outputs):
    """An ONNX file with the record of a.onnx; change(helper) -> nodes from `images`, cast to float, to `embeddings`."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["pixels"], to=onnx.TensorProto.FLOAT), *change(helper)],
        "rows",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("embeddings", onnx.TensorProto.FLOAT, outputs)],
        [
            helper.make_tensor("few", onnx.TensorProto.INT64, [2], [-1, 16]),
            helper.make_tensor("start", onnx.TensorProto.INT64, [1], [0]),
            helper.make_tensor("end", onnx.TensorProto.INT64, [1], [16]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"record": onnx.load(made / "a.onnx").metadata_props[0].value})
    onnx.save(model, path)


def test_onnx_with_weights_in_another_file_is_refused(made, tmp_path, monkeypatch):
    """Even beside it: its sha256 would not be that of its weights."""
    model = onnx.load(made / "a.onnx")
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="weights", size_threshold=1000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a.onnx is damaged or not an ONNX file: .* [Ee]xternal data"):
        checkpoint.Checkpoint("a.onnx")


@pytest.mark.parametrize("rows", ["one", "many"])
def test_onnx_of_another_number_of_rows_than_images_is_refused(rows, made, tmp_path, capsys):
    """By evaluate.py and search.py alike."""
    many = lambda helper: [helper.make_node("Reshape", ["pixels", "few"], ["embeddings"])]
    one = lambda helper: [
        helper.make_node("Reshape", ["pixels", "few"], ["all"]),
        helper.make_node("ReduceMean", ["all", "start"], ["embeddings"]),
    ]
    path = tmp_path / "rows.onnx"
    of_rows(path, made, {"one": one, "many": many}[rows], ["N", 16])
    words = f"{path} is not an embedding network of export.py: expected float32 ("
    flags = ["--dataset", "folder", "--data-root", str(made / "images"), "--workers", "0"]
    fails(lambda: evaluate.main(["--resume", str(path), *flags]), capsys, words)
    index = ["index", "--resume", str(path), "--images", str(made / "images"), "--out", str(tmp_path / "index")]
    fails(lambda: search.main([*index, "--workers", "0"]), capsys, words)


def test_safetensors_say_that_they_are_of_torch(made):
    """Without this entry, other libraries refuse them."""
    with safetensors.safe_open(made / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and "record" in file.metadata()


def test_loss_of_the_hub_needs_neither_net_nor_dataset(tmp_path):
    program = f"""
import sys, torch
loss = torch.hub.load({str(REPOSITORY)!r}, "proxy_anchor", num_classes=3, embedding_size=4, alpha=16, source="local")
assert loss.proxies.shape == (3, 4) and loss(torch.randn(6, 4), torch.arange(6) % 3).requires_grad
assert not {{"net", "dataset", "proxy_anchor"}} & set(sys.modules)
"""
    fresh(program, tmp_path)


def test_network_of_the_hub_leaves_the_users_modules_alone(made, tmp_path):
    """In a process with modules `net`, `dataset` and `proxy_anchor` of its own, imported before or after."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "__init__.py").write_text("mine = 1\n")
    (tmp_path / "net" / "part.py").write_text("mine = 2\n")
    (tmp_path / "dataset.py").write_text("mine = 3\n")
    (tmp_path / "proxy_anchor.py").write_text("mine = 4\n")
    odd_image(tmp_path / "1.jpg", 1, "RGB")
    program = f"""
import pickle, sys, torch
sys.modules["tqdm"] = None  # not among the hub's dependencies
import net, net.part, proxy_anchor
from PIL import Image
path = {str(made / "a.pth")!r}
network, transform = torch.hub.load({str(REPOSITORY)!r}, "embedding", checkpoint=path, source="local")
import dataset
assert net.mine == 1 and sys.modules["net"] is net and sys.modules["net.part"].mine == 2 and dataset.mine == 3
assert sys.modules["proxy_anchor"] is proxy_anchor and proxy_anchor.mine == 4
loss = torch.hub.load({str(REPOSITORY)!r}, "proxy_anchor", num_classes=3, embedding_size=16, source="local")
image = Image.open("1.jpg")
batch = torch.stack([transform(image), pickle.loads(pickle.dumps(transform))(image.convert("RGBA"))])
loss(network(batch), torch.arange(2)).backward()
torch.save([batch, network(batch).detach(), network.training], "out.pth")
"""
    fresh(program, tmp_path)
    batch, embeddings, training = torch.load(tmp_path / "out.pth")
    seen = transforms.Evaluation(32)(read_image(str(tmp_path / "1.jpg")))
    assert torch.equal(batch[0], seen) and torch.equal(batch[1], seen) and not training
    assert (embeddings - by_hand(made / "a.pth", batch)).abs().max() < 1e-5


def test_other_threads_import_nothing_of_this_repository_meanwhile(made, tmp_path):
    """At each import of its modules, neither they nor their folder are to be found under their usual names."""
    program = f"""
import sys, torch
repository, seen = {str(REPOSITORY)!r}, []

def look(event, arguments):
    if event == "import" and arguments[0].startswith("proxy_anchor_hub."):
        seen.append(repository in sys.path or {{"net", "dataset", "proxy_anchor"}} & set(sys.modules))

sys.addaudithook(look)
before = [*sys.path]
torch.hub.load(repository, "embedding", {str(made / "a.pth")!r}, source="local")
assert len(seen) > 10 and not any(seen)
assert sys.path == [*before, repository + "/hub"]
"""
    fresh(program, tmp_path)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_what_the_hub_returns_is_pickled_spawned_and_halved(name, tmp_path):
    """In this process, in one that it spawns, and in another one that has the folder hub/ in its path."""
    if name == "test_vit":
        pytest.importorskip("timm")
    contract = net.expects(name) | {"model": name, "embedding_size": 16, "image_size": 32, "l2_norm": 1}
    trees.save_checkpoint(tmp_path / "a.pth", net.create(name, 16, image_size=32), contract)
    (tmp_path / "main.py").write_text(f"""
import copy, pickle, torch
from PIL import Image

def run(network, transform, loss):
    images = torch.stack([transform(Image.new("RGB", (50, 40), color)) for color in ("red", "blue")])
    embeddings = network(images)
    return embeddings.detach(), loss(embeddings, torch.arange(2)).detach()

if __name__ == "__main__":
    loss = torch.hub.load({str(REPOSITORY)!r}, "proxy_anchor", num_classes=3, embedding_size=16, source="local")
    network, transform = torch.hub.load({str(REPOSITORY)!r}, "embedding", "a.pth", source="local")
    expected = run(network, transform, loss)
    same = lambda found: torch.testing.assert_close(found, expected)
    same(run(*pickle.loads(pickle.dumps((network, transform, loss)))))
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        same(pool.apply(run, (network, transform, loss)))
    for half in (copy.deepcopy(network).half(), copy.deepcopy(network).bfloat16()):
        assert (run(half, transform, loss)[0] - expected[0]).abs().max() < 0.05
    torch.save([network, transform, loss, expected], "whole.pth")
""")
    command = [sys.executable, "main.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = f"""
import sys, torch
from main import run
sys.path.append({str(REPOSITORY / "hub")!r})
*parts, expected = torch.load("whole.pth", weights_only=False)
torch.testing.assert_close(run(*parts), expected)
assert not {{"net", "dataset", "proxy_anchor"}} & set(sys.modules)
"""
    fresh(program, tmp_path)


def fresh(program, folder):
    command = [sys.executable, "-c", program]
    environment = os.environ | {"TORCH_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES[:-1])
def test_transform_of_the_hub_is_that_of_evaluation(mode, made, tmp_path):
    _, transform = hubconf.embedding(str(made / "a.safetensors"))
    odd_image(tmp_path / "image", 2, mode)
    image = Image.open(tmp_path / "image")
    assert torch.equal(transform(image), transforms.Evaluation(32)(read_image(str(tmp_path / "image"))))


def test_checkpoint_at_a_url(made, tmp_path, monkeypatch):
    """It is downloaded once; a file that could run code is refused, and not kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.pth").write_bytes((made / "a.pth").read_bytes())
    torch.save({"model_state_dict": {}, "network": Bomb(tmp_path / "exploded")}, tmp_path / "site" / "bad.pth")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        for _ in range(2):
            network, _ = torch.hub.load(str(REPOSITORY), "embedding", checkpoint=f"{url}/a.pth", source="local")
        assert len(asked) == 1 and network.embedding_size == 16
        for _ in range(2):
            with pytest.raises(ValueError, match="could run code"):
                hubconf.embedding(f"{url}/bad.pth?x=1")
        assert len(asked) == 3 and not (tmp_path / "exploded").exists()
        assert [path.name[8:] for path in (tmp_path / "home" / "hub" / "checkpoints").iterdir()] == ["-a.pth"]
        with pytest.raises(OSError):
            hubconf.embedding(f"{url}/none.pth")
    finally:
        server.shutdown()
        server.server_close()


def test_published_checkpoint_in_the_hub(tmp_path):
    torch.save({"model_state_dict": net.create("resnet18", 8).state_dict()}, tmp_path / "a.pth")
    path, given = str(tmp_path / "a.pth"), {"backbone": "resnet18", "embedding_size": 8}
    network, transform = torch.hub.load(str(REPOSITORY), "embedding", checkpoint=path, source="local", **given)
    assert transform(Image.new("L", (300, 250))).shape == (3, 224, 224) and network.embedding_size == 8
    for given, words in (
        ({}, "does not record its network: give backbone=... and embedding_size=..."),
        ({"backbone": "resnet18"}, "does not record its network: give backbone=... and embedding_size=..."),
        ({"backbone": "resnet18", "embedding_size": 16}, "of another network.* Check backbone and embedding_size"),
    ):
        with pytest.raises(ValueError, match=words):
            torch.hub.load(str(REPOSITORY), "embedding", str(tmp_path / "a.pth"), source="local", **given)
    assert net is sys.modules["net"] and dataset is sys.modules["dataset"]


def test_hub_refuses_what_a_checkpoint_contradicts(made):
    with pytest.raises(ValueError, match="was trained with backbone resnet18, not resnet50"):
        hubconf.embedding(str(made / "a.pth"), backbone="resnet50")


def test_onnx_file_in_the_hub(made, pixels):
    """It can be pickled too."""
    network, transform = pickle.loads(pickle.dumps(hubconf.embedding(str(made / "a.onnx"))))
    assert torch.equal(network(pixels), by_onnxruntime(made / "a.onnx", pixels))
    assert transform(Image.new("L", (300, 250))).shape == (3, 32, 32)


def test_lines_of_the_page_on_the_hub_run(made, tmp_path, monkeypatch):
    (program,) = [block for block in blocks(USE, "python") if "torch.hub" in block]
    (tmp_path / "proxy-anchor").symlink_to(REPOSITORY)
    (tmp_path / "cub_best.pth").write_bytes((made / "a.pth").read_bytes())
    for number in (1, 2):
        odd_image(tmp_path / f"{number}.jpg", number)
    monkeypatch.chdir(tmp_path)
    exec(program, names := {})
    assert names["embeddings"].shape == (2, 16) and names["criterion"].proxies.shape == (100, 512)


def test_entries_of_the_hub_are_two():
    """torch.hub.list takes all that can be called for one."""
    entries = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert entries == ["proxy_anchor", "embedding"]
