"""The settings of recipes of transformers, and the backbone alone: what trains, at which rate, and what is shown."""

import json
import math
import re

import compare
import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, read_metrics, run_folder, run_train, save_backbone, stop_at
from matplotlib.figure import Figure

import dataset
import evaluate
import net
import train
from net.embedding_net import EmbeddingNet
from proxy_anchor import checkpoint, evaluation, figures, loss_registry, training
from proxy_anchor.evaluation import Result
from proxy_anchor.runs import run_folders
from proxy_anchor.runs.run import Run

PEAK, STEPS, EPOCHS = 1e-3, 2, 4
HALF_CIRCLE = [(1 + math.cos(math.pi * epoch / EPOCHS)) / 2 for epoch in range(EPOCHS)]
# Factors of the learning rate, epoch by epoch, with --lr-decay-step 2 --lr-decay-gamma 0.1.
SCHEDULES = {"step": [1, 1, 0.1, 0.1], "cosine": HALF_CIRCLE, "constant": [1, 1, 1, 1]}


def loss_of_random_images(network, criterion):
    return criterion(network(torch.randn(4, 3, 32, 32)), torch.arange(4))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_and_what_moves_at_every_step(schedule):
    """Warm-up for 2 epochs, the embedding layer at 5 times the rate, proxies at 100 times, two layers frozen."""
    network = net.create("tiny", 8, bn_freeze=False)
    network.freeze("bn1,layer1.0")
    criterion = loss_registry.create("Proxy_Anchor", 4, 8)
    optimizer = training.create_optimizer("adamw", network, criterion, PEAK, 1e-4, embedding_lr=5)
    scheduler = training.create_scheduler(schedule, optimizer, EPOCHS, step=2, gamma=0.1)
    rates = []

    def loss_of(images, labels):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return criterion(network(images), labels)

    def moving(name):
        frozen = name.startswith(("model.bn1.", "model.layer1.0."))
        unused = name.startswith("model.fc.")
        counted = not name.endswith("num_batches_tracked")
        return counted and not frozen and not unused

    for epoch in range(EPOCHS):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        training.set_trainable(network, epoch, warm=2)
        batches = [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(STEPS)]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        training.train_one_epoch(network, loss_of, batches, optimizer, scaler, epoch)
        scheduler.step()
        moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
        statistics = {name for name in before if name.endswith(("running_mean", "running_var"))}
        expected = {name for name in before if moving(name)}
        if epoch < 2:
            expected &= {"model.embedding.weight", "model.embedding.bias"} | statistics
        assert {name for name in moved if not name.endswith("num_batches_tracked")} == expected
    by_hand = [[PEAK * f, 5 * PEAK * f, 100 * PEAK * f] for f in SCHEDULES[schedule] for _ in range(STEPS)]
    assert torch.tensor(rates, dtype=torch.double).allclose(torch.tensor(by_hand, dtype=torch.double), rtol=1e-9)


@pytest.mark.parametrize("eps", [None, 1e-4])
def test_eps_is_that_of_the_first_step_by_hand(eps):
    network, criterion = net.create("tiny", 8), loss_registry.create("Proxy_Anchor", 4, 8)
    optimizer = training.create_optimizer("adamw", network, criterion, PEAK, 0.01, eps=eps)
    loss_of_random_images(network, criterion).backward()
    weight = network.model.embedding.weight
    weight.grad.mul_(1e-4 / weight.grad.abs().max())  # of the size of eps
    before, gradient = weight.detach().double(), weight.grad.double()
    optimizer.step()
    by_hand = before * (1 - PEAK * 0.01) - PEAK * gradient / (gradient.abs() + (eps or 1e-8))
    assert torch.allclose(weight.double(), by_hand, rtol=0, atol=1e-6)  # float32; eps moves it by up to 1e-3


@pytest.mark.parametrize("names", ["", "patch_embed", "patch_embed,blocks.1"])
def test_frozen_layers_are_whole_words(names):
    """blocks.1 is not blocks.10; what is frozen stays in eval mode."""
    backbone = torch.nn.Module()
    backbone.patch_embed = torch.nn.Linear(2, 2)
    backbone.blocks = torch.nn.ModuleList([torch.nn.BatchNorm1d(2) for _ in range(11)])
    backbone.num_features, backbone.mean, backbone.std, backbone.bgr = 2, (0, 0, 0), (1, 1, 1), False
    network = EmbeddingNet(backbone, 3, bn_freeze=False)
    network.freeze(names)
    training.set_trainable(network.train(), epoch=1, warm=1)
    still = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in still} == set(filter(None, names.split(",")))
    assert backbone.blocks[10].training and backbone.blocks[1].training == ("blocks.1" not in names)


def test_unknown_layers_are_refused():
    network = net.create("tiny", 8)
    network.freeze("conv1, layer1.0")  # with a blank, as people write lists
    for name in ("patch_embed", "layer", "embedding", "layer1.0.conv", ""):
        with pytest.raises(ValueError, match=f"no layer '{name}' to freeze; it has conv1, bn1, layer1,"):
            network.freeze(name or ",")


def test_layernorm_head():
    """The equation of LayerNorm without an affine map, in float64; the state dict has the published keys."""
    network = net.create("tiny", 8, head="layernorm").eval()
    images = torch.randn(3, 3, 32, 32)
    features = network.model.pooled(images).double()
    centred = features - features.mean(dim=1, keepdim=True)
    normal = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    embeddings = normal @ network.model.embedding.weight.double().T
    embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    assert torch.allclose(network(images).double(), embeddings, atol=1e-6)
    assert torch.allclose(network.model.embedding.weight @ network.model.embedding.weight.T, torch.eye(8), atol=1e-6)
    assert network.state_dict().keys() == net.create("tiny", 8).state_dict().keys()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--eps 1e-4 --optimizer sgd", "argument --eps: sgd has no such setting"),
        ("--eps 0", "argument --eps: 0 is not positive"),
        ("--embedding-lr -1", "argument --embedding-lr: -1 is not positive"),
        ("--lr-schedule linear", "argument --lr-schedule: invalid choice: 'linear'"),
        ("--head mlp", "argument --head: invalid choice: 'mlp'"),
    ],
)
def test_settings_that_do_not_exist(line, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(line.split())
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of backbone weights."""
    return save_backbone("tiny", tmp_path_factory.mktemp("weights") / "tiny.pth")


SETTINGS = {"epochs": 2, "head": "layernorm", "lr-schedule": "cosine", "freeze": "conv1,layer1", "warm": 1}


def of_epochs(folder):
    """The rows of the epochs in metrics.csv, but for their time."""
    return [row | {"seconds": None} for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def logs(cub_root, weights, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    run_train(cub_root, logs, pretrained=weights, **SETTINGS)
    return logs


def test_backbone_alone_has_a_file_of_its_own(logs, weights, cub_root):
    assert [row["epoch"] for row in read_metrics(run_folder(logs))] == ["0", "1"]
    before = json.loads((run_folder(logs) / "backbone.json").read_text())
    network = net.create("tiny", 8, weights).eval()
    (images,) = dataset.eval_sets("cub", cub_root, 32, allow_partial=True)
    with torch.no_grad():
        features = network.model.pooled(network.normalize(torch.stack([image for image, _ in images])))
    labels = torch.tensor(images.labels)
    similarity = F.cosine_similarity(features[:, None].double(), features[None].double(), dim=2).fill_diagonal_(-2)
    assert before["R@1"] == (labels[similarity.argmax(dim=1)] == labels).double().mean()


def test_without_the_baseline_training_is_the_same(logs, weights, cub_root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "measure_backbone", lambda run, evaluate: None)
        train.main(arguments(cub_root, pretrained=weights, LOG_DIR=tmp_path, **SETTINGS))
    assert not (run_folder(tmp_path) / "backbone.json").exists()
    assert of_epochs(run_folder(tmp_path)) == of_epochs(run_folder(logs))
    with_it, without = (torch.load(run_folder(place) / "last.pth") for place in (logs, tmp_path))
    for name, tensor in with_it["model_state_dict"].items():
        assert torch.equal(tensor, without["model_state_dict"][name])


def test_frozen_layers_did_not_move(logs, weights):
    trained = torch.load(run_folder(logs) / "last.pth")["model_state_dict"]
    for name, tensor in torch.load(weights).items():
        if "conv" in name and name.endswith("weight"):
            assert torch.equal(tensor, trained[f"model.{name}"]) == name.startswith(("conv1.", "layer1."))


def test_stopped_run_keeps_its_baseline(weights, cub_root, tmp_path, monkeypatch, capsys):
    """A signal in the first epoch: the backbone is not measured again, and the table at the end shows it."""
    stop_at(monkeypatch, 5)  # of 3 batches that measure the backbone and 3 of the first epoch
    line = arguments(cub_root, pretrained=weights, LOG_DIR=tmp_path, epochs=1)
    with pytest.raises(SystemExit, match="143"):
        train.main(line)
    monkeypatch.undo()
    assert capsys.readouterr().out.count("backbone alone  R@1") == 1
    train.main([*line, "--resume", "auto"])
    shown = capsys.readouterr().out
    assert "Resuming" in shown and "backbone alone  R@1" not in shown
    assert re.search(r"^backbone alone +\d+\.\d\d", shown, re.M)
    assert [row["epoch"] for row in read_metrics(run_folder(tmp_path))] == ["0"]


def test_run_of_an_earlier_version_keeps_its_baseline(weights, cub_root, tmp_path, capsys):
    """It was in last.pth, and in metrics.csv as epoch -1."""
    train.main(arguments(cub_root, pretrained=weights, LOG_DIR=tmp_path, epochs=1))
    folder = run_folder(tmp_path)
    backbone = json.loads((folder / "backbone.json").read_text())
    (folder / "backbone.json").unlink()
    last = checkpoint.read(folder / "last.pth")
    last["progress"]["backbone"] = backbone
    torch.save(last, folder / "last.pth")
    head, row = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text(f"{head}\n-1,,,,{','.join(map(str, backbone.values()))}\n{row}\n")
    rows, read = run_folders.read_metrics(folder)
    assert [row["epoch"] for row in rows] == [0] and {name: read[name] for name in backbone} == backbone
    capsys.readouterr()
    train.main(["--resume", str(folder), "--epochs", "2"])
    assert f"backbone alone  {100 * backbone['R@1']:>6.2f}" in capsys.readouterr().out
    assert json.loads((folder / "backbone.json").read_text()) == backbone
    assert [row["epoch"] for row in read_metrics(folder)] == ["0", "1"]


@pytest.mark.parametrize("text", ["{", "[]", '{"R@1": "x"}', '{"R@1": 7}', "{}"])
def test_damaged_baseline_is_an_error(tmp_path, text):
    (tmp_path / "backbone.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/backbone.json is damaged"):
        run_folders.read_backbone(tmp_path)


def test_ending_below_the_backbone_is_said(weights, cub_root, tmp_path, monkeypatch, capsys):
    results = iter([0.9, 0.5, 0.4])

    def evaluate(*_, **__):
        return Result({"R@1": next(results)}, torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    run_train(cub_root, tmp_path, pretrained=weights)
    assert "Training made it worse: the last epoch is below the untrained backbone" in capsys.readouterr().out


def test_other_epochs_do_not_continue_a_cosine(logs, weights, cub_root, capsys):
    line = arguments(cub_root, pretrained=weights, LOG_DIR=logs, **SETTINGS | {"epochs": 3})
    with pytest.raises(SystemExit, match="1"):
        train.main([*line, "--resume", str(run_folder(logs))])
    assert "schedule: cosine over 2 epochs, now cosine over 3 epochs" in capsys.readouterr().err


def settings(*flags):
    """The plain values among the arguments of a training."""
    return {name: value for name, value in vars(train.parse([*flags])).items() if name != "spec"}


@pytest.mark.parametrize("change", [{"head": "orthogonal"}, {"freeze": "conv1"}, {"lr_schedule": "constant"}])
@pytest.mark.parametrize("script", [{}, {"teacher": "of transfer.py", "head": "orthogonal", "lr_schedule": "cosine"}])
def test_run_of_an_earlier_version_is_not_continued_as_another_experiment(script, change):
    """It does not tell these settings, which had one value then; transfer.py had its own."""
    then = settings() | script
    earlier = {name: value for name, value in then.items() if name not in ("head", "freeze", "lr_schedule", "eps")}
    assert run_folders.differences(earlier, then) == []
    if change != {name: then[name] for name in change}:
        assert [line.split(":")[0] for line in run_folders.differences(earlier, then | change)] == list(change)


def test_given_defaults_are_recorded_as_defaults_are():
    """Runs that were resumed, or given a default by hand, are the same experiment to compare.py."""
    assert json.dumps(settings("--embedding-lr", "1", "--alpha", "32", "--mrg", "0.1")) == json.dumps(settings())


def test_head_is_in_the_record_and_obeyed(logs, cub_root):
    best = run_folder(logs) / "cub_tiny_best.pth"
    assert checkpoint.Checkpoint(best).spec.head == "layernorm"
    line = ["--allow-partial", "--data-root", str(cub_root), "--workers", "0", "--resume", str(best)]
    metrics = evaluate.main(line)
    row = max(of_epochs(run_folder(logs)), key=lambda row: float(row["R@1"]))
    assert metrics["MAP@R"] == pytest.approx(float(row["MAP@R"]), abs=1e-9)


def test_figures_show_the_backbone_alone(logs, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **more: drawn.append(figure) or path.touch())
    figures.draw_run(*run_folders.read_metrics(run_folder(logs)), tmp_path / "curves.png", "title")
    recall = 100 * json.loads((run_folder(logs) / "backbone.json").read_text())["R@1"]
    assert f"backbone alone: R@1 {recall:.1f}" in [text.get_text() for text in drawn[0].axes[1].texts]
    compare.main([str(run_folder(logs)), "--save", str(tmp_path / "comparison.png")])
    head, line = capsys.readouterr().out.splitlines()[:2]
    assert "backbone alone" in head and f"{recall:.2f}" in line.split()
