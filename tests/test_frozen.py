"""train.py --frozen: the head on stored features of the backbone, whose images are each embedded once."""

import os
import shutil
import statistics

import head_gain
import kills
import poison
import pytest
import significance
import torch
import torch.nn.functional as F
from helpers import arguments, fails, read_figures, read_metrics, run_folder, save_backbone, stop_at, torchrun

import dataset
import evaluate
import net
import protocol
import train
from dataset import images
from dataset.loading import RandomBatches
from proxy_anchor import checkpoint, losses, training
from proxy_anchor.runs import child, features, logbook, run_folders

NAME = "tiny_Proxy_Anchor_embedding8_alpha32_mrg0.1_adamw_lr0.0001_batch8_frozen"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of backbone weights."""
    return save_backbone("tiny", tmp_path_factory.mktemp("weights") / "tiny.pth")


def flags(root, weights, logs, **changed):
    return ["--frozen", *arguments(root, **{"pretrained": weights, "epochs": 3, "LOG_DIR": logs} | changed)]


@pytest.fixture(scope="module")
def logs(cub_root, weights, tmp_path_factory):
    """Of an uninterrupted run."""
    logs = tmp_path_factory.mktemp("logs")
    train.main(flags(cub_root, weights, logs))
    return logs


@pytest.fixture
def read(monkeypatch):
    """The paths of the images that are decoded."""
    paths, read_image = [], images.read_image

    def recorded(path, upright):
        paths.append(path)
        return read_image(path, upright)

    monkeypatch.setattr(images, "read_image", recorded)
    return paths


def test_trains_as_the_equation_on_features_of_the_backbone(cub_root, weights, logs):
    """Written out: no augmentation, the features of whole batches, a linear layer and the proxies under AdamW."""
    torch.manual_seed(1)
    network = net.create("tiny", 8, weights, head="orthogonal").eval()
    layer, proxies = network.model.embedding, losses.ProxyAnchor(4, 8).proxies
    spec = train.parse(flags(cub_root, weights, logs)).spec
    train_set = dataset.load("cub", cub_root, "train", allow_partial=True)
    seen = dataset.unlabelled(train_set.paths, spec)
    seen.upright = train_set.upright
    with torch.no_grad():
        features = network.model.pooled(network.normalize(torch.stack([image for image, _ in seen])))
    labels = torch.tensor(train_set.labels)
    optimizer = torch.optim.AdamW(
        [{"params": layer.parameters()}, {"params": [proxies], "lr": 1e-2}], lr=1e-4, weight_decay=1e-4
    )
    batches = RandomBatches(train_set.labels, 8, seed=1)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for keys in batches:
            rows = [key[-1] for key in keys]
            loss = losses.equation(F.normalize(layer(features[rows])), proxies, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_value_([*layer.parameters(), proxies], 10)
            optimizer.step()
    trained = checkpoint.read(run_folder(logs) / "last.pth")
    torch.testing.assert_close(trained["model_state_dict"]["model.embedding.weight"], layer.weight.data)
    torch.testing.assert_close(trained["criterion"]["proxies"], proxies.data)


def test_checkpoint_is_the_whole_network_with_the_metrics_of_run_folder(cub_root, weights, logs):
    (best,) = run_folder(logs).glob("*_best.pth")
    common = arguments(cub_root)
    metrics = evaluate.main([*common, "--resume", str(best)])
    rows = [{name: float(value) for name, value in row.items()} for row in read_metrics(run_folder(logs))]
    row = max(rows, key=lambda row: row["R@1"])
    assert metrics == pytest.approx({name: row[name] for name in metrics}, abs=1e-12)
    backbone = torch.load(weights)
    state = torch.load(best)["model_state_dict"]
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in backbone.items())


def test_gain_of_heads_over_the_backbone_alone(cub_root, weights, logs, tmp_path, monkeypatch, capsys):
    """Of the last epoch, as metrics.csv and backbone.json have it."""
    monkeypatch.setattr(significance, "FEWEST", 2)
    train.main(flags(cub_root, weights, tmp_path, seed=2))
    runs = [run_folder(logs), run_folder(tmp_path)]
    capsys.readouterr()
    head_gain.main([*map(str, runs), "--workers", "0"])
    for line, name in zip(capsys.readouterr().out.splitlines(), ("R@1", "MAP@R"), strict=True):
        alone = 100 * run_folders.read_backbone(runs[0])[name]
        last = [100 * float(read_metrics(run)[-1][name]) for run in runs]
        mean, deviation = statistics.fmean(last), statistics.stdev(last)
        assert line.startswith(f"{name}: backbone alone {alone:.2f}, 2 heads {mean:.2f} ± {deviation:.2f}, difference ")
        assert float(line.split("difference ")[1].split()[0]) == pytest.approx(mean - alone, abs=0.0051)
    train.main(flags(cub_root, weights, tmp_path, seed=3, lr=1e-3))
    (other,) = tmp_path.glob("logs_cub/*seed3")
    fails(lambda: head_gain.main([str(runs[0]), str(other)]), capsys, "in more than the seed: lr: 0.0001, now 0.001")
    train.main(flags(cub_root, weights, tmp_path, seed=4, epochs=1, **{"average-weights": 0.9}))
    (other,) = tmp_path.glob("logs_cub/*seed4")
    fails(lambda: head_gain.main([str(other)]), capsys, "has results of averaged weights (--average-weights)")


def test_backbone_alone_is_measured_on_the_same_features(cub_root, weights, logs):
    line = arguments(cub_root)
    place = line.index("--embedding-size")
    alone = evaluate.main([*line[:place], *line[place + 2 :], "--backbone-only", "--pretrained", str(weights)])
    assert alone == pytest.approx(run_folders.read_backbone(run_folder(logs)), abs=1e-12)


def test_each_image_is_embedded_once(cub_root, weights, tmp_path, read, capsys):
    """By another run, by a fold and by more epochs no image is read; of two changed images, these two."""
    root = tmp_path / "data"
    shutil.copytree(cub_root, root)
    train.main(flags(root, weights, tmp_path / "logs", fold="1/2"))
    train_set, test_set = (dataset.load("cub", root, split, allow_partial=True) for split in ("train", "eval"))
    assert sorted(read) == sorted(train_set.paths)
    train.main(flags(root, weights, tmp_path / "logs", fold="2/2", seed=2))
    assert len(read) == len(train_set)
    train.main(flags(root, weights, tmp_path / "logs"))
    assert sorted(read) == sorted([*train_set.paths, *test_set.paths])
    assert "Embedding 18 images of 42 once; the features of all take 0 MB" in capsys.readouterr().out
    read.clear()
    train.main(flags(root, weights, tmp_path / "logs", epochs=4))
    assert not read
    changed = [train_set.paths[3], test_set.paths[5]]
    for path, other in zip(changed, (train_set.paths[20], test_set.paths[10])):
        shutil.copyfile(other, path)
        os.utime(path, ns=(0, 0))
    train.main(flags(root, weights, tmp_path / "logs", epochs=5))
    assert sorted(read) == sorted(changed)
    train.main(flags(root, weights, tmp_path / "new", epochs=5))
    ours, expected = (last_run(tmp_path / name) for name in ("logs", "new"))
    assert read_rows(ours) == read_rows(expected)


def last_run(logs):
    return max((logs / "logs_cub").iterdir(), key=lambda folder: (folder / "config.json").stat().st_mtime_ns)


def read_rows(folder):
    return [row | {"seconds": None} for row in read_metrics(folder)]


@pytest.mark.parametrize("change", ["weights", "image-size", "versions"])
def test_features_of_another_network_or_size_or_decoder_are_not_mixed(
    cub_root, weights, tmp_path, read, monkeypatch, change
):
    train.main(flags(cub_root, weights, tmp_path, epochs=1))
    read.clear()
    other = {}
    if change == "weights":
        state = torch.load(weights)
        state["conv1.weight"][0, 0, 0, 0] += 1
        torch.save(state, tmp_path / "other.pth")
        other = {"pretrained": tmp_path / "other.pth"}
    elif change == "image-size":
        other = {"image-size": 40}
    else:
        monkeypatch.setattr(logbook, "versions", lambda: {"pillow": "1.0"})
    train.main(flags(cub_root, weights, tmp_path, epochs=1, **other))
    assert len(read) == 42
    assert len(list((tmp_path / "features_cub").iterdir())) == 2


def test_killed_computation_continues(cub_root, weights, tmp_path, monkeypatch, read, logs):
    """After two blocks of 8 images and a piece of the third."""
    monkeypatch.setattr(features, "BLOCK", 8)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(images, "read_image", interrupted_after(20, images.read_image))
        train.main(flags(cub_root, weights, tmp_path))
    (store,) = (tmp_path / "features_cub").iterdir()
    (store / f".2.pth.{16 * 'a'}.tmp").write_bytes(b"a piece")  # as a killed writer leaves it
    assert len(list(store.glob("*.pth"))) == 2
    read.clear()
    train.main(flags(cub_root, weights, tmp_path))
    assert len(read) == 42 - 16 and sorted(file.name for file in store.iterdir()) == [
        ".lock",
        *(f"{number}.pth" for number in range(6)),
    ]
    for ours, expected in zip(read_rows(run_folder(tmp_path)), read_rows(run_folder(logs)), strict=True):
        assert {k: float(v) for k, v in ours.items() if v} == pytest.approx(
            {k: float(v) for k, v in expected.items() if v}, rel=1e-5
        )


def interrupted_after(count, read_image):
    calls = []

    def read(*arguments):
        calls.append(arguments)
        if len(calls) > count:
            raise KeyboardInterrupt
        return read_image(*arguments)

    return read


def test_damaged_features_are_an_error(cub_root, weights, tmp_path, capsys):
    train.main(flags(cub_root, weights, tmp_path))
    (block,) = tmp_path.glob("features_cub/*/0.pth")
    data = bytearray(block.read_bytes())
    data[len(data) // 2] ^= 1
    block.write_bytes(data)
    words = f"delete the folder {block.parent} to embed its images again"
    fails(lambda: train.main(flags(cub_root, weights, tmp_path)), capsys, words)
    shutil.rmtree(block.parent)
    train.main(flags(cub_root, weights, tmp_path))


# An epoch is 3 batches of training and 2 of evaluation, after 2 of the backbone alone.
@pytest.mark.parametrize("moment", [3, 5, 9])
def test_stopped_run_goes_on_to_the_same_end(cub_root, weights, tmp_path, monkeypatch, logs, moment):
    """Also where the file of weights is gone by then, and the features with it."""
    copy = tmp_path / "copy.pth"
    shutil.copy(weights, copy)
    shutil.copytree(logs / "features_cub", tmp_path / "logs" / "features_cub")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        stop_at(patch, moment)
        train.main(flags(cub_root, copy, tmp_path / "logs"))
    copy.unlink()
    if moment == 9:
        shutil.rmtree(tmp_path / "logs" / "features_cub")
    train.main(["--resume", str(run_folder(tmp_path / "logs"))])
    kills.assert_identical(kills.outcome(tmp_path / "logs"), kills.outcome(logs))


def test_fold_reads_no_test_image(cub_root, weights, tmp_path, monkeypatch):
    test_set = dataset.load("cub", cub_root, "eval", allow_partial=True)
    files = {*test_set.paths, *map(os.path.dirname, test_set.paths)}
    with poison.poisoned(files, monkeypatch):
        train.main(flags(cub_root, weights, tmp_path, fold="2/2"))


def test_it_is_another_experiment_than_full_training(cub_root, weights, tmp_path, capsys):
    """By its folder's name and where --resume names the run; what is recorded need not be given again."""
    line = flags(cub_root, weights, tmp_path, epochs=1)
    train.main(line)
    assert run_folder(tmp_path).name == NAME
    train.main(["--resume", str(run_folder(tmp_path)), "--epochs", "2"])
    assert len(read_metrics(run_folder(tmp_path))) == 2
    then = {"lr": 1e-4}
    assert run_folders.differences(then, then | {"frozen": True}) == ["frozen: False, now True"]


def test_recipe_is_printed_and_flags_come_first(cub_root, weights, tmp_path, capsys):
    args = train.parse(["--frozen", "--dataset", "glyphs", "--lr", "0.5"])
    assert (args.lr, args.epochs, args.pretrained, args.warm) == (0.5, training.FROZEN["epochs"], "imagenet", 0)
    assert args.image_size == 32  # of the dataset's recipe
    train.main(flags(cub_root, weights, tmp_path, epochs=1))
    assert f"Defaults of cub, --frozen: --lr {training.FROZEN['lr']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--pretrained none", "argument --frozen: the backbone never trains, so it needs pretrained weights, not none"),
        ("--warm 1", "argument --warm: --frozen excludes it, because the backbone never trains"),
        ("--freeze conv1", "argument --freeze: --frozen excludes it"),
        ("--bn-freeze 0", "argument --bn-freeze: --frozen excludes it"),
        ("--amp bf16", "argument --amp: --frozen excludes it"),
        ("--compile", "argument --compile: --frozen excludes it"),
        ("--cache decoded", "argument --cache: --frozen excludes it"),
    ],
)
def test_contradictions_are_refused(capsys, line, words):
    fails(lambda: train.parse(["--frozen", *line.split()]), capsys, words, code=2)


def test_protocol_embeds_each_image_once(cub_root, weights, tmp_path, monkeypatch, read):
    """Two seeds, each on the first half of the classes and then on all."""
    monkeypatch.setattr(child, "run", lambda command: train.main(command[2:]) or 0)
    protocol.main(["--seeds", "1", "2", "--", *flags(cub_root, weights, tmp_path)])
    assert len(list((tmp_path / "logs_cub").iterdir())) == 4
    assert len(read) == len(set(read)) == 42


@pytest.mark.slow
def test_two_processes(cub_root, tmp_path):
    """They train as one does, on one store, which either finds complete."""
    weights = save_backbone("resnet18", tmp_path / "resnet18.pth")
    line = flags(cub_root, weights, tmp_path / "one", model="resnet18", optimizer="sgd", **{"image-size": 64})
    train.main(line)
    two = [*line, "--LOG_DIR", str(tmp_path / "two")]
    done = torchrun(2, "train.py", *two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Embedding 42 images of 42 once") == 1
    for ours, expected in zip(read_figures(tmp_path / "two"), read_figures(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(expected, abs=1e-4)
    again = torchrun(2, "train.py", *two, "--epochs", 4, "--resume", "auto", cwd=tmp_path)
    assert again.returncode == 0 and "Embedding" not in again.stdout, again.stderr
