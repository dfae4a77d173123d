"""transfer.py: from a teacher to a student, in short runs on a small CUB."""

import csv
import json
import math
import shutil

import kills
import pytest
import torch
import trees
from helpers import read_figures, run_folder, stop_at, torchrun

import dataset
import evaluate
import net
import search
import transfer
from proxy_anchor import checkpoint, distillation
from proxy_anchor.embedding import Embedder
from proxy_anchor.retrieval import map_at_r, recall_at_k
from proxy_anchor.spec import NetworkSpec

RECORD = {"model": "tiny", "embedding_size": 12, "image_size": 32, "l2_norm": 1, "crop": 0.875}


def save_teacher(path, model="tiny"):
    """A checkpoint whose network tells the images apart."""
    torch.manual_seed(5)
    network = net.create(model, 12)
    for norm in network.model.norms():
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    trees.save_checkpoint(path, network, RECORD | {"model": model})
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def arguments(teacher, root, logs, **changed):
    settings = {
        "source-ckpt": teacher,
        "dataset": "cub",
        "data-root": root,
        "model": "tiny",
        "embedding-size": 8,
        "batch-size": 4,
        "image-size": 32,
        "workers": 0,
        "pretrained": "none",
        "epochs": 2,
        "LOG_DIR": logs,
    } | changed
    return ["--allow-partial", *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]


@pytest.fixture(scope="module")
def logs(teacher, cub_root, tmp_path_factory):
    """Of a finished run."""
    folder = tmp_path_factory.mktemp("logs")
    transfer.main(arguments(teacher, cub_root, folder))
    return folder


@pytest.mark.usefixtures("no_checkpoint_needed")
def test_defaults_are_the_published():
    published = {
        "loss": "Relaxed_Contra",
        "batch_size": 90,
        "IPC": 2,
        "view": 2,
        "sigma": 1,
        "delta": 1,
        "lr": 1e-4,
        "optimizer": "adamw",
        "weight_decay": 1e-4,
        "warm": 0,
        "bn_freeze": 0,
        "l2_norm": 0,
        "epochs": 90,
        "seed": 0,
        "source_model": "bn_inception",
        "source_embedding_size": 512,
        "model": "bn_inception",
        "image_size": 224,
        "lr_schedule": "cosine",
        "head": "orthogonal",
    }
    assert published.items() <= vars(transfer.parse(["--source-ckpt", "t.pth"])).items()
    args = transfer.parse(["--source-ckpt", "t.pth", "--dataset", "SOP", "--model", "resnet18", "--save", "1"])
    assert (args.epochs, args.source_model) == (150, "resnet50")
    args = transfer.parse(["--source-ckpt", "t.pth", "--dataset", "glyphs"])
    assert (args.model, args.image_size, args.bn_freeze, args.recipe.count("decay")) == ("resnet18", 32, 0, 0)


def test_folder_and_schedule(logs, teacher):
    folder = run_folder(logs)
    source = f"tiny-12-{checkpoint.Checkpoint(teacher).identity[:8]}"
    assert folder.name == (f"tiny_Relaxed_Contra_embedding8_from_{source}_sigma1_delta1_adamw_lr0.0001_batch4_seed0")
    rows = read_figures(logs)
    assert [row["lr"] for row in rows] == pytest.approx([1e-4 * (1 + math.cos(math.pi * e / 2)) / 2 for e in (0, 1)])
    expected = NetworkSpec("tiny", 8, 32, l2_norm=0, head="orthogonal", distance="euclidean")
    assert checkpoint.Checkpoint(folder / "cub_tiny_best.pth").spec == expected
    assert (folder / "curves.png").exists()


def test_both_see_the_same_pixels(teacher, cub_root, tmp_path, monkeypatch):
    """The teacher learns nothing, and all rows, two views of each image, come to the loss in one order."""
    seen, batches = [], []

    def embed(embedder, images, embed=Embedder.__call__):
        embeddings = embed(embedder, images)
        if not torch.is_inference_mode_enabled():
            seen.append((embedder.network.training, images, embeddings))
        return embeddings

    def forward(loss, student, teacher, forward=distillation.Distillation.forward):
        batches.append((student, teacher))
        return forward(loss, student, teacher)

    monkeypatch.setattr(Embedder, "__call__", embed)
    monkeypatch.setattr(distillation.Distillation, "forward", forward)
    transfer.main(arguments(teacher, cub_root, tmp_path, epochs=1))
    original = net.create("tiny", 12).eval()
    checkpoint.load(teacher, original)
    assert len(batches) == 6 and len(seen) == 12
    for (teaches, images, wanted), (learns, pixels, embeddings), batch in zip(seen[::2], seen[1::2], batches):
        assert torch.equal(images, pixels) and images.shape == (8, 3, 32, 32) and images.dtype == torch.uint8
        assert not torch.equal(images[:4], images[4:])
        assert torch.equal(batch[0], embeddings) and torch.equal(batch[1], wanted)
        assert learns and not teaches and not wanted.requires_grad and embeddings.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(original(original.normalize(images)), wanted)


def test_stopped_run_continues_to_the_same_end(teacher, cub_root, tmp_path, monkeypatch, logs):
    """Also where the teacher's file has moved."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 14)
        transfer.main(arguments(teacher, cub_root, tmp_path))
    moved = shutil.copy(teacher, tmp_path / "elsewhere.pth")
    transfer.main(arguments(moved, cub_root, tmp_path, resume="auto"))
    kills.assert_identical(kills.outcome(tmp_path), kills.outcome(logs))


def test_other_teacher_or_schedule_does_not_continue_a_run(teacher, cub_root, tmp_path, monkeypatch, logs, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 3)
        transfer.main(arguments(teacher, cub_root, tmp_path))
    config = run_folder(tmp_path) / "config.json"
    before = config.read_text()
    other = tmp_path / "other.pth"
    torch.manual_seed(6)
    trees.save_checkpoint(other, net.create("tiny", 12), RECORD)
    for flags, words in (
        (
            ["--source-ckpt", str(other)],
            "(teacher: a different teacher, or one recorded by file path in an older version); start a new one",
        ),
        (["--epochs", "3"], "(schedule: cosine over 2 epochs, now cosine over 3 epochs)"),
    ):
        fails(["--resume", str(config.parent), *flags], capsys, words)
        assert config.read_text() == before
    transfer.main(["--resume", str(config.parent)])
    kills.assert_identical(kills.outcome(tmp_path), kills.outcome(logs))


@pytest.mark.parametrize("loss", ["RKD", "PKT"])
def test_one_view_of_a_teacher_of_another_family(cub_root, tmp_path, loss):
    """As published: without a record of its network. Its images are normalised in its own way."""
    torch.manual_seed(0)
    torch.save({"model_state_dict": net.create("bn_inception", 6).state_dict()}, tmp_path / "published.pth")
    flags = {"source-model": "bn_inception", "source-embedding-size": 6, "image-size": 64, "epochs": 1}
    transfer.main(arguments(tmp_path / "published.pth", cub_root, tmp_path, view=1, loss=loss, **flags))
    (row,) = read_figures(tmp_path)
    assert math.isfinite(row["loss"])


def test_own_images_cached_and_in_mixed_precision(teacher, tmp_path):
    """A student of unit length is compared by the cosine."""
    trees.folder(tmp_path / "photos")
    flags = {"dataset": "folder", "cache": tmp_path / "cache", "amp": "bf16", "l2-norm": 1, "epochs": 1}
    transfer.main(arguments(teacher, tmp_path / "photos", tmp_path, **flags))
    (best,) = tmp_path.glob("logs_folder/*/folder_tiny_best.pth")
    assert checkpoint.Checkpoint(best).spec.distance == "cosine" and list((tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_two_processes_are_one(cub_root, tmp_path):
    """Frozen BatchNorm, as a CPU has its statistics for a process's part of the batch alone."""
    teacher = save_teacher(tmp_path / "teacher.pth", "resnet18")
    flags = {"model": "resnet18", "optimizer": "sgd", "lr": 1e-2, "bn-freeze": 1}
    done = torchrun(2, "transfer.py", *arguments(teacher, cub_root, tmp_path / "two", **flags), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 processes: each takes 4 of the 8 images of a batch" in done.stdout
    transfer.main(arguments(teacher, cub_root, tmp_path / "one", **flags))
    for ours, expected in zip(read_figures(tmp_path / "two"), read_figures(tmp_path / "one"), strict=True):
        # A CPU may round by the size of the batch; the mean of the gradients would change the loss by 18%.
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_evaluation_of_the_student_is_that_of_its_run(logs, cub_root):
    best = run_folder(logs) / "cub_tiny_best.pth"
    flags = ["--allow-partial", "--data-root", str(cub_root), "--workers", "0", "--resume", str(best)]
    metrics = evaluate.main(flags)
    with open(run_folder(logs) / "metrics.csv", newline="") as file:
        row = max(csv.DictReader(file), key=lambda row: (float(row["R@1"]), -int(row["epoch"])))
    assert metrics == {name: float(value) for name, value in row.items() if name in metrics} and len(metrics) == 8
    network = net.create("tiny", 8, l2_norm=False)
    checkpoint.load(best, network)
    (images,) = dataset.eval_sets("cub", cub_root, 32, allow_partial=True)
    found = Embedder(network, torch.device("cpu")).embed(dataset.eval_loader(images, 18, 0))
    embedded = found.vectors, found.labels
    recall, precision = (
        f(*embedded, *more, distance="euclidean") for f, more in ((recall_at_k, [[1]]), (map_at_r, []))
    )
    assert metrics["R@1"] == recall[1] and metrics["MAP@R"] == pytest.approx(precision[0].mean().item())
    assert metrics["MAP@R"] != map_at_r(*embedded)[0].mean().item()


def test_search_with_the_student(logs, cub_root, tmp_path, capsys):
    pytest.importorskip("faiss")
    best = run_folder(logs) / "cub_tiny_best.pth"
    index = ["--images", str(cub_root), "--out", str(tmp_path / "index"), "--workers", "0"]
    search.main(["index", "--resume", str(best), *index])
    capsys.readouterr()
    search.main(["query", "--index", str(tmp_path / "index"), "--json", str(cub_root), "-k", "4"])
    results = json.loads(capsys.readouterr().out)
    network = net.create("tiny", 8, l2_norm=False)
    checkpoint.load(best, network)
    paths = [result["query"] for result in results]
    images = dataset.unlabelled(paths, NetworkSpec("tiny", 8, 32))
    x = Embedder(network, torch.device("cpu")).embed(dataset.eval_loader(images, 50, 0)).vectors
    nearest = torch.cdist(x.double(), x.double()).topk(4, largest=False)
    for result, distances, order in zip(results, *nearest):
        assert [n["distance"] for n in result["neighbours"]] == pytest.approx(distances.tolist(), abs=1e-5)
        assert [n["path"] for n in result["neighbours"]] == [paths[i] for i in order]


def fails(argv, capsys, words, code=1):
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        transfer.main(argv)
    message = capsys.readouterr().err.removeprefix("usage: transfer.py --source-ckpt PATH [--flag value ...]\n")
    assert error.value.code == code and words in message and message.count("\n") == 1, message


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"IPC": 3}, "argument --IPC: the batch size, 4, is not a multiple of 3"),
        ({"sigma": 0}, "argument --sigma: 0 is not positive"),
        ({"sigma": "nan"}, "argument --sigma: nan is not positive"),
        ({"delta": -1}, "argument --delta: -1 is not positive"),
        ({"view": 0}, "argument --view: 0 is not positive"),
        ({"save": 0}, "argument --save: invalid choice: '0'"),
        ({"source-embedding-size": 0}, "argument --source-embedding-size: 0 is not positive"),
        ({"source-embedding-size": 13}, "--source-embedding-size: the teacher was trained with 12, not 13"),
        ({"source-model": "resnet50"}, "--source-model: the teacher was trained with tiny, not resnet50"),
        ({"image-size": 64}, "the teacher was trained at 32 pixels, and both must see the same size: set it to 32"),
    ],
)
def test_bad_arguments(teacher, cub_root, tmp_path, capsys, changed, words):
    fails(arguments(teacher, cub_root, tmp_path, **changed), capsys, words, code=2)
    assert not list(tmp_path.iterdir())


def test_bad_teachers(teacher, cub_root, tmp_path, capsys):
    fails(
        arguments(teacher, cub_root, tmp_path)[:1], capsys, "the following argument is required: --source-ckpt", code=2
    )
    missing, damaged, other = (tmp_path / name for name in ("missing.pth", "damaged.pth", "other.pth"))
    damaged.write_bytes(teacher.read_bytes()[:-1000])
    torch.save({"model_state_dict": net.create("tiny", 12).state_dict()}, other)
    for path, words, more in (
        (missing, f"There is no checkpoint {missing}", {}),
        (damaged, f"{damaged} is damaged or not a checkpoint", {}),
        (other, "other.pth is of another network", {}),
        (other, "model.embedding.weight: expected (512, 48), found (12, 48)", {"source-model": "tiny"}),
        (other, "Check --source-model and --source-embedding-size", {"source-model": "tiny"}),
    ):
        fails(arguments(path, cub_root, tmp_path / "logs", **more), capsys, words)
    assert not (tmp_path / "logs").exists()


def test_recipe_around_the_loss_is_the_published_one(teacher, cub_root, tmp_path, monkeypatch):
    """Nothing is clipped, and the embedding layer starts with orthonormal rows and no bias."""
    seen = {}

    def train_one_epoch(network, *_, clipped=(), **__):
        layer = network.model.embedding
        seen.update(clipped=list(clipped), weight=layer.weight.detach().clone(), bias=layer.bias.detach().clone())
        raise ValueError("enough")

    monkeypatch.setattr(transfer.training, "train_one_epoch", train_one_epoch)
    with pytest.raises(ValueError, match="enough"):
        transfer.main(arguments(teacher, cub_root, tmp_path))
    assert seen["clipped"] == [] and not seen["bias"].any()
    torch.testing.assert_close(seen["weight"] @ seen["weight"].T, torch.eye(len(seen["weight"])), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("no_checkpoint_needed")
def test_published_spelling_of_the_length():
    assert transfer.parse(["--source-ckpt", "t.pth", "--target-norm", "1"]).l2_norm == 1


def test_student_of_the_published_code_is_compared_as_it_was_trained(logs, cub_root, tmp_path, capsys):
    """Its checkpoint has no record: two flags say what ours says itself."""
    best = run_folder(logs) / "cub_tiny_best.pth"
    bare = tmp_path / "bare.pth"
    torch.save({"model_state_dict": torch.load(best)["model_state_dict"]}, bare)
    line = ["--allow-partial", "--data-root", str(cub_root), "--workers", "0", "--resume"]
    flags = ["--model", "tiny", "--embedding-size", "8", "--image-size", "32", "--l2-norm", "0"]
    recorded = evaluate.main([*line, str(best)])
    assert evaluate.main([*line, str(bare), *flags, "--distance", "euclidean"]) == recorded
    assert evaluate.main([*line, str(bare), *flags])["MAP@R"] != recorded["MAP@R"]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*line, str(best), "--distance", "cosine"])
    assert "argument --distance: the checkpoint was trained for euclidean, not cosine" in capsys.readouterr().err


def test_run_of_an_earlier_version_keeps_what_had_a_flag_then(logs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder(logs), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lr_schedule": "step", "eps": 1e-4}))
    args = transfer.parse(["--resume", str(folder)])
    assert (args.lr_schedule, args.eps, args.freeze) == ("step", 1e-4, "")
