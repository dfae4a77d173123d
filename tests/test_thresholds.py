"""evaluate.py --calibrate: the threshold in the checkpoint, what stays as it was, and what is refused."""

import os
import re

import pytest
import torch
import trees
from helpers import RECORD, arguments

import evaluate
import net
from proxy_anchor import checkpoint
from proxy_anchor.vectors import to_nearness


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return trees.folder(tmp_path_factory.mktemp("photos"), classes=[f"{c:02d}" for c in range(20)] + ["ant"], images=5)


def new_checkpoint(path, **changed):
    torch.manual_seed(0)
    network = net.create("tiny", 8, l2_norm=bool(changed.get("l2_norm", 1)))
    trees.save_checkpoint(path, network, RECORD | changed)
    return path


def flags(photos, path, *more):
    return [*arguments(photos, dataset="folder", resume=path), *map(str, more)]


@pytest.fixture(scope="module", params=["cosine", "euclidean"])
def calibrated(request, photos, tmp_path_factory):
    """(distance, path, identity and content before)"""
    path = tmp_path_factory.mktemp("calibrated") / "a.pth"
    new_checkpoint(path, distance=request.param, l2_norm=int(request.param == "cosine"))
    before = checkpoint.Checkpoint(path).identity, checkpoint.read(path)
    evaluate.main(flags(photos, path, "--calibrate", 0.3))
    return request.param, path, *before


def test_checkpoint_gets_the_threshold_and_stays_the_same_network(calibrated, photos):
    distance, path, identity, content = calibrated
    found = checkpoint.Checkpoint(path).calibration
    assert found.distance == distance and found.share == 0.3 and found.dataset == "folder"
    assert found.classes == (6, 5) and list(found.data) == ["eval"] and len(found.data["eval"]) == 16
    assert found.sizes == (25, 10, 5) and 0 <= found.unknown[0] <= 1
    now = checkpoint.read(path)
    assert now.keys() == content.keys() | {"threshold"} and now["network"] == content["network"]
    assert list(now["model_state_dict"]) == list(content["model_state_dict"])
    assert all(torch.equal(now["model_state_dict"][k], v) for k, v in content["model_state_dict"].items())
    assert checkpoint.Checkpoint(path).identity == identity and checkpoint.Checkpoint(path).spec.distance == distance
    assert [file.name for file in path.parent.iterdir()] == ["a.pth"]


def test_both_halves_are_printed_and_another_threshold_replaces_the_first(calibrated, photos, capsys, tmp_path):
    distance, path, _, _ = calibrated
    copy = tmp_path / "b.pth"
    copy.write_bytes(path.read_bytes())
    (tmp_path / "link.pth").symlink_to("b.pth")
    evaluate.main(flags(photos, tmp_path / "link.pth", "--calibrate", 0.5))
    found, first = checkpoint.Checkpoint(copy).calibration, checkpoint.Checkpoint(path).calibration
    assert (tmp_path / "link.pth").is_symlink() and found.share == 0.5
    assert to_nearness(found.values[0], distance) < to_nearness(first.values[0], distance)
    out = capsys.readouterr().out
    kind = {"cosine": "similarity", "euclidean": "distance"}[distance]
    chosen = re.search(rf"half of the classes \(6\), so that at most 50% of .*: {kind} ([\d.]+) for 25 images", out)
    assert float(chosen[1]) == pytest.approx(found.values[0], abs=1e-4)
    checked = re.search(r"Checked on the other half \(5\): ([\d.]+)% \[", out)
    assert float(checked[1]) == pytest.approx(100 * found.unknown[0], abs=0.01)
    assert f"{kind} at " in out and "ROC AUC" in out and f"recorded in {tmp_path / 'link.pth'}" in out


def test_pairs_are_compared_where_it_is_asked_for(photos, tmp_path, capsys):
    path = new_checkpoint(tmp_path / "a.pth")
    evaluate.main(flags(photos, path))
    assert "ROC AUC" not in capsys.readouterr().out
    evaluate.main(flags(photos, path, "--verify"))
    assert "ROC AUC" in capsys.readouterr().out


def test_published_checkpoint_gets_a_threshold_too(photos, tmp_path):
    """In the old format, from several GPUs, without a record of its network."""
    state = {f"module.{key}": value for key, value in net.create("tiny", 8).state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    identity = checkpoint.Checkpoint(tmp_path / "old.pth").identity
    assert checkpoint.Checkpoint(tmp_path / "old.pth").calibration is None
    evaluate.main(flags(photos, tmp_path / "old.pth", "--calibrate", 0.3))
    assert checkpoint.Checkpoint(tmp_path / "old.pth").calibration.distance == "cosine"
    assert checkpoint.Checkpoint(tmp_path / "old.pth").identity == identity
    assert checkpoint.Checkpoint(tmp_path / "old.pth").spec is None
    assert checkpoint.read(tmp_path / "old.pth")["model_state_dict"].keys() == state.keys()


def test_identity_is_that_of_the_weights(tmp_path):
    network = net.create("tiny", 8)
    state = network.state_dict()
    path = tmp_path / "a.pth"

    def identity(state, **more):
        torch.save({"model_state_dict": state} | more, path)
        return checkpoint.Checkpoint(path).identity

    same = identity(state)
    assert same == identity({f"module.{k}": v for k, v in state.items()}) == identity(state, network=RECORD)
    name = "model.embedding.weight"
    others = [
        state | {name: state[name] + 1e-6},
        state | {name: state[name].double()},
        state | {name: state[name].T},
        {k.replace("embedding", "other"): v for k, v in state.items()},
        dict(list(state.items())[:-1]),
    ]
    assert len({same, *map(identity, others)}) == 6


DAMAGES = {
    "text": lambda found: "0.5",
    "list": lambda found: [],
    "no number": lambda found: found | {"share": "0.5"},
    "not finite": lambda found: found | {"values": [float("nan"), 0.5, 0.5]},
    "half": lambda found: {"share": 0.5},
    "one size": lambda found: found | {"sizes": [20], "values": [0.5]},
    "sizes that rise": lambda found: found | {"sizes": [5, 10, 25]},
    "interval of one": lambda found: found | {"unknown": [0.5]},
    "number for a list": lambda found: found | {"values": 0.5},
    "number for an interval": lambda found: found | {"unknown": 0.1},
    "distance": lambda found: found | {"distance": "x"},
    "groups": lambda found: found | {"groups": "0.5"},
    "groups that are infinite": lambda found: found | {"groups": float("inf")},
    "no groups": lambda found: {name: value for name, value in found.items() if name != "groups"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_record_is_one_line(calibrated, damage, tmp_path):
    content = checkpoint.read(calibrated[1])
    torch.save(content | {"threshold": DAMAGES[damage](content["threshold"])}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is damaged: its record of the threshold is .*--calibrate replaces"):
        _ = checkpoint.Checkpoint(tmp_path / "a.pth").calibration


@pytest.mark.parametrize(
    "more, words, code",
    [
        (["--calibrate", "1"], "argument --calibrate: 1 is not between 0 and 1", 2),
        (["--calibrate", "nan"], "argument --calibrate: nan is not between 0 and 1", 2),
        (["--calibrate", "often"], "argument --calibrate: ", 2),
        (["--calibrate", "0.0001"], "so that 5 of them match, found 0.0001; the threshold stays as it was", 1),
    ],
)
def test_what_is_refused_leaves_the_checkpoint(photos, tmp_path, capsys, more, words, code):
    path = new_checkpoint(tmp_path / "a.pth")
    before = path.read_bytes()
    with pytest.raises(SystemExit) as error:
        evaluate.main(flags(photos, path, *more))
    assert error.value.code == code and words in capsys.readouterr().err and path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_checkpoint_that_cannot_be_written(photos, tmp_path, capsys):
    path = new_checkpoint(tmp_path / "a.pth")
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        evaluate.main(flags(photos, path, "--calibrate", "0.3"))
    assert f"{path} cannot be written" in capsys.readouterr().err
