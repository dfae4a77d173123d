"""Files among other processes: none is torn, none takes another's place, nothing of the user's is deleted."""

import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch
import trees
from helpers import arguments, exports_onnx

import dataset
import evaluate
import export
import net
import search
import transfer
from proxy_anchor import checkpoint, evaluation, files, weights
from proxy_anchor.index.store import Index
from proxy_anchor.report import page
from proxy_anchor.spec import NetworkSpec

RECORD = {"model": "tiny", "embedding_size": 8, "image_size": 32, "l2_norm": 1, "crop": 0.875}


def temporaries(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_replaced_file_has_the_permissions_of_any_new_one(tmp_path):
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "a.txt") as path:
            path.write_text("new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640 and not temporaries(tmp_path)


def test_planted_links_are_not_followed(tmp_path):
    """Neither at the former name of the temporary file, nor at the file itself, nor at its lock."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("a.txt.tmp", "a.txt"):
        (tmp_path / name).symlink_to(victim)
    with files.replacing(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert victim.read_text() == "precious" and (tmp_path / "a.txt.tmp").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new" and not (tmp_path / "a.txt").is_symlink()
    (tmp_path / ".b.txt.lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"b\.txt cannot be written"), files.locked(tmp_path / "b.txt"):
        pass
    assert victim.read_text() == "precious"


def test_only_leftovers_of_killed_processes_are_removed(tmp_path):
    """Not the user's own files, nor one that is being written."""
    own = [".a.txt.mine.tmp", "a.txt.tmp", "notes.tmp", ".b.txt.0123456789abcdef.tmp"]
    for name in (*own, ".a.txt.0123456789abcdef.tmp"):
        (tmp_path / name).write_text("")
    with files.replacing(tmp_path / "a.txt") as outer:
        outer.write_text("outer")
        with files.replacing(tmp_path / "a.txt") as inner:
            inner.write_text("inner")
        assert (tmp_path / "a.txt").read_text() == "inner" and outer.exists()
    assert (tmp_path / "a.txt").read_text() == "outer"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*own, "a.txt"])


def test_names_of_ours_that_are_others(tmp_path):
    """A pipe, which nobody writes to, and a link at the name of a leftover; a file of the user's at that of a lock."""
    os.mkfifo(tmp_path / ".a.txt.0123456789abcdef.tmp")
    (tmp_path / ".a.txt.0000000000000000.tmp").symlink_to(tmp_path / "victim")
    for name in ("victim", ".a.txt.lock"):
        (tmp_path / name).write_text("precious")
    before = set(os.listdir(tmp_path))
    with files.locked(tmp_path / "a.txt"), files.replacing(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert set(os.listdir(tmp_path)) == before | {"a.txt"}
    assert (tmp_path / "victim").read_text() == (tmp_path / ".a.txt.lock").read_text() == "precious"


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "[a]*?.pth", os.fsdecode(b"\xff.pth"), ".hidden"])
def test_any_name_can_be_replaced(tmp_path, name):
    for text in ("one", "two"):
        with files.locked(tmp_path / name), files.replacing(tmp_path / name) as path:
            path.write_text(text)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "two"


def write_forever(path):
    while True:
        with files.replacing(path) as temporary:
            temporary.write_bytes(bytes([random.randrange(256)]) * 2**20)


def test_several_writers_that_are_killed_never_tear_a_file(tmp_path):
    path, moments = tmp_path / "a.bin", random.Random(0)
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        writers = [context.Process(target=write_forever, args=(path,)) for _ in range(3)]
        for writer in writers:
            writer.start()
        time.sleep(moments.uniform(0.05, 0.3))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 2**20 and len(set(content)) == 1
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_lock_makes_others_wait_and_leaves_nothing(tmp_path):
    count = 0

    def add():
        nonlocal count
        for _ in range(50):
            with files.locked(tmp_path / "a.pth"):
                seen = count
                time.sleep(1e-4)
                count = seen + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == 200 and not os.listdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^of the body$"), files.locked(tmp_path / "a.pth"):
        raise FileNotFoundError("of the body")


def test_seal(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    seal = files.seal(path)
    assert files.is_intact(path, seal)
    path.write_bytes(b"abc")  # written anew, and equal
    assert files.is_intact(path, seal)
    path.write_bytes(b"abd")
    os.utime(path, ns=(seal["state"][2], seal["state"][2]))
    assert not files.is_intact(path, seal)


# One reading


def new_checkpoint(path, seed, **record):
    torch.manual_seed(seed)
    trees.save_checkpoint(path, net.create("tiny", 8), RECORD | record)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return trees.folder(tmp_path_factory.mktemp("photos"), classes=[f"{c:02d}" for c in range(12)] + ["ant"], images=5)


@pytest.fixture
def replaced(tmp_path):
    """(path, identity of A, a function that puts B into the place of A)."""
    path, other = new_checkpoint(tmp_path / "a.pth", 0), new_checkpoint(tmp_path / "b.pth", 1)
    return path, checkpoint.Checkpoint(path).identity, lambda: os.replace(other, path)


def test_calibration_of_weights_that_were_replaced_is_not_recorded(photos, replaced, capsys, monkeypatch):
    path, _, replace = replaced
    measure = evaluation.measure
    monkeypatch.setattr(evaluation, "measure", lambda *args, **more: [measure(*args, **more), replace()][0])
    with pytest.raises(SystemExit, match="1"):
        evaluate.main([*arguments(photos, dataset="folder", resume=path), "--calibrate", "0.3"])
    assert "a.pth was replaced while it was measured, so its threshold is not recorded" in capsys.readouterr().err
    assert checkpoint.Checkpoint(path).calibration is None


def test_report_names_the_weights_that_it_measured(photos, replaced, tmp_path):
    pytest.importorskip("sklearn")
    path, identity, replace = replaced
    args = evaluate.parse([*arguments(photos, dataset="folder", resume=path), "--report", str(tmp_path / "report")])
    replace()
    evaluate.evaluate(args, torch.device("cpu"))
    assert identity in (tmp_path / "report" / "index.html").read_text()


def test_index_is_of_the_weights_that_it_names(photos, replaced, tmp_path):
    pytest.importorskip("faiss")
    path, identity, replace = replaced
    flags = ["--workers", "0", "--out", str(tmp_path / "index"), "--images", str(photos)]
    args = search.parse(["index", "--resume", str(path), *flags])
    replace()
    search.update_index(args)
    index = Index.open(tmp_path / "index")
    assert index.made["weights"] == identity
    torch.manual_seed(0)
    image = dataset.unlabelled([index.images[0][0]], index.spec)[0][0]
    network = net.create("tiny", 8).eval()
    with torch.inference_mode():
        expected = network(network.normalize(image[None]))[0]
    torch.testing.assert_close(torch.tensor(index.images.vectors[0]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ending", [".safetensors", pytest.param(".onnx", marks=exports_onnx)])
def test_export_is_of_the_weights_that_it_names(photos, replaced, tmp_path, ending):
    pytest.importorskip("onnxscript")
    path, identity, replace = replaced
    args = export.parse(["--resume", str(path), "--check", str(photos), "--out", str(tmp_path / f"x{ending}")])
    replace()
    export.export(args)
    content = checkpoint.read(tmp_path / f"x{ending}")
    assert content["source"] == identity
    if ending == ".safetensors":
        torch.manual_seed(0)
        weights = net.create("tiny", 8).state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in content["model_state_dict"].items())


def test_teacher_is_the_one_that_is_named(photos, replaced, tmp_path):
    path, identity, replace = replaced
    logs = {"LOG_DIR": tmp_path / "logs", "pretrained": "none", "dataset": "folder"}
    args = transfer.parse([*arguments(photos, **logs, epochs=1), "--source-ckpt", str(path)])
    replace()
    network = net.create("tiny", 8)
    args.teacher.load(network)
    assert args.teacher.identity == identity == weights.digest(network.state_dict())


def test_training_and_calibration_take_turns(tmp_path):
    """While a threshold is being added, a training waits with its better network."""
    path = new_checkpoint(tmp_path / "best.pth", 0)
    network, saved = net.create("tiny", 8), threading.Event()

    def save():
        checkpoint.save(path, network, NetworkSpec(**RECORD))
        saved.set()

    with files.locked(path):
        thread = threading.Thread(target=save)
        thread.start()
        assert not saved.wait(0.5)
    thread.join()
    assert checkpoint.Checkpoint(path).identity == weights.digest(network.state_dict())


def test_exports_of_one_stem_take_turns(photos, tmp_path):
    pytest.importorskip("safetensors")
    path, done = new_checkpoint(tmp_path / "a.pth", 0), threading.Event()
    argv = ["--resume", str(path), "--check", str(photos), "--out", str(tmp_path / "x.safetensors")]
    thread = threading.Thread(target=lambda: [export.main(argv), done.set()])
    with files.locked(tmp_path / "x"):
        thread.start()
        assert not done.wait(1.5) and not (tmp_path / "x.safetensors").exists()
    thread.join()
    assert (tmp_path / "x-card.md").exists()


def test_card_of_somebody_else_is_kept(photos, tmp_path, capsys):
    path = new_checkpoint(tmp_path / "a.pth", 0)
    (tmp_path / "x-card.md").write_text("my notes")
    with pytest.raises(SystemExit, match="1"):
        export.main(["--resume", str(path), "--check", str(photos), "--out", str(tmp_path / "x.safetensors")])
    assert "x-card.md exists and is not a card of export.py: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "x-card.md").read_text() == "my notes" and not (tmp_path / "x.safetensors").exists()


def test_report_deletes_only_the_pictures_of_the_former_page(photos, tmp_path):
    pytest.importorskip("sklearn")
    path, folder = new_checkpoint(tmp_path / "a.pth", 0), tmp_path / "report"
    flags = [*arguments(photos, dataset="folder", resume=path), "--report", str(folder)]
    evaluate.main(flags)
    (former,) = folder.glob("images-*")
    own = {"images-mine", "images-20261128", "images-deadbeef"}
    for name in own:
        (folder / name).mkdir()
    evaluate.main(flags)
    left = {path.name for path in folder.glob("images-*")}
    assert own < left and former.name not in left and len(left) == 4
    assert page.GENERATOR in (folder / "index.html").read_text()


def test_checkpoint_in_a_folder_of_any_bytes(tmp_path):
    folder = tmp_path / os.fsdecode(b"bad\xff dir")
    folder.mkdir()
    path = new_checkpoint(folder / "a.pth", 0)
    assert weights.read(path, mmap=True)["network"] == RECORD
    assert checkpoint.Checkpoint(path).spec == NetworkSpec(**RECORD, orientation="stored")
