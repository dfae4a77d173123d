"""The checkpoint to resume a run from: the network and everything that the next step depends on.

It is a single file. If the classes of the loss are sharded over processes, each process also writes its rows (proxies
and their moments) to a separate file, with the step in its name. The main file lists them under "divided", with the
number of classes and the digest of each, and is written last: the last complete checkpoint always exists, and any
number of processes can read it. (torch.distributed.checkpoint is similar, but its metadata is a pickle, which could run
code.)
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
from proxy_anchor.weights import SHOWN_DIFFERENCES, digest, read

PROGRESS = {"epoch": int, "losses": list, "seconds": float, "rows": list}  # see run.Run


def save(path: Path, network: torch.nn.Module, spec: NetworkSpec, components: dict, progress: dict) -> None:
    """Write a checkpoint with the states of the network, the components and the random generators, and the progress.

    components: {name: object with a state_dict}. Each process writes its rows of classes, and the first one the rest.
    """
    content = {"model_state_dict": network.state_dict(), "network": spec.to_record()}
    content |= {name: component.state_dict() for name, component in components.items()}
    content |= {"progress": progress, "random": randomness.state()}
    files = []
    if collectives.world_size() > 1 and isinstance(components.get("criterion"), ShardedProxyAnchor):
        step = f"{path.stem}-{progress['epoch']}.{len(progress['losses'])}"
        count = collectives.world_size()
        files = [f"{step}-{number}of{count}.pth" for number in range(1, count + 1)]
        rows = sharded.take_rows(content)
        with replacing(path.with_name(files[collectives.rank()])) as file:
            torch.save(rows, file)
        classes = collectives.shard_sizes(components["criterion"].num_classes)
        digests = collectives.all_gather_object(digest(rows))  # also waits until all files are written
        content["divided"] = {"files": files, "classes": classes, "digests": digests}
    if collectives.rank() == 0:
        with replacing(path) as file:
            torch.save(content, file)
        for old in path.parent.iterdir():
            if re.fullmatch(rf"{re.escape(path.stem)}-\d+\.\d+-\d+of\d+\.pth", old.name) and old.name not in files:
                old.unlink()


def load(path: Path, network: torch.nn.Module, components: dict) -> dict:
    """Restore the network, the components and the random states that save wrote; returns the progress.

    Raises FileNotFoundError or ValueError if the file cannot be read, or if the network or a component differs from the
    saved one in its kind or its settings.
    """
    content = read(path)
    missing = [name for name in (*components, "progress", "random") if name not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint to resume from: it has no {', '.join(missing)}")
    progress = progress_of(path, content)
    weights.load(path, content, network)
    try:
        criterion = components.get("criterion")
        if isinstance(criterion, ShardedProxyAnchor):
            sharded.put_rows(content, read_rows(path, content, criterion.num_classes, criterion.classes))
        elif isinstance(criterion, ProxyAnchor) and "divided" in content:
            num_classes = len(criterion.proxies)
            sharded.put_rows(content, read_rows(path, content, num_classes, range(num_classes)))
        for name, component in components.items():
            if not isinstance(content[name], dict) or bool(content[name]) != bool(component.state_dict()):
                raise ValueError(f"its {name} is {str(content[name])[:80]}")
            current = settings(component)
            component.load_state_dict(content[name])
            saved = settings(component)
            if different := sorted(key for key in current.keys() & saved if current[key] != saved[key]):
                listed = ", ".join(f"{key} {saved[key]}, now {current[key]}" for key in different[:SHOWN_DIFFERENCES])
                raise ValueError(f"its {name} has other settings: {listed}")
        randomness.restore(content["random"])
    except Exception as error:  # each component raises its own kinds of errors
        raise ValueError(f"{path} does not fit this run: {str(error) or type(error).__name__}") from error
    return progress


def read_rows(path: Path, content: dict, num_classes: int, classes: range) -> dict[str, torch.Tensor]:
    """The rows of these classes, taken from the content or read from the files that it lists; see sharded.take_rows.

    Raises ValueError or FileNotFoundError if a file is missing or does not belong to the content.
    """
    rows = sharded.take_rows(content)
    divided = content.get("divided", {"files": [None], "classes": [num_classes]})
    digests = divided.get("digests", [None] * len(divided["files"]))  # older checkpoints have none
    if sum(divided["classes"]) != num_classes:
        raise ValueError(f"its loss has {sum(divided['classes'])} classes, expected {num_classes}")
    shards: list[dict[str, torch.Tensor]] = []
    start = 0  # first class of the current file
    for name, size, recorded in zip(divided["files"], divided["classes"], digests, strict=True):
        begin, end = max(start, classes.start), min(start + size, classes.stop)
        if begin < end or not (classes or shards):
            shard = rows if name is None else read(path.with_name(name))
            if recorded and digest(shard) != recorded:
                raise ValueError(f"{name} does not belong to it: its digest differs")
            if wrong := [key for key, value in shard.items() if len(value) != size]:
                raise ValueError(f"{name or path} has {len(shard[wrong[0]])} rows of {wrong[0]}, expected {size}")
            shards.append({key: value[begin - start : end - start].clone() for key, value in shard.items()})
        start += size
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def settings(component) -> dict:
    """The settings of an optimizer or a scheduler, without its state; {} for other components."""
    if isinstance(component, torch.optim.Optimizer):
        groups = enumerate(component.param_groups)
        return {f"{name} of group {i}": group[name] for i, group in groups for name in group.keys() - {"params", "lr"}}
    if isinstance(component, torch.optim.lr_scheduler.LRScheduler):
        state = component.state_dict()
        return {name: state[name] for name in state if not name.startswith("_") and name != "last_epoch"}
    return {}


def progress(path: Path) -> dict:
    """Read the progress from a file of save, without its tensors.

    Raises FileNotFoundError or ValueError, also if the file is another kind of checkpoint.
    """
    return progress_of(path, read(path, mmap=True))


def progress_of(path: Path, content: dict) -> dict:
    """The progress in a checkpoint's content; path is for messages. Raises ValueError if missing or damaged."""
    record = content.get("progress")
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in PROGRESS.items()):
        raise ValueError(f"{path} is not a checkpoint to resume from: it has no progress of a run")
    rows, losses = record["rows"], record["losses"]
    if record["epoch"] < 0 or not all(map(is_row, rows)):
        raise ValueError(f"{path} is damaged: its progress is epoch {record['epoch']} with the rows {str(rows)[:80]}")
    if not all(isinstance(loss, float) for loss in losses):
        raise ValueError(f"{path} is damaged: its progress has the losses {str(losses)[:80]}")
    return record


def is_row(value) -> bool:
    """Whether a value is a dict of an epoch's metrics, by name, with R@1."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value) and "R@1" in plain(value)
