import argparse
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import trees

import net
import net.pretrained
import net.resnet
from proxy_anchor import exported

FACTS = Path(__file__).with_name("facts")
KEYS = json.loads((FACTS / "state_dict_keys.json").read_text())


def known_weight(key, shape):
    """The weights of the known answer, made from the key's name."""
    random = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    last = key.rsplit(".", 1)[1]
    if last == "num_batches_tracked":
        return torch.tensor(0)
    if last == "running_var" or (len(shape) == 1 and last == "weight"):
        values = random.uniform(0.8, 1.2, shape)
    elif len(shape) == 1:
        values = random.normal(0, 0.1, shape)
    else:
        values = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    return torch.from_numpy(values.astype(np.float32))


def test_built_in_resnets_are_those_that_are_described():
    assert tuple(net.resnet.LAYERS) == net.RESNETS


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_shapes_are_the_published(name):
    state = net.create(name, 512).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == KEYS[name]
    assert list(state) == list(KEYS[name])


def test_bn_inception_known_answer():
    network = net.create("bn_inception", 512).eval()
    network.load_state_dict({key: known_weight(key, tuple(shape)) for key, shape in KEYS["bn_inception"].items()})
    images = torch.from_numpy(np.random.RandomState(7).normal(0, 1, (4, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        embeddings = network(images).numpy()
    np.testing.assert_allclose(embeddings, np.load(FACTS / "bn_inception_known_answer.npz")["embeddings"], atol=1e-5)


def test_bn_inception_batchnorm_momentum_is_caffes():
    norms = [m for m in net.create("bn_inception", 8).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.9, 1e-5)}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "googlenet"])
def test_features_are_torchvisions(name):
    """With the average pool alone as head, our features through torchvision's classifier give torchvision's logits."""
    network = net.create(name, 16).eval()
    reference = {"init_weights": False, "transform_input": False} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, **reference).eval()
    theirs.load_state_dict(
        {k.removeprefix("model."): v for k, v in network.state_dict().items() if "embedding" not in k}
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours = network.model.fc(network.model.features(images).mean(dim=(2, 3)))
        torch.testing.assert_close(ours, theirs(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_starts_and_trains_as_torchvisions(name):
    """To the bit, from the same seed: the same weights under the same names, the same features and gradients."""
    torch.manual_seed(0)
    ours = net.BACKBONES[name]()
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    features = [ours.features(images).mean(dim=(2, 3)), theirs(images)]
    assert torch.equal(*features)
    for values in features:
        values.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters() if not key.startswith("fc.")}
    assert all(torch.equal(parameter.grad, gradients[key]) for key, parameter in theirs.named_parameters())


def test_orthogonal_start():
    """All else, the random numbers of the backbone too, starts as it does with the published one."""
    torch.manual_seed(0)
    published = net.create("resnet18", 16)
    torch.manual_seed(0)
    network = net.create("resnet18", 16, head="orthogonal")
    weight = network.model.embedding.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(16))
    assert not network.model.embedding.bias.any()
    ours = network.state_dict()
    different = [key for key, value in published.state_dict().items() if not torch.equal(value, ours[key])]
    assert different == ["model.embedding.weight"]


def test_head_is_average_plus_max_pool():
    network = net.create("resnet18", 16, l2_norm=False).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        features = network.model.features(images)
        pooled = features.mean(dim=(2, 3)) + features.amax(dim=(2, 3))
        torch.testing.assert_close(network(images), pooled @ network.model.embedding.weight.T)


@pytest.mark.parametrize("name, epsilon", [("resnet18", 1e-12), ("googlenet", 1e-5)])
def test_l2_norm_has_the_published_epsilon(name, epsilon):
    network = net.create(name, 16).eval()
    plain = net.create(name, 16, l2_norm=False).eval()
    plain.load_state_dict(network.state_dict())
    for model in (network, plain):
        model.model.embedding.weight.data *= 1e-4  # so short that the epsilon shows
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        x = plain(images)
        torch.testing.assert_close(network(images), x / torch.sqrt((x * x).sum(1, keepdim=True) + epsilon))


def test_embedding_layer_starts_kaiming_normal_fan_out():
    layer = net.create("resnet50", 512).model.embedding
    assert layer.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("name", net.BACKBONES)
def test_normalize(name):
    """The published input of each network; nothing of it is in the checkpoint."""
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    pixels = image.numpy().astype(np.float64)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    expected = (pixels / 255 - mean) / std
    if name == "bn_inception":
        expected = pixels[:, ::-1] - np.array([104, 117, 128])[:, None, None]
    network = net.create(name, 8)
    np.testing.assert_allclose(network.normalize(image).numpy(), expected, atol=1e-5)
    assert not any("normalize" in key for key in network.state_dict())


@pytest.mark.parametrize("bn_freeze", [True, False])
def test_bn_freeze_starts_with_fixed_batchnorm(bn_freeze):
    network = net.create("resnet18", 8, bn_freeze=bn_freeze)
    trainable = [
        p.requires_grad for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()
    ]
    assert all(trainable) if not bn_freeze else not any(trainable)


def test_image_sizes_that_bn_inception_accepts():
    assert all(net.accepts("bn_inception", size) for size in (32, 64, 224, 256, 324, 448))
    assert not any(net.accepts("bn_inception", size) for size in (8, 300, 336))
    assert net.accepts("resnet18", 300)


# Weights files


def backbone_state(name):
    state = net.create(name, 4).state_dict()
    return {
        k.removeprefix("model."): v for k, v in state.items() if "embedding" not in k and "num_batches_tracked" not in k
    }


def test_weights_from_a_file(tmp_path):
    state = backbone_state("resnet18")
    torch.save(state, tmp_path / "resnet18.pth")
    network = net.create("resnet18", 16, pretrained=tmp_path / "resnet18.pth")
    torch.testing.assert_close(network.model.conv1.weight.data, state["conv1.weight"])


def test_old_bn_inception_file_with_batchnorm_rows(tmp_path):
    state = backbone_state("bn_inception")
    assert len(state) == 416
    old = {k: v[None] if "_bn." in k else v for k, v in state.items()}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network = net.create("bn_inception", 16, pretrained=tmp_path / "old.pth")
    torch.testing.assert_close(network.model.conv1_7x7_s2_bn.weight.data, state["conv1_7x7_s2_bn.weight"])


def test_wrong_weights_files_are_errors(tmp_path):
    torch.save(backbone_state("resnet18"), tmp_path / "resnet18.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="another network"):
        net.create("resnet34", 16, pretrained=tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="text.pth is not a checkpoint"):
        net.create("resnet18", 16, pretrained=tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        net.create("resnet18", 16, pretrained=tmp_path / "none.pth")


def behind(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def without_classifier(name):
    unused = net.BACKBONES[name]().unused
    return {key: value for key, value in backbone_state(name).items() if key.split(".")[0] not in unused}


@pytest.mark.parametrize(
    "content, left_out",
    [
        (lambda state: behind("module.", state), ""),
        (lambda state: behind("_orig_mod.", state), ""),
        (lambda state: behind("module._orig_mod.", state), ""),
        (lambda state: behind("_orig_mod.module.", state), ""),
        (lambda state: {"state_dict": behind("backbone.module.", state)}, ""),
        (lambda state: {"model": state, "epoch": 3}, ""),
        (lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1.0, sizes=[1, 2])}, ""),
        (lambda state: state | {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, "fc (2)"),
        (lambda state: behind("module.", state) | {"n_averaged": torch.tensor(3)}, ""),
        (
            lambda state: {
                "state_dict": behind("module.encoder_q.", state)
                | behind("module.encoder_k.", behind("", state))
                | {"module.queue": torch.zeros(4, 4), "module.encoder_q.fc.0.weight": torch.zeros(3, 3)}
            },
            "left out: encoder_k (100), queue (1), fc (1).",
        ),
        (
            lambda state: {
                "student": {},
                "teacher": behind("backbone.", state) | {"head.mlp.0.weight": torch.zeros(3)},
            },
            "behind backbone.; left out: head (1)",
        ),
        (
            lambda state: (
                behind("module.", state)
                | {"module.projection_head.0.weight": torch.zeros(3), "module.prototypes.weight": torch.zeros(3)}
            ),
            "left out: projection_head (1), prototypes (1).",
        ),
        (
            lambda state: state | {"last_linear.weight": torch.zeros(3, 512), "last_linear.bias": torch.zeros(3)},
            "left out: last_linear (2).",
        ),
        (
            lambda state: behind("a\x1b[31m.", state) | {"b\n\x1b[2J": torch.zeros(1)},
            "behind a\\x1b[31m.; left out: b\\n\\x1b[2J (1).",
        ),
    ],
    ids=range(14),
)
def test_weights_as_others_save_them(content, left_out, tmp_path):
    """Behind prefixes, within entries, with another classifier or none, which never runs."""
    state = without_classifier("resnet18")
    torch.save(content(state), tmp_path / "a.pth")
    backbone = net.create("resnet18", 8, tmp_path / "a.pth").model
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in state.items())
    assert left_out in backbone.remark and bool(left_out) == bool(backbone.remark)


@pytest.mark.parametrize("name", ["bn_inception", "googlenet"])
def test_weights_without_the_layers_that_never_run(name, tmp_path):
    state = without_classifier(name)
    torch.save(state, tmp_path / "a.pth")
    loaded = net.create(name, 8, tmp_path / "a.pth").model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_backbone_of_ones_own_checkpoint(ending, tmp_path):
    """The embedding layer starts anew; another network is refused by the record, with both names."""
    trained, path = net.create("resnet18", 8), tmp_path / f"a{ending}"
    record = {"model": "resnet18", "embedding_size": 8, "image_size": 32, "l2_norm": 1}
    if ending == ".pth":
        trees.save_checkpoint(path, trained, record)
    else:
        pytest.importorskip("safetensors")
        exported.save(path, ending, exported.InferenceNet(trained, "cosine"), 32, {"network": record})
    network = net.create("resnet18", 16, path)
    assert torch.equal(network.model.conv1.weight, trained.model.conv1.weight)
    assert network.model.remark.endswith("behind model.; left out: embedding (2); an embedding layer starts anew.\n")
    with pytest.raises(ValueError, match=f"a{ending} has weights of 'resnet18', not resnet34: check --model"):
        net.create("resnet34", 8, path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state | {"more.weight": torch.zeros(1)}, "Unexpected key.*more.weight"),
        (lambda state: {key: value for key, value in state.items() if key != "bn1.weight"}, "Missing key.*bn1.weight"),
        (lambda state: {"model": {key: value for key, value in state.items() if key != "bn1.weight"}}, "Missing key"),
        (lambda state: state | behind("module.", state), "two tensors conv1.weight"),
        (lambda state: state | {"conv1.weight": state["conv1.weight"].to(torch.int8)}, "conv1.weight as int8"),
        (
            lambda state: state | {"conv1.weight": state["conv1.weight"].to(torch.complex64)},
            "conv1.weight as complex64",
        ),
        (lambda state: state | {"conv1.weight": state["conv1.weight"].to_sparse()}, "has no state dict of backbone"),
        (lambda state: {"model": state | {"conv1.weight": state["conv1.weight"].to("meta")}}, "has no state dict of"),
        (
            lambda state: {"optimizer": state, "epoch": 3},
            "no state dict .* state_dict, model, .*; it has 'optimizer', ",
        ),
        (lambda state: {}, "it has none"),
    ],
    ids=range(10),
)
def test_weights_that_do_not_fit_are_errors(change, words, tmp_path):
    torch.save(change(without_classifier("resnet18")), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth .*{words}"):
        net.create("resnet18", 8, tmp_path / "a.pth")


def test_exported_program_is_no_weights_file(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"a.onnx is an ONNX file, from which no backbone can start: give its checkpoint or"
    ):
        net.create("resnet18", 8, tmp_path / "a.onnx")


# Download, from a server of the test's own


@pytest.fixture
def server(tmp_path, monkeypatch):
    import hashlib
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(backbone_state("resnet18"), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    (folder / "weights.pth").rename(folder / f"resnet18-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setitem(
        net.pretrained.URLS, "resnet18", f"http://127.0.0.1:{httpd.server_port}/resnet18-{digest[:8]}.pth"
    )
    yield folder / f"resnet18-{digest[:8]}.pth"
    httpd.shutdown()


def test_download_is_cached(server):
    expected = torch.load(server, weights_only=True)["conv1.weight"]
    torch.testing.assert_close(net.create("resnet18", 8, "imagenet").model.conv1.weight.data, expected)
    server.unlink()  # so the second time can only come from the cache
    torch.testing.assert_close(net.create("resnet18", 8, "imagenet").model.conv1.weight.data, expected)


def test_download_of_a_wrong_file_is_refused(server, tmp_path):
    server.write_bytes(server.read_bytes() + b"x")
    with pytest.raises(OSError, match=rf"Fetch http://.*{server.name} by hand .* put it at .*{server.name}"):
        net.create("resnet18", 8, "imagenet")
    assert not list(tmp_path.glob("torch/**/*.pth"))


def test_failed_download_says_what_to_fetch(server):
    server.unlink()
    with pytest.raises(OSError, match="404.*Fetch http://"):
        net.create("resnet18", 8, "imagenet")


def test_damaged_file_in_the_cache_is_refused(server):
    path = net.pretrained.imagenet_file("resnet18")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(OSError, match="damaged"):
        net.create("resnet18", 8, "imagenet")


def test_our_networks_do_without_timm():
    """Not even imported, by a script either: it takes seconds."""
    program = (
        "import sys, train, net\n"
        "for name in net.BACKBONES:\n"
        "    train.parse(['--model', name]), net.create(name, 4)\n"
        "sys.exit('timm' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=FACTS.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
