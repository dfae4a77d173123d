"""The checkpoint to resume a run from: the network, and all else that its next step depends on.

It is one file. Where the classes of the loss are divided over processes, each process writes their rows, the proxies
and their moments, to a file of its own, whose name says when it was written; the one file names these, and takes its
place after them. So the last complete checkpoint is there at any moment, and any number of processes can read it.
Its entry "divided" has, of each process, the name of the file, the number of classes, and the digest of the rows.
(torch.distributed.checkpoint does the same, but its table of contents is a pickle, which could run code.)
"""

import re
from pathlib import Path

import torch

from proxy_anchor import collectives, sharded, weights
from proxy_anchor.files import replacing
from proxy_anchor.losses import ProxyAnchor
from proxy_anchor.metrics import plain
from proxy_anchor.runs import randomness
from proxy_anchor.sharded import ShardedProxyAnchor
from proxy_anchor.spec import NetworkSpec
from proxy_anchor.weights import SHOWN, digest, read

PROGRESS = {"epoch": int, "losses": list, "seconds": float, "rows": list}  # see run.Run


def save(path: Path, network: torch.nn.Module, spec: NetworkSpec, parts: dict, progress: dict) -> None:
    """Write a checkpoint to resume from: that of checkpoint.save, the parts, the progress and the random states.

    parts: each has a state_dict. Each process writes its own rows of classes, and the first one the rest.
    """
    content = {"model_state_dict": network.state_dict(), "network": spec.to_record()}
    content |= {name: part.state_dict() for name, part in parts.items()}
    content |= {"progress": progress, "random": randomness.state()}
    files = []
    if collectives.world_size() > 1 and isinstance(parts.get("criterion"), ShardedProxyAnchor):
        moment = f"{path.stem}-{progress['epoch']}.{len(progress['losses'])}"
        count = collectives.world_size()
        files = [f"{moment}-{number}of{count}.pth" for number in range(1, count + 1)]
        rows = sharded.take_rows(content)
        with replacing(path.with_name(files[collectives.rank()])) as file:
            torch.save(rows, file)
        classes = collectives.shard_sizes(parts["criterion"].num_classes)
        digests = collectives.all_gather_object(digest(rows))  # when all files are written
        content["divided"] = {"files": files, "classes": classes, "digests": digests}
    if collectives.rank() == 0:
        with replacing(path) as file:
            torch.save(content, file)
        for old in path.parent.iterdir():
            if re.fullmatch(rf"{re.escape(path.stem)}-\d+\.\d+-\d+of\d+\.pth", old.name) and old.name not in files:
                old.unlink()


def load(path: Path, network: torch.nn.Module, parts: dict) -> dict:
    """Bring the network, the parts and the random states to what save wrote; returns its progress.

    Raises FileNotFoundError or ValueError if it cannot be read or is of another network, optimizer ..., or if a part
    had other settings then.
    """
    content = read(path)
    missing = [name for name in (*parts, "progress", "random") if name not in content]
    if missing:
        raise ValueError(f"{path} is no checkpoint to resume from: it has no {', '.join(missing)}")
    progress = progress_of(path, content)
    weights.load(path, content, network)
    try:
        criterion = parts.get("criterion")
        if isinstance(criterion, ShardedProxyAnchor):
            sharded.put_rows(content, read_rows(path, content, criterion.num_classes, criterion.classes))
        elif isinstance(criterion, ProxyAnchor) and "divided" in content:
            num_classes = len(criterion.proxies)
            sharded.put_rows(content, read_rows(path, content, num_classes, range(num_classes)))
        for name, part in parts.items():
            if not isinstance(content[name], dict) or bool(content[name]) != bool(part.state_dict()):
                raise ValueError(f"its {name} is {str(content[name])[:80]}")
            now = settings(part)
            part.load_state_dict(content[name])
            then = settings(part)
            if different := sorted(key for key in now.keys() & then if now[key] != then[key]):
                listed = ", ".join(f"{key} {then[key]}, now {now[key]}" for key in different[:SHOWN])
                raise ValueError(f"its {name} has other settings: {listed}")
        randomness.restore(content["random"])
    except Exception as error:  # of many kinds, one for each part
        raise ValueError(f"{path} does not fit this run: {str(error) or type(error).__name__}") from error
    return progress


def read_rows(path: Path, content: dict, num_classes: int, classes: range) -> dict[str, torch.Tensor]:
    """The rows of these classes, removed from the content or read from the files that it lists; see sharded.take_rows.

    Raises ValueError or FileNotFoundError if a file is missing or does not belong to the content.
    """
    rows = sharded.take_rows(content)
    divided = content.get("divided", {"files": [None], "classes": [num_classes]})
    digests = divided.get("digests", [None] * len(divided["files"]))  # older checkpoints have none
    if sum(divided["classes"]) != num_classes:
        raise ValueError(f"its loss has {sum(divided['classes'])} classes, now {num_classes}")
    pieces: list[dict[str, torch.Tensor]] = []
    start = 0  # the first class of a file
    for name, size, recorded in zip(divided["files"], divided["classes"], digests, strict=True):
        begin, end = max(start, classes.start), min(start + size, classes.stop)
        if begin < end or not (classes or pieces):
            piece = rows if name is None else read(path.with_name(name))
            if recorded and digest(piece) != recorded:
                raise ValueError(f"{name} does not belong to it: other rows were written with it")
            if wrong := [key for key, value in piece.items() if len(value) != size]:
                raise ValueError(f"{name or path} has {len(piece[wrong[0]])} rows of {wrong[0]}, expected {size}")
            pieces.append({key: value[begin - start : end - start].clone() for key, value in piece.items()})
        start += size
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def settings(part) -> dict:
    """The settings that an optimizer or a scheduler was made with, without its state; {} for other parts."""
    if isinstance(part, torch.optim.Optimizer):
        groups = enumerate(part.param_groups)
        return {f"{name} of group {i}": group[name] for i, group in groups for name in group.keys() - {"params", "lr"}}
    if isinstance(part, torch.optim.lr_scheduler.LRScheduler):
        state = part.state_dict()
        return {name: state[name] for name in state if not name.startswith("_") and name != "last_epoch"}
    return {}


def progress(path: Path) -> dict:
    """The progress in a file of save; little more of it is read.

    Raises as checkpoint.load does, also if the file is another kind of checkpoint.
    """
    return progress_of(path, read(path, mmap=True))


def progress_of(path: Path, content: dict) -> dict:
    """The progress of a run in a checkpoint's content; path is for messages. Raises ValueError if there is none."""
    found = content.get("progress")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in PROGRESS.items()):
        raise ValueError(f"{path} is no checkpoint to resume from: it has no progress of a run")
    rows, losses = found["rows"], found["losses"]
    if found["epoch"] < 0 or not all(map(is_row, rows)):
        raise ValueError(f"{path} is damaged: its progress is epoch {found['epoch']} with the rows {str(rows)[:80]}")
    if not all(isinstance(loss, float) for loss in losses):
        raise ValueError(f"{path} is damaged: its progress has the losses {str(losses)[:80]}")
    return found


def is_row(found) -> bool:
    """Whether this has a name for each value, and the R@1 of an epoch."""
    return isinstance(found, dict) and all(isinstance(name, str) for name in found) and "R@1" in plain(found)
